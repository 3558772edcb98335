"""SaLSaTrainer in a single process (contract lines 6, 7, 11, 13-19)."""

import copy
import json
import math
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_salsa import (
    OPTIMIZERS,
    BatchObjective,
    SaLSaAdam,
    SaLSaSeq2SeqTrainer,
    SaLSaSeq2SeqTrainingArguments,
    SaLSaSGD,
    SaLSaTrainer,
    SaLSaTrainerMixin,
    SaLSaTrainingArguments,
)
from hf_salsa.objective import unwrap_optimizer
from hf_salsa.trainer import StepSizeReadout


@pytest.fixture
def arguments(tmp_path):
    def make(cls=SaLSaTrainingArguments, **overrides):
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **overrides,
        }
        return cls(**settings)

    return make


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class Endless(IterableDataset):
    """Examples in their own order, whatever the seed."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        yield from self.examples


class CheckReplay(TrainerCallback):
    """At every search: the objective at w_k is what training_step differentiated, bit for bit."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.checked = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        objective = self.trainer._objective
        if unwrap_optimizer(self.trainer.optimizer).search_due:
            assert torch.equal(objective.loss, self.trainer.differentiated)
            assert torch.equal(objective(), self.trainer.differentiated)
            self.checked += 1


class Recording(SaLSaTrainer):
    """Adds up what training_step returns, apart from what the objective records."""

    differentiated = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        first = all(p.grad is None for p in model.parameters())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.differentiated = loss if first else self.differentiated + loss
        return loss


# --- The loss that is tested is the loss that is differentiated (6)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bert", {}),
        ("bert", {"gradient_accumulation_steps": 3}),
        ("bert", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
        ("bert", {"bf16": True}),
        ("bert", {"gradient_checkpointing": True}),
        ("gpt2", {}),
        ("gpt2", {"gradient_accumulation_steps": 2}),
        ("gpt2", {"gradient_accumulation_steps": 2, "bf16": True}),
        ("gpt2", {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}),
        ("gpt2", {"label_smoothing_factor": 0.1}),
        ("gpt2", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
        ("gpt2", {"neftune_noise_alpha": 5.0}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
def test_replay_is_exact(request, arguments, sentences, texts, model, options):
    data = {"bert": sentences, "gpt2": texts}[model]
    args = arguments(**options, per_device_train_batch_size=4)
    trainer = Recording(request.getfixturevalue(model)(), args, train_dataset=data)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Evaluating the objective again")
        trainer.train()
    assert check.checked == 6


def test_replay_is_exact_with_compute_loss_func(arguments, bert, sentences):
    def compute_loss(outputs, labels, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / num_items_in_batch

    args = arguments(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer = Recording(bert(), args, train_dataset=sentences, compute_loss_func=compute_loss)
    check = CheckReplay(trainer)
    trainer.add_callback(check)
    trainer.train()
    assert check.checked == 6


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
        self.head = nn.Linear(16, 2)
        self.drawn = []

    def forward(self, input_ids, labels=None):
        if torch.is_grad_enabled():
            self.drawn.append((torch.rand(()).item(), input_ids.sum().item()))
        else:
            torch.rand(())
        logits = self.head(self.body(input_ids.float() / 64))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_searching_draws_the_same_data_and_masks(arguments, sentences):
    """A run that searches at every step sees what a run that hardly searches sees (7)."""
    runs = []
    for interval in (1, 10):
        set_seed(0)
        model = WithBatchNorm()
        optimizer = SaLSaSGD(model.parameters(), initial_step_size=1e-4, steps_to_double=1e9)
        for group in optimizer.param_groups:
            group["search_interval"] = interval
            group["max_search_interval"] = interval
            # As after a long run at rest: L_k stays where it is.
            group["searches"] = 1
            group["step_size_average_fast"] = group["step_size_average_slow"] = 1e-4
        trainer = SaLSaTrainer(
            model,
            arguments(max_steps=20),
            train_dataset=sentences,
            optimizers=(optimizer, None),
        )
        trainer.train()
        runs.append((optimizer.counters.searches, model))
    assert [searches for searches, _ in runs] == [1 + 20, 1 + 2]
    assert runs[0][1].drawn == runs[1][1].drawn
    for name, buffer in runs[0][1].named_buffers():
        torch.testing.assert_close(buffer, dict(runs[1][1].named_buffers())[name])
    assert int(runs[0][1].body[1].num_batches_tracked) == 20


# --- Accumulation (11)


@pytest.mark.parametrize("optim", ["salsa_adam", "salsa_sgd", "salsa_adam_plus", "salsa_sgd_plus"])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_accumulation_gives_the_same_trajectory(request, arguments, sentences, texts, model, optim):
    data = {"bert": sentences, "gpt2": texts}[model]
    runs = []
    for accumulation in (1, 2, 8):
        net = request.getfixturevalue(model)(dropout=0.0)
        args = arguments(
            optim=optim,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            logging_steps=1,
            max_steps=10,
        )
        trainer = SaLSaTrainer(net, args, train_dataset=data)
        trainer.train()
        sizes = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((sizes, losses, weights(net)))
    for sizes, losses, net in runs[1:]:
        assert sizes == pytest.approx(runs[0][0], rel=1e-4)
        assert losses == pytest.approx(runs[0][1], rel=1e-4)
        for name, expected in runs[0][2].items():
            torch.testing.assert_close(net[name], expected, rtol=0, atol=2e-4)


def test_plain_loop_accelerate_loop_and_trainer_agree(arguments, bert, sentences):
    """Three ways to write the same training, dropout on: one trajectory, bit for bit (19)."""

    def loss_fn(batch):
        return model(**batch).loss

    models, sizes = [], []
    for kind in ("plain", "accelerate", "trainer"):
        model = bert()
        optimizer = SaLSaAdam(model.parameters())
        if kind == "trainer":
            set_seed(7)
            trainer = SaLSaTrainer(
                model,
                arguments(seed=7),
                train_dataset=Endless(sentences[:48]),
                optimizers=(optimizer, None),
            )
            trainer.train()
        else:
            prepared = optimizer
            accelerator = None
            if kind == "accelerate":
                accelerator = Accelerator(cpu=True)
                model, prepared = accelerator.prepare(model, optimizer)
            objective = BatchObjective(model, prepared)
            set_seed(7)
            for batch in DataLoader(Endless(sentences[:48]), batch_size=8):
                loss = objective.record(loss_fn, batch)
                if accelerator is None:
                    loss.backward()
                else:
                    accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
        assert optimizer.counters.searches == 6
        models.append(model)
        sizes.append(optimizer.step_size)
    assert sizes[0] == sizes[1] == sizes[2]
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])


def test_accelerate_accumulates(bert, sentences):
    """`accelerator.accumulate` with 2 x 4 is 1 x 8."""
    ends = []
    for accumulation in (1, 2):
        model = bert(dropout=0.0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        loader = DataLoader(sentences, batch_size=8 // accumulation)
        optimizer = SaLSaAdam(model.parameters())
        model, prepared, loader = accelerator.prepare(model, optimizer, loader)
        objective = BatchObjective(model, prepared, accelerator.gradient_accumulation_steps)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = objective.record(lambda batch, model=model: model(**batch).loss, batch)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
        assert optimizer.counters.searches == 8
        ends.append((optimizer.step_size, weights(model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(value, ends[1][1][name], rtol=0, atol=1e-3)


# --- A stock optimizer is stock


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


def test_plain_training_arguments_train_with_salsa_adam_and_say_so(arguments, bert, sentences):
    with pytest.warns(UserWarning, match="trains with salsa_adam") as caught:
        trainer = SaLSaTrainer(bert(), arguments(TrainingArguments), train_dataset=sentences)
        trainer.train()
    assert len([w for w in caught if "trains with" in str(w.message)]) == 1
    assert isinstance(unwrap_optimizer(trainer.optimizer), SaLSaAdam)


def test_own_optimizer(arguments, bert, sentences):
    model = bert()
    optimizer = SaLSaSGD(model.parameters(), c=0.4, momentum=0.5)
    trainer = SaLSaTrainer(
        model, arguments(), train_dataset=sentences, optimizers=(optimizer, None)
    )
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer) is optimizer
    assert optimizer.counters.searches == 6


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
    assert unwrap_optimizer(trainer.optimizer).param_groups[0]["c"] == 0.2


# --- Logging and report (17)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_log_shows_the_step_size_applied(arguments, bert, sentences, optim):
    applied = []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            applied.append(unwrap_optimizer(optimizer).step_size)

    args = arguments(optim=optim, logging_steps=1)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences, callbacks=[Collect()])
    metrics = trainer.train().metrics
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in lines] == applied
    assert len(set(applied)) > 1
    for key in ("searches", "trials", "interval", "decrease", "slope"):
        assert f"salsa/{key}" in lines[0]
    assert [entry["salsa/searches"] for entry in lines] == [1, 2, 3, 4, 5, 6]
    counters = unwrap_optimizer(trainer.optimizer).counters
    assert metrics["salsa/searches"] == counters.searches == 6
    assert metrics["salsa/trials"] == counters.trials
    assert metrics["salsa/extra_forward_share"] == counters.trials / (counters.trials + 6)
    assert metrics["salsa/failed_searches"] == metrics["salsa/skipped_steps"] == 0
    assert metrics["salsa/final_step_size"] == applied[-1]
    assert metrics["salsa/median_step_size"] == sorted(applied)[2:4][0] / 2 + sorted(applied)[3] / 2
    assert trainer.state.log_history[-1]["salsa/trials"] == counters.trials
    json.dumps(metrics)


def test_the_trainer_knows_when_to_cool_down(arguments, bert, sentences):
    """At the end of each run, of a second one too."""
    args = arguments(salsa_cool_down=0.5, logging_steps=1, gradient_accumulation_steps=2)
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    for _ in range(2):
        trainer.train()
        line_search = unwrap_optimizer(trainer.optimizer)
        lines = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(lines) == 6
        found = line_search.param_groups[0]["step_size"]
        assert lines[-1]["learning_rate"] == line_search.step_size == pytest.approx(found / 3)


def test_extra_forward_passes_are_counted(arguments, sentences):
    set_seed(0)
    model = WithBatchNorm()
    calls = {True: 0, False: 0}
    model.register_forward_pre_hook(
        lambda *_: calls.__setitem__(torch.is_grad_enabled(), calls[torch.is_grad_enabled()] + 1)
    )
    args = arguments(gradient_accumulation_steps=2, per_device_train_batch_size=4)
    metrics = SaLSaTrainer(model, args, train_dataset=sentences).train().metrics
    assert calls[True] == 12
    assert calls[False] == 2 * metrics["salsa/trials"]
    assert metrics["salsa/extra_forward_share"] == calls[False] / sum(calls.values())


def test_settings_without_meaning_are_named_once(arguments, bert, sentences):
    args = arguments(learning_rate=2e-5, warmup_steps=0.1, lr_scheduler_type="cosine")
    trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
    with pytest.warns(UserWarning, match="Ignored with SaLSaAdam") as caught:
        trainer.train()
    messages = [str(w.message) for w in caught if "Ignored" in str(w.message)]
    assert len(messages) == 1
    for name in ("learning_rate=2e-05", "warmup_steps=0.1", "lr_scheduler_type=cosine"):
        assert name in messages[0]
    assert isinstance(trainer.lr_scheduler, StepSizeReadout)


def test_own_scheduler_is_replaced_and_named(arguments, bert, sentences):
    model = bert()
    optimizer = SaLSaAdam(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0  # a warm-up starts at nothing
    trainer = SaLSaTrainer(
        model, arguments(), train_dataset=sentences, optimizers=(optimizer, scheduler)
    )
    with pytest.warns(UserWarning, match="the scheduler LambdaLR"):
        trainer.train()
    assert optimizer.counters.searches == 6


def test_readout_only_reads():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SaLSaSGD([weight])
    readout = StepSizeReadout(optimizer)
    assert set(optimizer.param_groups[0]) == set(SaLSaSGD([weight]).param_groups[0])
    for _ in range(3):
        weight.grad = 2 * weight.detach()
        optimizer.step(lambda: weight.square().sum())
        before = copy.deepcopy(optimizer.param_groups[0])
        readout.step()
        assert str(optimizer.param_groups[0]) == str(before)
        assert readout.get_last_lr() == [optimizer.step_size]


class Scaled(SaLSaTrainer):
    """Training with a gradient scaler, as fp16 has it, without a device that has fp16."""

    init_scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.init_scale, growth_interval=1000
        )


def test_a_gradient_scaler_is_seen_through(arguments, bert, sentences):
    """The search sees unscaled gradients: the trajectory is that without a scaler (13)."""
    models = []
    for cls in (SaLSaTrainer, Scaled):
        model = bert()
        cls(model, arguments(), train_dataset=sentences).train()
        models.append(model)
    assert_same_weights(*models)  # scaling by a power of two is exact


def test_a_step_that_the_scaler_skips_changes_nothing(arguments, bert, sentences):
    seen = []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            inner = unwrap_optimizer(optimizer)
            group = {k: v for k, v in inner.param_groups[0].items() if k != "params"}
            seen.append((optimizer.step_was_skipped, weights(model), group))

    model = bert()
    model.classifier.weight.register_hook(
        lambda grad: grad * torch.inf if len(seen) in (3, 4) else grad
    )
    trainer = Scaled(model, arguments(max_steps=8), train_dataset=sentences, callbacks=[Collect()])
    trainer.train()
    assert [skipped for skipped, _, _ in seen] == [False] * 3 + [True] * 2 + [False] * 3
    _, values, group = seen[2]
    for _, skipped_values, skipped_group in seen[3:5]:
        assert all(torch.equal(value, values[name]) for name, value in skipped_values.items())
        counted = {"steps", "skipped_steps", "consecutive_skips"}
        assert all(skipped_group[key] == group[key] for key in set(group) - counted)
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer.counters.skipped_steps == 2
    assert optimizer.counters.searches == 6


# --- Checkpoints (15)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumed_run_equals_the_straight_run(request, arguments, sentences, texts, model, optim):
    data = {"bert": sentences, "gpt2": texts}[model]
    make = request.getfixturevalue(model)
    args = arguments(
        optim=optim,
        bf16=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        max_steps=14,
        save_strategy="steps",
        save_steps=5,
        logging_steps=1,
        salsa_cool_down=0.8,
    )
    straight = SaLSaTrainer(make(), args, train_dataset=data)
    straight.train()
    resumed = SaLSaTrainer(make(), args, train_dataset=data)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-5"))
    assert_same_weights(straight.model, resumed.model)
    a, b = (unwrap_optimizer(t.optimizer) for t in (straight, resumed))
    assert a.counters == b.counters
    strip = {"params"}
    assert [{k: v for k, v in g.items() if k not in strip} for g in a.param_groups] == [
        {k: v for k, v in g.items() if k not in strip} for g in b.param_groups
    ]
    keys = ("loss", "learning_rate", "salsa/searches", "salsa/trials", "salsa/decrease")
    logs = [
        [[entry.get(key) for key in keys] for entry in t.state.log_history if "loss" in entry]
        for t in (straight, resumed)
    ]
    assert logs[0] == logs[1]


class InterruptedModel(nn.Module):
    """Raises KeyboardInterrupt in the middle of a trial."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.trials_left = math.inf

    def forward(self, input_ids, labels):
        if not torch.is_grad_enabled():
            self.trials_left -= 1
            if self.trials_left < 0:
                raise KeyboardInterrupt
        return self.model(input_ids=input_ids, labels=labels)


def test_ctrl_c_inside_a_search_loses_nothing(arguments, bert, sentences):
    args = arguments(
        max_steps=12, save_strategy="steps", save_steps=4, logging_steps=1, optim="sls_adam"
    )
    straight = SaLSaTrainer(InterruptedModel(bert()), args, train_dataset=sentences)
    straight.train()
    counts = [e["salsa/trials"] for e in straight.state.log_history if "loss" in e]
    model = InterruptedModel(bert())
    model.trials_left = counts[6]  # in the search of the eighth step
    interrupted = SaLSaTrainer(model, args, train_dataset=sentences)
    states = []

    class Snapshot(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            states.append(weights(model))

    interrupted.add_callback(Snapshot())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert interrupted.state.global_step == 7
    now = weights(model)
    assert all(torch.equal(now[name], value) for name, value in states[-1].items())
    resumed = SaLSaTrainer(InterruptedModel(bert()), args, train_dataset=sentences)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-4"))
    assert_same_weights(straight.model, resumed.model)


def test_checkpoint_of_another_optimizer_is_refused(arguments, bert, sentences):
    args = arguments(optim="adamw_torch", save_strategy="steps", save_steps=3)
    SaLSaTrainer(bert(), args, train_dataset=sentences).train()
    trainer = SaLSaTrainer(bert(), arguments(), train_dataset=sentences)
    with pytest.raises(ValueError, match="was not written by SaLSaAdam"):
        trainer.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-3"))


# --- What users do with Trainer


def test_learns(arguments, bert, sentences):
    args = arguments(num_train_epochs=30, max_steps=-1, eval_strategy="epoch")
    trainer = SaLSaTrainer(
        bert(dropout=0.0),
        args,
        train_dataset=sentences,
        eval_dataset=sentences,
        compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.95


def test_second_train_goes_on(arguments, bert, sentences):
    trainer = SaLSaTrainer(bert(), arguments(), train_dataset=sentences)
    trainer.train()
    first = unwrap_optimizer(trainer.optimizer)
    trainer.train()
    assert unwrap_optimizer(trainer.optimizer) is first
    assert first.counters.searches == 12


def test_load_best_model_and_early_stopping(arguments, bert, sentences):
    args = arguments(
        max_steps=12,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=1,
    )
    trainer = SaLSaTrainer(
        bert(),
        args,
        train_dataset=sentences,
        eval_dataset=sentences[:16],
        callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_auto_find_batch_size(arguments, bert, sentences):
    class TooLarge(bert().__class__):
        def forward(self, input_ids, labels=None, **kwargs):
            if input_ids.shape[0] > 4 and not torch.is_grad_enabled():  # in a trial
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    model = TooLarge(bert().config)
    model.load_state_dict(bert().state_dict())
    trainer = SaLSaTrainer(model, arguments(auto_find_batch_size=True), train_dataset=sentences)
    trainer.train()
    assert trainer._train_batch_size == 4
    assert trainer.state.global_step == 6


def test_iterable_dataset(arguments, bert, sentences):
    trainer = SaLSaTrainer(bert(), arguments(), train_dataset=Endless(sentences))
    assert trainer.train().metrics["salsa/searches"] == 6


def test_hyperparameter_search(arguments, bert, sentences):
    pytest.importorskip("optuna")
    tried = []

    def space(trial):
        tried.append(trial.suggest_categorical("salsa_c", [0.3, 0.5]))
        return {"salsa_c": tried[-1]}

    used = []

    class Collect(TrainerCallback):
        def on_train_end(self, args, state, control, optimizer=None, **kwargs):
            used.append(unwrap_optimizer(optimizer).param_groups[0]["c"])

    trainer = SaLSaTrainer(
        args=arguments(eval_strategy="steps", eval_steps=3),
        train_dataset=sentences,
        eval_dataset=sentences[:16],
        model_init=lambda: bert(),
        callbacks=[Collect()],
    )
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    assert used == tried
    assert math.isfinite(best.objective)


def test_peft_searches_adapters_only(arguments, bert, sentences):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config)
    frozen = {
        n: (p._version, p.clone()) for n, p in model.named_parameters() if not p.requires_grad
    }
    trainer = SaLSaTrainer(model, arguments(), train_dataset=sentences)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert optimizer.counters.searches == 6
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
    for name, param in model.named_parameters():
        if name in frozen:
            version, value = frozen[name]
            assert param._version == version
            assert torch.equal(param, value)


@pytest.mark.slow
def test_torch_compile(arguments, gpt2, texts):
    """Inductor draws other dropout masks with and without gradients; without dropout: exact."""
    args = arguments(torch_compile=True, max_steps=3)
    trainer = Recording(gpt2(dropout=0.0), args, train_dataset=texts)
    metrics = trainer.train().metrics
    assert metrics["salsa/searches"] == 3
    assert not unwrap_optimizer(trainer.optimizer).param_groups[0]["reevaluate_loss"]


def test_torch_compile_adds_one_graph_for_the_trials(arguments, gpt2, texts):
    """The forward pass without gradients is compiled once, however many trials there are."""
    graphs = {}
    for optim, steps in (("adamw_torch", 4), ("salsa_adam", 1), ("salsa_adam", 4)):
        torch._dynamo.reset()
        counters.clear()
        args = arguments(
            optim=optim, torch_compile=True, torch_compile_backend="aot_eager", max_steps=steps
        )
        trainer = SaLSaTrainer(gpt2(dropout=0.0), args, train_dataset=texts)
        trials = trainer.train().metrics.get("salsa/trials")
        graphs[optim, steps] = counters["stats"]["unique_graphs"]
    assert trials > 4
    assert graphs["salsa_adam", 1] == graphs["salsa_adam", 4] == 2 * graphs["adamw_torch", 4]


def test_seq2seq(arguments):
    set_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    rows = torch.randint(1, 64, (32, 6))
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = arguments(SaLSaSeq2SeqTrainingArguments, predict_with_generate=True)
    trainer = SaLSaSeq2SeqTrainer(
        T5ForConditionalGeneration(config), args, train_dataset=data, eval_dataset=data[:8]
    )
    assert isinstance(trainer, Seq2SeqTrainer)
    assert trainer.train().metrics["salsa/searches"] == 6
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_mixin_on_a_trainer_with_its_own_loss(arguments, bert, sentences):
    class Doubled(Trainer):
        losses = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.losses += 1
            inputs.pop("labels")  # as sentence-transformers and TRL do
            return model(**inputs).logits.square().mean()

    class SaLSaDoubled(SaLSaTrainerMixin, Doubled):
        pass

    trainer = SaLSaDoubled(bert(), arguments(), train_dataset=sentences)
    metrics = trainer.train().metrics
    assert trainer.losses == 6 + metrics["salsa/trials"]


def test_gradient_clipping_keeps_the_true_slope(arguments, bert, sentences):
    """The first search's slope is <g, -d>: with SGD, clipped by kappa, kappa ||g||^2 (14)."""
    slopes = {}
    for max_grad_norm in (0.0, 0.1):
        args = arguments(optim="salsa_sgd", max_grad_norm=max_grad_norm, max_steps=1)
        trainer = SaLSaTrainer(bert(), args, train_dataset=sentences)
        trainer.train()
        line = trainer.state.log_history[0]
        slopes[max_grad_norm] = (line["salsa/slope"], line["grad_norm"])
    slope, norm = slopes[0.0]
    assert slope == pytest.approx(norm**2, rel=1e-4)
    assert slopes[0.1][0] == pytest.approx(0.1 * norm, rel=1e-4)


def test_plain_module_with_tuple_outputs(arguments, sentences):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            logits = self.head(input_ids.float() / 64)
            return nn.functional.cross_entropy(logits, labels), logits

    set_seed(0)
    args = arguments(gradient_accumulation_steps=2)
    assert SaLSaTrainer(Plain(), args, train_dataset=sentences).train().training_loss > 0


# --- What users are told (18)


def test_empty_dataset_is_refused(arguments, bert):
    with pytest.raises(ValueError, match="salsa_adam does not work with an empty train_dataset"):
        SaLSaTrainer(bert(), arguments(), train_dataset=[])


def test_online_trainers_are_refused_by_name(arguments, bert, sentences):
    class GRPOTrainer(Trainer):
        pass

    class SaLSaGRPOTrainer(SaLSaTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(ValueError, match="GRPOTrainer: it generates new data"):
        SaLSaGRPOTrainer(bert(), arguments(), train_dataset=sentences)
    SaLSaGRPOTrainer(bert(), arguments(optim="adamw_torch"), train_dataset=sentences)


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP version 1")],
)
def test_set_ups_that_come_out_wrong_are_refused(arguments, bert, sentences, attribute, reason):
    class Launched(Trainer):
        """As `accelerate launch` with a configuration of its own would make it."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, attribute, True)
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)

    class SaLSaLaunched(SaLSaTrainerMixin, Launched):
        pass

    with pytest.raises(ValueError, match=f"does not work with {reason}.*FSDP2"):
        SaLSaLaunched(bert(), arguments(save_strategy="no"), train_dataset=sentences)


def test_data_parallel_is_refused(arguments, bert, sentences):
    args = arguments()
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn.DataParallel.*torchrun --nproc_per_node"):
        SaLSaTrainer(bert(), args, train_dataset=sentences)


def test_model_without_loss(arguments, sentences):
    class NoLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, labels):
            return {"logits": self.head(input_ids.float())}

    with pytest.raises(ValueError, match="did not return a loss"):
        SaLSaTrainer(NoLoss(), arguments(), train_dataset=sentences).train()


def test_losses_that_are_not_finite_end_the_run_with_a_reason(arguments, sentences):
    class NotFinite(WithBatchNorm):
        def forward(self, input_ids, labels=None):
            outputs = super().forward(input_ids, labels)
            outputs["loss"] = outputs["loss"] * math.nan
            return outputs

    model = NotFinite()
    before = weights(model)
    trainer = SaLSaTrainer(model, arguments(max_steps=40), train_dataset=sentences)
    with pytest.raises(FloatingPointError, match="20 steps in a row"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_low_precision_weights_are_warned_of(arguments, bert, sentences):
    with pytest.warns(UserWarning, match="Trainable parameters are bfloat16.*bf16=True"):
        SaLSaTrainer(bert().bfloat16(), arguments(), train_dataset=sentences).train()
