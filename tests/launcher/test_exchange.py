"""What is exchanged, tried in this process, on classes of the tests' own."""

import copy
import importlib
import inspect
import io
import pickle
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_salsa import (
    SaLSaAdam,
    SaLSaAdamPlus,
    SaLSaArgumentsMixin,
    SaLSaSGD,
    SaLSaTrainer,
    SaLSaTrainerMixin,
    SaLSaTrainingArguments,
    exchange,
    script_trainer,
)
from hf_salsa.optimizers import LineSearchOptimizer


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """In the place of those of transformers."""


class Trainer(transformers.Trainer):
    """Likewise."""


LIBRARY = SimpleNamespace(TrainingArguments=TrainingArguments, Trainer=Trainer)
STOCK_CONSTRUCTOR = inspect.signature(Trainer)
exchange.exchange_arguments(LIBRARY)
exchange.exchange_trainer(LIBRARY)
TrainingArguments = LIBRARY.TrainingArguments


@dataclass
class OwnArguments(TrainingArguments):
    """Of a script, derived after the exchange."""

    optim: str = "adamw_torch"
    learning_rate: float = 1e-3


class OwnTrainer(Trainer):
    """Of a script, with a training step that the search must see."""

    seen = ()  # a list elsewhere: an evaluation puts back what belongs to the trainer

    def training_step(self, *args, **kwargs):
        self.seen.append(self.in_trial)
        return super().training_step(*args, **kwargs)


@pytest.fixture
def asked(monkeypatch):
    """Sets what the command line asks for."""
    monkeypatch.setattr(script_trainer, "_said", set())

    def ask(launcher=None, script=None):
        monkeypatch.setattr(exchange, "asked", exchange.Asked(launcher, script))

    ask()
    return ask


@pytest.fixture
def arguments(tmp_path):
    def make(cls=TrainingArguments, **settings):
        few = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        return cls(str(tmp_path / "out"), **few, **settings)

    return make


@pytest.fixture
def train(bert, sentences, arguments, asked, capsys):
    """Trains two steps; returns the optimizer's class and what is said on stderr."""

    def run(cls=Trainer, args=None, **settings):
        model = bert()
        given = {name: make(model) for name, make in settings.items()}
        trainer = cls(model, args or arguments(), train_dataset=sentences, **given)
        trainer.train()
        lines = [line for line in capsys.readouterr().err.splitlines() if "hf_salsa: " in line]
        return type(trainer.optimizer.optimizer), [x.removeprefix("hf_salsa: ") for x in lines]

    return run


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


class OwnOptimizerTrainer(Trainer):
    """Makes its optimizer itself."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = sgd(self.model)
        return self.optimizer


class LaterArgumentsTrainer(Trainer):
    def __init__(self, model, args, **kwargs):
        args.optim = "adafactor"
        super().__init__(model, args, **kwargs)


# What a script says -> the trainer's class, the arguments', and what the trainer is given.
IN_CODE = {
    "optim=": (Trainer, {"optim": "adamw_torch"}, {}),
    "optim= later": (LaterArgumentsTrainer, {}, {}),
    "default of a subclass": (Trainer, {"cls": OwnArguments}, {}),
    "optimizers=": (Trainer, {}, {"optimizers": lambda model: (sgd(model), None)}),
    "optimizer_cls_and_kwargs=": (
        Trainer,
        {},
        {"optimizer_cls_and_kwargs": lambda model: (torch.optim.SGD, {"lr": 0.1})},
    ),
    "create_optimizer": (OwnOptimizerTrainer, {}, {}),
}


def test_by_default_salsa_adam_plus_trains(train):
    said = ["Trainer's optimizer was exchanged for SaLSaAdamPlus (the default)."]
    assert train() == (SaLSaAdamPlus, said)


@pytest.mark.parametrize("code", IN_CODE)
def test_what_the_code_says_is_left_alone(train, arguments, code):
    cls, settings, given = IN_CODE[code]
    optimizer, (line,) = train(cls, arguments(**settings), **given)
    assert not issubclass(optimizer, LineSearchOptimizer)
    assert line == (
        f"{cls.__name__} trains with {optimizer.__name__}, nothing was exchanged: its script names "
        "it. --optim NAME in front of the script's name exchanges it."
    )


class OwnSchedulerTrainer(Trainer):
    """Makes its scheduler itself."""

    scheduled = ()

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.scheduled.append(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)


def test_a_scheduler_of_the_scripts_own(train, arguments, monkeypatch):
    """Not called with a line search, and the line says so; with a stock optimizer as ever."""
    monkeypatch.setattr(OwnSchedulerTrainer, "scheduled", [])
    said = (
        "OwnSchedulerTrainer's optimizer was exchanged for SaLSaAdamPlus (the default). Its "
        "create_scheduler is not called: there is no learning rate to schedule."
    )
    assert train(OwnSchedulerTrainer) == (SaLSaAdamPlus, [said])
    assert OwnSchedulerTrainer.scheduled == []
    optimizer, (line,) = train(OwnSchedulerTrainer, arguments(optim="adamw_torch"))
    assert optimizer is torch.optim.AdamW
    assert "create_scheduler" not in line
    assert OwnSchedulerTrainer.scheduled == [2]


@pytest.mark.parametrize("code", IN_CODE)
def test_the_launchers_flag_wins_over_the_code(train, arguments, asked, code):
    asked("salsa_sgd", script="salsa_adam")
    cls, settings, given = IN_CODE[code]
    optimizer, (line,) = train(cls, arguments(**settings), **given)
    assert optimizer is SaLSaSGD
    whose = "the launcher's --optim"
    assert line == f"{cls.__name__}'s optimizer was exchanged for SaLSaSGD ({whose})."


@pytest.mark.parametrize("code", IN_CODE)
def test_the_scripts_flag_wins_over_the_code(train, arguments, asked, code):
    asked(script="salsa_sgd")
    cls, settings, given = IN_CODE[code]
    optimizer, (line,) = train(cls, arguments(**{"optim": "salsa_sgd"} | settings), **given)
    assert optimizer is SaLSaSGD
    assert line.endswith("exchanged for SaLSaSGD (the script's --optim).")


def test_a_line_search_in_the_code_is_said(train, arguments):
    optimizer, (line,) = train(args=arguments(optim="salsa_sgd"))
    assert optimizer is SaLSaSGD
    assert line.endswith(" for SaLSaSGD (the script's optim=).")


def test_a_line_search_of_the_script_stays(train, asked):
    asked(script="salsa_adam")
    made = []

    def optimizers(model):
        made.append(SaLSaAdam(model.parameters(), c=0.4))
        return made[0], None

    optimizer, _ = train(optimizers=optimizers)
    assert optimizer is SaLSaAdam
    assert made[0].counters.searches


def test_a_flag_that_names_a_stock_optimizer_changes_nothing_else(train, asked, arguments):
    asked("adamw_torch")
    optimizer, (line,) = train(optimizers=lambda model: (sgd(model), None))
    assert optimizer is torch.optim.SGD
    reason = "nothing was exchanged: the launcher's --optim names adamw_torch."
    assert line == f"Trainer trains with SGD, {reason}"


def test_the_same_is_said_once(train):
    assert [len(train()[1]) for _ in range(2)] == [1, 0]
    assert len(train(OwnOptimizerTrainer)[1]) == 1


@pytest.mark.parametrize("name", ["salsa_adm", "sgdd"])
def test_an_unknown_optimizer(asked, arguments, name):
    asked(name)
    with pytest.raises(ValueError, match=f"optim='{name}' is not an optimizer. Did you mean"):
        arguments()


@pytest.mark.parametrize("name", ["GRPOTrainer", "OnlineDPOTrainer"])
def test_what_generates_its_data_is_refused(bert, arguments, sentences, asked, name):
    cls = type(name, (Trainer,), {})
    with pytest.raises(ValueError, match=f"salsa_adam_plus does not work with {name}: it"):
        cls(bert(), arguments(), train_dataset=sentences)
    asked("adamw_torch")
    cls(bert(), arguments(), train_dataset=sentences)


def test_deepspeed_is_refused(asked):
    parser = HfArgumentParser(TrainingArguments)
    with pytest.raises(ValueError, match="deepspeed='ds.json' is not allowed with optim='salsa_ad"):
        parser.parse_args_into_dataclasses(["--deepspeed", "ds.json"])


# --- classes


def test_a_training_step_of_the_scripts_own_is_inside_of_what_is_evaluated(
    bert, sentences, arguments, asked, monkeypatch
):
    steps = []
    monkeypatch.setattr(OwnTrainer, "seen", steps)
    trainer = OwnTrainer(bert(), arguments(), train_dataset=sentences)
    trainer.train()
    assert steps.count(False) == 2
    # The first search has its checks, too.
    assert steps.count(True) >= trainer.line_search.counters.trials > 0


def test_a_trainer_is_what_it_was(bert, arguments):
    trainer = OwnTrainer(bert(), arguments())
    cls = type(trainer)
    assert isinstance(trainer, (OwnTrainer, Trainer, transformers.Trainer))
    assert cls.__mro__[1] is SaLSaTrainerMixin
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(cls, name) == getattr(OwnTrainer, name)
    assert type(OwnTrainer(bert(), arguments())) is cls
    assert not issubclass(OwnTrainer, SaLSaTrainerMixin)
    assert inspect.signature(Trainer) == inspect.signature(OwnTrainer) == STOCK_CONSTRUCTOR


def test_a_trainer_that_searches_already_stays(bert, arguments):
    class Searching(SaLSaTrainerMixin, Trainer):
        pass

    assert type(Searching(bert(), arguments())) is Searching
    assert exchange.searching_trainer(SaLSaTrainer) is SaLSaTrainer


def test_arguments_are_what_they_were(arguments, asked):
    for cls in (TrainingArguments, OwnArguments):
        args = arguments(cls)
        assert isinstance(args, (TrainingArguments, transformers.TrainingArguments))
        assert type(args) is cls
        assert type(replace(args)) is cls
    assert TrainingArguments.__qualname__ == "TrainingArguments"
    assert TrainingArguments.__doc__ == "In the place of those of transformers."
    assert exchange.searching_arguments(SaLSaTrainingArguments) is SaLSaTrainingArguments


def test_flags_and_defaults(asked):
    parser = HfArgumentParser(OwnArguments)
    (args,) = parser.parse_args_into_dataclasses([])
    assert (args.optim, args.learning_rate, args.max_grad_norm) == ("adamw_torch", 1e-3, 1.0)
    (args,) = parser.parse_args_into_dataclasses(["--optim", "salsa_sgd", "--salsa_c", "0.25"])
    assert (args.optim, args.salsa_c, args.max_grad_norm) == ("salsa_sgd", 0.25, 0.0)
    with pytest.raises(ValueError, match="salsa_c=2.0 is not allowed"):
        parser.parse_args_into_dataclasses(["--optim", "salsa_sgd", "--salsa_c", "2"])


def test_arguments_that_name_the_mixin_themselves(arguments, asked):
    @dataclass
    class Both(SaLSaArgumentsMixin, OwnArguments):
        pass

    assert arguments(Both).optim == "salsa_adam_plus"


# --- pickle


def test_pickled_arguments_name_this_package(arguments, asked):
    args = arguments(OwnArguments, optim="salsa_sgd", salsa_c=0.25)
    pickled = pickle.dumps(args)
    assert b"hf_salsa.exchange" in pickled
    for again in (pickle.loads(pickled), copy.deepcopy(args), copy.copy(args)):
        assert type(again) is OwnArguments
        assert again == args
        assert again.salsa_c == 0.25


@pytest.mark.parametrize("cls", [transformers.TrainingArguments, Seq2SeqTrainingArguments])
def test_where_nothing_is_exchanged_they_get_their_fields(arguments, asked, cls):
    """As in a process that was spawned, or where training_args.bin is read."""
    args = arguments(exchange.searching_arguments(cls), optim="salsa_sgd", salsa_c=0.25)
    buffer = io.BytesIO()
    torch.save(args, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert isinstance(again, cls)
    assert again == args
    assert (again.optim, again.salsa_c) == ("salsa_sgd", 0.25)


def test_arguments_of_a_local_class_are_copied(arguments, asked):
    @dataclass
    class Local(TrainingArguments):
        pass

    assert copy.deepcopy(arguments(Local)) == arguments(Local)


def test_a_pickled_trainer(bert, arguments, asked):
    trainer = OwnTrainer(bert(), arguments(optim="salsa_adam", salsa_c=0.25))
    again = exchange.restore(*trainer.__reduce__()[1])
    assert type(again) is type(trainer)
    assert trainer.__reduce__()[1] == (exchange.searching_trainer, OwnTrainer)
    assert pickle.loads(pickle.dumps(trainer.__reduce__()[:2])) == trainer.__reduce__()[:2]


# --- the import hook


def test_a_module_is_changed_before_anyone_sees_it(tmp_path, monkeypatch):
    (tmp_path / "toy_library").mkdir()
    for name, text in {"__init__": "", "part": "value = 1\n", "other": "value = 1\n"}.items():
        (tmp_path / "toy_library" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def change(module):
        seen.append((module.__name__, module.value))
        module.value = 2

    missing = "toy_library.missing"
    hook = exchange.AfterImport({"toy_library.part": change, missing: change})
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    from toy_library.other import value as other
    from toy_library.part import value

    assert (value, other) == (2, 1)
    assert seen == [("toy_library.part", 1)]
    assert importlib.import_module("toy_library.part").__file__.endswith("part.py")
    with pytest.raises(ModuleNotFoundError, match="toy_library.missing"):
        importlib.import_module(missing)
    for name in [name for name in sys.modules if name.startswith("toy_library")]:
        monkeypatch.delitem(sys.modules, name)
