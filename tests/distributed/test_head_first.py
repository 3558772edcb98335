"""A new head first, in several processes: DDP and FSDP2 train it as one process does (12, 15)."""

import pytest
from launching import configuration, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OPTIMIZERS = ("salsa_adam", "salsa_sgd_plus", "adamw_torch")
STEPS, HEAD_STEPS = 40, 4
FSDP2 = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def given(optim, batch, resume=None, **arguments):
    """A run whose loss is the mean over its mini-batch, however many processes share it."""
    of_run = {
        "salsa_head_first": HEAD_STEPS,
        "average_tokens_across_devices": False,
        "max_grad_norm": 1.0,
        **arguments,
    }
    run = {**configuration("new head", optim, batch), "steps": STEPS, "arguments": of_run}
    return run if resume is None else {**run, "resume": resume}


# Resumed within the phase, at its end and after it.
SHARDED = [
    given(optim, 4, resume, fsdp=True, fsdp_config=FSDP2)
    for optim, resume in zip(OPTIMIZERS, (2, 6, 2), strict=True)
] + [given("adamw_torch", 4, HEAD_STEPS, fsdp=True, fsdp_config=FSDP2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Optimizer -> the result of one process."""
    (results,) = launch(tmp_path_factory.mktemp("one"), 1, [given(o, 8) for o in OPTIMIZERS])
    return dict(zip(OPTIMIZERS, results, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two ranks: of DDP, then of FSDP2."""
    runs = [*(given(optim, 4) for optim in OPTIMIZERS), *SHARDED]
    return launch(tmp_path_factory.mktemp("two"), 2, runs)


def test_two_processes_train_the_head_as_one_does(one, two):
    names = [*OPTIMIZERS, *OPTIMIZERS, "adamw_torch"]
    for number, (optim, result) in enumerate(zip(names, two[0], strict=True)):
        expected = one[optim]
        assert result["sharded"] == (number >= len(OPTIMIZERS))
        assert result["head_steps"] == expected["head_steps"] == HEAD_STEPS
        assert result["step_sizes"][:5] == pytest.approx(expected["step_sizes"][:5], rel=1e-3)
        assert result["losses"][:5] == pytest.approx(expected["losses"][:5], rel=1e-3)
        assert result["norm"] == pytest.approx(expected["norm"], rel=3e-3)


def test_ranks_hold_the_same_weights(two):
    for first, second in zip(*two, strict=True):
        assert first["weights"] == second["weights"]
        assert first["trials"] == second["trials"]


def test_fsdp2_resumes_in_the_phase_bit_for_bit(two):
    for result in two[0][len(OPTIMIZERS) :]:
        assert result["resumed"]["weights"] == result["weights"]
        assert result["resumed"]["step_sizes"] == result["step_sizes"]
        assert result["resumed"]["trials"] == result["trials"]
