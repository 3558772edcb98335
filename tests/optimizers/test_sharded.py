"""Parameters that are sharded as FSDP2 does it, in one process (contract line 12)."""

import math

import pytest
import torch
from cases import both_directions, every_optimizer, failures_expected
from problems import (
    Recorded,
    backward,
    batches,
    initial_weights,
    network_loss,
    parameters,
    same,
    search_every,
    square,
    train,
)
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_salsa import SaLSaAdam
from hf_salsa.optimizers import base
from hf_salsa.optimizers.matrix_scale import matrix_scale
from hf_salsa.optimizers.untrained import never_trained, some_new


@pytest.mark.slow
@every_optimizer
@both_directions
@failures_expected
def test_sharded_parameters_give_the_same_trajectory(mesh, case, direction):
    """The layout of FSDP2, some parameters replicated; several processes have their own tests."""
    plain = parameters()
    placements = [Shard(0), Replicate(), Shard(0), Replicate()]
    sharded = [
        nn.Parameter(distribute_tensor(w, mesh, [placement]))
        for w, placement in zip(initial_weights(), placements, strict=True)
    ]
    optimizer, other = (
        case.make(sharded, direction=direction),
        case.make(plain, direction=direction),
    )
    sizes = []
    for x, y in batches(40):

        def loss_fn(x=x, y=y):
            return network_loss([p.full_tensor() for p in sharded], x, y)

        optimizer.step(loss_fn, loss=backward(sharded, loss_fn))
        sizes.append(optimizer.step_size)
    assert sizes == pytest.approx(train(other, plain, batches(40)), rel=1e-12)
    for param, expected in zip(sharded, plain, strict=True):
        assert isinstance(param, DTensor)
        torch.testing.assert_close(param.full_tensor(), expected.data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("read_at_once", [True, False])
def test_the_norm_of_sharded_gradients_shows_what_is_not_finite(mesh, monkeypatch, read_at_once):
    """As clip_grad_norm_ returns it: itself sharded."""
    if not read_at_once:
        monkeypatch.setattr(base, "_HOST_DEVICES", ())
    params = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in initial_weights()]
    optimizer = SaLSaAdam(params, initial_step_size=1e-3)

    def loss_fn():
        return square([p.full_tensor() for p in params])

    def step(spoiled):
        objective = Recorded(loss_fn)
        optimizer.attach(objective)
        objective.loss = backward(params, loss_fn)
        if spoiled:
            params[0].grad *= math.inf
        objective.gradient_norm = nn.utils.get_total_norm([p.grad for p in params])
        assert isinstance(objective.gradient_norm, DTensor)
        optimizer.step()

    step(spoiled=False)
    search_every(optimizer, 10)
    weights = [p.full_tensor().clone() for p in params]
    step(spoiled=True)
    assert same([p.full_tensor() for p in params], weights)
    assert optimizer.counters.skipped_steps == 1
    step(spoiled=False)
    assert optimizer.counters.skipped_steps == 1
    assert not same([p.full_tensor() for p in params], weights)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_sharded_weights_show_whether_they_were_trained(mesh, placement):
    def sharded(*tensors):
        return [nn.Parameter(distribute_tensor(t, mesh, [placement])) for t in tensors]

    assert never_trained(sharded(torch.ones(6), torch.zeros(4), torch.randn(4, 6)))
    assert not never_trained(sharded(torch.randn(6), torch.zeros(4), torch.randn(4, 6)))
    assert some_new(sharded(torch.randn(6), torch.zeros(4), torch.randn(4, 6)))
    assert not some_new(sharded(torch.randn(6), torch.tensor([0, 0, 0, 1.0]), torch.randn(4, 6)))


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_sharded_matrices_have_the_size_of_whole_ones(mesh, placement):
    torch.manual_seed(0)
    matrices = [torch.randn(6, 4), torch.randn(3, 2, 2).bfloat16(), torch.randn(6, 1, 3)]
    placed = [nn.Parameter(distribute_tensor(m, mesh, [placement])) for m in matrices]
    of_placed, of_whole = (matrix_scale((w, 1.0) for w in side) for side in (placed, matrices))
    assert of_placed == pytest.approx(of_whole, rel=1e-6)
