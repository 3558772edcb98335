"""A new head first, in several processes: DDP and FSDP2 train it as one process does (12, 15)."""

import pytest
from launching import configuration, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OPTIMIZERS = ("salsa_adam", "salsa_sgd_plus", "salsa_adam_plus", "adamw_torch")
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
    for optim, resume in zip(OPTIMIZERS, (2, 6, 5, 2), strict=True)
] + [given("adamw_torch", 4, HEAD_STEPS, fsdp=True, fsdp_config=FSDP2)]


# The body takes shorter steps than the head: processes -> the runs.
FACTOR = 0.25
WITH_FACTORS = {
    1: [given("salsa_adam", 8), given("salsa_sgd_plus", 8)],
    2: [
        given("salsa_adam", 4),
        given("salsa_adam", 4, 2, fsdp=True, fsdp_config=FSDP2),
        given("salsa_sgd_plus", 4, 6, fsdp=True, fsdp_config=FSDP2),
    ],
}
for runs in WITH_FACTORS.values():
    runs[:] = [{**run, "body_factor": FACTOR} for run in runs]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Optimizer, and whether with a factor -> the result of one process."""
    runs = [*(given(o, 8) for o in OPTIMIZERS), *WITH_FACTORS[1]]
    (results,) = launch(tmp_path_factory.mktemp("one"), 1, runs)
    kinds = [(run["optim"], "body_factor" in run) for run in runs]
    return dict(zip(kinds, results, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two ranks: of DDP, then of FSDP2, then with factors."""
    runs = [*(given(optim, 4) for optim in OPTIMIZERS), *SHARDED, *WITH_FACTORS[2]]
    return launch(tmp_path_factory.mktemp("two"), 2, runs)


def assert_trained_alike(result, expected):
    assert result["head_steps"] == expected["head_steps"] == HEAD_STEPS
    assert result["step_sizes"][:5] == pytest.approx(expected["step_sizes"][:5], rel=1e-3)
    assert result["losses"][:5] == pytest.approx(expected["losses"][:5], rel=1e-3)
    assert result["norm"] == pytest.approx(expected["norm"], rel=3e-3)


def test_two_processes_train_the_head_as_one_does(one, two):
    names = [*OPTIMIZERS, *OPTIMIZERS, "adamw_torch"]
    for number, (optim, result) in enumerate(zip(names, two[0][: len(names)], strict=True)):
        assert result["sharded"] == (number >= len(OPTIMIZERS))
        assert_trained_alike(result, one[optim, False])


def test_a_body_with_shorter_steps_is_trained_as_in_one_process(one, two):
    results = two[0][-len(WITH_FACTORS[2]) :]
    assert [result["sharded"] for result in results] == [False, True, True]
    for run, result in zip(WITH_FACTORS[2], results, strict=True):
        expected, plain = one[run["optim"], True], one[run["optim"], False]
        assert_trained_alike(result, expected)
        for which in (result, result.get("resumed", result)):
            factors = {(is_head, factor) for is_head, factor in which["factors"]}
            assert factors == {(False, FACTOR), (True, 1.0)}
        steps = slice(HEAD_STEPS, HEAD_STEPS + 4)  # the first ones of head and body
        assert result["step_sizes"][steps] == pytest.approx(expected["step_sizes"][steps], rel=1e-3)
        assert result["losses"][steps] == pytest.approx(expected["losses"][steps], rel=1e-3)
        assert result["step_sizes"][steps] != pytest.approx(plain["step_sizes"][steps], rel=0.1)


def test_ranks_hold_the_same_weights(two):
    for first, second in zip(*two, strict=True):
        assert first["weights"] == second["weights"]
        assert first["trials"] == second["trials"]


def test_fsdp2_resumes_in_the_phase_bit_for_bit(two):
    for result in [result for result in two[0] if result["sharded"]]:
        assert result["resumed"]["weights"] == result["weights"]
        assert result["resumed"]["step_sizes"] == result["step_sizes"]
        assert result["resumed"]["trials"] == result["trials"]
