"""What is said about a wrong call: what was given, what is expected, the line to write."""

import re
import warnings
from functools import partial

import pytest
import torch
from cases import every_optimizer
from problems import backward, batches, clones, network_loss, parameters, point, same
from torch import nn
from transformers.utils import ModelOutput

from hf_salsa import BatchObjective, SaLSaAdam, SaLSaSGD


def says(message, *parts):
    return all(part in str(message) for part in parts)


@pytest.fixture
def objective():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    return BatchObjective(net, SaLSaSGD(net.parameters()))


@pytest.mark.parametrize("given", [torch.tensor(1.0, requires_grad=True), 1.0, None, {"x": 1}])
def test_a_loss_in_place_of_a_function_of_record(objective, given):
    with pytest.raises(TypeError) as refused:
        objective.record(given)
    kind = type(given).__name__
    assert says(refused.value, f"a {kind} as loss_fn", "a function", "record(loss_fn, batch)")


@pytest.mark.parametrize(
    ("returned", "given"),
    [
        (1.5, "float"),
        (None, "NoneType"),
        ((torch.tensor(1.0), torch.tensor(2.0)), "tuple"),
        (ModelOutput(loss=torch.tensor(1.0)), "ModelOutput"),
        ({"loss": torch.tensor(1.0)}, "dict"),
        (torch.ones(3), "shape (3,)"),
        (torch.ones(2, 0), "shape (2, 0)"),
    ],
)
def test_what_is_no_loss_of_record(objective, returned, given):
    with pytest.raises(TypeError) as refused:
        objective.record(lambda: returned)
    line = "loss.mean()" if "shape" in given else "model(**batch).loss"
    assert says(refused.value, f"loss_fn returned a {'tensor of ' * ('shape' in given)}{given}")
    assert says(refused.value, "it must return", line)


@pytest.mark.parametrize("given", [torch.tensor(1.0), 0.5, "loss"])
@every_optimizer
def test_a_loss_in_place_of_a_closure(case, given):
    params = parameters()
    backward(params, partial(network_loss, params, *next(batches(1))))
    start = clones(params)
    with pytest.raises(TypeError) as refused:
        case.make(params).step(given)
    kind = type(given).__name__
    assert says(
        refused.value, f"step() got a {kind} as closure", "a function that returns the loss"
    )
    assert says(refused.value, "step(closure, loss=loss)", "BatchObjective")
    assert same(clones(params), start)


@pytest.mark.parametrize(
    ("returned", "kind"), [(None, "NoneType"), ((1.0, 2.0), "tuple"), (torch.ones(2), "Tensor")]
)
@every_optimizer
def test_a_closure_that_returns_no_loss(case, returned, kind):
    params = parameters()
    loss = backward(params, partial(network_loss, params, *next(batches(1))))
    start, grads = clones(params), clones([p.grad for p in params])
    for known in (loss, None):
        with pytest.raises(TypeError) as refused:
            case.make(params).step(lambda: returned, loss=known)
        assert says(refused.value, f"closure returned a {kind}", "must return the loss", "`return")
    assert same(clones(params), start)
    assert same([p.grad for p in params], grads)


@pytest.mark.parametrize("set_to_none", [None, True, False], ids=["no zero_grad", "", "0"])
@every_optimizer
def test_a_closure_that_differentiates(case, set_to_none):
    """As torch's own optimizers want it: the gradients survive, the message has the way."""
    params = parameters()
    optimizer = case.make(params)
    loss_fn = partial(network_loss, params, *next(batches(1)))
    loss = backward(params, loss_fn)
    grads, start = [p.grad for p in params], clones(params)
    values = clones(grads)

    def closure():
        if set_to_none is not None:
            optimizer.zero_grad(set_to_none=set_to_none)
        again = loss_fn()
        again.backward()
        return again

    with pytest.raises(RuntimeError) as refused:
        optimizer.step(closure, loss=loss)
    assert says(refused.value, "closure differentiates", "only return the loss")
    assert says(refused.value, "loss.backward() once, before step(closure, loss=loss)")
    assert same(clones(params), start)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert same(grads, values)


@every_optimizer
def test_another_error_of_the_closure_is_its_own(case):
    params = parameters()
    loss = backward(params, partial(network_loss, params, *next(batches(1))))

    def closure():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        case.make(params).step(closure, loss=loss)


def test_an_objective_of_another_model():
    net, other = nn.Linear(3, 1), nn.Linear(3, 1)
    with pytest.raises(ValueError, match="trains no parameter of this Linear") as refused:
        BatchObjective(other, SaLSaAdam(net.parameters()))
    assert says(refused.value, "the model that the optimizer was made for", "accelerator.prepare(")


def test_a_forgotten_zero_grad_is_said_once(objective):
    optimizer = objective.line_search
    net = objective.scene.model
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number in range(4):
            x = torch.randn(8, 3)
            objective.record(lambda x: (net(x) - 1).square().mean(), x).backward()
            relevant = [str(w.message) for w in said if "zero_grad" in str(w.message)]
            assert len(relevant) == (number > 0)
            optimizer.step()
    assert says(relevant[0], "still in .grad", "optimizer.zero_grad() after optimizer.step()")


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_either_kind_is_silent(objective, set_to_none):
    net = objective.scene.model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            x = torch.randn(8, 3)
            objective.record(lambda x: (net(x) - 1).square().mean(), x).backward()
            objective.line_search.step()
            objective.line_search.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize(("args", "settings"), [((1e-3,), {}), ((), {"lr": 1e-3})])
@every_optimizer
def test_a_learning_rate(case, args, settings):
    given = "0.001 as a positional argument" if args else "lr=0.001"
    with pytest.raises(TypeError, match=re.escape(f"got {given}, but there is no learning")) as no:
        case.cls([point(1.0)], *args, **settings)
    assert says(no.value, f"Write {case.cls.__name__}(params)", "settings by name", "c=0.3")
