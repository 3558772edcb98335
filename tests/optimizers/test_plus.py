"""The plus optimizers against their formulas, and what their rule needs of the tensors."""

from functools import partial

import pytest
import torch
from cases import both_directions, of_plus, silent
from problems import (
    Recorded,
    backward,
    batches,
    clones,
    each_way_of_carrying_over,
    initial_weights,
    network_loss,
    parameters,
    point,
    same,
    snapshot,
    train,
)
from reference import Parameter, PlusReference

from hf_salsa import SaLSaAdamPlus, SaLSaSGDPlus
from hf_salsa.optimizers import trial_points
from hf_salsa.rules import plus


@of_plus
@both_directions
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("variant", ["defaults", "all others"])
@silent
def test_trajectory_is_the_references(case, direction, grouped, variant):
    """300 steps of stochastic mini-batches: every step size, and the weights at the end."""
    weights, params = initial_weights(), parameters()
    search_options = case.variants[variant]
    options = {"direction": direction, **search_options}
    if grouped:
        first, second = case.groups
        own = [first, first, second, second]
        groups = [{"params": params[:2], **first}, {"params": params[2:], **second}]
        optimizer = case.make(groups, **options)
    else:
        own = [{} if case.adam else {"momentum": 0.9}] * 4
        optimizer = case.make(params, **options)
    reference = PlusReference(
        case.cls.__name__,
        [Parameter(w, **o) for w, o in zip(weights, own, strict=True)],
        all_trained=case.adam,
        **options,
    )
    for k, (x, y) in enumerate(batches(300)):
        if variant != "defaults" and 50 <= k < 60:
            y = y + 5  # out of the range in which the loss started
        train(optimizer, params, [(x, y)])
        reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
        assert optimizer.step_size == pytest.approx(reference.applied, rel=1e-4)
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-3)
    counters = optimizer.counters
    assert counters.searches == reference.searches < 100
    assert 0 <= counters.trials - reference.trials <= 5  # the check of the first search
    decided = {name for name, times in reference.decided.items() if times}
    expected = {"waited", "still", "tolerated"}
    expected |= {"grown"} if variant == "defaults" else {"shrunk", "out of range"}
    assert decided >= expected


@both_directions
@pytest.mark.parametrize("total_steps", [0, 237])
@pytest.mark.parametrize("plus_type", [SaLSaAdamPlus, SaLSaSGDPlus])
@silent
def test_trajectory_of_weights_that_were_never_trained_is_the_references(
    plus_type, direction, total_steps
):
    """Biases of 0, of which training moves every number. SGD has no warm-up."""
    weights, params = initial_weights(), parameters()
    for w in (*weights, *(p.data for p in params)):
        if w.dim() == 1:
            w.zero_()
    options = {"direction": direction, "steps_to_double": 3}
    options |= {"total_steps": total_steps} if total_steps else {"cool_down": 0.0}
    optimizer = plus_type(params, **options)
    adam = plus_type is SaLSaAdamPlus
    own = {} if adam else {"momentum": 0.9}
    reference = PlusReference(
        plus_type.__name__,
        [Parameter(w, **own) for w in weights],
        untrained=True,
        usual=1e-3 if adam else 0.0,
        **options,
    )
    for x, y in batches(total_steps or 300):
        y = y + 1  # a loss that falls
        train(optimizer, params, [(x, y)])
        reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
        assert optimizer.step_size == pytest.approx(reference.applied, rel=1e-4)
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-3)
    assert optimizer.counters.searches == reference.searches
    assert optimizer.counters.trials - reference.trials == 2  # the checks of the first search
    assert (reference.decided["warmed up"] > 3) == adam
    assert reference.decided["still"] > 0  # votes alone would have let it grow
    if adam:
        assert reference.decided["grown"] > 0


@both_directions
@silent
def test_trajectory_of_a_warm_up_that_is_lowered_is_the_references(direction):
    """With a bound so low that steps of the warm-up change too much."""
    weights, params = initial_weights(), parameters()
    for w in (*weights, *(p.data for p in params)):
        if w.dim() == 1:
            w.zero_()
    options = {"direction": direction, "total_steps": 237, "trust": 1e-8}
    optimizer = SaLSaAdamPlus(params, **options)
    started = [Parameter(w) for w in weights]
    reference = PlusReference("SaLSaAdamPlus", started, untrained=True, usual=1e-3, **options)
    for x, y in batches(237):
        train(optimizer, params, [(x, y)])
        reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
        assert optimizer.step_size == pytest.approx(reference.applied, rel=1e-4)
    assert 0 < reference.decided["lowered"] < reference.decided["warmed up"]
    assert optimizer.param_groups[0]["warm_up_to"] == pytest.approx(reference.warm_up_to)


@both_directions
@silent
def test_trajectory_after_a_head_phase_is_the_references(direction):
    """From the weights that the phase leaves; the body's one matrix says where the warm-up ends."""
    params, total_steps, head_steps = parameters(), 237, 5
    groups = [{"params": params[:2]}, {"params": params[2:], "head": True}]
    options = {"direction": direction, "total_steps": total_steps, "trust": 1e-3}
    optimizer = SaLSaAdamPlus(groups, head_first=head_steps, **options)
    reference = None
    for k, (x, y) in enumerate(batches(total_steps)):
        y = y + 1
        if k == head_steps:
            assert not optimizer.head_alone
            after = [Parameter(w) for w in clones(params)]
            reference = PlusReference(
                "SaLSaAdamPlus", after, matrices=clones(params[:1]), **options
            )
            reference.k, searches = k, optimizer.counters.searches
        train(optimizer, params, [(x, y)])
        if reference:
            reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
            assert optimizer.step_size == pytest.approx(reference.applied, rel=1e-4)
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-3)
    assert optimizer.counters.searches - searches == reference.searches
    assert reference.decided["warmed up"] > 3
    assert reference.decided["grown"] > 2


@of_plus
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_search_measures_the_last_step_weight_decay_included(case, weight_decay):
    """D against its formula, on the weights that the optimizer left."""
    params = parameters()
    optimizer = case.make(params, weight_decay=weight_decay, max_search_interval=1)
    weights, change = [], 0.0
    for x, y in batches(6):
        loss_fn = partial(network_loss, params, x, y)
        loss = backward(params, loss_fn)
        weights.append(clones(params))
        shrunk = optimizer.step_size
        optimizer.step(loss_fn, loss=loss)
        if len(weights) == 1:
            continue
        before, now = weights[-2:]
        step = [w - v for w, v in zip(now, before, strict=True)]
        foreseen = sum(float((p.grad * u).sum()) for p, u in zip(params, step, strict=True))
        loss_before = float(network_loss(before, x, y))
        record, (group,) = optimizer.last_search, optimizer.param_groups
        assert record.trial_loss == pytest.approx(loss_before, rel=1e-12)
        bound = group["trust"] * group["first_losses"] / len(weights)
        seen = loss_before - float(loss) + foreseen
        most = plus._SAMPLE_LIMIT * bound
        change = plus._BETA * change + (1 - plus._BETA) * min(abs(seen), most)
        change *= min(1.0, optimizer.step_size / shrunk) ** 2
        assert group["change"] == pytest.approx(change, rel=1e-9)
        assert (record.trials, group["samples"]) == (1, len(weights) - 1)


@of_plus
def test_clipping_divides_out(case):
    """Clipping shortens the step, it does not make the loss flatter."""
    found = []
    for factor in (1.0, 0.25):
        params = parameters()
        optimizer = case.make(params, initial_step_size=1e-6)
        objective = Recorded(None)
        optimizer.attach(objective)
        for (x, y), clipped_by in zip(batches(2), (1.0, factor), strict=True):
            objective.closure = partial(network_loss, params, x, y)
            objective.loss = backward(params, objective.closure)
            objective.clip_factor = clipped_by
            for param in params:
                param.grad *= clipped_by
            optimizer.step()
        found.append(optimizer.param_groups[0])
    whole, clipped = found
    assert whole["samples"] == clipped["samples"] == 1
    for name in ("change", "progress", "loss", "first_losses"):
        assert clipped[name] == pytest.approx(whole[name], rel=1e-9)


# Of a run on a trained body and a new head -> how many steps are done.
PHASES = {
    "in the head phase": 2,
    "before the start": 4,
    "dense": 6,
    "rare": 30,
    "between two searches": 32,
    "in the tail": 80,
}


@of_plus
@pytest.mark.parametrize("phase", PHASES)
@each_way_of_carrying_over
def test_a_continued_run_equals_the_uninterrupted_one(case, carry_over, phase):
    done, total = PHASES[phase], 90

    def make(params, **changed):
        groups = [{"params": params[:2]}, {"params": params[2:], "head": True}]
        return case.cls(groups, **{"total_steps": total, "head_first": 4, **changed})

    params = parameters()
    optimizer = make(params)
    data = list(batches(total))
    train(optimizer, params, data[:done])
    group = optimizer.param_groups[0]
    if phase == "between two searches":
        while not group["steps_since_search"]:
            train(optimizer, params, data[done : done + 1])
            done += 1
    assert optimizer.head_alone is (phase == "in the head phase")
    assert (group["searches"] == 0) is (phase in ("in the head phase", "before the start"))
    assert (group["search_interval"] > 1) is (done >= 30)
    assert (optimizer.step_size < group["step_size"]) is (phase == "in the tail")
    other_params, other = carry_over(partial(make, trust=0.77), params, optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    assert train(other, other_params, data[done:]) == train(optimizer, params, data[done:])
    assert same(clones(other_params), clones(params))
    assert same(other.state_dict(), optimizer.state_dict())
    assert optimizer.param_groups[0]["samples"] > 5
    assert optimizer.step_size < 0.1 * optimizer.last_search.step_size  # cooled down


@of_plus
@pytest.mark.parametrize("sign", ["warm_up_over", "rule_version"])
def test_a_checkpoint_of_a_former_rule_is_refused(case, sign):
    """By what only the first one knew, or by another number."""
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(3))
    saved = snapshot(optimizer)
    for group in saved["param_groups"]:
        group["rule_version"] += 1
        if sign == "warm_up_over":
            del group["rule_version"]
            group[sign] = True
    other = case.make(parameters())
    before = snapshot(other)
    sentence = f"former version of the rule of {case.cls.__name__}.*Start the run anew, or resume"
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(saved)
    assert same(other.state_dict(), before)


@pytest.mark.parametrize("pieces", [5, 12])
@of_plus
def test_small_pieces_give_the_same_trajectory(monkeypatch, case, pieces):
    whole, cut = parameters(), parameters()
    expected = train(case.make(whole), whole, batches(40))
    monkeypatch.setattr(trial_points, "_SMALLEST_CHUNK", pieces)
    assert train(case.make(cut), cut, batches(40)) == pytest.approx(expected, rel=1e-9)


# --- what it recovers from ----------------------------------------------------------------------


@of_plus
@pytest.mark.parametrize("step", [1, 100])
def test_a_step_size_ten_times_too_large_is_noticed(case, step):
    """At the start, and in the middle of a run: it shrinks, and the loss ends far below."""
    params = parameters()
    optimizer = case.make(params)
    losses = []
    for k, (x, y) in enumerate(batches(300)):
        if k == step:
            too_large = 10 * optimizer.step_size
            for group in optimizer.param_groups:
                group.update(step_size=too_large, lr=too_large)
        losses.append(network_loss(params, x, y).item())
        train(optimizer, params, [(x, y)])
    assert optimizer.step_size <= too_large / 1.5
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]


@of_plus
def test_a_few_mini_batches_of_another_kind_do_not_end_a_run(case):
    """They leave the weights where the loss is out of its range; later ones are as before."""
    params = parameters()
    optimizer = case.make(params)
    losses, step_sizes = [], []
    for k, (x, y) in enumerate(batches(900)):
        y = y + 5 if 50 <= k < 60 else y
        losses.append(network_loss(params, x, y).item())
        train(optimizer, params, [(x, y)])
        step_sizes.append(optimizer.step_size)
    assert sum(losses[60:70]) > 1.5 * sum(losses[40:50])
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]
    assert step_sizes[-1] > 5 * min(step_sizes[60:])


@of_plus
def test_a_negative_loss_is_refused(case):
    param = point(1.0)
    optimizer = case.make([param])

    def loss_fn():
        return (param.square() - 5).sum()

    with pytest.raises(RuntimeError, match="need one that is not negative"):
        optimizer.step(loss_fn, loss=backward([param], loss_fn))
    assert param.item() == 1.0


@of_plus
def test_the_slope_is_measured_for_the_first_step_size_only(case, monkeypatch):
    """It costs a pass over the gradients and the state."""
    measured = []
    first = trial_points.TrialPoints.first
    monkeypatch.setattr(
        trial_points.TrialPoints, "first", lambda *given: measured.append(None) or first(*given)
    )
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, batches(30))
    assert optimizer.counters.searches > 5
    assert len(measured) == 1
