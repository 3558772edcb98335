"""What users may write and what they are told (contract lines 18, 19)."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from hf_salsa import OPTIMIZERS, SaLSaSeq2SeqTrainingArguments, SaLSaTrainingArguments
from hf_salsa.search_arguments import ignored_settings, line_search_name, optimizer_arguments
from hf_salsa.settings import SETTINGS, SettingFields


def parse(*argv):
    return HfArgumentParser(SaLSaTrainingArguments).parse_args_into_dataclasses(list(argv))[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_line_search_is_an_optim_name(tmp_path, name):
    args = parse("--output_dir", str(tmp_path), "--optim", name)
    assert args.optim == name
    assert line_search_name(args) == name
    optimizer_class = OPTIMIZERS[name]
    assert args.max_grad_norm == (1.0 if optimizer_class.rule_type.clips_gradients else 0.0)
    optimizer_class([nn.Parameter()], **optimizer_arguments(args))


def test_defaults(tmp_path):
    args = parse("--output_dir", str(tmp_path))
    assert args.optim == "salsa_adam_plus"
    assert optimizer_arguments(args) == {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def test_all_settings_from_the_command_line(tmp_path):
    args = parse(
        *("--output_dir", str(tmp_path), "--optim", "salsa_adam", "--salsa_c", "0.5"),
        *("--salsa_beta3", "0.9", "--salsa_steps_to_double", "100"),
        *("--salsa_backtrack_factor", "0.8", "--salsa_initial_step_size", "0.1"),
        *("--salsa_max_search_interval", "5", "--salsa_direction", "momentum"),
        *("--salsa_require_decrease", "true", "--adam_beta1", "0.8", "--adam_beta2", "0.99"),
        *("--adam_epsilon", "1e-6", "--weight_decay", "0.01", "--salsa_cool_down", "0.2"),
    )
    assert optimizer_arguments(args) == {
        "c": 0.5,
        "beta3": 0.9,
        "steps_to_double": 100.0,
        "backtrack_factor": 0.8,
        "initial_step_size": 0.1,
        "max_search_interval": 5,
        "direction": "momentum",
        "require_decrease": True,
        "cool_down": 0.2,
        "betas": (0.8, 0.99),
        "eps": 1e-6,
        "weight_decay": 0.01,
    }


def test_sgd_takes_no_adam_settings(tmp_path):
    args = SaLSaTrainingArguments(str(tmp_path), optim="sls_sgd", weight_decay=0.1)
    assert optimizer_arguments(args) == {"weight_decay": 0.1}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_parse(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    path.write_text(json.dumps({"output_dir": str(tmp_path), "optim": "sls_adam", "salsa_c": 0.2}))
    parser = HfArgumentParser(SaLSaTrainingArguments)
    parse_file = parser.parse_yaml_file if suffix == "yaml" else parser.parse_json_file
    (args,) = parse_file(str(path))
    assert (args.optim, args.salsa_c) == ("sls_adam", 0.2)


@pytest.mark.parametrize("optim", ["salsa_sgd", "adamw_torch"])
@pytest.mark.parametrize("cls", [SaLSaTrainingArguments, SaLSaSeq2SeqTrainingArguments])
def test_to_dict_round_trips(tmp_path, cls, optim):
    args = cls(str(tmp_path), optim=optim, salsa_c=0.4 if optim == "salsa_sgd" else None)
    values = json.loads(json.dumps(args.to_dict()))
    (again,) = HfArgumentParser(cls).parse_dict(values)
    assert again.to_dict() == args.to_dict()
    assert cls(**values).to_dict() == args.to_dict()
    assert dataclasses.replace(args).optim == args.optim == optim


def test_stock_optimizers_keep_transformers_defaults(tmp_path):
    ours = SaLSaTrainingArguments(str(tmp_path), optim="adamw_torch").to_dict()
    stock = TrainingArguments(str(tmp_path), optim="adamw_torch").to_dict()
    assert {name: ours[name] for name in stock} == stock


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("salsa_c", 1.5, "strictly between 0 and 1"),
        ("salsa_c", 0.0, "strictly between 0 and 1"),
        ("salsa_c", float("nan"), "strictly between 0 and 1"),
        ("salsa_beta3", 1.0, r"in \[0, 1\)"),
        ("salsa_beta3", -0.1, r"in \[0, 1\)"),
        ("salsa_steps_to_double", 0.5, "at least 1"),
        ("salsa_steps_to_double", float("inf"), "finite"),
        ("salsa_backtrack_factor", 1.0, "strictly between 0 and 1"),
        ("salsa_initial_step_size", 0.0, "above 0"),
        ("salsa_initial_step_size", float("inf"), "finite"),
        ("salsa_max_search_interval", 0, "at least 1"),
        ("salsa_direction", "newton", "'gradient' or 'momentum'"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, argument, value, allowed):
    with pytest.raises(ValueError, match=rf"^{argument}={value!r} is not allowed: .*{allowed}"):
        SaLSaTrainingArguments(str(tmp_path), optim="salsa_adam", **{argument: value})


@pytest.mark.parametrize("value", [True, False])
def test_settings_that_an_optimizer_does_not_have_are_refused(tmp_path, value):
    message = f"salsa_require_decrease={value} is not allowed with optim='salsa_adam_plus'"
    with pytest.raises(ValueError, match=message):
        SaLSaTrainingArguments(str(tmp_path), optim="salsa_adam_plus", salsa_require_decrease=value)
    able = "salsa_adam, salsa_sgd, sls_adam, sls_sgd"
    with pytest.raises(ValueError, match=f"salsa_c=2.0 .* no such setting.*optim to one of {able}"):
        SaLSaTrainingArguments(str(tmp_path), salsa_c=2.0)


def test_a_misspelt_optimizer_gets_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match="optim='salsa_adma' is not an optimizer. Did you mean"):
        parse("--output_dir", str(tmp_path), "--optim", "salsa_adma")
    with pytest.raises(ValueError, match="salsa_adam, salsa_sgd, sls_adam, sls_sgd"):
        SaLSaTrainingArguments(str(tmp_path), optim="zzz")


def test_deepspeed_is_refused_with_the_alternative(tmp_path):
    with pytest.raises(ValueError, match=r"deepspeed='x.json' is not allowed.*torchrun"):
        parse("--output_dir", str(tmp_path), "--deepspeed", "x.json")


@pytest.mark.parametrize(
    ("optim", "given", "expected"),
    [
        ("salsa_adam", "max_trials=7", {"max_trials": 7}),
        ("salsa_sgd", "momentum=0.9", {"momentum": 0.9}),
        ("salsa_sgd", " momentum = 0.9 , max_trials = 7,", {"momentum": 0.9, "max_trials": 7}),
        ("salsa_adam", "direction=momentum", {"direction": "momentum"}),
        ("salsa_adam", "require_decrease=True", {"require_decrease": True}),
        (
            "salsa_adam_plus",
            "trust=0.02,first_share=0.2,max_search_interval=7",
            {"trust": 0.02, "first_share": 0.2, "max_search_interval": 7},
        ),
        ("salsa_adam", "", {}),
    ],
)
def test_optim_args_reach_settings_without_a_field(tmp_path, optim, given, expected):
    args = parse("--output_dir", str(tmp_path), "--optim", optim, "--optim_args", given)
    stock = optimizer_arguments(SaLSaTrainingArguments(str(tmp_path), optim=optim))
    found = optimizer_arguments(args)
    assert found == stock | expected
    assert {name: type(found[name]) for name in expected} == {
        name: type(value) for name, value in expected.items()
    }
    optimizer = OPTIMIZERS[optim]([nn.Parameter(torch.ones(1))], **found)
    for name, value in expected.items():
        assert optimizer.param_groups[0][name] == value
    assert args.optim_args == given  # as it was, for cards and checkpoints


def test_optim_args_stand_beside_fields(tmp_path):
    args = SaLSaTrainingArguments(
        str(tmp_path), optim="salsa_adam", salsa_c=0.4, optim_args="max_trials=7"
    )
    found = optimizer_arguments(args)
    assert (found["c"], found["max_trials"]) == (0.4, 7)


@pytest.mark.parametrize(
    ("optim", "given", "said"),
    [
        (
            "salsa_adam",
            "momentum=0.9",
            "optim_args: momentum=0.9 is not allowed .*'salsa_adam'",
        ),
        ("salsa_adam_plus", "require_decrease=True", "optim_args: require_decrease=True is not"),
        ("salsa_adam", "lr=0.1", "optim_args: lr=0.1 is not allowed .*no such setting"),
        ("salsa_adam", "foo=bar", "optim_args: foo='bar' is not allowed .*no such setting"),
        ("salsa_adam", "total_steps=5", "optim_args: total_steps=5 is not allowed"),
        ("salsa_adam", "max_trials=0", "optim_args: max_trials=0 is not allowed: .*at least 1"),
        ("salsa_adam", "max_trials=2.5", "optim_args: max_trials=2.5 is not allowed: .*whole"),
        ("salsa_adam", "max_trials=many", "optim_args: max_trials='many' is not allowed: .*whole"),
        ("salsa_sgd", "momentum=1.0", r"optim_args: momentum=1.0 is not allowed: .*\[0, 1\)"),
        ("salsa_sgd", "momentum=", "optim_args='momentum=' is not allowed: .*NAME=VALUE"),
        ("salsa_adam", "max_trials", "optim_args='max_trials' is not allowed: .*NAME=VALUE"),
        ("salsa_adam", "c=0.4,7", "optim_args='c=0.4,7' is not allowed: .*NAME=VALUE"),
        ("salsa_adam", "=7", "optim_args='=7' is not allowed: .*NAME=VALUE"),
    ],
)
def test_optim_args_that_do_not_fit_are_refused(tmp_path, optim, given, said):
    with pytest.raises(ValueError, match=said):
        SaLSaTrainingArguments(str(tmp_path), optim=optim, optim_args=given)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("weight_decay=0.1", "weight_decay"),
        ("eps=1e-6", "adam_epsilon"),
        ("betas=(0.8,0.99)", "adam_beta1"),
        ("betas=0.8", "adam_beta1"),
    ],
)
def test_optim_args_that_have_a_field_of_transformers_name_it(tmp_path, given, field):
    with pytest.raises(ValueError, match=rf"optim_args.* is not allowed.*Use {field}\b"):
        SaLSaTrainingArguments(str(tmp_path), optim_args=given)


def test_optim_args_take_several_settings_and_refuse_infinity(tmp_path):
    args = SaLSaTrainingArguments(
        str(tmp_path), optim="salsa_adam_plus", optim_args="trust=0.02, first_share=0.7"
    )
    assert optimizer_arguments(args)["trust"] == 0.02
    assert optimizer_arguments(args)["first_share"] == 0.7
    for infinite in ("inf", "1e999"):
        with pytest.raises(ValueError, match="trust=inf is not allowed: .* finite number above 0"):
            SaLSaTrainingArguments(
                str(tmp_path), optim="salsa_adam_plus", optim_args=f"trust={infinite}"
            )


def test_settings_of_a_search_are_refused_with_a_stock_optimizer(tmp_path):
    with pytest.raises(ValueError, match=r"salsa_c=0.3 is not allowed with optim='adamw_torch'"):
        SaLSaTrainingArguments(str(tmp_path), optim="adamw_torch", salsa_c=0.3)


def test_the_norm_to_clip_at_follows_the_optimizer(tmp_path):
    args = SaLSaTrainingArguments(str(tmp_path))
    assert args.max_grad_norm == 1.0
    args = dataclasses.replace(args, optim="salsa_adam")
    assert args.max_grad_norm == 0.0
    assert dataclasses.replace(args, optim="adamw_torch").max_grad_norm == 1.0
    assert dataclasses.replace(args, optim="salsa_sgd_plus").max_grad_norm == 1.0
    assert dataclasses.replace(args, max_grad_norm=0.5).max_grad_norm == 0.5
    asked = SaLSaTrainingArguments(str(tmp_path), max_grad_norm=0.0)
    assert dataclasses.replace(asked, optim="adamw_torch").max_grad_norm == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_set_optimizer_takes_every_name(tmp_path, name):
    args = SaLSaTrainingArguments(str(tmp_path), optim="adamw_torch")
    assert args.set_optimizer(name, weight_decay=0.1) is args
    direct = SaLSaTrainingArguments(str(tmp_path), optim=name, weight_decay=0.1)
    assert args.to_dict() == direct.to_dict()
    args.set_optimizer("adamw_torch", learning_rate=1e-3)
    assert (args.optim, args.learning_rate, args.max_grad_norm) == ("adamw_torch", 1e-3, 1.0)


def test_optim_args_of_a_stock_optimizer_are_transformers_business(tmp_path):
    args = SaLSaTrainingArguments(str(tmp_path), optim="adamw_anyprecision", optim_args="a=1")
    assert args.optim_args == "a=1"


def test_optim_args_set_later_are_checked_when_the_optimizer_is_made(tmp_path):
    args = SaLSaTrainingArguments(str(tmp_path), optim="salsa_adam")
    args.optim_args = "max_trials=0"
    with pytest.raises(ValueError, match="optim_args: max_trials=0 is not allowed: .*at least 1"):
        optimizer_arguments(args)


def test_help_says_meaning_range_and_every_default():
    parser = HfArgumentParser(SaLSaTrainingArguments)
    shown = " ".join(parser.format_help().split())
    said = {action.dest: action.help for action in parser._actions}
    for entry in dataclasses.fields(SettingFields):
        name = entry.name.removeprefix("salsa_")
        words = said[entry.name]
        assert words.startswith(SETTINGS[name].meaning)
        assert SETTINGS[name].allowed in words
        assert words in shown
        for optim, cls in OPTIMIZERS.items():
            if name in cls.default_settings():
                default, names = cls.default_settings()[name], f"[^()]*\\b{optim}\\b[^()]*"
                assert re.search(rf"{re.escape(str(default))} \({names}\)", words)


def test_what_a_line_search_ignores_is_named(tmp_path):
    args = SaLSaTrainingArguments(
        str(tmp_path), learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.1
    )
    assert ignored_settings(args) == [
        "learning_rate=2e-05",
        "lr_scheduler_type=cosine",
        "warmup_steps=0.1",
    ]
    assert ignored_settings(SaLSaTrainingArguments(str(tmp_path))) == []


def test_values_set_later_are_checked_when_the_optimizer_is_made(tmp_path):
    args = SaLSaTrainingArguments(str(tmp_path), optim="salsa_adam")
    args.salsa_c = 7.0  # as a hyper-parameter search does
    with pytest.raises(ValueError, match=r"salsa_c=7.0 is not allowed: .*between 0 and 1"):
        optimizer_arguments(args)
