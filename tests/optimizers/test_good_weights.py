"""GoodWeights: what is kept, when a run goes back, and how it goes on."""

import copy
import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import of_plus
from problems import backward, batches, clones, network_loss, parameters, same, train
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam
from hf_salsa.good_weights import GoodWeights
from hf_salsa.optimizers import state as states


class Network(nn.Module):
    """The small problem with statistics of its batches, in a buffer."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(parameters())
        self.norm = nn.BatchNorm1d(4, affine=False, dtype=torch.float64)

    def forward(self, x, y):
        return network_loss(self.weights, self.norm(x), y)


def lengthen(optimizer, factor):
    """Let the coming steps be longer than any search would let them be."""
    state, run = optimizer._read()
    optimizer._write(replace(state, step_size=factor * state.step_size), run)


def made(case, **options):
    network = Network()
    optimizer = case.make(list(network.parameters()), cool_down=0.0, **options)
    return network, optimizer, BatchObjective(network, optimizer), GoodWeights(network, optimizer)


def go_on(network, optimizer, objective, good_weights, data):
    for x, y in data:
        objective.record(network, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        good_weights.update()


@of_plus
def test_run_whose_steps_become_far_too_long_goes_back(case, caplog):
    data = list(batches(120))
    network, optimizer, _, good_weights = run = made(case)
    go_on(*run, data[:60])
    assert not good_weights.returns
    step_size = optimizer.step_size
    lengthen(optimizer, 3000)
    caplog.set_level(logging.WARNING)
    rest = iter(data[60:])
    for batch in rest:
        before = good_weights.returns
        kept, kept_state = clones(good_weights._kept), good_weights._state
        go_on(*run, [batch])
        if good_weights.returns > before:
            break
    else:
        pytest.fail("It did not go back.")
    # Everything is as it was, w_{k-1} too: no step has led here.
    assert same([now for now, _ in good_weights._tensors()], kept)
    assert all(torch.equal(p, optimizer.state[p]["previous"]) for p in network.weights)
    group = optimizer.param_groups[0]
    assert group["step_size"] <= kept_state.step_size / 2
    assert group["search_interval"] == 1
    left = list(rest)
    assert group["steps"] == 120 - len(left) < 80  # time does not go back
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Back to the weights before step" in caplog.text
    go_on(*run, left)
    assert good_weights.returns == 1
    assert network(*data[-1]) < 1.5 * kept_state.first_losses / 10
    assert optimizer.step_size < 10 * step_size


@of_plus
def test_kept_are_the_weights_of_the_lowest_averaged_loss_before_their_step(case):
    network, optimizer, objective, good_weights = made(case)
    lowest, weights = float("inf"), None
    for x, y in batches(100):
        before, searched = clones(network.weights), optimizer.search_due
        go_on(network, optimizer, objective, good_weights, [(x, y)])
        loss = optimizer.rule.averaged_loss(good_weights._optimizer._read()[0])
        if searched and loss < lowest:
            lowest, weights = loss, before
        assert same(_weights(good_weights), weights)
    assert lowest < 0.5
    assert not good_weights.returns


def _weights(good_weights):
    """Return the kept weights, without moments and buffers."""
    tensors, kept = good_weights._tensors(), good_weights._kept
    return [k for (now, before), k in zip(tensors, kept, strict=True) if now is not before]


@of_plus
def test_a_second_return_takes_shorter_steps_still(case):
    run = _, optimizer, _, good_weights = made(case)
    data = list(batches(200))
    go_on(*run, data[:60])
    sizes = []
    for start in (60, 100, 140):
        lengthen(optimizer, 1e5)
        number = good_weights.returns
        for batch in data[start : start + 40]:
            go_on(*run, [batch])
            if good_weights.returns > number:
                sizes.append(optimizer.param_groups[0]["step_size"])
                break
    assert len(sizes) == 3
    assert sizes[0] >= 2 * sizes[1] >= 4 * sizes[2]


@of_plus
def test_gradients_that_stay_nan_send_it_back_before_the_optimizer_gives_up(case):
    run = network, optimizer, _, good_weights = made(case)
    data = list(batches(80))
    go_on(*run, data[:40])
    with torch.no_grad():
        network.weights[0].fill_(float("inf"))
    go_on(*run, data[40:50])
    assert good_weights.returns == 1
    assert optimizer.param_groups[0]["consecutive_skips"] == 0
    go_on(*run, data[50:])
    assert good_weights.returns == 1
    assert optimizer.counters.skipped_steps == 10
    assert network(*data[-1]).isfinite()


@of_plus
@pytest.mark.parametrize("stop", [25, 63, 80])
def test_resumed_run_equals_the_straight_run(case, stop, tmp_path):
    data = list(batches(140))

    def train_on(run, start, end):
        for k in range(start, end):
            if k in (60, 100):
                lengthen(run[1], 3000)
            go_on(*run, [data[k]])

    straight = made(case)
    train_on(straight, 0, 140)
    assert straight[3].returns >= 1
    stopped = made(case)
    train_on(stopped, 0, stop)
    torch.save([part.state_dict() for part in (*stopped[:2], stopped[3])], tmp_path / "run.pt")
    resumed = made(case)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for part, state in zip((*resumed[:2], resumed[3]), saved, strict=True):
        part.load_state_dict(state)
    train_on(resumed, stop, 140)
    assert same(dict(straight[0].state_dict()), dict(resumed[0].state_dict()))
    assert straight[3].returns == resumed[3].returns
    assert straight[1].counters == resumed[1].counters


@of_plus
def test_parameters_that_come_later_are_kept_too(case):
    run = _, optimizer, _, good_weights = made(case)
    data = list(batches(60))
    go_on(*run, data[:20])
    late = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer.add_param_group({"params": [late]})
    number = len(good_weights._kept)
    go_on(*run, data[20:])
    assert len(good_weights._kept) > number


@of_plus
def test_weights_of_another_model_are_refused(case):
    run = made(case)
    go_on(*run, batches(20))
    saved = copy.deepcopy(run[3].state_dict())
    saved["kept"] = saved["kept"][1:]
    other = made(case)
    with pytest.raises(ValueError, match="another model"):
        other[3].load_state_dict(saved)


def test_the_papers_rules_are_refused():
    model = nn.Linear(2, 2)
    for optimizer in (SaLSaAdam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(TypeError, match=type(optimizer).__name__):
            GoodWeights(model, optimizer)


@of_plus
def test_nothing_changes_without_a_collapse(case):
    alone, watched = parameters(), parameters()
    first, second = case.make(alone, cool_down=0.0), case.make(watched, cool_down=0.0)
    good_weights = GoodWeights(nn.ParameterList(watched), second)
    for batch in batches(100):
        train(first, alone, [batch])
        train(second, watched, [batch])
        assert not good_weights.update()
    assert same(alone, watched)
    assert not backward(watched, partial(network_loss, watched, *batch)).isnan()
    assert states.read(states.RunState, second.param_groups[0]).steps == 100
