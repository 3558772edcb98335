"""The benchmarks run and show what they should; how fast anything is, no test says."""

import importlib
import json
import math
import sys
from pathlib import Path

import compare
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaAdamPlus

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(compare.__file__).parent / "benchmarks"))  # they are run from there
contenders, import_time, measuring, plain_networks, put_back, step, train, workloads = map(
    importlib.import_module,
    (
        *("contenders", "import_time", "measuring", "plain_networks"),
        *("put_back", "step", "train", "workloads"),
    ),
)


@pytest.fixture
def tiny(monkeypatch):
    """A model that takes no time, in the place of MiniLM."""
    config = BertConfig(
        vocab_size=4096,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    shape = workloads.ModelShape(BertForSequenceClassification, config, 4, 8)
    monkeypatch.setitem(workloads.MODELS, "minilm", shape)
    monkeypatch.setattr(contenders, "SHORTEST_TURN", 1e-9)
    return shape


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning:hf_salsa")
def test_the_optimizers_alone(tiny, tmp_path, capsys):
    output = tmp_path / "figures.json"
    flags = ["--quick", "--clock", "cpu", "--trials", "1", "3", "--steps", "8"]
    step.main([*flags, "--output", str(output)])
    found = json.loads(output.read_text())
    about, costs, groups, quarters = found.values()
    assert about["clock"] == "cpu"
    rows = {row["optimizer"]: row for row in costs}
    assert rows["AdamW fused"]["ratio (quartiles)"] == [1.0, 1.0, 1.0]
    # A search backs the weights up once, all other steps copy nothing.
    assert rows["SaLSaAdam, no search"]["copies of the weights"] < 0.5
    assert rows["SaLSaAdam, no search, norm known"]["copies of the weights"] < 0.5
    for trials in ("1 trial", "3 trials"):
        assert rows[f"SaLSaAdam, search, {trials}"]["copies of the weights"] >= 1
    assert rows["SaLSaAdamPlus, no search"]["copies of the weights"] < 0.5
    assert "SaLSaAdamPlus, step before a search" in rows
    assert rows["forward and backward pass"]["ratio (quartiles)"][0] > 1
    added = {name: row["added to a training step"] for name, row in rows.items()}
    assert added["AdamW fused"] == [0.0, 0.0, 0.0]
    assert added["SaLSaAdamPlus, search"][0] > 0
    assert added["forward and backward pass"] is None
    assert {row["groups"] for row in groups} == {1, 10, 100}
    assert [row["steps"] for row in quarters] == [2, 4, 6, 8]
    assert quarters[-1]["searches"] > 0
    shown = capsys.readouterr().out
    for title in list(found)[1:]:
        assert f"\n{title}\n" in shown


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_a_search_makes_the_wanted_trials(trials):
    weight = nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    optimizer = SaLSaAdam([weight])
    search = contenders.RestingSearch(optimizer)
    search.no_search().run()
    assert optimizer.last_search is None
    search.norm_known().run()
    assert optimizer.last_search is None
    for _ in range(2):
        search.search(trials).run()
        assert optimizer.last_search.trials == trials
        assert optimizer.last_search.interval == 10
    search.search(trials, max_search_interval=1).run()
    assert optimizer.last_search.interval == 1


def test_plus_copies_the_weights_and_then_looks_back():
    weight = nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    optimizer = SaLSaAdamPlus([weight], total_steps=workloads.LONG_RUN)
    search = contenders.PlusSearch(optimizer)
    for _ in range(2):
        before = weight.detach().clone()
        search.step_before().run()
        trials = optimizer.counters.trials
        assert torch.equal(optimizer.state[weight]["previous"], before)
        assert not torch.equal(weight, before)
        assert optimizer.search_due
        search.search().run()
        assert optimizer.counters.trials == trials + 1
        assert optimizer.last_search.slope != 0  # it saw a step
        assert optimizer.last_search.interval == 20


@pytest.mark.parametrize("due", [True, False])
@pytest.mark.parametrize("name", ["salsa_adam", "salsa_sgd"])
def test_a_line_search_at_rest(name, due):
    """It goes on at its step size, and its next searches are as far apart as they may be."""
    weight = nn.Parameter(torch.zeros(()))
    optimizer = OPTIMIZERS[name]([weight], max_search_interval=7, steps_to_double=50)
    state = workloads.at_rest(optimizer, 1e-3, search_due=due)
    workloads.update_groups(optimizer, state)
    assert optimizer.step_size == pytest.approx(1e-3, rel=1e-3)
    assert optimizer.search_due is due
    assert optimizer.param_groups[0]["steps_to_double"] == 50
    weight.grad = torch.ones(())
    searches = optimizer.counters.searches
    for _ in range(14):
        start = weight.item()
        optimizer.step(lambda start=start: torch.tensor(0.0 if weight == start else -1.0), loss=0.0)
    assert optimizer.counters.searches == searches + 2


@pytest.mark.slow
def test_whole_runs(tiny, capsys):
    train.main(["--quick", "--steps", "10"])
    shown = capsys.readouterr().out
    assert "Training runs, minilm" in shown
    lines = [line.split("|") for line in shown.splitlines() if line.startswith("| ")]
    head, rows = [cell.strip() for cell in lines[0]], {}
    for line in lines[2:]:
        cells = dict(zip(head, map(str.strip, line), strict=True))
        rows[cells["run"]] = cells
    for interval, searches in ((10, 0.1), (1, 1.0)):
        row = rows[f"SaLSaAdam, interval {interval}, 1 trial"]
        assert float(row["searches per step"]) == pytest.approx(searches, abs=0.04)
        assert float(row["extra forwards per step"]) == float(row["searches per step"])
    assert rows["adamw_torch_fused"]["searches per step"] == "0"
    assert "the forward pass alone" in rows


def test_whole_jobs(tmp_path, capsys):
    output = tmp_path / "figures.json"
    flags = ["--jobs", "probe", "--updates", "3", "--optims", "sls_adam", "--repeats", "2"]
    train.main([*flags, "--output", str(output)])
    _, (stock, ours) = json.loads(output.read_text()).values()
    assert (stock["run"], ours["run"]) == ("adamw_torch_fused", "sls_adam")
    assert stock["updates"] == ours["updates"] == 3
    assert stock["wall (quartiles)"] == stock["processor (quartiles)"] == [1.0, 1.0, 1.0]
    assert stock["extra forwards"] == 0
    assert ours["extra forwards"] > 3  # each of its steps searches
    assert "The whole job probe, 3 updates" in capsys.readouterr().out


def test_what_is_put_back(tiny, tmp_path, capsys):
    """Of a tiny model's step it is a large part; of a step without a search, nearly nothing."""
    output = tmp_path / "figures.json"
    put_back.main(["--clock", "cpu", "--repeats", "3", "--output", str(output)])
    _, rows = json.loads(output.read_text()).values()
    ms = [row["ms"] for row in rows]
    assert ms[1] > ms[0] > 0
    assert ms[1] > ms[2] > 5 * ms[3] > 0
    assert "MISSED: 0.03" in capsys.readouterr().out


def test_plain_networks(tmp_path, capsys):
    """Every network trains; of the rates, which AdamW has each once, the best one is shown."""
    output = tmp_path / "figures.json"
    plain_networks.main(["--updates", "10", "--repeats", "2", "--output", str(output)])
    about, rows = json.loads(output.read_text()).values()
    assert about["repeats"] == 2
    *of_networks, mean = rows
    assert [row["network"] for row in of_networks] == list(plain_networks.tasks())
    task = plain_networks.tasks()["digits, three layers"]
    row = of_networks[0]
    losses = {
        rate: sum(plain_networks.train(task, seed, 10, rate)[0] for seed in (0, 1)) / 2
        for rate in (None, *plain_networks.RATES)
    }
    assert row["SaLSaAdamPlus"] == pytest.approx(losses.pop(None))
    assert row["its rate"] == min(losses, key=losses.get)
    assert row["AdamW, best of 7 rates"] == pytest.approx(min(losses.values()))
    assert row["ratio"] == pytest.approx(row["SaLSaAdamPlus"] / min(losses.values()))
    ratios = [row["ratio"] for row in of_networks]
    assert math.prod(ratios) == pytest.approx(mean["ratio"] ** len(ratios))
    assert all(row["largest step size"] > 0 for row in of_networks)
    assert "Training loss at the end of 10 updates" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plain_networks.main(["--updates", "9"])


def test_importing(monkeypatch, capsys):
    cases = [
        import_time.Case("import json", "import decimal", 1e9),
        import_time.Case("import decimal", "import json", -1.0),
    ]
    monkeypatch.setattr(import_time, "CASES", cases)
    monkeypatch.setattr(import_time, "HEAVY", ("json", "decimal", "torch"))
    import_time.main(["--repeats", "2"])
    shown = capsys.readouterr().out
    assert "| then import decimal" in shown
    assert "met: 1000000000.0" in shown
    assert "MISSED: -1.0" in shown  # and that is no error
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["json", "by torch itself"] in lines
    assert ["decimal", "yes"] in lines
    assert ["torch", "no"] in lines


def test_ratios_are_taken_within_each_round():
    ratio = measuring.Ratio.of([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])
    assert ratio == (2.0, 1.5, 2.5)
    assert str(ratio) == "2.000 (1.500-2.500)"


def test_contenders_take_turns_in_new_orders():
    order = []
    found = measuring.in_turns({n: lambda n=n: order.append(n) or 1.0 for n in "abc"}, 4)
    assert found == dict.fromkeys("abc", [1.0] * 4)
    rounds = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({*map(tuple, rounds)}) > 1


def test_peak_memory():
    def run():
        first = torch.ones(1000)
        del first
        return torch.ones(3000).sum()

    kept = torch.ones(10_000)  # it was there before
    assert 12_000 <= measuring.peak_memory(run) < 14_000
    assert kept.numel() == 10_000


def test_a_table(capsys):
    rows = [{"name": "a", "x": 0.12345, "y": None}, {"name": "b", "x": 12345.6, "y": 2}]
    measuring.print_table("Title", rows)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Title",
        "",
        "| name | x     | y   |",
        "| ---- | ----- | --- |",
        "| a    | 0.123 | n/a |",
        "| b    | 12346 | 2   |",
    ]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (step, ["--repeats", "1"], "--repeats 1 is too few"),
        (step, ["--steps", "3"], "--steps 3 is too few"),
        (train, ["--steps", "15"], "--steps 15 is not a multiple of 10"),
        (train, ["--models", "t5"], "invalid choice: 't5'"),
    ],
)
def test_wrong_flags(capsys, script, flags, message):
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
