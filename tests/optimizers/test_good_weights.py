"""GoodWeights: what is kept, when a run goes back, and how it goes on."""

import copy
import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import of_plus
from problems import backward, batches, clones, network_loss, parameters, same, train
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam
from hf_salsa.good_weights import GoodWeights
from hf_salsa.optimizers import base
from hf_salsa.optimizers import state as states
from hf_salsa.rules import Plus
from hf_salsa.rules.plus import PlusState


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


def everything(network, optimizer):
    """Moments and buffers."""
    kept = [
        tensor.clone()
        for param in network.weights
        for name, tensor in optimizer.state[param].items()
        if name != "previous"
    ]
    return kept + clones(network.buffers())


def train_noting(run, data):
    """Train until it goes back; what was last kept, noted apart from it, and the batches left."""
    network, optimizer, _, good_weights = run
    noted, rest = None, iter(data)
    number = good_weights.returns
    for batch in rest:
        state, before = good_weights._state, clones(network.weights)
        go_on(*run, [batch])
        if good_weights.returns > number:
            return noted, list(rest)
        if good_weights._state is not state:  # w_k, and all else as it is after the step
            noted = before, everything(network, optimizer), good_weights._state
    return noted, None


@of_plus
def test_run_whose_steps_become_far_too_long_goes_back(case, caplog):
    data = list(batches(120))
    run = network, optimizer, _, good_weights = made(case)
    (weights, others, state), left = train_noting(run, data[:60])
    assert left is None
    step_size = optimizer.step_size
    lengthen(optimizer, 3000)
    caplog.set_level(logging.WARNING)
    later, left = train_noting(run, data[60:])
    assert later is None
    assert left is not None
    # Everything is as it was, w_{k-1} too: no step has led here.
    assert same(clones(network.weights), weights)
    assert same(everything(network, optimizer), others)
    assert all(torch.equal(p, optimizer.state[p]["previous"]) for p in network.weights)
    group = optimizer.param_groups[0]
    assert group["step_size"] <= state.step_size / 2
    assert group["search_interval"] == 1
    assert group["steps"] == 120 - len(left) < 80  # time does not go back
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the loss has left the range" in caplog.text
    go_on(*run, left)
    assert good_weights.returns == 1
    assert network(*data[-1]) < 1.5 * state.first_losses / 10
    assert optimizer.step_size < 10 * step_size


def test_the_state_after_a_return_is_that_of_then_with_half_the_step_size():
    now = PlusState(3e-2, search_interval=9, searches=70, failed_searches=4, samples=60, loss=9.0)
    then = PlusState(
        2e-2, 5, 3, 40, 1, first_losses=8.0, first_squares=7.0, loss=0.5, change=0.1,
        samples=30, progress=0.2, started_at=4, warm_up_to=1e-3, warming_up=True,
    )  # fmt: skip
    after = replace(
        then, step_size=1e-2, change=0.1 / 4, search_interval=1,
        steps_since_search=0, searches=70, failed_searches=4, warming_up=False,
    )  # fmt: skip
    assert Plus.gone_back(now, then) == after
    assert Plus.gone_back(replace(now, step_size=1e-3), then).step_size == 5e-4


@of_plus
def test_what_is_put_back_has_the_scale_that_the_loss_has_now(case):
    """The loss is a sum over micro-batches, and their number has doubled since."""
    run = network, optimizer, objective, good_weights = made(case)
    data = list(batches(120))
    (weights, others, _), _ = train_noting(run, data[:60])
    step_size, lowest = good_weights._state.step_size, good_weights._state.loss
    lengthen(optimizer, 3000)
    for x, y in data[60:]:
        for _ in range(2):
            objective.record(network, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if good_weights.update():
            break
    assert good_weights.returns == 1
    assert same(clones(network.weights), weights)
    scale = 1 if case.adam else 2  # Adam's steps do not depend on it, SGD's momentum does
    expected = [t * scale for t in others[:-3]] + others[-3:]
    assert same(everything(network, optimizer), expected)
    assert optimizer.param_groups[0]["loss"] == 2 * lowest
    assert optimizer.param_groups[0]["step_size"] <= step_size / scale / 2
    # A second return starts from what was rescaled.
    assert same(_weights(good_weights), weights)
    assert all(any(torch.equal(t, k) for k in good_weights._kept) for t in expected)


@of_plus
def test_data_that_become_harder_for_good_are_left_to_the_rule(case, caplog):
    run = made(case)
    go_on(*run, batches(60))
    caplog.set_level(logging.WARNING)
    go_on(*run, ((x, 4 * y + 12) for x, y in batches(300)))
    assert run[3].returns == 3
    assert "went back 3 times without a lower loss" in caplog.records[-1].getMessage()


@of_plus
@pytest.mark.parametrize("on_host", [True, False])
def test_gradients_that_never_become_finite_end_the_run(case, on_host, monkeypatch):
    if not on_host:
        monkeypatch.setattr(base, "_HOST_DEVICES", ())
    run = made(case)
    go_on(*run, batches(40))
    data = [(x, y * math.nan) for x, y in batches(100)]
    with pytest.raises(FloatingPointError):
        go_on(*run, data)
    assert 1 <= run[3].returns <= 3


@of_plus
def test_an_optimizer_with_history_is_not_trusted_with_weights_of_then(case):
    network, optimizer, objective, _ = made(case)
    for x, y in batches(100):
        objective.record(network, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.search_due
    late = GoodWeights(network, optimizer)
    go_on(network, optimizer, objective, late, batches(1))
    assert not late._kept


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
