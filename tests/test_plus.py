"""salsa_adam_plus and salsa_sgd_plus: the rule, and the contract lines that it could break."""

import copy
import inspect
import math
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Parameter, PlusReference
from test_optimizers import (
    ADAM_OPTIONS,
    CAUSES,
    Recorded,
    backward,
    batches,
    clones,
    deepcopied,
    initial_weights,
    network_loss,
    parameters,
    pickled,
    point,
    same,
    saved_and_loaded,
    snapshot,
    spoil,
    square,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import hf_salsa.optimizers
from hf_salsa import SaLSaAdamPlus, SaLSaSGDPlus
from hf_salsa.line_search import AgreementSettings, AgreementState, search_once

both = pytest.mark.parametrize("cls", [SaLSaAdamPlus, SaLSaSGDPlus])

SETTINGS = AgreementSettings(
    c=0.4,
    beta3=0.9,
    steps_to_double=500,
    backtrack_factor=0.5,
    initial_step_size=1.0,
    max_search_interval=10,
    require_decrease=False,
    max_trials=30,
    steps_to_double_fast=6,
    confidence=2.0,
    first_share=0.1,
)
STARTED = AgreementState(step_size=0.01, searches=1)


def run(state, evaluate, *, settings=SETTINGS, loss=1.0, slope=1.0, agreement=0.0, resolution=0.0):
    """One search; the record, the new state, and the step sizes that were tried."""
    tried = []

    def remembering(step_size):
        tried.append(step_size)
        return evaluate(step_size)

    record, new = search_once(
        settings,
        state,
        remembering,
        loss=loss,
        slope=slope,
        agreement=agreement,
        resolution=resolution,
    )
    return record, new, tried


def parabola(curvature, loss=1.0, slope=1.0):
    return lambda eta: loss - slope * eta + curvature * eta**2 / 2


# --- the rule on floats -------------------------------------------------------------------------


def test_training_starts_at_a_tenth_of_what_the_first_mini_batch_allows():
    """1 - eta + 32 eta^2 accepts eta <= (1 - c) / 32: 2^-6 of the halvings of 1 * 2^(1/500)."""
    record, state, tried = run(AgreementState(step_size=1.0), parabola(64.0))
    found = 2**-6 * 2 ** (1 / 500)
    assert state.step_size == record.step_size == pytest.approx(0.1 * found)
    assert found in map(pytest.approx, tried)
    assert record.trials == len(tried) < 10
    assert (record.interval, state.search_interval, state.steps_since_search) == (1, 1, 0)
    assert replace(state, searches=0, step_size=1.0) == AgreementState(step_size=1.0)


def test_a_first_search_that_fails_leaves_everything_to_the_next():
    record, state, tried = run(AgreementState(step_size=1.0), parabola(1.0), slope=-1.0)
    assert (record.outcome, tried, state.failed_searches) == ("slope", [], 1)
    assert not state.step_size_known
    assert run(state, parabola(64.0))[1].step_size_known


def test_one_trial_measures_slope_and_curvature_and_armijo_bounds_the_step():
    """A parabola is known from one trial: eta = 2 (1 - c) slope / curvature, however far it is."""
    for curvature in (100.0, 200.0):
        record, state, tried = run(STARTED, parabola(curvature))
        assert tried == [0.01 * 2 ** (1 / 500)]
        assert record.step_size == pytest.approx(min(tried[0], 2 * 0.6 / curvature))
        assert (record.trials, record.outcome, state.samples) == (1, "accepted", 1)
        assert state.curvature / 0.1 == pytest.approx(curvature)
        assert state.s / 0.1 == pytest.approx(1.0)


def test_the_step_size_at_most_halves_and_a_wall_counts_as_four_slopes():
    record, state, _ = run(STARTED, lambda eta: 1e6)
    assert record.step_size == 0.005
    trial = 0.01 * 2 ** (1 / 500)
    assert state.curvature == pytest.approx(0.1 * 4 / trial)
    # A slope that points uphill on average halves too; one bad mini-batch among good ones does not.
    assert run(STARTED, parabola(1.0), slope=-1.0)[0].step_size == 0.005
    seen = replace(STARTED, samples=50, s=1.0, curvature=1.0)
    assert run(seen, parabola(1.0, slope=-1.0), slope=-1.0)[0].step_size > 0.01


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_halves_the_trial(broken):
    walled = lambda eta: broken if eta > 0.004 else parabola(1.0)(eta)  # noqa: E731
    record, state, tried = run(STARTED, walled)
    assert tried == [pytest.approx(0.01 * 2 ** (1 / 500) / 2**i) for i in range(3)]
    # Not below half of the step size of before, though: the next search looks again.
    assert record.step_size == tried[-1] < 0.005
    assert (record.trials, state.failed_searches) == (3, 0)
    record, state, tried = run(STARTED, lambda eta: broken)
    assert (record.outcome, len(tried), record.step_size) == ("trials", 30, 0.01)
    assert state == replace(STARTED, searches=2, failed_searches=1)


def test_what_the_precision_of_the_loss_cannot_show_is_not_tried():
    record, state, tried = run(STARTED, parabola(1.0), resolution=0.02)
    assert (record.outcome, tried, record.step_size) == ("unresolved", [], 0.01)
    assert state == replace(STARTED, searches=2, failed_searches=1)
    # The slope of this mini-batch may vanish: the loss's change along the direction need not.
    seen = replace(STARTED, samples=50, s=3.0)
    assert run(seen, parabola(1.0), slope=0.0, resolution=0.02)[0].accepted


def agreeing(values, **settings):
    """The growth of each search on a flat loss with these agreements, and the last state."""
    changed, state, growths = replace(SETTINGS, **settings), STARTED, []
    for value in values:
        # Growth is tested alone: a straight line bounds nothing, and every step searches.
        state = replace(state, search_interval=1, steps_since_search=0)
        before = state.step_size
        _, state, _ = run(state, parabola(0.0), settings=changed, agreement=value)
        growths.append(state.step_size / before)
    return growths, state


def test_growth_is_fast_while_the_mini_batches_agree():
    fast, slow = pytest.approx(2 ** (1 / 6)), pytest.approx(2 ** (1 / 500))
    assert agreeing([1.0] * 5)[0] == [slow, slow, fast, fast, fast]
    assert agreeing([-1.0] * 5)[0] == [slow] * 5
    noise = [-0.9, 1.0] * 20
    assert agreeing([1.0, *noise])[0] == [slow] * 41
    assert agreeing(noise, confidence=-math.inf)[0][2:] == [fast] * 38
    assert agreeing([1.0] * 5, confidence=math.inf)[0] == [slow] * 5


def test_the_warm_up_is_over_for_good_when_agreement_is():
    fast, slow = pytest.approx(2 ** (1 / 6)), pytest.approx(2 ** (1 / 500))
    # Of a few samples a lack of agreement may be chance.
    growths, state = agreeing([1.0, 1.0, 1.0, -0.5, *[1.0] * 16])
    assert (growths[3], growths[-1]) == (slow, fast)
    assert not state.warm_up_over
    growths, state = agreeing([1.0] * 12 + [-1.0] * 8 + [1.0] * 60)
    assert state.warm_up_over
    assert growths[-1] == slow
    assert agreeing([0.0] * 9)[1].warm_up_over is False
    assert agreeing([0.0] * 10)[1].warm_up_over is True


@pytest.mark.parametrize(("mean", "fast"), [(0.45, False), (0.47, True)])
def test_the_standard_error_is_that_of_an_exponential_average(mean, fast):
    """That of 19 samples: with variance 1, two of them are 2 / sqrt(19) = 0.459."""
    square = mean**2 + 1 / 0.9  # of which the next sample, at the mean itself, leaves 1
    seen = replace(STARTED, samples=200, agreement=mean, agreement_square=square)
    record, state, _ = run(seen, parabola(0.0), agreement=mean)
    assert record.step_size == pytest.approx(0.01 * 2 ** (1 / (6 if fast else 500)))
    assert state.warm_up_over != fast


def test_growth_counts_steps_not_searches():
    state = replace(STARTED, steps_since_search=3, search_interval=4)
    assert run(state, parabola(0.0))[0].step_size == pytest.approx(0.01 * 2 ** (4 / 500))
    seen = replace(state, samples=9, agreement=1.0, agreement_square=1.0)
    record, _, _ = run(seen, parabola(0.0), agreement=1.0)
    assert record.step_size == pytest.approx(0.01 * 2 ** (4 / 6))


def test_searches_grow_rare_after_the_warm_up():
    state, intervals = replace(STARTED, warm_up_over=True), []
    for _ in range(80):
        state = replace(state, steps_since_search=0)
        record, state, _ = run(state, parabola(0.0))
        intervals.append(record.interval)
    assert intervals == [min(10, 1 + n // 8) for n in range(1, 81)]
    assert agreeing([1.0] * 30)[1].search_interval == 1
    few = replace(SETTINGS, max_search_interval=3)
    assert run(state, parabola(0.0), settings=few)[0].interval == 3


finite = st.floats(-1e6, 1e6)


@given(
    step_size=st.floats(1e-12, 1e3),
    slope=finite,
    agreement=finite,
    loss=finite,
    trial_loss=finite,
    samples=st.integers(0, 1000),
    s=finite,
    curvature=finite,
    n=st.integers(0, 9),
    c=st.floats(0.01, 0.99),
)
def test_the_step_size_never_leaves_its_bounds(
    step_size, slope, agreement, loss, trial_loss, samples, s, curvature, n, c
):
    assume(samples > 0 or s == curvature == 0)
    state = AgreementState(
        step_size, searches=1, samples=samples, s=s, curvature=curvature, steps_since_search=n
    )
    settings = replace(SETTINGS, c=c)
    record, new, tried = run(
        state,
        lambda eta: trial_loss,
        settings=settings,
        loss=loss,
        slope=slope,
        agreement=agreement,
        resolution=sys.float_info.min,
    )
    if not record.accepted:
        assert (tried, new.step_size) == ([], step_size)
        return
    (trial,) = tried
    assert step_size <= trial <= step_size * 2 ** ((n + 1) / 6) * (1 + 1e-12)
    assert min(trial, step_size / 2) <= new.step_size <= trial
    assert all(math.isfinite(getattr(new, field.name)) for field in fields(new))
    if new.step_size > step_size / 2:
        # Armijo's criterion on the parabola of the averages.
        decrease = new.step_size * new.s - new.step_size**2 * new.curvature / 2
        armijo = c * new.step_size * new.s
        slack = 1e-9 * (abs(new.step_size * new.s) + new.step_size**2 * abs(new.curvature))
        assert decrease >= armijo - slack
    assert new.search_interval == (min(10, 1 + new.samples // 8) if new.warm_up_over else 1)


# --- the rule on tensors ------------------------------------------------------------------------

OWN = {
    SaLSaAdamPlus: [
        {"betas": (0.8, 0.99), "weight_decay": 0.1},
        {"betas": (0.95, 0.999), "eps": 1e-4},
    ],
    SaLSaSGDPlus: [{"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5}],
}
DEFAULT = {SaLSaAdamPlus: {}, SaLSaSGDPlus: {"momentum": 0.9}}


def plain(cls, params, **options):
    """Without a cool-down, which needs the length of the run."""
    return cls(params, cool_down=0.0, **options)


@both
@pytest.mark.parametrize("direction", ["momentum", "gradient"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("search_options", [{}, {"c": 0.9, "confidence": 0.5, "beta3": 0.8}])
@pytest.mark.filterwarnings("error")
def test_trajectory_is_the_references(cls, direction, grouped, search_options):
    """300 steps of stochastic mini-batches: every step size, and the weights at the end."""
    weights, params = initial_weights(), parameters()
    options = {"direction": direction, **search_options}
    if grouped:
        first, second = OWN[cls]
        own = [first, first, second, second]
        groups = [{"params": params[:2], **first}, {"params": params[2:], **second}]
        optimizer = plain(cls, groups, **options)
    else:
        own = [DEFAULT[cls]] * 4
        optimizer = plain(cls, params, **options)
    reference = PlusReference(
        cls.__name__, [Parameter(w, **o) for w, o in zip(weights, own, strict=True)], **options
    )
    for x, y in batches(300):
        train(optimizer, params, [(x, y)])
        reference.step(lambda w, x=x, y=y: network_loss(w, x, y))
        assert optimizer.step_size == pytest.approx(reference.eta, rel=1e-9)
    for param, weight in zip(params, reference.weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=1e-6)
    counters = optimizer.counters
    assert counters.searches == reference.searches
    assert counters.trials < counters.searches + 12  # one each, but for the first
    assert reference.fast_growth >= 2
    assert reference.bounded > 3 or direction == "gradient" or not search_options
    assert reference.searches < 100


@both
def test_the_agreement_is_of_earlier_steps_only(cls):
    """Against the formula, computed from the state that the step before left."""
    params = parameters()
    optimizer = plain(cls, params, max_search_interval=1)
    data = list(batches(6))
    train(optimizer, params, data[:5])
    x, y = data[5]
    loss_fn = partial(network_loss, params, x, y)
    loss = backward(params, loss_fn)
    gradients = clones([p.grad for p in params])
    earlier = []
    for param, gradient in zip(params, gradients, strict=True):
        state = optimizer.state[param]
        if cls is SaLSaSGDPlus:
            earlier.append(0.9 * state["momentum_buffer"])
        else:
            v = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
            denominator = (v / (1 - 0.999**6)).sqrt() + 1e-8
            earlier.append(0.9 * state["exp_avg"] / (1 - 0.9**6) / denominator)
    expected = sum((g * p).sum().item() for g, p in zip(gradients, earlier, strict=True))
    before = optimizer.param_groups[0]["agreement"]
    optimizer.step(loss_fn, loss=loss)
    seen = (optimizer.param_groups[0]["agreement"] - 0.9 * before) / 0.1
    assert seen == pytest.approx(expected, rel=1e-9)


@both
def test_clipping_divides_out_of_slope_and_agreement(cls):
    """Clipping shortens the step, it does not make the loss flatter."""
    ours, theirs = parameters(), parameters()
    clipped, free = (plain(cls, p, initial_step_size=1e-6) for p in (ours, theirs))
    objective = Recorded(None)
    clipped.attach(objective)
    for (x, y), factor in zip(batches(2), (1.0, 0.25), strict=True):
        objective.closure = partial(network_loss, ours, x, y)
        objective.loss = backward(ours, objective.closure)
        objective.clip_factor = factor
        for param in ours:
            param.grad *= factor
        clipped.step()
        train(free, theirs, [(x, y)])
    record = clipped.last_search
    assert record.decrease == pytest.approx(record.slope * record.step_size, rel=1e-3)
    (a,), (b,) = clipped.param_groups, free.param_groups
    assert a["samples"] == b["samples"] == 1
    if cls is SaLSaSGDPlus:  # what earlier gradients put into the direction is the same
        assert a["agreement"] == pytest.approx(b["agreement"])
        assert record.slope < free.last_search.slope


@both
@pytest.mark.parametrize("carry_over", [saved_and_loaded, deepcopied, pickled])
def test_a_continued_run_equals_the_uninterrupted_one(cls, carry_over):
    params = parameters()
    optimizer = cls(params, total_steps=90)
    data = list(batches(90))
    done = 45
    train(optimizer, params, data[:done])
    while not optimizer.param_groups[0]["steps_since_search"]:  # go on between two searches
        train(optimizer, params, data[done : done + 1])
        done += 1
    other_params, other = carry_over(cls, params, optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    assert train(other, other_params, data[done:]) == train(optimizer, params, data[done:])
    assert same(clones(other_params), clones(params))
    assert same(other.state_dict(), optimizer.state_dict())
    assert optimizer.step_size < 0.1 * optimizer.last_search.step_size  # cooled down


@both
def test_checkpoint_libraries_round_trip(cls):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        return model, plain(cls, model.parameters())

    def steps(model, optimizer):
        sizes = []
        for x in torch.randn(8, 8, 3, generator=torch.Generator().manual_seed(0)):

            def loss_fn(x=x):
                return (model(x) - 1).square().mean()

            optimizer.step(loss_fn, loss=backward(list(model.parameters()), loss_fn))
            sizes.append(optimizer.step_size)
        return sizes

    model, optimizer = make()
    steps(model, optimizer)
    stored = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other = make()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, stored)
    assert steps(other_model, other) == steps(model, optimizer)
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])


@both
def test_the_groups_hold_plain_scalars(cls):
    params = parameters()
    optimizer = plain(cls, [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}])
    train(optimizer, params, batches(40))
    first, second = optimizer.param_groups
    assert {type(v) for k, v in first.items() if k != "params"} <= {int, float, bool, str, tuple}
    assert {k for k in first if k != "params" and first[k] != second[k]} == {"weight_decay"}


@pytest.mark.parametrize("pieces", [5, 12])
@both
def test_small_pieces_give_the_same_trajectory(monkeypatch, cls, pieces):
    whole, cut = parameters(), parameters()
    expected = train(plain(cls, whole), whole, batches(40))
    monkeypatch.setattr(hf_salsa.optimizers, "_SMALLEST_CHUNK", pieces)
    assert train(plain(cls, cut), cut, batches(40)) == pytest.approx(expected, rel=1e-9)


@both
@pytest.mark.filterwarnings("ignore:Trainable parameters are")
def test_low_precision_weights_train(cls):
    """Slope, agreement and trial points are in float32; the loss is what it is."""
    params = parameters(torch.bfloat16)
    optimizer = plain(cls, params)
    losses = []
    for x, y in batches(200, torch.bfloat16):
        loss_fn = partial(network_loss, params, x, y)
        losses.append(backward(params, loss_fn))
        optimizer.step(loss_fn, loss=losses[-1])
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@both
def test_sharded_parameters_give_the_same_trajectory(mesh, cls):
    whole = parameters()
    placements = [Shard(0), Replicate(), Shard(0), Replicate()]
    sharded = [
        nn.Parameter(distribute_tensor(w, mesh, [placement]))
        for w, placement in zip(initial_weights(), placements, strict=True)
    ]
    optimizer, other = plain(cls, sharded), plain(cls, whole)
    sizes = []
    for x, y in batches(40):

        def loss_fn(x=x, y=y):
            return network_loss([p.full_tensor() for p in sharded], x, y)

        optimizer.step(loss_fn, loss=backward(sharded, loss_fn))
        sizes.append(optimizer.step_size)
    assert sizes == pytest.approx(train(other, whole, batches(40)), rel=1e-9)


# --- steps that are not taken -------------------------------------------------------------------


@pytest.mark.parametrize("cause", CAUSES)
@both
def test_not_finite_steps_are_skipped(cls, cause):
    params = parameters()
    optimizer = plain(cls, params)
    train(optimizer, params, batches(5))
    assert optimizer.search_due
    weights, state = clones(params), snapshot(optimizer)
    closure, loss = spoil(params, cause)
    optimizer.step(closure, loss=loss)
    assert same(clones(params), weights)
    group = state["param_groups"][0]
    group.update(steps=6, skipped_steps=1, consecutive_skips=1)
    group["trials"] += cause == "nan closure"
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("steps_before", [0, 5])
@both
def test_an_exception_in_a_trial_leaves_everything_as_it_was(cls, steps_before, error):
    params, undisturbed = parameters(torch.float32), parameters(torch.float32)
    optimizer, other = plain(cls, params), plain(cls, undisturbed)
    data = list(batches(9, torch.float32))
    train(optimizer, params, data[:steps_before])
    train(other, undisturbed, data[:steps_before])
    loss_fn = partial(network_loss, params, *data[steps_before])
    start, calls = clones(params), 0

    def closure():
        nonlocal calls
        calls += 1
        if not same(clones(params), start):
            raise error
        return loss_fn()

    loss = backward(params, loss_fn)
    with pytest.raises(type(error)):
        optimizer.step(closure, loss=loss)
    # The first search of all evaluates the loss once more at w_k.
    assert calls == (1 if steps_before else 2)
    assert same(clones(params), start)
    rest = data[steps_before:]
    assert train(optimizer, params, rest) == train(other, undisturbed, rest)
    assert same(clones(params), clones(undisturbed))


# --- arguments ----------------------------------------------------------------------------------


def test_defaults():
    search_settings = {
        "c": 0.4,
        "beta3": 0.9,
        "steps_to_double": 500,
        "steps_to_double_fast": 12,
        "confidence": 2.0,
        "first_share": 0.1,
        "backtrack_factor": 0.5,
        "initial_step_size": 1.0,
        "max_search_interval": 10,
        "direction": "momentum",
        "max_trials": 30,
        "cool_down": 0.6,
        "total_steps": None,
    }
    own = {
        SaLSaAdamPlus: ADAM_OPTIONS,
        SaLSaSGDPlus: {"momentum": 0.9, "weight_decay": 0.0},
    }
    for cls, options in own.items():
        signature = inspect.signature(cls).parameters.values()
        defaults = {p.name: p.default for p in signature if p.name != "params"}
        assert defaults == search_settings | options


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (SaLSaAdamPlus, "steps_to_double_fast", 0.5),
        (SaLSaAdamPlus, "confidence", math.nan),
        (SaLSaAdamPlus, "first_share", 0.0),
        (SaLSaSGDPlus, "first_share", 1.5),
        (SaLSaSGDPlus, "cool_down", -0.1),
        (SaLSaAdamPlus, "betas", (0.0, 0.999)),
        (SaLSaSGDPlus, "momentum", 0.0),
    ],
)
def test_bad_arguments_are_refused(cls, option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.* is not allowed: .*\.$"):
        cls(parameters(), **{option: value})


@both
def test_a_group_without_momentum_is_refused_and_not_added(cls):
    optimizer = plain(cls, [point(1.0)])
    own = {"betas": (0.0, 0.9)} if cls is SaLSaAdamPlus else {"momentum": 0.0}
    with pytest.raises(ValueError, match="compares each gradient with those before it"):
        optimizer.add_param_group({"params": [point(2.0)], **own})
    assert len(optimizer.param_groups) == 1


@both
def test_the_length_of_the_run_must_be_known(cls):
    param = point(3.0, -4.0)
    optimizer = cls([param])
    loss = backward([param], partial(square, [param]))
    with pytest.raises(RuntimeError, match=r"pass total_steps=.* or cool_down=0"):
        optimizer.step(partial(square, [param]), loss=loss)
