"""The comparison's tasks and candidates: each is what its name says."""

import dataclasses
import json
import runpy

import compare
import pytest
import torch
from comparison import candidates, loaders
from comparison.candidates import BY_DEFAULT, CALIBRATED, CANDIDATES
from comparison.former_plus import FormerPlusAdam
from comparison.grid import be_quiet
from comparison.loaders import Sources, load_text
from comparison.plus_parts import CosineTail, MeasuredStart, PlainMomentum
from comparison.runs import Run, make_trainer, prepare
from comparison.tasks import PRESETS
from comparison_helpers import SMOKE, carry_out, prose_run
from support.text import DataArguments, load_texts
from transformers import TrainingArguments

from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaAdamPlus
from hf_salsa.head import find_head
from hf_salsa.rules import Plus
from hf_salsa.search_arguments import resolved_max_grad_norm

ABLATIONS = {
    "former_slow_growth": {"confidence": 1e9},
    "former_any_growth": {"confidence": -1e9},
    "former_full_start": {"first_share": 1.0},
    "former_gradient": {"direction": "gradient"},
    "former_no_averages": {"beta3": 0.0},
    "former_no_cool_down": {"cool_down": 0.0},
    "former_no_clipping": {},
}


def trainer_of(run):
    return make_trainer(run, prepare(run.task.kind, json.dumps(run.task.settings), Sources()))


def test_ablations_are_the_former_rule_without_one_part(tmp_path):
    assert ABLATIONS.keys() == candidates.ABLATED["former_plus"].keys()
    assert {*candidates.ABLATIONS, *candidates.TRIED, *BY_DEFAULT} == set(CANDIDATES)
    assert not {*candidates.ABLATIONS, *candidates.TRIED} & set(BY_DEFAULT)
    whole = FormerPlusAdam([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    for name, changed in ABLATIONS.items():
        run = prose_run(tmp_path, name)
        trainer = trainer_of(run)
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is FormerPlusAdam
        for group in optimizer.param_groups:
            assert {k: v for k, v in group.items() if k != "params" and v != whole[k]} == changed
        clipped = name != "former_no_clipping"
        norm = resolved_max_grad_norm(trainer.args.max_grad_norm, FormerPlusAdam)
        assert norm == (1.0 if clipped else 0.0)
        arguments = {} if clipped else {"max_grad_norm": 0.0}
        expected = {"rule": "FormerPlusAdam", **arguments, **changed}
        assert run.configuration["candidate"] == expected


OWN_RULES = {
    "plus_measured_start": MeasuredStart,
    "plus_plain_momentum": PlainMomentum,
    "plus_cosine_tail": CosineTail,
}


@pytest.mark.parametrize(
    "name", sorted({*candidates.ABLATED["salsa_adam_plus"]} - {"plus_go_back", *OWN_RULES})
)
def test_an_ablation_is_salsa_adam_plus_with_other_settings(tmp_path, name):
    whole = SaLSaAdamPlus([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    run = prose_run(tmp_path, name)
    optimizer = trainer_of(run).create_optimizer()
    assert type(optimizer) is SaLSaAdamPlus
    assert optimizer.param_groups
    for group in optimizer.param_groups:
        changed = {k: v for k, v in group.items() if k != "params" and v != whole[k]}
        assert changed == candidates.CANDIDATES[name].options != {}
    assert run.configuration["candidate"] == {"rule": "SaLSaAdamPlus", **changed}


@pytest.mark.parametrize("name", OWN_RULES)
def test_an_ablation_without_a_setting_has_a_rule_of_its_own(tmp_path, name):
    run = prose_run(tmp_path, name)
    optimizer = trainer_of(run).create_optimizer()
    assert type(optimizer) is OWN_RULES[name]
    assert vars(optimizer.rule) == vars(Plus())
    assert run.configuration["candidate"] == {"rule": OWN_RULES[name].__name__}


def test_without_its_warm_up_the_rule_measures_the_start():
    params = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4, 4))]

    def loss_fn():
        return params[1].square().sum() + (params[0] - 1).square().sum()

    for make, warms_up in [(SaLSaAdamPlus, True), (MeasuredStart, False)]:
        optimizer = make(params, total_steps=100)
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step(loss_fn)
        assert optimizer.param_groups[0]["warming_up"] is warms_up
        for param, value in zip(params, (0.0, 1.0), strict=True):
            param.data.fill_(value)


@pytest.mark.parametrize(("make", "adams"), [(PlainMomentum, True), (SaLSaAdamPlus, False)])
def test_with_plain_momentum_steps_are_adams(make, adams):
    ours, stock = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer, adam = make([ours], cool_down=0.0), torch.optim.AdamW([stock], weight_decay=0.0)
    for k in range(5):
        loss_fn = lambda k=k: ((k + 1) * ours.square()).sum()  # noqa: E731
        optimizer.zero_grad()
        loss_fn().backward()
        stock.grad = ours.grad.clone()
        optimizer.step(loss_fn)
        adam.param_groups[0]["lr"] = optimizer.step_size
        adam.step()
    assert torch.allclose(ours, stock, rtol=1e-6) is adams


def test_a_cosine_falls_over_the_same_share_of_the_run():
    linear, cosine = Plus(), CosineTail.rule_type()
    found = [rule.factor(k, 100) for k in (0, 40, 55, 70, 85, 99) for rule in (linear, cosine)]
    expected = [1, 1, 1, 1, 0.75, 0.853553, 0.5, 0.5, 0.25, 0.146447, 1 / 60, 0.000685]
    assert found == pytest.approx(expected, rel=1e-3)
    assert Plus().factor(5, 0) == CosineTail.rule_type().factor(5, 0) == 1


def test_a_candidate_goes_back_to_good_weights(tmp_path):
    run = prose_run(tmp_path, "plus_go_back")
    args = trainer_of(run).args
    assert (args.optim, args.salsa_go_back) == ("salsa_adam_plus", True)
    assert run.configuration["candidate"] == {"optim": "salsa_adam_plus", "salsa_go_back": True}


def test_the_study_is_of_the_rules_that_were_tried():
    studied = compare.parse_args(["--preset", "study"]).candidates
    assert candidates.TRIED.keys() == set(studied) - {
        *(CALIBRATED, "schedule_free", "salsa_adam", "former_plus")
    }
    named = compare.parse_args(["--preset", "study", "--candidates", "former_gradient"]).candidates
    assert named == ["former_gradient"]
    used = {seed for task in PRESETS["cpu"].values() for seed in (*task.seeds, 100, 101)}
    for task in PRESETS["study"].values():
        assert not used & {*task.seeds, *task.calibration_seeds}


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Ignored with")
def test_an_ablation_knows_the_length_of_its_run(tmp_path):
    results = carry_out(prose_run(tmp_path, "former_slow_growth"))
    assert results["status"] == "finished"
    sizes = results["step_sizes"]
    assert sizes[-1] < 0.2 * max(sizes)
    assert sizes[0] == pytest.approx(max(sizes), rel=0.1)


def test_paper_candidates_follow_the_papers_schedule(tmp_path):
    task = PRESETS["cpu"]["mrpc"]
    arguments = Run("mrpc", task, "adam", task.adam_rate, 0, tmp_path).arguments
    assert arguments == {
        "optim": "adamw_torch_fused",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    flat = dataclasses.replace(task, flat=True)
    arguments = Run("mrpc", flat, "sgd", 0.1, 0, tmp_path).arguments
    assert arguments == {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    # The calibrated baseline warms up and decays everywhere; line searches have neither.
    arguments = Run("mrpc", flat, CALIBRATED, 1e-4, 0, tmp_path).arguments
    assert arguments["lr_scheduler_type"] == "cosine"
    assert Run("mrpc", task, "salsa_sgd", None, 0, tmp_path).arguments == {"optim": "salsa_sgd"}


def test_rates_and_schedules_of_the_rivals(tmp_path):
    from_scratch, fine_tuned = PRESETS["cpu"]["shakespeare"], PRESETS["cpu"]["mrpc"]

    def arguments(name, task):
        rate = CANDIDATES[name].rate
        return Run("task", task, name, rate and rate(task), 0, tmp_path).arguments

    cosine = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    for task, rate, free_rate in ((from_scratch, 3e-3, 2.5e-3), (fine_tuned, 1e-4, 3e-4)):
        folk = {"optim": "adamw_torch_fused", "learning_rate": rate, **cosine}
        assert arguments("adamw_folk", task) == folk
        free = arguments("schedule_free_warmup", task)
        assert free["learning_rate"] == pytest.approx(free_rate)
        assert (free["lr_scheduler_type"], free["warmup_steps"]) == ("constant", 0.1)
    default = arguments("adamw_default", fine_tuned)
    stock = TrainingArguments(str(tmp_path))
    assert default["learning_rate"] == stock.learning_rate
    assert default["lr_scheduler_type"] == stock.lr_scheduler_type


def test_the_head_of_a_pretrained_network_of_images_is_new():
    task = PRESETS["cpu"]["efficientnet"]
    head = find_head(prepare(task.kind, json.dumps(task.settings), Sources()).make_model())
    assert head == ["network._fc.weight", "network._fc.bias"]
    assert task.new_head


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_of_the_other_half(tmp_path, monkeypatch):
    be_quiet()
    settings = SMOKE["prose"].settings | {
        "pretraining": {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    }
    sources = Sources(pretrained_dir=str(tmp_path))
    scratch = load_text(sources, **SMOKE["prose"].settings)
    prepared = load_text(sources, **settings)
    (folder,) = tmp_path.iterdir()
    assert folder.is_dir()
    with monkeypatch.context() as context:
        context.setattr(loaders, "Trainer", None)  # it is not trained again
        again = load_text(sources, **settings)
    weights = [prepared.make_model().state_dict(), again.make_model().state_dict()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def loss(model):
        inputs = torch.tensor(prepared.validation["input_ids"][:])
        with torch.no_grad():
            return model.eval()(input_ids=inputs, labels=inputs).loss.item()

    assert loss(prepared.make_model()) < loss(scratch.make_model()) - 0.1
    train, _ = prepared.make_train(0)
    text = load_texts(DataArguments())[0]
    second_half = text[: SMOKE["prose"].settings["max_characters"]][10_000:]
    vocabulary = prepared.arguments["processing_class"]
    assert vocabulary.decode(train["input_ids"][0]) == second_half[:32]
    assert len(train) == len(second_half) // 32
    other = settings | {"pretraining": settings["pretraining"] | {"max_steps": 3}}
    load_text(sources, **other)
    assert len(list(tmp_path.iterdir())) == 2


def test_commands_that_repeat_a_comparison():
    assert compare.command_of("smoke") == "python scripts/compare.py --preset smoke"
    assert compare.command_of("cpu").endswith(" --glue_dir GLUE --text_file shakespeare.txt")


LABELS = {
    "sls_adam": "Adam + SLS",
    "sls_sgd": "SGD + SLS",
    "salsa_adam": "Adam + SaLSa",
    "salsa_sgd": "SGD + SaLSa",
    "salsa_adam_plus": "Adam + SaLSa plus",
    "salsa_sgd_plus": "SGD + SaLSa plus",
}


def test_every_optimizer_of_the_package_is_a_candidate():
    labels = {name: CANDIDATES[name].label for name in OPTIMIZERS}
    assert labels | LABELS == labels
    assert set(OPTIMIZERS) < set(BY_DEFAULT)
    for name in OPTIMIZERS:
        assert CANDIDATES[name].arguments == {"optim": name}


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [("salsa_muon", "SaLSaMuon", "Muon + SaLSa"), ("muon_search", "SearchedMuon", "SearchedMuon")],
)
def test_a_new_optimizer_is_a_candidate_too(monkeypatch, name, kind, label):
    monkeypatch.setitem(OPTIMIZERS, name, type(kind, (SaLSaAdam,), {}))
    again = runpy.run_path(candidates.__file__)
    assert again["CANDIDATES"][name].label == label
    assert name in again["BY_DEFAULT"]
