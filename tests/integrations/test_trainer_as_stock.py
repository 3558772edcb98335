"""What transformers' own tests ask of Trainer, asked of every optimizer: all but checkpoints.

After `tests/trainer/test_trainer.py` and its successors (`_callback`, `_optimizers`, `_evaluation`,
`_hyperparameter`, `_data`) and `tests/optimization/test_optimization.py` of transformers, in words
of our own; `test_trainer_as_stock_resume.py` has the checkpoints. Where stock `Trainer` with
`adamw_torch` shows what is right, it is asked.

What of them does not apply, and why:

- schedules (`get_scheduler`, warm-up, cosine, `lr_scheduler_kwargs`, `ReduceLROnPlateau`,
  `GreedyLR`) as such: the line search sets the step size and nothing multiplies it. What is left
  of them: they are named, ignored and replaced by a read-out; one in a plain loop changes nothing.
- a learning rate: `get_learning_rates()` shows the step size, before the first step the one at
  which the first search starts. `Adafactor(lr=None)` and its schedule have no counterpart.
- a closure that calls backward, as torch's LBFGS takes it: the gradients are in `.grad` already
  and a closure only evaluates. One that differentiates is refused
  (`tests/optimizers/test_messages.py`).
- divergence by a learning rate of 1e9 (`logging_nan_inf_filter`): a search rejects such a step, so
  the loss that is not finite comes from the data here.
- the other optimizers (GaLore, LOMO, bitsandbytes, schedule-free, Muon, Adafactor): not ours;
  `--optim` with their names is stock's business (`test_trainer_optimizers.py`).
- DeepSpeed, FSDP 1, tensor and sequence parallelism: refused (`test_trainer_refusals.py`).
  Several processes: `tests/distributed/`.
- TPU, apex, tf32, memory of `fp16_full_eval`, `torch_compile` of evaluation, the hub, Ray and W&B
  sweeps: nothing of the optimizer in them. fp16 and bf16 are in `test_trainer_precision.py`, a
  sweep in `test_trainer_features.py`.
- data collators, grouping by length, samplers' seeds, removal of columns, `predict` with several
  outputs: they end before the optimizer.
"""

import math
import warnings

import pytest
import torch
from regression import Events, Line, PlainLine, logged, make_trainer, points
from torch import nn
from trainer_problems import assert_same_weights, weights
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    get_scheduler,
)
from transformers.trainer import DEFAULT_CALLBACKS

from hf_salsa import OPTIMIZERS, SaLSaTrainer
from hf_salsa.printing import RunPrinter
from hf_salsa.run_trace import RunTrace
from hf_salsa.trainer import StepSizeReadout

every_optimizer = pytest.mark.parametrize("optim", OPTIMIZERS)
STOCK = {"optim": "adamw_torch", "kind": Trainer}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:A line search failed"),  # at the bottom, and not the matter
]


# --- logging --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 5},
        {"logging_steps": 0.25},
        {"logging_steps": 7, "logging_first_step": True},
        {"logging_strategy": "epoch", "eval_strategy": "epoch"},
        {"logging_strategy": "no", "eval_strategy": "steps", "eval_steps": 6},
        {"logging_steps": 2, "gradient_accumulation_steps": 3, "eval_on_start": True},
    ],
    ids=str,
)
def test_entries_of_the_log_come_when_stock_ones_do(arguments, options):
    """As many, at the same updates, with the same names and the search's beside them."""

    def history(**settings):
        trainer = make_trainer(arguments, **settings, **options)
        trainer.train()
        return trainer.state.log_history

    expected = history(**STOCK)
    assert len(expected) > 1
    for optim in OPTIMIZERS:
        for stock, ours in zip(expected, history(optim=optim), strict=True):
            assert (ours["step"], ours["epoch"]) == (stock["step"], stock["epoch"]), optim
            assert stock.keys() <= ours.keys(), optim
            added = ours.keys() - stock.keys()
            assert all(name.startswith("salsa/") for name in added), optim
            assert bool(added) is not any(name.startswith("eval_") for name in stock), optim


@every_optimizer
def test_the_training_loss_is_the_mean_of_the_logged_losses(arguments, optim):
    found = []
    for steps in (4, 5):  # 12 updates: the second leaves two that are never logged
        trainer = make_trainer(arguments, optim, logging_steps=steps)
        found.append(trainer.train().training_loss)
        losses = logged(trainer)
        assert len(losses) == 12 // steps
        if 12 % steps == 0:
            assert found[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Unlabelled(Line):
    """Of some batches the loss is not finite, and so are the gradients."""

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        if self.training and len(self.given) in (40, 64):  # the fifth batch and the eighth
            outputs["loss"] = outputs["loss"] * math.nan
        return outputs


@every_optimizer
@pytest.mark.parametrize("filtered", [True, False])
def test_losses_that_are_not_finite(arguments, optim, filtered):
    """`logging_nan_inf_filter` keeps them out of the log; the steps are skipped either way."""
    trainer = make_trainer(
        arguments, optim, Unlabelled(), logging_steps=1, logging_nan_inf_filter=filtered
    )
    metrics = trainer.train().metrics
    losses = logged(trainer)
    first = next((i for i, loss in enumerate(losses) if math.isnan(loss)), None)
    assert first == (None if filtered else 4)  # unfiltered, stock Trainer's sum stays so
    assert metrics["salsa/skipped_steps"] == 2
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.evaluate()["eval_loss"] < losses[0]


@every_optimizer
def test_arguments_are_left_as_they_were(arguments, optim):
    trainer = make_trainer(arguments, optim)
    before = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == before


# --- how many updates -----------------------------------------------------------------------------


@every_optimizer
def test_number_of_updates(arguments, optim):
    for options, expected in (
        ({}, 12),
        ({"num_train_epochs": 1.5}, 6),
        ({"max_steps": 10}, 10),
        ({"max_steps": 5, "data": points(3)}, 5),  # less than a batch: an epoch each
        ({"num_train_epochs": 1, "data": points(36), "gradient_accumulation_steps": 3}, 2),
    ):
        trainer = make_trainer(arguments, optim, **options)
        assert trainer.train().global_step == expected
        counters = trainer.line_search.counters
        assert trainer.line_search.param_groups[0]["steps"] == expected
        assert 0 < counters.searches <= expected


@every_optimizer
def test_a_seed_is_a_trajectory(arguments, optim):
    ends = []
    for seed in (42, 42, 314):
        trainer = make_trainer(arguments, optim, seed=seed)
        trainer.train()
        ends.append(trainer.model)
    assert_same_weights(ends[0], ends[1])
    assert not torch.equal(ends[0].head.weight, ends[2].head.weight)


@every_optimizer
def test_model_init_begins_anew(arguments, optim):
    """A second `train()` is the first again, search and all; another seed is another run."""
    trainer = make_trainer(arguments, optim, model_init=Line, logging_steps=1)
    runs = []
    for seed in (42, 42, 314):
        trainer.args.seed = seed
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "learning_rate"), weights(trainer.model)))
        assert logged(trainer, "salsa/searches")[-1] == trainer.line_search.counters.searches
    assert runs[0][:2] == runs[1][:2]
    assert runs[0][0] != runs[2][0]
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


# --- accumulation ---------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("number", [32, 28], ids=["even", "uneven"])
def test_accumulation_trains_as_one_batch_does(arguments, optim, number):
    """Of 28 points the last update of an epoch has one micro-batch of four, not two."""
    runs = []
    for accumulation in (1, 2):
        trainer = make_trainer(
            arguments,
            optim,
            data=points(number),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
            max_steps=8,
        )
        trainer.train()
        runs.append((logged(trainer), logged(trainer, "learning_rate"), weights(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3)
    for name, expected in runs[0][2].items():
        torch.testing.assert_close(runs[1][2][name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@every_optimizer
def test_a_loss_by_the_number_of_items(arguments, optim, gpt2, texts):
    """A `compute_loss_func` that divides by it is the same however a ragged batch is cut.

    One that takes the mean of each micro-batch is not: the test would see it.
    """

    def trained(by_items, accumulation):
        def loss_of(outputs, labels, num_items_in_batch=None):
            logits = outputs["logits"][:, :-1].flatten(0, 1)
            mean = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            if not by_items or num_items_in_batch is None:
                return mean
            return mean * (labels[:, 1:] != -100).sum() / num_items_in_batch

        trainer = make_trainer(
            arguments,
            optim,
            gpt2(dropout=0.0),
            data=texts,
            compute_loss_func=loss_of,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
            max_steps=2,
        )
        trainer.train()
        return logged(trainer), logged(trainer, "learning_rate")

    whole, cut, means = trained(True, 1), trained(True, 4), trained(False, 4)
    assert cut[0] == pytest.approx(whole[0], rel=1e-4)
    assert cut[1] == pytest.approx(whole[1], rel=1e-3)
    assert means[0] != pytest.approx(whole[0], rel=1e-4)


# --- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_strategy": "epoch", "save_strategy": "epoch"},
        {
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 4,
            "gradient_accumulation_steps": 2,
        },
    ],
    ids=["default", "epochs", "steps"],
)
def test_events_are_stock_trainers(arguments, options):
    """The same ones in the same order: no trial is heard of."""

    def heard(**settings):
        events = Events()
        make_trainer(arguments, callbacks=[events], **settings, **options).train()
        return events.seen

    expected = heard(**STOCK)
    assert ("on_optimizer_step", 3) in expected
    for optim in OPTIMIZERS:
        assert heard(optim=optim) == expected, optim


@every_optimizer
def test_a_callback_can_stop_the_run(arguments, optim):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = make_trainer(arguments, optim, callbacks=[Stop()], logging_steps=1)
    metrics = trainer.train().metrics
    assert trainer.state.global_step == len(logged(trainer)) == 4
    assert metrics["salsa/searches"] == trainer.line_search.counters.searches <= 4


def test_callbacks_are_stocks_and_one(arguments):
    trainer = make_trainer(arguments, "salsa_adam")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    stock = [type(c) for c in make_trainer(arguments, **STOCK).callback_handler.callbacks]
    assert set(DEFAULT_CALLBACKS) <= set(stock)
    assert stock[-1] is PrinterCallback
    assert kinds == [*stock[:-1], RunPrinter, RunTrace]
    assert issubclass(RunPrinter, PrinterCallback)


@every_optimizer
def test_early_stopping(arguments, optim):
    """A metric that never gets better ends the run after as many evaluations as it has patience."""
    trainer = make_trainer(
        arguments,
        optim,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        compute_metrics=lambda _: {"constant": 1.0},
        num_train_epochs=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="constant",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.global_step == 3 * 4
    assert trainer.state.best_global_step == 4


# --- evaluation -----------------------------------------------------------------------------------


def eval_loss(model):
    x, y = (torch.tensor([point[name] for point in points(20)]) for name in ("x", "labels"))
    with torch.no_grad():
        return float((model.head(x[:, None]).squeeze(-1) - y).square().mean())


@every_optimizer
def test_evaluating_and_predicting(arguments, optim):
    """Of the current weights, and without a trace in the training."""
    quiet = make_trainer(arguments, optim)
    quiet.train()
    trainer = make_trainer(
        arguments, optim, eval_strategy="steps", eval_steps=3, eval_on_start=True
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eval_loss(trainer.model), rel=1e-5)
    trainer.train()
    assert_same_weights(quiet.model, trainer.model)
    assert len(logged(trainer, "eval_loss")) == 1 + 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eval_loss(trainer.model), rel=1e-5)
    x = torch.tensor([[point["x"]] for point in points(20)])
    predicted = trainer.predict(points(20)).predictions
    expected = trainer.model.head(x).squeeze(-1).detach()
    torch.testing.assert_close(torch.tensor(predicted), expected)


@every_optimizer
def test_a_loader_of_ones_own(arguments, optim):
    """Neither a DataLoader nor with a dataset: its length and its batches are all that is asked."""

    class Twice:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return 2 * len(self.loader)

        def __iter__(self):
            for _ in range(2):
                yield from self.loader

    class OwnLoader(SaLSaTrainer):
        def get_train_dataloader(self):
            return Twice(super().get_train_dataloader())

    trainer = make_trainer(arguments, optim, kind=OwnLoader, num_train_epochs=1)
    assert trainer.train().global_step == 8
    assert trainer.line_search.counters.searches > 0


# --- which optimizer, and its groups --------------------------------------------------------------


@every_optimizer
def test_every_way_to_bring_the_optimizer_trains_alike(arguments, optim):
    """By its name, as an object, as a class with arguments, and from `create_optimizer`."""
    kind = OPTIMIZERS[optim]

    class Creates(SaLSaTrainer):
        def create_optimizer(self, *args, **kwargs):
            if self.optimizer is None:
                self.optimizer = kind(self.model.parameters())
            return self.optimizer

    model = Line()
    ways = (
        {},
        {"model": model, "optimizers": (kind(model.parameters()), None)},
        {"optimizer_cls_and_kwargs": (kind, {})},
        {"kind": Creates},
    )
    ends = []
    for way in ways:
        trainer = make_trainer(arguments, optim, **way, logging_steps=1)
        trainer.train()
        assert type(trainer.line_search) is kind
        ends.append((trainer.model, logged(trainer, "learning_rate")))
    for end, sizes in ends[1:]:
        assert_same_weights(ends[0][0], end)
        assert sizes == ends[0][1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bias = nn.Parameter(torch.zeros(4))


@every_optimizer
def test_groups_are_stock_trainers(arguments, optim):
    """Biases and norms do not decay."""
    model = nn.Sequential(Block(), nn.ModuleList([Block(), Block()]))
    made = []
    for settings in (STOCK, {"optim": optim, "salsa_head_first": 0}):
        trainer = make_trainer(arguments, model=model, weight_decay=0.1, **settings)
        trainer.create_optimizer_and_scheduler(10)
        names = {id(param): name for name, param in model.named_parameters()}
        groups = trainer.optimizer.param_groups
        made.append([([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in groups])
    assert made[0] == made[1]
    assert [decay for _, decay in made[1]] == [0.1, 0.0]
    assert made[1][0][0] == ["0.linear.weight", "1.0.linear.weight", "1.1.linear.weight"]


@every_optimizer
def test_learning_rates_and_groups_can_be_asked_for(arguments, optim):
    trainer = make_trainer(arguments, optim)
    for ask in (trainer.get_learning_rates, trainer.get_optimizer_group):
        with pytest.raises(ValueError, match="optimizer is None"):
            ask()
    trainer.create_optimizer()
    first = OPTIMIZERS[optim].rule_type().initial_step_size
    assert trainer.get_learning_rates() == [first, first]
    assert len(trainer.get_optimizer_group()) == 2
    param = trainer.model.head.weight
    assert any(param is p for p in trainer.get_optimizer_group(param)["params"])
    trainer.train()
    assert trainer.get_learning_rates() == [trainer.line_search.step_size] * 2


# --- what is left of schedules --------------------------------------------------------------------


@every_optimizer
def test_it_finds_a_point_without_a_learning_rate(optim):
    """What transformers' tests of an optimizer begin with; nothing is given but the number 100."""
    weight = nn.Parameter(torch.tensor([0.1, -0.2, -0.1]))
    target = torch.tensor([0.4, 0.2, -0.5])
    optimizer = OPTIMIZERS[optim]([weight], total_steps=100)

    def loss():
        return nn.functional.mse_loss(weight, target)

    for _ in range(100):
        optimizer.zero_grad()
        now = loss()
        now.backward()
        optimizer.step(loss, loss=now)
    torch.testing.assert_close(weight.detach(), target, rtol=0, atol=1e-2)


_SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "polynomial": {"power": 5.0, "lr_end": 1e-5},
}


@every_optimizer
def test_every_schedule_is_named_and_replaced(arguments, optim):
    for schedule in [kind.value for kind in SchedulerType]:
        trainer = make_trainer(
            arguments,
            optim,
            lr_scheduler_type=schedule,
            lr_scheduler_kwargs=_SCHEDULES.get(schedule),
            warmup_steps=2,
            eval_strategy="epoch",  # some ask for a metric
            metric_for_best_model="loss",
        )
        with pytest.warns(UserWarning, match="Ignored with .*warmup_steps=2") as caught:
            trainer.create_optimizer_and_scheduler(10)
        (said,) = [str(w.message) for w in caught if "Ignored" in str(w.message)]
        assert (f"lr_scheduler_type={schedule}" in said) is (schedule != "linear")
        assert ("lr_scheduler_kwargs" in said) is (schedule in _SCHEDULES)
        assert type(trainer.lr_scheduler) is StepSizeReadout


@every_optimizer
@pytest.mark.parametrize("own", [False, True], ids=["by name", "own"])
def test_reduce_on_plateau_reduces_nothing(arguments, optim, own):
    """Trainer steps it with a metric; the read-out in its place takes none."""
    plain = make_trainer(arguments, optim, logging_steps=1)
    plain.train()
    options = {"eval_strategy": "epoch", "metric_for_best_model": "eval_loss", "logging_steps": 1}
    if own:
        model = Line()
        optimizer = OPTIMIZERS[optim](model.parameters())
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=0)
        options |= {"model": model, "optimizers": (optimizer, plateau)}
    else:
        options |= {"lr_scheduler_type": "reduce_lr_on_plateau"}
    trainer = make_trainer(arguments, optim, **options)
    with pytest.warns(UserWarning, match="ReduceLROnPlateau" if own else "reduce_lr_on_plateau"):
        trainer.train()
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    assert_same_weights(plain.model, trainer.model)


@every_optimizer
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_schedule_in_a_plain_loop_changes_nothing(optim, schedule):
    """`get_scheduler` writes `lr`, which nothing reads; it is said once."""
    ends = []
    for scheduled in (False, True):
        model = PlainLine()
        optimizer = OPTIMIZERS[optim](model.parameters(), total_steps=10)
        scheduler = get_scheduler(schedule, optimizer, 2, 10) if scheduled else None
        batch = torch.tensor([[point["x"], point["labels"]] for point in points()])

        def loss(model=model, batch=batch):
            return model(*batch.T)[0]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step(loss)
                if scheduler is not None:
                    scheduler.step()
        said = [w for w in caught if "lr" in str(w.message)]
        ends.append((model, optimizer.step_size, len(said)))
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert [number for _, _, number in ends] == [0, 1]


@every_optimizer
def test_the_read_out_is_saved_and_loaded(arguments, optim, tmp_path):
    trainer = make_trainer(arguments, optim)
    trainer.train()
    expected = trainer.lr_scheduler.get_last_lr()
    assert expected == [trainer.line_search.step_size] * 2
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    fresh = make_trainer(arguments, optim)
    fresh.create_optimizer_and_scheduler(12)
    assert fresh.lr_scheduler.get_last_lr() != expected
    state = torch.load(tmp_path / "scheduler.pt", weights_only=True)
    fresh.lr_scheduler.load_state_dict(state)
    assert fresh.lr_scheduler.last_epoch == 12
    fresh.line_search.load_state_dict(trainer.line_search.state_dict())
    assert fresh.lr_scheduler.get_last_lr() == expected
