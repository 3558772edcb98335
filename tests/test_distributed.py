"""Several processes take the decisions of one (contract lines 11, 12)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EQUIVALENT = {1: [(8, 1), (4, 2), (1, 8)], 2: [(4, 1), (2, 2), (1, 4)]}  # (batch, accumulation)


def launch(folder, processes, configurations):
    """Run the worker in `processes` processes and return its results, a list per rank."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    worker = [str(TESTS / "distributed_worker.py"), str(folder), json.dumps(configurations)]
    done = subprocess.run(
        [*launcher, *worker],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]


def configurations(processes):
    return [
        {
            "model": model,
            "optim": optim,
            "batch": batch,
            "accumulation": accumulation,
            "dropout": 0.0,
            "steps": 10,
        }
        for model in ("bert", "gpt2")
        for optim in ("salsa_adam", "salsa_sgd", "salsa_adam_plus")
        for batch, accumulation in EQUIVALENT[processes]
    ]


def sharded(model, accumulation, state_dict_type, optim="salsa_adam"):
    block = {"bert": "BertLayer", "gpt2": "GPT2Block"}[model]
    settings = {
        "version": 2,
        "transformer_layer_cls_to_wrap": [block],
        "state_dict_type": state_dict_type,
    }
    return {
        "model": model,
        "optim": optim,
        "batch": 4 // accumulation,
        "accumulation": accumulation,
        "dropout": 0.0,
        "steps": 10,
        "resume": 5,
        "arguments": {"fsdp": True, "fsdp_config": settings},
    }


SHARDED = [
    sharded("bert", 1, "FULL_STATE_DICT"),
    sharded("bert", 2, "SHARDED_STATE_DICT"),
    sharded("gpt2", 2, "FULL_STATE_DICT"),
    sharded("gpt2", 1, "SHARDED_STATE_DICT"),
    sharded("gpt2", 2, "SHARDED_STATE_DICT", "salsa_adam_plus"),
]


# Every search accepts its first trial, and the step size never grows: whether a step searches
# makes no difference to what is trained.
AT_REST = [
    {
        "model": "batchnorm",
        "batch": 4,
        "accumulation": 1,
        "dropout": 0.0,
        "steps": 200,
        "arguments": {
            "salsa_c": 1e-9,
            "salsa_initial_step_size": 1e-4,
            "salsa_steps_to_double": 1e300,
            "salsa_max_search_interval": interval,
            "ddp_find_unused_parameters": True,
        },
    }
    for interval in (1, 10)
]

PLAIN_LOOPS = [{"model": "plain loop", "trials": trials} for trials in ("bare", "wrapped")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All configurations in one process and in two, started once."""
    with_dropout = [
        {"model": model, "batch": 4, "accumulation": 2, "dropout": 0.1, "steps": 50}
        for model in ("bert", "gpt2")
    ]
    one = launch(tmp_path_factory.mktemp("one"), 1, configurations(1))
    configured = configurations(2) + with_dropout + AT_REST + PLAIN_LOOPS + SHARDED
    two = launch(tmp_path_factory.mktemp("two"), 2, configured)
    assert {result["world_size"] for rank in one for result in rank} == {1}
    assert {result["world_size"] for rank in two for result in rank} == {2}
    return one[0], two


@pytest.mark.distributed
def test_processes_times_accumulation_times_batch(runs):
    """1 x 8 = 2 x 4 = 8 x 1 (processes x accumulation x batch): same step sizes and weights."""
    one, two = runs
    by_run = {}
    for results, processes in ((one, 1), (two[0], 2)):
        for configuration, result in zip(configurations(processes), results, strict=False):
            by_run.setdefault((configuration["model"], configuration["optim"]), []).append(result)
    assert len(by_run) == 6
    for same in by_run.values():
        assert len(same) == 6
        for result in same[1:]:
            assert result["step_sizes"] == pytest.approx(same[0]["step_sizes"], rel=1e-3)
            assert result["losses"] == pytest.approx(same[0]["losses"], rel=1e-3)
            assert result["norm"] == pytest.approx(same[0]["norm"], rel=1e-4)


@pytest.mark.distributed
def test_ranks_hold_the_same_weights(runs):
    """After 50 steps with dropout, other masks on every rank: bit for bit."""
    _, two = runs
    for first, second in zip(*two, strict=True):
        assert first["weights"] == second["weights"]
        assert first.get("trials") == second.get("trials")


@pytest.mark.distributed
def test_searches_leave_the_buffers_of_ddp_alone(runs):
    """BatchNorm, uneven last batches and unused parameters: searching or not, all is the same."""
    _, two = runs
    start = len(configurations(2)) + 2
    for rank in two:
        always, seldom = rank[start : start + 2]
        assert (always["searches"], seldom["searches"] < 150) == (200, True)
        assert always["buffers"] == seldom["buffers"] != []
        assert always["weights"] == seldom["weights"]


@pytest.mark.distributed
def test_trials_through_the_wrapper_of_ddp(runs):
    """A forward pass without gradients through it must not stop its broadcasts of buffers."""
    _, two = runs
    start = len(configurations(2)) + 4
    for rank in two:
        bare, wrapped = rank[start : start + 2]
        assert bare == wrapped


@pytest.mark.distributed
def test_one_all_reduce_per_evaluation_and_none_without_a_search(runs):
    """Each search averages f(w_k) and every trial loss; DDP itself reduces outside of Python."""
    _, two = runs
    for rank in two:
        for result in rank[: len(configurations(2)) + 4]:
            assert result["all_reduces"] == result["searches"] + result["trials"]


@pytest.mark.distributed
def test_fsdp2_gives_the_trajectory_of_one_process(runs):
    one, two = runs
    results = two[0][-len(SHARDED) :]
    for configuration, result in zip(SHARDED, results, strict=True):
        wanted = {name: configuration[name] for name in ("model", "optim")} | {"batch": 8}
        (expected,) = (
            single
            for candidate, single in zip(configurations(1), one, strict=True)
            if wanted.items() <= candidate.items()
        )
        assert result["sharded"]
        assert not expected["sharded"]
        assert result["step_sizes"] == pytest.approx(expected["step_sizes"], rel=1e-3)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-4)


@pytest.mark.distributed
def test_fsdp2_resumes_bit_for_bit(runs):
    """From full and from sharded state dictionaries."""
    _, two = runs
    for result in two[0][-len(SHARDED) :]:
        assert result["resumed"]["weights"] == result["weights"]
        assert result["resumed"]["step_sizes"] == result["step_sizes"]
        assert result["resumed"]["trials"] == result["trials"]
