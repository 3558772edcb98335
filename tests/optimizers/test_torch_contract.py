"""What torch's own tests (TestOptim) ask of an optimizer, asked of every class of this package.

What does not apply, and why:
- closures that call backward: a closure only returns the loss, since it runs at every trial; that
  one is told so is in test_messages.py;
- learning-rate schedules and tensors as lr: there is no learning rate; that an lr from outside is
  ignored and said is in test_groups.py;
- `differentiable`, `maximize`, `capturable`, `fused`, `foreach`, `nesterov`, `amsgrad`: there are
  no such settings, which test_signature.py asks for;
- sparse gradients are refused (test_step.py);
- bounds of memory of foreach kernels, and several devices.
"""

import copy
import gc
import io
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from cases import every_optimizer
from problems import (
    backward,
    batches,
    bowl,
    clones,
    complex_numbers,
    mixed_precision,
    network_loss,
    non_contiguous,
    parameters,
    point,
    same,
    scalar_and_empty,
    snapshot,
    train,
)
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


def trained(case, steps=3, **settings):
    params = parameters()
    optimizer = case.make(params, **settings)
    train(optimizer, params, batches(steps))
    return params, optimizer


# --- load_state_dict ----------------------------------------------------------------------------


@every_optimizer
def test_what_is_loaded_does_not_share_memory_and_steps_alike(case):
    params, optimizer = trained(case)
    saved = optimizer.state_dict()
    other_params = [nn.Parameter(w) for w in clones(params)]
    other = case.make(other_params)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    assert train(other, other_params, batches(4)) is not None
    assert same(saved, before)
    train(optimizer, params, batches(4))
    assert same(clones(params), clones(other_params))


@every_optimizer
def test_loading_leaves_the_given_dict_alone(case):
    _, optimizer = trained(case)
    saved = snapshot(optimizer)
    given = copy.deepcopy(saved)
    case.make(parameters()).load_state_dict(given)
    assert same(given, saved)


@every_optimizer
@pytest.mark.parametrize("there", [{}, {"map_location": "cpu"}, {"mmap": True}])
def test_a_file_round_trip(case, there, tmp_path):
    _, optimizer = trained(case)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True, **there)
    other = case.make(parameters())
    other.load_state_dict(loaded)
    assert same(other.state_dict(), optimizer.state_dict())


@every_optimizer
def test_groups_that_do_not_fit_are_refused_and_nothing_is_loaded(case):
    params, optimizer = trained(case)
    for groups in (
        [{"params": params[:2]}, {"params": params[2:]}],
        [{"params": params[:3]}],
    ):
        other = case.make(groups)
        before = snapshot(other)
        with pytest.raises(ValueError, match="loaded state dict|doesn't match"):
            other.load_state_dict(optimizer.state_dict())
        assert same(other.state_dict(), before)


@every_optimizer
def test_keys_of_the_state_are_indices_in_the_order_of_the_groups(case):
    params = parameters()
    optimizer = case.make([{"params": params[2:]}, {"params": params[:2]}])
    train(optimizer, params, batches(2))
    state = optimizer.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1], [2, 3]]
    assert list(state["state"]) == ([0, 1, 2, 3] if case.state_names else [])


# --- hooks --------------------------------------------------------------------------------------


@every_optimizer
def test_state_dict_hooks_run_and_may_change_what_passes(case):
    _, optimizer = trained(case)
    seen = []

    def pre(_):
        seen.append("save")

    def post(_, state):
        seen.append("saved")
        return {**state, "more": 1}

    def pre_load(_, state):
        seen.append("load")
        state = dict(state)
        state.pop("more")
        return state

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(post)
    handle = optimizer.register_load_state_dict_pre_hook(pre_load)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["save", "saved", "load", "loaded"]
    handle.remove()
    optimizer.load_state_dict(state)
    assert seen[4:] == ["loaded"]


@every_optimizer
def test_step_hooks_run_once_a_step(case):
    params, optimizer = trained(case)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    train(optimizer, params, batches(1))
    for handle in handles:
        handle.remove()
    train(optimizer, params, batches(1))
    assert sorted(seen) == sorted(["global pre", "pre", "post", "global post"])
    assert seen.index("pre") < seen.index("post")


# --- copies -------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_pickles_step_alike(case, steps):
    params, optimizer = trained(case, steps)
    for copied_params, copied in (
        copy.deepcopy((params, optimizer)),
        pickle.loads(pickle.dumps((params, optimizer))),
    ):
        assert same(copied.state_dict(), optimizer.state_dict())
        assert repr(copied) == repr(optimizer)
        # torch adds one of its own settings to the defaults of a copy
        assert {**optimizer.defaults, "differentiable": False} == {
            **copied.defaults,
            "differentiable": False,
        }
        train(copied, copied_params, batches(2))
    copied_state = copied.state_dict()
    train(optimizer, params, batches(2))
    assert same(copied_state, optimizer.state_dict())


@every_optimizer
def test_an_optimizer_survives_torch_save(case):
    params, optimizer = trained(case)
    file = io.BytesIO()
    torch.save((params, optimizer), file)
    file.seek(0)
    _, loaded = torch.load(file, weights_only=False)
    assert same(loaded.state_dict(), optimizer.state_dict())


# --- parameters and groups ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [scalar_and_empty, non_contiguous, complex_numbers, mixed_precision]
)
@every_optimizer
def test_parameters_of_every_layout_train_save_and_load(case, make):
    params = make()
    optimizer = case.make(params)
    loss_fn = partial(bowl, params, 3)
    first = backward(params, loss_fn)
    for _ in range(8):
        optimizer.step(loss_fn, loss=backward(params, loss_fn))
    assert float(loss_fn()) < float(first)
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = case.make(other_params)
    other.load_state_dict(snapshot(optimizer))
    assert same(other.state_dict(), optimizer.state_dict())
    other_loss = partial(bowl, other_params, 3)
    for these, one, loss in ((params, optimizer, loss_fn), (other_params, other, other_loss)):
        one.step(loss, loss=backward(these, loss))
    for param, expected in zip(other_params, params, strict=True):
        torch.testing.assert_close(param, expected)


@every_optimizer
def test_what_torch_refuses_as_parameters_is_refused(case):
    param = point(1.0)
    with pytest.raises(TypeError, match="should be an iterable"):
        case.make(param)
    with pytest.raises(ValueError, match="empty parameter list"):
        case.make([])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        case.make([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        case.make([param * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        case.make([{"params": [param]}, {"params": [param]}])
    with pytest.raises(TypeError, match="ordered collection|sets"):
        case.make([{"params": {param}}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case.make([param, param])


@every_optimizer
def test_named_parameters_keep_their_names(case):
    net = nn.Linear(2, 1)
    optimizer = case.make(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    loss_fn = lambda: net(torch.ones(3, 2)).square().mean()  # noqa: E731
    optimizer.step(loss_fn, loss=backward(list(net.parameters()), loss_fn))
    other = case.make(net.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())


@every_optimizer
def test_zero_grad(case):
    params = parameters()
    optimizer = case.make(params)
    backward(params, partial(network_loss, params, *next(batches(1))))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@every_optimizer
def test_gradients_of_0_and_frozen_parameters_move_nothing(case):
    """With neither momentum nor decay: a step of any size times 0."""
    param, frozen = point(1.0, 2.0), point(3.0).requires_grad_(False)
    optimizer = case.make([param, frozen])
    param.grad = torch.zeros_like(param)
    with pytest.warns(UserWarning, match="does not descend"):
        optimizer.step(lambda: 1.0, loss=1.0)
    assert param.tolist() == [1.0, 2.0]
    assert frozen.tolist() == [3.0]
    assert frozen not in optimizer.state


# --- what was saved by others, and gradual unfreezing -------------------------------------------


@every_optimizer
def test_numbers_where_torch_keeps_tensors_load(case):
    params, optimizer = trained(case)
    saved = snapshot(optimizer)
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    other_params = [nn.Parameter(w) for w in clones(params)]
    other = case.make(other_params)
    other.load_state_dict(saved)
    assert same(other.state_dict(), optimizer.state_dict())
    assert train(other, other_params, batches(3)) == train(optimizer, params, batches(3))


@pytest.mark.parametrize("saved_as", [torch.float64, torch.bfloat16, torch.float16])
@every_optimizer
def test_moments_of_another_precision_load_and_step(case, saved_as):
    _, optimizer = trained(case)
    saved = snapshot(optimizer)
    for entry in saved["state"].values():
        for name in entry.keys() - {"step"}:
            entry[name] = entry[name].to(saved_as)
    params = parameters(torch.float32)
    other = case.make(params)
    other.load_state_dict(saved)
    dtypes = {t.dtype for state in other.state.values() for t in state.values()}
    assert dtypes <= {torch.float32}
    train(other, params, batches(3, torch.float32))
    assert other.counters.searches > optimizer.counters.searches


@every_optimizer
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradual_unfreezing_goes_on_after_a_checkpoint(case, when):
    """A group that is added before the load or after it, and a round trip of the whole."""
    params = parameters()
    optimizer = case.make(params[2:])
    for x, y in batches(4):
        loss_fn = partial(network_loss, params, x, y)
        optimizer.step(loss_fn, loss=backward(params, loss_fn))
    if when == "before":
        optimizer.add_param_group({"params": params[:2]})
    saved, weights = snapshot(optimizer), clones(params)

    def resumed(saved, weights, unfrozen):
        params = [nn.Parameter(w.clone()) for w in weights]
        one = case.make(params[2:])
        if unfrozen:
            one.add_param_group({"params": params[:2]})
        one.load_state_dict(saved)
        if not unfrozen:
            one.add_param_group({"params": params[:2]})
        return params, one

    other_params, other = resumed(saved, weights, when == "before")
    if when == "after":
        optimizer.add_param_group({"params": params[:2]})
    assert train(other, other_params, batches(3)) == train(optimizer, params, batches(3))
    third_params, third = resumed(snapshot(other), clones(other_params), True)
    assert train(third, third_params, batches(3)) == train(optimizer, params, batches(3))
    assert same(clones(third_params), clones(params))
    assert same(third.state_dict()["state"], optimizer.state_dict()["state"])


@every_optimizer
def test_without_momentum_there_are_no_empty_entries(case):
    params, optimizer = trained(case)
    optimizer.zero_grad()
    optimizer.step()
    assert set(optimizer.state) == (set(params) if case.state_names else set())
    assert all(entry for entry in optimizer.state_dict()["state"].values())


@every_optimizer
def test_other_settings_are_named_once(case):
    name = case.some_setting
    _, optimizer = trained(case, weight_decay=0.2, **{name: 0.45})
    other = case.make(parameters(), **{name: 0.15})
    with pytest.warns(UserWarning, match="other settings, and they hold") as said:
        for _ in range(2):
            other.load_state_dict(optimizer.state_dict())
            for group in other.param_groups:
                group.update({name: 0.15, "weight_decay": 0.0})
    (message,) = {str(w.message) for w in said}
    assert len(said) == 1
    assert f"{name}=0.45 (here 0.15)" in message
    assert "weight_decay=0.2 (here 0.0)" in message
    assert "cool_down" not in message
    assert "beta" not in message
    assert "param_groups after loading" in message


@every_optimizer
def test_a_state_with_the_name_of_a_setting_is_refused(case):
    for name in (case.some_setting, "weight_decay"):
        state = type(
            "Clash", (case.rule.state_type,), {"__annotations__": {name: float}, name: 0.0}
        )
        rule = type("Rule", (case.rule,), {"state_type": dataclass(frozen=True)(state)})
        own = type("Own", (case.cls,), {"rule_type": rule})
        with pytest.raises(
            TypeError, match=f"'{name}' is a setting and a name of the state of Own"
        ):
            own(parameters())
        del own, rule, state
        gc.collect()  # else checkpoints may be taken for those of this class


@every_optimizer
@pytest.mark.parametrize("name", ["steps", "trials", "rule", "lr", "head"])
def test_a_state_with_a_name_of_the_optimizers_own_is_refused(case, name):
    state = type("Clash", (case.rule.state_type,), {"__annotations__": {name: float}, name: 0.0})
    rule = type("Rule", (case.rule,), {"state_type": dataclass(frozen=True)(state)})
    own = type("Own", (case.cls,), {"rule_type": rule})
    with pytest.raises(TypeError, match=f"'{name}' is a name of the state of Rule and one of Own"):
        own(parameters())
    del own, rule, state
    gc.collect()  # else checkpoints may be taken for those of this class
