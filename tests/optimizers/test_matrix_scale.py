"""How large the matrices of a trained body are, and the warm-up that it decides."""

import copy
import math

import pytest
import torch
from cases import silent
from problems import train_regression
from torch import nn

from hf_salsa import SaLSaAdamPlus, SaLSaSGDPlus
from hf_salsa.optimizers.matrix_scale import matrix_scale


def scale_of(*weights):
    """`matrix_scale` of weights that take the whole step."""
    return matrix_scale((weight, 1.0) for weight in weights)


def test_it_is_the_step_at_which_signs_that_agree_reach_the_spectral_norm():
    """Of a matrix of independent numbers, to a few per cent."""
    torch.manual_seed(0)
    weight = 0.3 * torch.randn(400, 900)
    step = scale_of(weight) * torch.ones_like(weight)
    norms = [float(torch.linalg.matrix_norm(m, 2)) for m in (weight, step)]
    assert norms[1] == pytest.approx(norms[0], rel=0.03)


def test_it_is_the_geometric_mean_over_matrices_large_and_small():
    of_first = 0.5 * (4**-0.5 + 9**-0.5)
    of_kernel = 2.0 * (16**-0.5 + 72**-0.5)
    first, kernel = torch.full((9, 4), -0.5), torch.full((16, 8, 3, 3), 2.0)
    assert scale_of(first) == pytest.approx(of_first)
    assert scale_of(first, kernel) == pytest.approx(math.sqrt(of_first * of_kernel))
    # A matrix that takes shorter steps has room for longer ones.
    factors = matrix_scale([(first, 0.25), (kernel, 1.0)])
    assert factors == pytest.approx(2 * math.sqrt(of_first * of_kernel))


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((32, 16, 3, 3), 32, 144),  # a convolution
        ((48, 1, 5, 5), 1, 25),  # a depthwise one: every channel for itself
        ((24, 1, 7), 1, 7),
        ((1, 1, 5, 5), 5, 5),
        ((24, 16, 3), 24, 48),
        ((1, 50, 32), 50, 32),  # embeddings of positions, as of a vision transformer
        ((8, 60, 40), 480, 40),  # eight experts: (60, 40) is one of them
    ],
)
def test_weights_of_more_dimensions_are_one_matrix_or_several(shape, rows, columns):
    assert scale_of(torch.ones(shape)) == pytest.approx(rows**-0.5 + columns**-0.5)


def test_vectors_are_no_matrices_whatever_their_shape():
    first = torch.full((9, 4), -0.5)
    vectors = [torch.ones(9), torch.tensor(7.0), torch.ones(1, 1, 9), torch.ones(9, 1, 1)]
    assert scale_of(first, *vectors) == scale_of(first) > 0
    assert scale_of(*vectors) == scale_of() == 0


@pytest.mark.parametrize("odd", [0.0, math.inf, math.nan])
def test_it_is_0_where_a_matrix_does_not_say(odd):
    """As LoRA's second one, which starts with 0: half of the weights are not trained then."""
    assert scale_of(torch.ones(9, 4), torch.full((4, 9), odd)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_it_knows_every_type(dtype):
    weight = torch.full((9, 4), 0.5, dtype=dtype)
    assert scale_of(weight) == pytest.approx(0.5 * (4**-0.5 + 9**-0.5))


def trained_body():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    return body, nn.Linear(8, 1)


def groups(body, head):
    return [{"params": [*body.parameters()]}, {"params": [*head.parameters()], "head": True}]


@silent
@pytest.mark.parametrize("total_steps", [2000, None])
def test_after_the_head_the_step_size_rises_to_a_share_of_the_bodys_matrices(total_steps):
    body, head = trained_body()
    tail = {} if total_steps else {"cool_down": 0.0}
    optimizer = SaLSaAdamPlus(groups(body, head), head_first=5, total_steps=total_steps, **tail)
    model = nn.Sequential(body, head)
    train_regression(optimizer, model, 5)
    trials = optimizer.counters.trials
    end = 0.02 * scale_of(*body.parameters())
    found = train_regression(optimizer, model, 4, start=5)
    steps = 100 if total_steps else 50
    assert found == pytest.approx([end * (k + 1) / steps for k in range(4)])
    assert optimizer.counters.trials <= trials + 2 + 3  # two checks; it tries nothing
    assert optimizer.param_groups[0]["warm_up_to"] == pytest.approx(end)
    assert not optimizer.param_groups[0]["untrained"]


@silent
def test_without_a_head_phase_or_matrices_or_with_sgd_the_start_is_measured():
    body, head = trained_body()
    biases = [{"params": [p for p in body.parameters() if p.dim() == 1]}, groups(body, head)[1]]
    adapters, _ = trained_body()
    nn.init.zeros_(adapters[2].weight)
    settings = {"head_first": 2, "total_steps": 400}
    made = [
        SaLSaAdamPlus(groups(body, head), **settings | {"head_first": 0}),
        SaLSaAdamPlus(biases, **settings),
        SaLSaSGDPlus(groups(body, head), **settings),
        SaLSaAdamPlus(groups(adapters, head), **settings),
    ]
    for optimizer, layers in zip(made, [body, body, body, adapters], strict=True):
        train_regression(optimizer, nn.Sequential(layers, head), 3)
        group = optimizer.param_groups[0]
        assert (group["warm_up_to"], group["warming_up"]) == (0.0, False)
        assert group["searches"] > 0


@silent
def test_a_run_resumed_in_the_warm_up_is_the_straight_run_bit_for_bit():
    body, head = trained_body()
    straight = SaLSaAdamPlus(groups(body, head), head_first=5, total_steps=400)
    expected = train_regression(straight, nn.Sequential(body, head), 40)

    other_body, other_head = trained_body()
    model = nn.Sequential(other_body, other_head)
    first = SaLSaAdamPlus(groups(other_body, other_head), head_first=5, total_steps=400)
    found = train_regression(first, model, 12)
    second = SaLSaAdamPlus(groups(other_body, other_head), head_first=5, total_steps=400)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += train_regression(second, model, 28, start=12)
    assert found == expected
    for param, other in zip(
        straight.param_groups[0]["params"], other_body.parameters(), strict=True
    ):
        assert torch.equal(param, other)
