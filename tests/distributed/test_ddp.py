"""DDP: several processes take the decisions of one (contract lines 11, 12)."""

import pytest
from launching import configuration, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Processes -> (batch, accumulation) with 8 examples in an update.
EQUIVALENT = {1: [(8, 1), (4, 2), (1, 8)], 2: [(4, 1), (2, 2), (1, 4)]}

WITH_DROPOUT = [
    {"model": model, "batch": 4, "accumulation": 2, "dropout": 0.1, "steps": 50}
    for model in ("bert", "gpt2")
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

# The last update of an epoch has half as many micro-batches: with BERT half the loss.
HALF_UPDATES = [
    configuration(model, "salsa_sgd", batch=2, accumulation=4)
    | {"examples": 56, "arguments": {"max_grad_norm": 0.0, "salsa_initial_step_size": size}}
    for model, size in (("bert", 0.1 / 8), ("gpt2", 0.1))
]
WHOLE_UPDATES = [
    configuration(given["model"], "salsa_sgd", batch=16)
    | {"examples": 56, "arguments": {"max_grad_norm": 0.0, "salsa_initial_step_size": 0.1}}
    for given in HALF_UPDATES
]

PLAIN_LOOPS = [{"model": "plain loop", "trials": trials} for trials in ("bare", "wrapped")]


def configurations(processes):
    return [
        configuration(model, optim, batch, accumulation)
        for model in ("gpt2",)  # whose stock loss is the same however a batch is cut
        for optim in ("salsa_adam", "salsa_sgd", "salsa_adam_plus")
        for batch, accumulation in EQUIVALENT[processes]
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The results of one process, in the order of `configurations(1)` and `WHOLE_UPDATES`."""
    given = [*configurations(1), *WHOLE_UPDATES]
    return launch(tmp_path_factory.mktemp("one"), 1, given)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """For each of two ranks name -> results; all that two processes train, started once."""
    groups = {
        "equivalent": configurations(2),
        "with dropout": WITH_DROPOUT,
        "at rest": AT_REST,
        "half updates": HALF_UPDATES,
        "plain loops": PLAIN_LOOPS,
    }
    everything = [given for group in groups.values() for given in group]
    ranks = launch(tmp_path_factory.mktemp("two"), 2, everything)
    named = []
    for rank in ranks:
        results = iter(rank)
        named.append({name: [next(results) for _ in group] for name, group in groups.items()})
        assert not list(results)
    return named


def test_processes_times_accumulation_times_batch(one, two):
    """1 x 8 = 2 x 4 = 8 x 1 (processes x accumulation x batch): same step sizes and weights."""
    by_run = {}
    for results, processes in ((one[: -len(WHOLE_UPDATES)], 1), (two[0]["equivalent"], 2)):
        for given, result in zip(configurations(processes), results, strict=True):
            by_run.setdefault((given["model"], given["optim"]), []).append(result)
    assert len(by_run) == 3
    for same in by_run.values():
        assert len(same) == 6
        for result in same[1:]:
            assert result["step_sizes"] == pytest.approx(same[0]["step_sizes"], rel=1e-3)
            assert result["losses"] == pytest.approx(same[0]["losses"], rel=1e-3)
            assert result["norm"] == pytest.approx(same[0]["norm"], rel=1e-4)


def test_the_scale_of_the_loss_is_known_to_all(one, two):
    """BERT's stock loss is the sum of 4 micro-batches times 2 processes, at last of 2."""
    scales = {"bert": [8, 8, 8, 4] * 2 + [8, 8], "gpt2": [1] * 10}
    for rank in two:
        results = zip(HALF_UPDATES, rank["half updates"], one[-len(WHOLE_UPDATES) :], strict=True)
        for given, half, whole in results:
            ratios = [
                size / cut
                for size, cut in zip(whole["step_sizes"], half["step_sizes"], strict=True)
            ]
            assert half["searches"] == 10
            assert ratios == pytest.approx(scales[given["model"]], rel=1e-3)


def test_ranks_hold_the_same_weights(two):
    """After 50 steps with dropout, other masks on every rank: bit for bit."""
    first, second = two
    for name, results in first.items():
        for a, b in zip(results, second[name], strict=True):
            assert a["weights"] == b["weights"]
            assert a.get("trials") == b.get("trials")


def test_searches_leave_the_buffers_of_ddp_alone(two):
    """BatchNorm, uneven last batches and unused parameters: searching or not, all is the same."""
    for rank in two:
        always, seldom = rank["at rest"]
        assert (always["searches"], seldom["searches"] < 150) == (200, True)
        assert always["buffers"] == seldom["buffers"] != []
        assert always["weights"] == seldom["weights"]


def test_trials_through_the_wrapper_of_ddp(two):
    """A forward pass without gradients through it must not stop its broadcasts of buffers."""
    for rank in two:
        bare, wrapped = rank["plain loops"]
        assert bare == wrapped


def test_one_all_reduce_per_evaluation_and_none_without_a_search(two):
    """Each search averages f(w_k) and every trial loss; DDP itself reduces outside of Python."""
    for rank in two:
        for name in ("equivalent", "with dropout", "at rest", "half updates"):
            for result in rank[name]:
                assert result["all_reduces"] == result["searches"] + result["trials"]
