"""An exception at any place of a search: the weights are w_k, the next step works (line 8)."""

import random
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from cases import both_directions, every_optimizer
from problems import backward, batches, clones, network_loss, parameters, same, snapshot, train
from torch import nn

from hf_salsa import BatchObjective

ERRORS = [RuntimeError("out of memory"), KeyboardInterrupt()]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
KERNELS = ["_foreach_copy_", "_foreach_lerp_", "_foreach_add_", "dot"]


class Moody(nn.Module):
    """Draws, counts, keeps statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1))
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(float(x.sum()))
        self.mean.lerp_(x.mean(0), 0.1)
        return (self.body(x - self.mean) - random.random() - np.random.rand()).square().mean()


def everything(net):
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        [b.tolist() for b in net.buffers()],
        (net.calls, list(net.seen), [m.training for m in net.modules()]),
        [p.tolist() for p in net.parameters()],
        [p.grad.tolist() for p in net.parameters()],
    )


def seeded():
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)


def raise_at(number, error, function):
    """`function`, which raises at its call `number` (after its work), and how often it came."""
    calls = [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        result = function(*args, **kwargs)
        if calls[0] == number + 1:
            raise error
        return result

    return wrapped, calls


@each_error
@every_optimizer
def test_at_every_evaluation(case, error):
    """Of the first search and of a later one, until a search ends without having met it."""
    for steps_before in (0, 3):
        raised = True
        number = 0
        while raised:
            seeded()
            net = Moody()
            optimizer = case.make(net.parameters())
            objective = BatchObjective(net, optimizer)

            def take_step(loss_fn, objective=objective, optimizer=optimizer):
                objective.record(loss_fn, torch.randn(8, 4)).backward()
                optimizer.step()
                optimizer.zero_grad()

            for _ in range(steps_before):
                take_step(net)
            # Its first call is training's own.
            loss_fn, calls = raise_at(number + 1, error, net)
            objective.record(loss_fn, torch.randn(8, 4)).backward()
            state, before = snapshot(optimizer), everything(net)
            try:
                optimizer.step()
                raised = False
            except type(error):
                assert calls[0] == number + 2
                assert everything(net) == before
                assert same(optimizer.state_dict()["param_groups"], state["param_groups"])
                assert not objective.recorded
                assert not objective.evaluating
                optimizer.zero_grad()
                take_step(net)
                assert optimizer.last_search.accepted
            number += 1
        assert number > (2 if steps_before == 0 else 1)


@pytest.mark.parametrize("kernel", KERNELS)
@each_error
@every_optimizer
@both_directions
def test_inside_the_trial_points(case, kernel, error, direction, monkeypatch):
    """Each call of the kernels that write trial points, and the slope's, in turn."""
    reached, number = 0, 0
    loss_of = network_loss
    while True:
        params = parameters(torch.float32)
        optimizer = case.make(params, direction=direction, initial_step_size=30.0)
        batch = next(batches(1, torch.float32))
        loss_fn = partial(loss_of, params, *batch)
        loss = backward(params, loss_fn)
        start = clones(params)
        function, calls = raise_at(number, error, getattr(torch, kernel))
        searching = True
        with monkeypatch.context() as patch:
            patch.setattr(torch, kernel, function)
            patch.setattr(optimizer, "take_step", lambda update: None)  # the step is another matter
            try:
                optimizer.step(loss_fn, loss=loss)
                searching = calls[0] > number
            except type(error):
                pass
        if calls[0] <= number:
            break
        assert searching
        assert same(clones(params), start)
        train(optimizer, params, [batch])
        assert not same(clones(params), start)
        reached += 1
        number += 1
        if number > 40:
            break
    assert reached > 0 or kernel == "_foreach_lerp_"


@each_error
@every_optimizer
def test_a_run_with_interruptions_is_one_without(case, error):
    """Searches that were interrupted and begun anew leave nothing in the state."""
    ours, theirs = parameters(), parameters()
    optimizer, other = case.make(ours), case.make(theirs)
    for number, (x, y) in enumerate(batches(8)):
        loss_fn = partial(network_loss, ours, x, y)
        loss = backward(ours, loss_fn)
        interrupted, _ = raise_at(number % 3, error, loss_fn)
        if optimizer.search_due:
            twin = snapshot(optimizer)
            with suppress(type(error)):
                optimizer.step(interrupted, loss=loss)
                ours_now = clones(theirs)  # it was over before: take it back
                for param, weight in zip(ours, ours_now, strict=True):
                    param.data.copy_(weight)
                optimizer.load_state_dict(twin)
        train(optimizer, ours, [(x, y)])
        train(other, theirs, [(x, y)])
        assert same(clones(ours), clones(theirs))
    assert same(optimizer.state_dict(), other.state_dict())
