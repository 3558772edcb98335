"""SaLSaTrainer: HuggingFace Trainer whose optimizer may evaluate the mini-batch again."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import (
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from .accelerated import unwrap_evaluating, unwrap_optimizer
from .model_card import write_model_card
from .model_card_procedure import add_to_procedure, head_first_sentence
from .objective import BatchObjective
from .optimizers import OPTIMIZERS, LineSearchOptimizer
from .phases import phases_of
from .printing import print_by
from .refusals import refuse_what_comes_out_wrong
from .run_trace import RunTrace
from .search_arguments import (
    SearchArguments,
    head_first_of,
    ignored_settings,
    line_search_name,
    optimizer_arguments,
    resolved_max_grad_norm,
)
from .trainer_go_back import GoBackMixin, WatchRun
from .trainer_head import HeadFirstMixin, with_head_first

# The names under which Trainer takes parameters from the optimizer's arguments.
_PARAMETER_OPTIONS = {"params", "model", "optimizer_dict"}


class StepSizeReadout(LRScheduler):
    """A scheduler that only reads: its learning rate is the step size last applied."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        for group in optimizer.param_groups:
            # Keys that come and go break checkpoints of sharded models.
            group.pop("initial_lr", None)

    def get_lr(self) -> list[float | Tensor]:
        """Return the step size of each parameter group."""
        # Accelerate's wrapper has no attributes of the optimizer inside.
        line_search = unwrap_optimizer(self.optimizer)
        assert line_search is not None
        return [line_search.step_size for _ in line_search.param_groups]

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the step size of each parameter group, as of now."""
        return self.get_lr()


class SaLSaTrainerMixin(GoBackMixin, HeadFirstMixin):
    """Lets any subclass of `Trainer` train with a line search.

    Put it first: `class SaLSaSFTTrainer(SaLSaTrainerMixin, SFTTrainer)`. `training_step` records
    each micro-batch in a `BatchObjective`; `optimizer.step()`, called by Trainer as ever, evaluates
    it at trial weights and picks the step size. With another optimizer (`--optim adamw_torch`)
    everything is the base class's own, but for the updates that `salsa_head_first` asks for: they
    train a new head alone, recorded and searched as with a line search.

    Raises:
        ValueError: At construction, with a line search: an empty `train_dataset`, or a set-up in
            which the loss is not re-evaluated rightly (DeepSpeed, FSDP 1, `nn.DataParallel`,
            context, sequence or tensor parallelism, trainers that generate their own data).
    """

    _run: TrainerState | None = None
    lr_scheduler: LRScheduler | None  # type: ignore[assignment]  # Trainer says LambdaLR

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [print_by(callback) for callback in callbacks]
        self.add_callback(RunTrace())
        self._watch = WatchRun()
        if self.optimizer is not None:
            name = type(self.optimizer).__name__
            uses_line_search = isinstance(self.optimizer, LineSearchOptimizer)
        elif self.optimizer_cls_and_kwargs is not None:
            name = self.optimizer_cls_and_kwargs[0].__name__
            uses_line_search = issubclass(self.optimizer_cls_and_kwargs[0], LineSearchOptimizer)
        else:
            name = line_search_name(self.args) or ""
            uses_line_search = bool(name)
            if uses_line_search and not isinstance(self.args, SearchArguments):
                warnings.warn(
                    f"{type(self).__name__} was given plain {type(self.args).__name__}: it trains "
                    f"with {name}, not with {self.args.optim!s}. Choose the optimizer with "
                    "SaLSaTrainingArguments(optim=...).",
                    stacklevel=2,
                )
        if uses_line_search:
            refuse_what_comes_out_wrong(self, name, "use a stock optimizer")
        elif self.head_first:
            refuse_what_comes_out_wrong(self, "salsa_head_first", "leave it out")
        self._head = self._new_head(self.model) if self.optimizer is None else ()

    @property
    def line_search(self) -> LineSearchOptimizer | None:
        """The line-search optimizer, without Accelerate's wrapper; None with any other."""
        return unwrap_optimizer(self.optimizer)

    def get_optimizer_cls_and_kwargs(  # type: ignore[override]  # as sentence-transformers does
        self, args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, Any]:
        """Return the optimizer class and its arguments, as `args` ask for them.

        Args:
            args: The training arguments.
            model: The model to train; some optimizers of transformers need it.
        """
        name = line_search_name(args)
        if name is None:
            cls, options = super().get_optimizer_cls_and_kwargs(args, model)
            number = head_first_of(args)
            return with_head_first(cls, options, number) if number else (cls, options)
        stock_args = copy.copy(args)
        stock_args.optim = OptimizerNames.ADAMW_TORCH
        _, options = super().get_optimizer_cls_and_kwargs(stock_args, model)
        # Which parameters to train, if not all of the model: sentence-transformers adds its loss's.
        params = {key: options[key] for key in _PARAMETER_OPTIONS & options.keys()}
        return OPTIMIZERS[name], optimizer_arguments(args) | params

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Set up the scheduler: with a line search one that only shows the step size.

        Args:
            num_training_steps: Updates of the whole run.
            optimizer: Whose rate is scheduled, the trainer's own by default.
        """
        scheduled = optimizer or self.optimizer
        line_search = unwrap_optimizer(scheduled)
        if scheduled is None or line_search is None:
            return super().create_scheduler(num_training_steps, optimizer)
        ignored = ignored_settings(self.args)
        if self.lr_scheduler is not None and not isinstance(self.lr_scheduler, StepSizeReadout):
            ignored.append(f"the scheduler {type(self.lr_scheduler).__name__}")
        if ignored:
            warnings.warn(
                f"Ignored with {type(line_search).__name__}, whose line search sets the step size: "
                f"{', '.join(ignored)}.",
                stacklevel=2,
            )
        readout = StepSizeReadout(scheduled)  # the wrapper: Accelerate swaps the inner step()
        self.lr_scheduler = readout
        return readout

    def _begin_run(self, processes: int) -> None:
        """Prepare for a run that starts or is resumed, after a checkpoint was loaded."""
        self._run = self.state
        line_search, optimizer = self.line_search, self.optimizer
        self._begin_watch(self.model, line_search)
        kind = None if line_search is None else type(line_search)
        self.args.max_grad_norm = resolved_max_grad_norm(self.args.max_grad_norm, kind)
        evaluating = unwrap_evaluating(optimizer)
        if evaluating is None or optimizer is None:
            self._objective = None
            return
        if line_search is not None and not isinstance(self.lr_scheduler, StepSizeReadout):
            raise ValueError(
                f"create_scheduler of {type(self).__name__} made a "
                f"{type(self.lr_scheduler).__name__}, but {type(line_search).__name__} has no "
                "learning rate to schedule. Return super().create_scheduler(...) there, or use a "
                "stock optimizer."
            )
        self._objective = BatchObjective(self.model, optimizer)
        self._objective.scene.owner = self
        if self.accelerator.num_processes > 1 and self._others(self.model):
            raise ValueError(
                f"{type(line_search).__name__} does not work with parameters beside the model, as "
                "those of a loss, in several processes: their gradients are not averaged. Train in "
                "one process, make them part of the model, or use a stock optimizer."
            )
        evaluating.plan(self.state.max_steps, done=self.state.global_step)
        if line_search is not None:
            line_search.expect(self.args.gradient_accumulation_steps * processes)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run forward and backward on one micro-batch, and record it for the search.

        Args:
            model: The model, as it was prepared for training.
            inputs: The micro-batch.
            num_items_in_batch: Items of the whole update, by which some losses are normalised.

        Returns:
            The loss, as it was differentiated.
        """
        # By them stock Trainer multiplies the loss then.
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        processes = self.accelerator.num_processes if averaged else 1
        if self._run is not self.state:  # Trainer makes a new state for each run
            self._begin_run(processes)
        if self.line_search is None and not self._searching:
            self._objective = None  # the stock optimizer begins
        if self._objective is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._objective.processes_in_loss = processes
        return self._objective.record_step(self._noted_step, model, inputs, num_items_in_batch)

    @property
    def in_trial(self) -> bool:
        """True while the search evaluates the loss: for code in compute_loss that counts."""
        return self._objective is not None and self._objective.evaluating

    def _noted_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a training step; return what it returns, and the sum of what backward was given.

        The search calls this again: one definition of the loss serves gradient and trials. Then
        nothing is differentiated and nothing is logged.
        """
        losses: list[Tensor] = []
        accelerator, trial = self.accelerator, self.in_trial
        backward = accelerator.backward

        def noting(loss: Tensor, **kwargs: Any) -> None:
            losses.append(loss.detach() / accelerator.gradient_accumulation_steps)
            if not trial:
                backward(loss, **kwargs)

        if trial and isinstance(model, DistributedDataParallel):
            model = model.module  # the wrapper's forward prepares a backward that never comes
        try:
            accelerator.backward = noting
            with self._silence() if trial else nullcontext(), self._doubled() as doubled:
                if doubled and num_items_in_batch is not None:
                    num_items_in_batch = 2 * num_items_in_batch
                returned = super().training_step(model, inputs, num_items_in_batch)
        finally:
            accelerator.backward = backward
        return returned, sum(losses[1:], losses[0]) if losses else None

    @contextmanager
    def _doubled(self) -> Iterator[bool]:
        """Let the loss be divided by twice as many micro-batches, if that is asked; yield that."""
        doubled = self._objective is not None and self._objective.doubling
        if not doubled:
            yield False
            return
        steps = self.current_gradient_accumulation_steps
        try:
            self.current_gradient_accumulation_steps = 2 * steps
            yield True
        finally:
            self.current_gradient_accumulation_steps = steps

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Let no callback and no tracker hear of what runs inside."""
        handler: Any = self.callback_handler
        accelerator: Any = self.accelerator
        call_event, log = handler.call_event, accelerator.log
        try:
            handler.call_event = lambda event, args, state, control, **_: control
            accelerator.log = lambda *args, **kwargs: None
            yield
        finally:
            handler.call_event, accelerator.log = call_event, log

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(self._with_others(model))
        if self._objective is not None:
            self._objective.note_clipping(norm, self.args.max_grad_norm)
        return norm

    def _with_others(self, model: nn.Module) -> nn.Module:
        """Return what has all parameters that are trained: one factor must clip them."""
        others = self._others(model)
        return _WithOthers(model, others) if others else model

    def _others(self, model: nn.Module) -> list[Tensor]:
        """Return the parameters of the line search that are not the model's, as those of a loss."""
        if self.line_search is None:
            return []
        own = {id(p) for p in model.parameters()}
        groups = self.line_search.param_groups
        return [p for group in groups for p in group["params"] if id(p) not in own]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        whole = self._with_others(model) if grad_norm is None else model
        norm = super()._get_grad_norm(whole, grad_norm)
        if self._objective is not None:
            self._objective.note_gradient_norm(norm)  # computed for the log, so it costs nothing
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with what the search did since beside them.

        Args:
            logs: Name -> value. Training losses get the latest search and the totals so far
                (`salsa/searches`, `salsa/trials`, `salsa/interval`, `salsa/decrease`,
                `salsa/slope`; with `salsa_go_back` `salsa/returns`); the metrics at the end of
                training the report of the whole run.
            start_time: When training started.
        """
        if self.in_trial:
            return
        line_search = self.line_search
        if line_search is not None and "loss" in logs:
            counters, trace = line_search.counters, self.run_trace
            logs["salsa/searches"] = counters.searches - trace.before.get("searches", 0)
            logs["salsa/trials"] = counters.trials - trace.before.get("trials", 0)
            logs.update(trace.latest | self._watch.logged)
        elif line_search is not None and "train_runtime" in logs:
            logs.update(self.run_trace.report(line_search, self.state) | self._watch.logged)
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the model card: with a line search one that says what was searched, and its plot.

        Args:
            language: As in `Trainer.create_model_card`, like all others.
            license: License of the model.
            tags: Tags of the model.
            model_name: Title of the card.
            finetuned_from: The base model.
            tasks: Task identifiers.
            dataset_tags: Identifiers of the data sets on the hub.
            dataset: Names of the data sets.
            dataset_args: Arguments of the data sets.
            dataset_name: Name of the data set, as TRL's scripts give it.
        """
        settings: dict[str, Any] = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset or dataset_name,
            "dataset_args": dataset_args,
        }
        line_search = self.line_search
        if line_search is None:
            settings |= {"dataset": dataset, "dataset_name": dataset_name}
            # Only what was given: TRL's own takes few of these.
            super().create_model_card(**{k: v for k, v in settings.items() if v is not None})
            self._tell_of_head()
        elif self.is_world_process_zero():
            write_model_card(
                Path(str(self.args.output_dir)),
                state=self.state,
                arguments=self.args,
                optimizer=line_search,
                model=self.accelerator.unwrap_model(self.model),
                searches=self.run_trace.points,
                processing_class=self.processing_class,
                data=self.train_dataset if self.eval_dataset is None else self.eval_dataset,
                **settings,
            )

    def _tell_of_head(self) -> None:
        """Say on the card of a stock optimizer that it trained a new head first, if it did."""
        evaluating = unwrap_evaluating(self.optimizer)
        if evaluating is not None and self.is_world_process_zero():
            head = phases_of(evaluating, self.state.max_steps).head
            model = self.accelerator.unwrap_model(self.model)
            sentences = head_first_sentence(evaluating, model, head)
            add_to_procedure(Path(str(self.args.output_dir)) / "README.md", sentences)

    @property
    def run_trace(self) -> RunTrace:
        """The searches of the current run."""
        callbacks = self.callback_handler.callbacks
        return next(callback for callback in callbacks if isinstance(callback, RunTrace))


class _WithOthers(nn.Module):
    """A model and parameters beside it, for `Trainer` to clip."""

    def __init__(self, model: nn.Module, others: list[Tensor]) -> None:
        super().__init__()
        self._parts = (model, others)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        model, others = self._parts
        yield from model.parameters(recurse)
        yield from others


class SaLSaTrainer(SaLSaTrainerMixin, Trainer):
    """`Trainer` without a learning rate.

    Takes what `Trainer` takes. The optimizer is `salsa_adam_plus` unless
    `SaLSaTrainingArguments.optim` names another or `optimizers=(SaLSaSGD(model.parameters()),
    None)` brings one.

    Example:
        >>> args = SaLSaTrainingArguments("out")
        >>> trainer = SaLSaTrainer(model, args, train_dataset=dataset)
        >>> trainer.train()
    """


class SaLSaSeq2SeqTrainer(SaLSaTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` without a learning rate; see `SaLSaTrainer`."""
