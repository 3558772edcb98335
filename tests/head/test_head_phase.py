"""The first updates train the head alone, whatever the optimizer; then it begins."""

import copy
import io
import pickle

import pytest
import torch
from loops import (
    ALL,
    BIAS,
    SEARCHES,
    STOCK,
    Loop,
    batch,
    body_of,
    network,
    scaler,
    spoil_body,
    started,
    weights,
)
from problems import same, snapshot
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD, head_groups

every_kind = pytest.mark.parametrize("kind", ALL, ids=str)
# One of each sort: with and without state, with a rule that looks back, with fused kernels, with
# state from the start.
SOME = ["salsa_adam", "salsa_adam_plus", "sls_sgd without momentum", "AdamW fused", "Adagrad"]
each_kind = pytest.mark.parametrize("kind", [k for k in ALL if k.name in SOME], ids=str)
each_search = pytest.mark.parametrize("kind", SEARCHES, ids=str)
each_stock = pytest.mark.parametrize("kind", STOCK, ids=str)


def moments(optimizer):
    """All state of the parameters that an update moves."""
    return [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "previous" and torch.is_tensor(tensor)
    ]


@every_kind
def test_the_head_learns_and_the_body_waits(kind):
    loop = started(kind, head_first=10)
    before, moments_before = body_of(loop.net), copy.deepcopy(moments(loop.optimizer))
    for number in range(10):
        assert loop.optimizer.head_alone
        assert loop.optimizer.search_due
        loop.step(number)
        assert loop.optimizer.step_size > 0
        assert same(body_of(loop.net), before)
    assert not loop.optimizer.head_alone
    assert loop.losses[-1] < 0.05 * loop.losses[0]
    assert loop.optimizer.counters.searches == 10
    if moments_before:  # as Adagrad has them
        assert same(moments(loop.optimizer), moments_before)
    assert not any(bool(t.any()) for t in moments(loop.optimizer)[len(moments_before) :])
    loop.run(1, first=10)
    assert not same(body_of(loop.net), before)


@each_kind
def test_the_head_reaches_a_bias_of_150(kind):
    loop = started(kind, head_first=40).run(40)
    assert float(loop.net(batch(99)[0]).mean()) == pytest.approx(BIAS, rel=0.1)


@each_kind
def test_a_head_that_fits_each_mini_batch_alone_takes_shorter_steps(kind):
    """Random targets and more features than examples: what one gains, the next one loses."""

    class Noise(Loop):
        def loss(self, x, y):
            noise = torch.randn(16, 1, generator=torch.Generator().manual_seed(int(1e6 * x.sum())))
            return (self.net(x) - 10 * noise).square().mean()

    loop, step_sizes = started(kind, head_first=40, make_loop=Noise), []
    for number in range(40):
        loop.run(1, first=number)
        step_sizes.append(loop.optimizer.step_size)
    assert max(step_sizes[-10:]) < step_sizes[0] / 4


@each_kind
@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_not_finite_says_nothing_about_the_next(kind, loss, first):
    class Masked(Loop):
        masked = first

        def loss(self, x, y):
            plain = super().loss(x, y)
            return plain + (loss if self.masked else 0)

    loop = started(kind, make_loop=Masked)
    for masked in (first, not first, False):
        loop.masked = masked
        loop.run(1, first=int(masked))
    group = loop.optimizer.param_groups[0]
    assert group["head_losses_seen"] == 2
    finite = [x for x in loop.losses if x < torch.inf]
    assert group["head_losses"] == pytest.approx(sum(finite))


@pytest.mark.parametrize("kind", [k for k in SEARCHES if k.name != "salsa_adam_plus"], ids=str)
def test_the_optimizer_begins_after_the_phase(kind):
    """Its first step is that of a fresh optimizer at the weights that the phase leaves.

    `salsa_adam_plus` warms up then: tests/optimizers/test_plus.py has its reference.
    """
    loop = started(kind, head_first=3).run(3)
    net = copy.deepcopy(loop.net)
    fresh = Loop(net, kind.make(net, head_first=0))
    states = []
    for one in (loop, fresh):
        torch.manual_seed(5)
        one.run(4, first=3)
        states.append([state for _, state in sorted(one.optimizer.state_dict()["state"].items())])
    assert same(weights(loop.net), weights(net))
    assert same(*states)


@each_stock
def test_a_stock_optimizer_is_itself_after_the_phase(kind):
    loop = started(kind, head_first=3).run(3)
    net = copy.deepcopy(loop.net)
    stock = type(loop.optimizer).__bases__[1](net.parameters(), **kind.options)
    torch.manual_seed(5)
    loop.run(4, first=3)
    torch.manual_seed(5)
    for number in range(3, 7):
        loop.loss.__func__(Plain(net), *batch(number)).backward()
        stock.step()
        stock.zero_grad()
    assert same(weights(loop.net), weights(net))


class Plain:
    """What `Loop.loss` needs of a loop."""

    def __init__(self, net):
        self.net = net


@every_kind
def test_a_body_without_numbers_skips_nothing(kind):
    clean, spoilt = (started(kind, loop={"max_norm": 5.0}) for _ in range(2))
    torch.manual_seed(1)
    clean.run(5)
    torch.manual_seed(1)
    spoilt.run(5, spoil=spoil_body)
    assert same(weights(clean.net), weights(spoilt.net))
    assert spoilt.optimizer.counters.skipped_steps == 0
    assert clean.norms == spoilt.norms


@each_kind
def test_a_head_without_numbers_skips_the_step(kind):
    loop = started(kind).run(2)
    before = weights(loop.net)

    def spoil_head(net):
        net[1].weight.grad[0, 0] = torch.inf

    with pytest.warns(UserWarning, match="step 3 are not finite: the step is skipped"):
        loop.step(2, spoil_head)
    assert same(weights(loop.net), before)
    assert loop.optimizer.counters.skipped_steps == 1
    loop.run(7, first=3)
    assert loop.optimizer.head_alone  # it was no step of the phase
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        loop.run(20, spoil=spoil_head)


@each_kind
def test_the_norm_that_is_clipped_is_the_head_s(kind):
    loop = started(kind, loop={"max_norm": 1.0})
    torch.manual_seed(1)
    loss = loop.loss(*batch(0))
    grads = torch.autograd.grad(loss, list(loop.net[1].parameters()))
    torch.manual_seed(1)
    loop.run(1)
    assert loop.norms == pytest.approx([float(torch.stack([g.norm() for g in grads]).norm())])
    # The slope along its signs stays the true one, whatever is clipped (14).
    slope = loop.optimizer.last_search.slope
    assert slope == pytest.approx(float(sum(g.abs().sum() for g in grads)), rel=1e-4)


@each_kind
def test_weight_decay_waits(kind):
    loops = [started(kind, weight_decay=decay) for decay in (0.0, 0.5)]
    for loop in loops:
        torch.manual_seed(1)
        loop.run(10)
    assert same(*(weights(loop.net) for loop in loops))


@each_kind
def test_micro_batches_are_one_update(kind):
    whole, parts = (
        started(kind, loop={"accumulate": number}, make_loop=WithoutDropout) for number in (1, 4)
    )
    for loop in (whole, parts):
        loop.run(10)
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class WithoutDropout(Loop):
    def __init__(self, net, *args, **kwargs):
        super().__init__(net.eval(), *args, **kwargs)


@pytest.mark.parametrize("max_norm", [None, 5.0])
@each_kind
def test_a_gradient_scaler_is_seen_through(kind, max_norm):
    """Scaling by a power of two is exact; torch's fused kernels unscale by themselves later."""
    plain = started(kind, head_first=4, loop={"max_norm": max_norm})
    scaled = started(kind, head_first=4, loop={"max_norm": max_norm, "scaler": scaler()})
    for loop in (plain, scaled):
        torch.manual_seed(1)
        loop.run(7)
    assert same(weights(plain.net), weights(scaled.net))


@each_kind
def test_a_scaler_does_not_see_a_body_without_numbers(kind):
    loop = started(kind, loop={"scaler": scaler(), "max_norm": 5.0})
    loop.run(3, spoil=spoil_body)
    assert loop.scaler.get_scale() == 2.0**10
    loop = started(kind, loop={"scaler": scaler()})
    for number in range(3):  # without clipping the loop says when gradients are complete
        loop.step(number, lambda net: (spoil_body(net), loop.optimizer.leave_body_alone()))
    assert loop.scaler.get_scale() == 2.0**10
    assert loop.optimizer.counters.skipped_steps == 0


@each_kind
def test_a_step_that_the_scaler_skips_is_counted(kind):
    loop = started(kind, loop={"scaler": scaler()}).run(1)
    before = weights(loop.net)
    with pytest.warns(UserWarning, match="the step is skipped"):
        loop.step(1, spoil_body)
        loop.step(2)
    assert loop.optimizer.counters.skipped_steps == 1
    assert not same(weights(loop.net), before)


# --- how long it lasts --------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "expected"), [(200, 10), (60, 6), (5, 1), (1, 1)])
@every_kind
def test_at_most_a_tenth_of_the_run(kind, steps, expected):
    loop = started(kind)
    loop.optimizer.plan(steps)
    loop.run(min(steps, 12))
    assert loop.optimizer.param_groups[0]["head_steps"] == expected


@each_kind
def test_a_second_run_has_no_second_phase(kind):
    loop = started(kind)
    loop.optimizer.plan(20)
    loop.run(3)
    assert loop.optimizer.param_groups[0]["head_steps"] == 2
    loop.optimizer.plan(1000)
    assert not loop.optimizer.head_alone
    loop.run(2, first=3)
    assert loop.optimizer.param_groups[0]["head_steps"] == 2


@each_kind
def test_without_a_head_or_with_0_there_is_none(kind):
    net = network()
    off = kind.make(net, head_first=0)
    assert not off.head_alone
    with torch.no_grad():
        for param in net[1].parameters():
            param.mul_(3)
    assert not kind.make(net).head_alone


# --- what outlives a step -----------------------------------------------------------------------


def loaded(kind, loop):
    file = io.BytesIO()
    torch.save((loop.net.state_dict(), loop.optimizer.state_dict()), file)
    file.seek(0)
    net = network()
    optimizer = kind.make(net)
    of_net, of_optimizer = torch.load(file, weights_only=True)
    net.load_state_dict(of_net)
    optimizer.load_state_dict(of_optimizer)
    return net, optimizer


def deepcopied(kind, loop):
    return copy.deepcopy((loop.net, loop.optimizer))


def pickled(kind, loop):
    return pickle.loads(pickle.dumps((loop.net, loop.optimizer)))


@pytest.mark.parametrize("after", [4, 10])
@pytest.mark.parametrize("carry_over", [loaded, deepcopied, pickled])
@each_kind
def test_a_continued_run_equals_the_uninterrupted_one(kind, carry_over, after):
    straight = started(kind)
    straight.optimizer.plan(200)
    straight.run(after)
    continued = Loop(*carry_over(kind, straight))
    assert type(continued.optimizer) is type(straight.optimizer)
    for loop in (straight, continued):
        torch.manual_seed(7)
        loop.run(14 - after, first=after)
    assert same(weights(straight.net), weights(continued.net))
    assert same(snapshot(straight.optimizer), snapshot(continued.optimizer))


@each_kind
def test_what_outlives_a_step_are_numbers_in_every_group(kind):
    loop = started(kind)
    seen = []
    for number in range(12):
        loop.step(number)
        seen.append([{k: type(v) for k, v in g.items()} for g in loop.optimizer.param_groups])
    assert all(groups == seen[0] for groups in seen)
    first, second = loop.optimizer.param_groups
    others = {name for name in first if name not in ("params", "head")}
    assert all(first[name] == second[name] for name in others)


def joined(kind, loop):
    """The same optimizer for a model whose head is not found any more."""
    net = copy.deepcopy(loop.net)
    optimizer = kind.make(net)
    assert len(optimizer.param_groups) == 1
    return net, optimizer


@each_search
def test_a_checkpoint_of_the_phase_goes_on_where_no_head_is_found(kind):
    """As where the model was loaded from the checkpoint."""
    straight = started(kind).run(4)
    net, optimizer = joined(kind, straight)
    optimizer.load_state_dict(straight.optimizer.state_dict())
    continued = Loop(net, optimizer)
    for loop in (straight, continued):
        torch.manual_seed(7)
        loop.run(8, first=4)
    assert same(weights(straight.net), weights(net))
    assert same(snapshot(straight.optimizer), snapshot(optimizer))


@each_search
def test_a_checkpoint_without_a_head_loads_where_one_is_found(kind):
    """Settings of the checkpoint hold, and it is of a run that has begun."""
    net = network()
    straight = Loop(net, kind.cls(net.parameters(), **kind.options)).run(4)
    stored = straight.optimizer.state_dict()
    for group in stored["param_groups"]:  # as 0.1.0 wrote it
        for name in [n for n in group if n.startswith("head")]:
            del group[name]
    fresh = network()
    fresh.load_state_dict(net.state_dict())
    continued = Loop(fresh, kind.make(fresh))
    continued.optimizer.load_state_dict(stored)
    assert not continued.optimizer.head_alone
    for loop in (straight, continued):
        torch.manual_seed(7)
        loop.run(4, first=4)
    assert same(weights(net), weights(fresh))


def test_other_groups_are_torch_s_to_refuse():
    net = network()
    stored = SaLSaAdam(head_groups(net), head_first=2).state_dict()
    for params in ([*net[0].parameters()], [{"params": [p]} for p in net.parameters()]):
        with pytest.raises(ValueError, match="parameter group"):
            SaLSaAdam(params, head_first=2).load_state_dict(stored)


@each_stock
def test_a_stock_checkpoint_with_another_head_is_refused_with_what_to_do(kind):
    loop = started(kind).run(4)
    _, optimizer = joined(kind, loop)
    message = "do not agree on whether there is a new head.*name the head.*leave that out"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(loop.optimizer.state_dict())
    stock = type(loop.optimizer).__bases__[1]
    stored = stock(loop.net.parameters(), **kind.options).state_dict()
    with pytest.raises(ValueError, match=message):
        loop.optimizer.load_state_dict(stored)
    optimizer.load_state_dict(stored)  # neither has one
    assert not optimizer.head_alone


# --- torch's contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in ALL if "without" not in k.name], ids=str)
def test_checkpoint_libraries_make_it_create_its_state(kind):
    """They call `step` without gradients, or with a learning rate of 0; the phase sees no trace."""
    clean, asked = started(kind, head_first=3), started(kind, head_first=3)
    for loop in (clean, asked):
        torch.manual_seed(7)
        for number in range(5):
            loop.step(number)
            if loop is asked and number < 3:
                ask_for_state(loop.net, loop.optimizer)
    assert same(weights(clean.net), weights(asked.net))
    assert same(snapshot(clean.optimizer), snapshot(asked.optimizer))


def ask_for_state(net, optimizer):
    """As torch.distributed.checkpoint does."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


@each_kind
def test_the_phase_needs_the_loss(kind):
    net = network()
    optimizer = kind.make(net)
    net(batch(0)[0]).sum().backward()
    before = weights(net)
    with pytest.raises(RuntimeError, match="no loss to re-evaluate.*objective.record"):
        optimizer.step()
    assert same(weights(net), before)


@each_search
def test_a_closure_will_do(kind):
    net = network()
    optimizer = kind.make(net.eval())
    before = body_of(net)
    for number in range(3):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step(lambda x=x, y=y: (net(x) - y).square().mean())
    assert same(body_of(net), before)
    assert optimizer.counters.searches == 3
    assert float((net(batch(0)[0]) - batch(0)[1]).square().mean()) < 0.5 * BIAS**2


@each_kind
def test_a_failed_search_takes_no_step_and_says_so(kind):
    class Masked(Loop):
        def loss(self, x, y):
            loss = super().loss(x, y)
            return loss + loss.detach() * (torch.nan if self.masked else 0)

        masked = False

    loop = started(kind, make_loop=Masked).run(2)
    before, loop.masked = weights(loop.net), True
    with pytest.warns(
        UserWarning, match=r"search of the new head failed: the loss is nan.* no step"
    ):
        loop.step(2)
    assert same(weights(loop.net), before)
    assert loop.optimizer.step_size == 0
    assert loop.optimizer.counters.failed_searches == 1
    loop.masked = False
    loop.run(1, first=3)
    assert loop.optimizer.step_size > 0


@each_stock
def test_hooks_run_once_a_step(kind):
    stock = type(started(kind).optimizer).__bases__[1]
    stock([nn.Parameter(torch.ones(1))], **kind.options)  # now torch has wrapped its step
    loop, calls = started(kind, head_first=2), []
    loop.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    loop.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    loop.run(4)
    assert calls == 4 * ["pre", "post"]


@each_stock
def test_the_schedule_runs_from_the_first_update(kind):
    loop = started(kind, head_first=3)
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    for number in range(5):
        assert loop.optimizer.param_groups[0]["lr"] == kind.options["lr"] / (1 + number)
        loop.step(number)
        schedule.step()


@each_stock
def test_groups_join_late_and_names_are_sane(kind):
    loop = started(kind).run(2)
    late = nn.Parameter(torch.ones(2))
    loop.optimizer.add_param_group({"params": [late]})
    assert loop.optimizer.param_groups[-1]["head_steps"] == 2
    assert not loop.optimizer.param_groups[-1]["head"]
    assert loop.optimizer.head_alone
    cls = type(loop.optimizer)
    assert cls.__name__ == f"HeadFirst{cls.__bases__[1].__name__}"
    assert isinstance(loop.optimizer, torch.optim.Optimizer)
    assert repr(loop.optimizer).startswith(cls.__name__)
    with pytest.raises(ValueError, match="head_first=-1 is not allowed"):
        kind.make(network(), head_first=-1)


def test_a_stock_optimizer_alone_has_no_objective():
    net = network()
    with pytest.raises(TypeError, match="needs a line-search optimizer"):
        BatchObjective(net, torch.optim.AdamW(net.parameters()))


def test_a_mark_is_true_or_false():
    params = network().parameters()
    with pytest.raises(ValueError, match="head=1 is not allowed: it must be True or False"):
        SaLSaSGD([{"params": list(params), "head": 1}])
