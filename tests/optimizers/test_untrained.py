"""Whether weights were ever trained, and the warm-up of those that were not."""

import copy
import math

import pytest
import torch
from cases import silent
from problems import train_regression
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from hf_salsa import SaLSaAdamPlus, SaLSaSGDPlus
from hf_salsa.optimizers.untrained import never_trained, some_new

USUAL = SaLSaAdamPlus.usual_step_size
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def bert():
    return BertModel(BertConfig(**SMALL, intermediate_size=8))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))


def convolutions():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))


def normalised():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16, bias=False), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("make", [bert, gpt2, normalised])
def test_weights_of_a_new_model_were_never_trained_and_one_step_changes_that(make):
    model = make()
    params = list(model.parameters())
    assert never_trained(params)
    for param in params:
        param.grad = torch.randn_like(param)
    torch.optim.AdamW(params, lr=1e-5).step()
    assert not never_trained(params)


def test_normalisations_of_a_convolutional_network_show_it():
    model = convolutions()
    model(torch.zeros(1, 3, 8, 8))
    assert never_trained(list(model.parameters()))


def test_where_nothing_shows_the_weights_count_as_trained():
    """Random biases, and none at all, as of LoRA's factors."""
    assert not never_trained(list(nn.Linear(8, 8).parameters()))
    assert not never_trained([nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.randn(8, 4))])
    assert not never_trained([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(()))])
    assert not never_trained([])


def test_a_new_head_does_not_make_a_trained_body_new():
    body = bert()
    for param in body.parameters():
        param.data.add_(1e-3 * torch.randn_like(param))
    head = nn.Linear(8, 3)
    nn.init.zeros_(head.bias)
    assert not never_trained([*body.parameters(), *head.parameters()])


def test_a_new_part_shows_by_a_parameter_of_0():
    """The bias of a head, the second matrix of adapters, a gate; and no longer after one step."""
    trained = [torch.randn(4, 3), torch.randn(4), torch.tensor([0.0, 1.0]), torch.zeros(0)]
    assert not some_new([])
    assert not some_new(trained)
    for new in (torch.zeros(4), torch.zeros(4, 2), torch.zeros(()), torch.zeros(2).bfloat16()):
        assert some_new([*trained, new])
        param = nn.Parameter(new)
        param.grad = torch.ones_like(param)
        torch.optim.AdamW([param], lr=1e-5).step()
        assert not some_new([*trained, param])
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64):
        assert not some_new([torch.tensor([0, 1e-7], dtype=dtype)])
        assert some_new([torch.zeros(2, dtype=dtype)])


def train_on(optimizer_type, *, new_bias=False, frozen=False, head_first=0):
    """Return the group of an optimizer that has found its first step size."""
    model = normalised()
    for param in model.parameters():
        param.data.add_(1e-3)
    if new_bias:
        nn.init.zeros_(model[3].bias)
    model[3].bias.requires_grad_(not frozen)
    head = {"params": model[3].parameters(), "head": True}
    groups = [{"params": model[:3].parameters()}, head]
    optimizer = optimizer_type(groups, total_steps=400, head_first=head_first)
    train_regression(optimizer, model, 3)
    assert optimizer.counters.searches > head_first
    return optimizer.param_groups[0]


@silent
def test_only_a_trained_model_with_nothing_new_counts_as_all_trained():
    assert train_on(SaLSaAdamPlus)["all_trained"]
    assert train_on(SaLSaAdamPlus, new_bias=True, frozen=True)["all_trained"]
    assert not train_on(SaLSaAdamPlus, new_bias=True)["all_trained"]
    assert not train_on(SaLSaAdamPlus, head_first=2)["all_trained"]
    assert not train_on(SaLSaSGDPlus)["all_trained"]


@silent
def test_adams_step_size_rises_to_the_usual_one_in_a_twentieth_of_the_run():
    model = normalised()
    optimizer = SaLSaAdamPlus(model.parameters(), total_steps=2000)
    found = train_regression(optimizer, model, 1)
    assert optimizer.counters.trials == 2  # the two checks of the first search; it tries nothing
    found += train_regression(optimizer, model, 99, start=1)
    assert found[:9] == pytest.approx([USUAL * (k + 1) / 100 for k in range(9)])
    assert found == sorted(found)
    assert 0.85 * USUAL <= found[-1] <= USUAL


@silent
def test_sgd_has_no_usual_step_size_but_knows_that_weights_are_new():
    model = normalised()
    optimizer = SaLSaSGDPlus(model.parameters(), total_steps=400)
    train_regression(optimizer, model, 3)
    group = optimizer.param_groups[0]
    assert (group["warm_up_to"], group["warming_up"]) == (0.0, False)
    assert group["untrained"]
    assert optimizer.last_search.trials == 1


@silent
def test_a_trained_model_has_no_warm_up():
    model = normalised()
    for param in model.parameters():
        param.data.add_(1e-3)
    optimizer = SaLSaAdamPlus(model.parameters(), total_steps=400)
    first, *_ = train_regression(optimizer, model, 1)
    assert not optimizer.param_groups[0]["warming_up"]
    assert optimizer.counters.trials > 2
    assert not math.isclose(first, USUAL / 20)


@silent
def test_a_run_resumed_in_the_warm_up_is_the_straight_run_bit_for_bit():
    straight = normalised()
    optimizer = SaLSaAdamPlus(straight.parameters(), total_steps=400)
    expected = train_regression(optimizer, straight, 40)

    stopped = normalised()
    first = SaLSaAdamPlus(stopped.parameters(), total_steps=400)
    found = train_regression(first, stopped, 7)
    saved = copy.deepcopy(first.state_dict())
    second = SaLSaAdamPlus(stopped.parameters(), total_steps=400)
    second.load_state_dict(saved)
    found += train_regression(second, stopped, 33, start=7)
    assert found == expected
    for param, other in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(param, other)
