"""The objective is what was differentiated, by which factor, and nothing else (line 6)."""

import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD

both_classes = pytest.mark.parametrize("cls", [SaLSaAdam, SaLSaSGD])


def make(cls=SaLSaSGD, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = cls(net.parameters())
    objective = BatchObjective(net, optimizer, **settings)
    return net, optimizer, objective, lambda x: (net(x) - 1).square().mean()


def batch(size=8):
    return torch.randn(size, 3)


def squared_norm(net):
    return sum(float(p.grad.square().sum()) for p in net.parameters())


# Backward passes of one update; what the objective is, in terms of the recorded losses a and b.
BACKWARDS = {
    "each": (lambda a, b: (a.backward(), b.backward()), lambda a, b: a + b),
    "halves": (lambda a, b: ((a / 2).backward(), (b / 2).backward()), lambda a, b: a / 2 + b / 2),
    "the sum": (lambda a, b: (a + b).backward(), lambda a, b: a + b),
    "weights": (lambda a, b: (0.25 * a - 3 * b).backward(), lambda a, b: 0.25 * a - 3 * b),
    "the last first": (lambda a, b: (b.backward(), a.backward()), lambda a, b: a + b),
    "the first only": (lambda a, b: a.backward(), lambda a, b: a),
    "the second only": (lambda a, b: b.backward(), lambda a, b: b),
    "twice": (
        lambda a, b: (a.backward(retain_graph=True), (2 * a).backward(), b.backward()),
        lambda a, b: 3 * a + b,
    ),
    "a gradient given": (lambda a, b: a.backward(torch.tensor(0.5)), lambda a, b: a / 2),
    "a product": (lambda a, b: (a * b.detach()).backward(), lambda a, b: a * b),
}


@pytest.mark.parametrize("how", BACKWARDS)
def test_it_is_what_backward_took(how):
    """Bit for bit, at every step; the slope is the squared norm of the gradient."""
    net, optimizer, objective, loss_fn = make()
    differentiate, expected = BACKWARDS[how]
    for _ in range(3):
        a, b = (objective.record(loss_fn, batch()) for _ in range(2))
        differentiate(a, b)
        known = objective.loss
        torch.testing.assert_close(known, expected(a.detach(), b.detach()), rtol=1e-6, atol=0)
        assert torch.equal(objective(), known)
        slope = squared_norm(net)
        assert optimizer.step() == known
        assert optimizer.last_search.slope == pytest.approx(slope, rel=1e-5)
        assert optimizer.last_search.loss == float(known)
        optimizer.zero_grad()
    assert optimizer.counters.skipped_steps == 0


@pytest.mark.parametrize("how", BACKWARDS)
def test_no_gradients_of_the_step_before_are_seen(how):
    """Those of this update's own backward passes are no forgotten zero_grad()."""
    _, optimizer, objective, loss_fn = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            a, b = (objective.record(loss_fn, batch()) for _ in range(2))
            BACKWARDS[how][0](a, b)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("bad", [math.nan, 1e6])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_micro_batch_that_is_left_out_is_no_part_of_it(bad, position):
    _, optimizer, objective, loss_fn = make()
    for _ in range(4):
        total = 0.0
        for number in range(3):
            loss = objective.record(loss_fn, batch() * (bad if number == position else 1))
            if float(loss.detach()) < 100:
                loss.backward()
                total = total + loss.detach()
        assert torch.equal(objective.loss, total)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.counters.skipped_steps == 0
    assert optimizer.last_search.accepted


def test_an_update_that_is_left_out_altogether_is_none():
    """It is no skipped step either, and the next one knows nothing of it."""
    _, optimizer, objective, loss_fn = make()
    for left_out in (True, False, True, True, False):
        loss = objective.record(loss_fn, batch())
        if left_out:
            assert not objective.recorded
            continue
        loss.backward()
        assert torch.equal(objective.loss, loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        assert not objective.recorded
    assert optimizer.counters.skipped_steps == 0
    assert optimizer.counters.searches == 2


def test_an_update_without_a_backward_takes_no_step():
    net, optimizer, objective, loss_fn = make()
    before = [p.detach().clone() for p in net.parameters()]
    objective.record(loss_fn, batch())
    assert optimizer.step() is None
    assert all(map(torch.equal, before, net.parameters()))
    assert optimizer.counters.searches == optimizer.counters.skipped_steps == 0


def test_the_loss_is_known_and_returned_on_steps_that_search_only():
    _, optimizer, objective, loss_fn = make()
    for searching in (True, False, False, True):
        if not searching or optimizer.counters.searches:
            optimizer.param_groups[0]["search_interval"] = 1 if searching else 99
        assert optimizer.search_due is searching
        loss = objective.record(loss_fn, batch())
        loss.backward()
        expected = loss.detach() if searching else None
        assert objective.loss == expected
        assert optimizer.step() == expected
        optimizer.zero_grad()


# --- gradient scalers ---------------------------------------------------------------------------


def scaler_of(scale=2.0**16):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def scaled_run(cls, scaler, accumulate):
    _, optimizer, objective, loss_fn = make(cls, scaler=scaler)
    found = []
    for _ in range(6):
        for _ in range(accumulate):
            loss = objective.record(loss_fn, batch()) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        found.append(optimizer.last_search)
    return found, [p.detach() for group in optimizer.param_groups for p in group["params"]]


@both_classes
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_scaler_is_taken_out(cls, accumulate):
    plain, scaled = (scaled_run(cls, scaler, accumulate) for scaler in (None, scaler_of()))
    assert scaled[0] == plain[0]
    assert all(map(torch.equal, scaled[1], plain[1]))


@both_classes
def test_a_scaler_that_is_switched_off_is_none(cls):
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert scaled_run(cls, off, 2)[0] == scaled_run(cls, None, 2)[0]


@pytest.mark.parametrize("scale", [4096.0, 2.0**16])
def test_an_unknown_scaler_is_refused_where_the_step_searches(scale):
    net, optimizer, objective, loss_fn = make()
    loss = objective.record(loss_fn, batch())
    with pytest.raises(RuntimeError, match=f"by {scale:g}: a gradient scaler.*scaler=scaler"):
        scaler_of(scale).scale(loss).backward()
    assert all(p.grad is None for p in net.parameters())
    objective.clear()
    optimizer.param_groups[0].update(search_interval=5, searches=1)
    scaler_of(scale).scale(objective.record(loss_fn, batch())).backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("factor", [0.25, 3.0, 128.0, 300.0])
def test_a_weight_is_no_scaler(factor):
    _, optimizer, objective, loss_fn = make()
    loss = objective.record(loss_fn, batch())
    (loss * factor).backward()
    assert torch.equal(objective.loss, loss.detach() * factor)
    optimizer.step()
    assert optimizer.last_search.accepted


@both_classes
def test_the_scaler_of_accelerate_is_known(cls):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler_of()
    net, optimizer, _, _ = make(cls)
    net, optimizer = accelerator.prepare(net, optimizer)
    objective = BatchObjective(net, optimizer)
    for _ in range(3):
        loss = objective.record(lambda x: (net(x) - 1).square().mean(), batch())
        accelerator.backward(loss)
        assert torch.equal(objective.loss, loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert objective.line_search.counters.searches == 3


@pytest.mark.parametrize(
    "order",
    [
        "zero_grad last",
        "zero_grad between",
    ],
)
def test_an_overflow_that_the_scaler_skips_leaves_nothing(order):
    scaler = scaler_of(4.0)
    _, optimizer, objective, loss_fn = make(scaler=scaler)
    for number in range(4):
        loss = objective.record(loss_fn, batch() * (math.inf if number == 1 else 1))
        if order == "zero_grad between":
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        if number != 1:
            assert torch.equal(objective.loss, loss.detach())
        scaler.step(optimizer)
        scaler.update()
        if order == "zero_grad last":
            optimizer.zero_grad()
    assert optimizer.counters.skipped_steps == 1
    assert optimizer.counters.searches == 3


# --- losses with a derivative of their own ------------------------------------------------------


def gradient_penalty(net, x):
    x = x.detach().requires_grad_()
    out = net(x).tanh().sum()
    return out.square() + torch.autograd.grad(out, x, create_graph=True)[0].square().sum()


def forces(net, x):
    x = x.detach().requires_grad_()
    (force,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (force - 1).square().mean()


def adversarial(net, x):
    """Virtual adversarial training: the perturbation comes from an inner backward pass."""
    noise = (1e-2 * torch.randn_like(x)).requires_grad_()
    kept = [p.grad for p in net.parameters()]
    (net(x + noise) - net(x).detach()).square().mean().backward()
    for param, grad in zip(net.parameters(), kept, strict=True):
        param.grad = grad
    return (net(x + noise.grad.sign() * 0.1) - 1).square().mean()


def adversarial_that_leaves_gradients(net, x):
    noise = (1e-2 * torch.randn_like(x)).requires_grad_()
    (net(x + noise) - net(x).detach()).square().mean().backward()
    net.zero_grad()
    return (net(x + noise.grad.sign() * 0.1) - 1).square().mean()


@both_classes
@pytest.mark.parametrize(
    "loss_of", [gradient_penalty, forces, adversarial, adversarial_that_leaves_gradients]
)
def test_it_is_evaluated_with_gradients_and_leaves_them(cls, loss_of):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = cls(net.parameters())
    objective = BatchObjective(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            loss = objective.record(lambda x: loss_of(net, x), batch())
            loss.backward()
            params = [p for p in net.parameters() if p.grad is not None]
            grads = [(p.grad, p.grad.clone()) for p in params]
            assert torch.equal(objective(), loss.detach())
            assert objective.with_gradients
            for param, (grad, value) in zip(params, grads, strict=True):
                assert param.grad is grad
                assert torch.equal(grad, value)
            optimizer.step()
            for param, (grad, value) in zip(params, grads, strict=True):
                assert param.grad is grad
                assert torch.equal(grad, value)
            assert optimizer.last_search.accepted
            optimizer.zero_grad()


def test_a_plain_loss_is_evaluated_without_gradients():
    _, optimizer, objective, loss_fn = make()
    seen = []

    def noting(x):
        seen.append(torch.is_grad_enabled())
        return loss_fn(x)

    objective.record(noting, batch()).backward()
    optimizer.step()
    assert seen[0] is True
    assert len(seen) > 2
    assert not any(seen[1:])
    assert not objective.with_gradients


@pytest.mark.parametrize("mask", [True, False])
def test_a_transformer_in_eval_mode_takes_the_same_path(mask):
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    optimizer = SaLSaSGD(net.parameters())
    objective = BatchObjective(net, optimizer)
    padding = torch.tensor([[False, False, True], [False, True, True]]) if mask else None
    enabled = torch.backends.mha.get_fastpath_enabled()
    for _ in range(3):
        x = torch.randn(2, 3, 8)
        loss = objective.record(
            lambda x: net(x, src_key_padding_mask=padding).square().mean(1)[:, 0].mean(), x
        )
        loss.backward()
        assert torch.equal(objective(), loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    assert not net.training
    assert not optimizer.param_groups[0]["reevaluate_loss"]


# --- a batch that is written into ---------------------------------------------------------------

NESTS = {
    "tensor": (lambda x: x, lambda b: b),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "list": (lambda x: [x], lambda b: b[0]),
    "nested": (lambda x: {"a": [{"b": (x,)}]}, lambda b: b["a"][0]["b"][0]),
}


@pytest.mark.parametrize("nest", NESTS)
def test_a_batch_that_is_written_into_is_copied_and_that_is_said_once(nest):
    _, optimizer, objective, loss_fn = make()
    wrap, unwrap = NESTS[nest]
    with pytest.warns(UserWarning, match=r"loss_fn writes into tensors of its batch") as said:
        for _ in range(3):
            loss = objective.record(
                lambda b: loss_fn(unwrap(b).sub_(0.5).div_(0.25)), wrap(batch())
            )
            loss.backward()
            for _ in range(2):
                assert torch.equal(objective(), loss.detach())
            optimizer.step()
            assert optimizer.last_search.accepted
            optimizer.zero_grad()
    assert len(said) == 1


def test_a_batch_that_is_taken_apart_is_whole_again():
    _, _, objective, loss_fn = make()
    given = {"x": batch(), "labels": [1, 2]}
    loss = objective.record(lambda b: loss_fn(b.pop("x")) * len(b.pop("labels")), given)
    loss.backward()
    assert torch.equal(objective(), loss.detach())
    assert torch.equal(objective(), loss.detach())
