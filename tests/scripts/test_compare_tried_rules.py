"""The rules of `compare.py --preset study`: each does what its name says."""

import pytest
import torch
from comparison import tried_rules
from comparison.candidates import TRIED
from comparison_helpers import carry_out, prose_run
from torch import nn

from hf_salsa import BatchObjective
from hf_salsa.rules import Line


def weight(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def square_loss(param, target):
    return (param - target).square().sum()


def take_step(optimizer, param, target):
    """One step towards a target; returns the loss before it."""
    param.grad = None
    loss = square_loss(param, target)
    loss.backward()
    optimizer.step(lambda: square_loss(param, target), loss=loss.detach())
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_tried_rule_trains_and_is_another_one(tmp_path, name):
    results = carry_out(prose_run(tmp_path, name))
    assert results["losses"][-1] < results["losses"][0]
    base = carry_out(prose_run(tmp_path, "former_plus" if "plus" in name else "salsa_adam"))
    # Too few updates for some of them to take another step.
    seen = ("step_sizes", "peak_metric", "extra_forward_passes")
    assert [results[value] for value in seen] != [base[value] for value in seen]
    assert results["configuration"] != base["configuration"]


def choose(optimizer, loss, evaluate, slope=1.0, state=None):
    """One search of the optimizer's rule, from its first state if none is given."""
    rule = optimizer.rule
    state = state or rule.state_type(rule.initial_step_size)
    return rule.search(state, Line(evaluate, loss=loss, slope=slope, resolution=1e-12))


def test_ponos_starts_at_polyaks_step_size_and_lets_the_loss_rise():
    optimizer = tried_rules.NonMonotone([weight(1.0)])
    record, state = choose(optimizer, 0.5, lambda eta: 0.0)
    assert record.step_size == pytest.approx(5 / 2**3)  # 0 <= 0.5 - eta / 2
    record, state = choose(optimizer, 4.0, lambda eta: -10.0, state=state)
    assert record.step_size == pytest.approx(10.0)
    # The reference is 4, then (0.5 + 4) / 2 < 4: the larger; then (2 * 4 + 1) / 3 = 3.
    record, _ = choose(optimizer, 1.0, lambda eta: 2.9, state=state)
    assert record.step_size == pytest.approx(10 / 2**6)  # 2.9 <= 3 - eta / 2


def test_adaptive_backtracking_shrinks_by_what_was_missed():
    tried = []

    def parabola(eta):
        tried.append(eta)
        return 1 - eta + 500 * eta**2

    record, _ = choose(tried_rules.AdaptiveBacktracking([weight(1.0)]), 1.0, parabola)
    assert record.accepted
    assert parabola(record.step_size) <= 1 - 0.3 * record.step_size
    # v = (1 - 500 eta) / 0.3; factor 0.9 * 0.7 / (1 - 0.3 v).
    assert tried[1] / tried[0] == pytest.approx(0.01)
    assert tried[2] / tried[1] == pytest.approx(0.63 / (500 * tried[1]))
    assert len(tried) < 6


def test_a_step_is_bounded_by_the_weights():
    param = weight(3.0, 4.0)
    take_step(tried_rules.RelativeChange([param]), param, torch.zeros(2))
    change = (param.detach() - torch.tensor([3.0, 4.0])).norm()
    assert change == pytest.approx(0.05)


@pytest.mark.parametrize("rule", [tried_rules.OtherBatch, tried_rules.PlusOtherBatch])
def test_another_mini_batch_judges(rule):
    model = nn.Linear(1, 1)
    optimizer = rule(model.parameters())
    optimizer.plan(3)
    objective = BatchObjective(model, optimizer)
    batches = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(0))

    def loss_fn(x):
        return (model(x) - 2 * x).square().mean()

    for number, x in enumerate(batches):
        optimizer.zero_grad()
        objective.record(loss_fn, x).backward()
        judge = loss_fn(batches[max(0, number - 1)]).item()
        optimizer.step()
        assert optimizer.last_search.loss == pytest.approx(judge)


def test_averages_are_evaluated_and_taken_back():
    param = weight(1.0, 2.0)
    optimizer = tried_rules.Averaged([param])
    average = torch.zeros(2, dtype=torch.float64)
    optimizer.eval()  # nothing is known yet
    assert param.tolist() == [1.0, 2.0]
    for target in torch.randn(5, 2, generator=torch.Generator().manual_seed(0)):
        optimizer.train()
        take_step(optimizer, param, target)
        average = 0.98 * average + 0.02 * param.detach()
        trained = param.detach().clone()
        optimizer.eval()
    torch.testing.assert_close(param.detach(), average / (1 - 0.98**5))
    assert not torch.equal(param, trained)
    optimizer.train()
    assert torch.equal(param, trained)


def test_schedule_free_evaluates_the_mean_of_z():
    param = weight(1.0, 2.0)
    optimizer = tried_rules.ScheduleFree([param])
    means = []
    for target in torch.randn(5, 2, generator=torch.Generator().manual_seed(0)):
        optimizer.train()
        take_step(optimizer, param, target)
        means.append(optimizer.state[param]["z"].clone())
        y = param.detach().clone()
        optimizer.eval()
    x = sum(means) / 5
    torch.testing.assert_close(param.detach(), x)
    torch.testing.assert_close(y, 0.1 * means[-1] + 0.9 * x)
    optimizer.train()
    torch.testing.assert_close(param.detach(), y)
