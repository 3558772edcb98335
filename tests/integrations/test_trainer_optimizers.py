"""Which optimizer the trainer trains with, stock ones included."""

from dataclasses import dataclass

import pytest
import torch
from trainer_problems import assert_same_weights
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_salsa import OPTIMIZERS, SaLSaAdamPlus, SaLSaSGD, SaLSaTrainer, SaLSaTrainingArguments
from hf_salsa.optimizers import LineSearchAdam
from hf_salsa.rules import RuleState, SearchRecord, StepSizeRule


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}])
def test_a_stock_optimizer_trains_as_trainer_does(arguments, bert, sentences, options):
    models = []
    for trainer_class, args_class in (
        (Trainer, TrainingArguments),
        (SaLSaTrainer, SaLSaTrainingArguments),
    ):
        model = bert()
        args = arguments(args_class, optim="adamw_torch", learning_rate=1e-3, **options)
        trainer = trainer_class(model, args, train_dataset=sentences)
        metrics = trainer.train().metrics
        assert not [name for name in metrics if name.startswith("salsa")]
        models.append(model)
    assert_same_weights(*models)


def test_plain_training_arguments_train_with_the_default_and_say_so(arguments, bert, sentences):
    with pytest.warns(UserWarning, match="trains with salsa_adam_plus") as caught:
        trainer = SaLSaTrainer(bert(), arguments(TrainingArguments), train_dataset=sentences)
        trainer.train()
    assert len([w for w in caught if "trains with" in str(w.message)]) == 1
    assert isinstance(trainer.line_search, SaLSaAdamPlus)


def test_own_optimizer(arguments, bert, sentences):
    model = bert()
    optimizer = SaLSaSGD(model.parameters(), c=0.4, momentum=0.5)
    trainer = SaLSaTrainer(
        model, arguments(), train_dataset=sentences, optimizers=(optimizer, None)
    )
    trainer.train()
    assert trainer.line_search is optimizer
    assert optimizer.counters.searches == 6


@pytest.mark.slow
def test_own_stock_optimizer_is_left_alone(arguments, bert, sentences):
    models = []
    for cls in (Trainer, SaLSaTrainer):
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        args = arguments(TrainingArguments if cls is Trainer else SaLSaTrainingArguments)
        args.max_grad_norm = 1.0
        cls(model, args, train_dataset=sentences, optimizers=(optimizer, None)).train()
        models.append(model)
    assert_same_weights(*models)


def test_optimizer_class_and_arguments(arguments, bert, sentences):
    trainer = SaLSaTrainer(
        bert(),
        arguments(),
        train_dataset=sentences,
        optimizer_cls_and_kwargs=(SaLSaSGD, {"c": 0.2}),
    )
    trainer.train()
    assert trainer.line_search.param_groups[0]["c"] == 0.2


def test_line_search_is_the_optimizer_inside(arguments, bert, sentences):
    trainer = SaLSaTrainer(bert(), arguments(), train_dataset=sentences)
    assert trainer.line_search is None  # not made yet
    trainer.train()
    assert isinstance(trainer.line_search, SaLSaAdamPlus)
    assert trainer.line_search is trainer.optimizer.optimizer  # inside Accelerate's wrapper
    model = bert()
    own = SaLSaSGD(model.parameters())
    trainer = SaLSaTrainer(model, arguments(), train_dataset=sentences, optimizers=(own, None))
    assert trainer.line_search is own


def test_line_search_is_none_with_a_stock_optimizer(arguments, bert, sentences):
    trainer = SaLSaTrainer(bert(), arguments(optim="adamw_torch"), train_dataset=sentences)
    trainer.train()
    assert trainer.optimizer is not None
    assert trainer.line_search is None


@dataclass(frozen=True, kw_only=True)
class Halves(StepSizeRule[RuleState]):
    """A rule of a user's own, which looks at nothing: half of the step size before."""

    initial_step_size: float = 1e-3
    share: float = 0.5

    def search(self, state, line):
        found = state.accepted(step_size=self.share * state.step_size)
        return SearchRecord.of(line, found), found

    def describe(self):
        return "shrinks"


class HalvesAdam(LineSearchAdam):
    rule_type = Halves


@pytest.mark.slow
def test_an_optimizer_of_ones_own_is_one_entry(arguments, bert, sentences, monkeypatch):
    """Added to `OPTIMIZERS` it is an `--optim`, with its settings as `--optim_args`."""
    monkeypatch.setitem(OPTIMIZERS, "halves_adam", HalvesAdam)
    given = arguments(optim="halves_adam", optim_args="share=0.25", weight_decay=0.1)
    parser = HfArgumentParser(SaLSaTrainingArguments)
    flags = ["--output_dir", given.output_dir, "--use_cpu", "true", "--max_steps", "6"]
    flags += ["--optim", "halves_adam", "--optim_args", "share=0.25", "--weight_decay", "0.1"]
    (parsed,) = parser.parse_args_into_dataclasses([*flags, "--report_to", "none"])
    for args in (given, parsed):
        assert args.optim == "halves_adam"
        trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
        trainer.train()
        assert type(trainer.line_search) is HalvesAdam
        assert trainer.line_search.rule == Halves(share=0.25)
        assert trainer.line_search.param_groups[0]["weight_decay"] == 0.1
        assert trainer.line_search.step_size == 1e-3 * 0.25**6
        assert trainer.line_search.counters.searches == 6
    with pytest.raises(ValueError, match="halves_adam"):
        arguments(optim="halves_adma")
    with pytest.raises(ValueError, match="salsa_c=0.3 is not allowed with optim='halves_adam'"):
        arguments(optim="halves_adam", salsa_c=0.3)


def test_an_optimizer_that_is_not_entered_is_unknown(arguments):
    with pytest.raises(ValueError, match="optim='halves_adam' is not an optimizer"):
        arguments(optim="halves_adam")
