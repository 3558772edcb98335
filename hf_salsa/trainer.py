"""SaLSaTrainer: HuggingFace Trainer whose optimizer may evaluate the mini-batch again."""

import copy
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames

from .model_card import write_model_card
from .objective import BatchObjective, unwrap_optimizer
from .optimizers import OPTIMIZERS, LineSearchOptimizer
from .traces import without_trace
from .training_args import (
    SaLSaArgumentsMixin,
    ignored_settings,
    line_search_name,
    optimizer_arguments,
)

# TRL's trainers that generate inside of training_step.
_ONLINE_TRAINERS = {
    "A2POTrainer",
    "AsyncDistillationTrainer",
    "AsyncGRPOTrainer",
    "DistillationTrainer",
    "GKDTrainer",
    "GOLDTrainer",
    "GRPOTrainer",
    "IWOPDTrainer",
    "NashMDTrainer",
    "OnlineDPOTrainer",
    "PPOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
    "XPOTrainer",
}
# The names under which Trainer takes parameters from the optimizer's arguments.
_PARAMETER_OPTIONS = {"params", "model", "optimizer_dict"}
# Where the trainers of TRL and sentence-transformers add up metrics while they compute a loss.
_METRICS = ("_metrics", "_total_train_tokens", "accum_loss_components")


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


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


class SaLSaTrainerMixin(_Base):
    """Lets any subclass of `Trainer` train with a line search.

    Put it first: `class SaLSaSFTTrainer(SaLSaTrainerMixin, SFTTrainer)`. `training_step` records
    each micro-batch in a `BatchObjective`; `optimizer.step()`, called by Trainer as ever, evaluates
    it at trial weights and picks the step size. With another optimizer (`--optim adamw_torch`)
    everything is the base class's own.

    Raises:
        ValueError: At construction, with a line search: an empty `train_dataset`, or a set-up in
            which the loss is not re-evaluated rightly (DeepSpeed, FSDP 1, `nn.DataParallel`,
            context, sequence or tensor parallelism, trainers that generate their own data).
    """

    _objective: BatchObjective | None = None
    _loss_scaling_checked: bool = False
    _planned: bool = False
    model: nn.Module
    lr_scheduler: LRScheduler | None  # type: ignore[assignment]  # Trainer says LambdaLR

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.optimizer is not None:
            name = type(self.optimizer).__name__
            uses_line_search = isinstance(self.optimizer, LineSearchOptimizer)
        elif self.optimizer_cls_and_kwargs is not None:
            name = self.optimizer_cls_and_kwargs[0].__name__
            uses_line_search = issubclass(self.optimizer_cls_and_kwargs[0], LineSearchOptimizer)
        else:
            name = line_search_name(self.args) or ""
            uses_line_search = bool(name)
            if uses_line_search and not isinstance(self.args, SaLSaArgumentsMixin):
                warnings.warn(
                    f"{type(self).__name__} was given plain {type(self.args).__name__}: it trains "
                    f"with {name}, not with {self.args.optim!s}. Choose the optimizer with "
                    "SaLSaTrainingArguments(optim=...).",
                    stacklevel=2,
                )
        if uses_line_search:
            self._refuse_what_comes_out_wrong(name)

    @property
    def line_search(self) -> LineSearchOptimizer | None:
        """The line-search optimizer, without Accelerate's wrapper; None with any other."""
        return unwrap_optimizer(self.optimizer)

    def _refuse_what_comes_out_wrong(self, name: str) -> None:
        """Raise a `ValueError` with the reason and the alternative before training starts."""
        online = _ONLINE_TRAINERS & {base.__name__ for base in type(self).__mro__}
        parallelism = self.accelerator.parallelism_config
        reasons = [
            (
                self.train_dataset is not None
                and has_length(self.train_dataset)
                and len(self.train_dataset) == 0,
                "an empty train_dataset: there is nothing to train on. Check the path and the "
                "filters of the data",
            ),
            (
                self.is_deepspeed_enabled,
                "DeepSpeed: its engine steps inside backward, where the loss cannot be "
                "re-evaluated. Use FSDP2 or DDP (torchrun) instead",
            ),
            (
                self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2,
                "FSDP version 1: it hides the parameters from the optimizer. Use FSDP2 "
                "(fsdp_config version 2) instead",
            ),
            (
                self.args.n_gpu > 1,
                "nn.DataParallel, which one process with several GPUs falls into. Start one "
                "process per GPU (torchrun --nproc_per_node N script.py) or set "
                "CUDA_VISIBLE_DEVICES=0",
            ),
            (
                parallelism is not None and parallelism.total_size != parallelism.dp_replicate_size,
                "context, sequence or tensor parallelism: each rank holds a part of one loss. Use "
                "DDP (torchrun) instead",
            ),
            (
                bool(online),
                f"{', '.join(sorted(online))}: it generates new data in every training step, so "
                "there is no mini-batch to evaluate again",
            ),
        ]
        for applies, reason in reasons:
            if applies:
                raise ValueError(f"{name} does not work with {reason}; or use a stock optimizer.")

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
            return super().get_optimizer_cls_and_kwargs(args, model)
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
            self._objective = None
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
        # A new training run: nothing recorded in an earlier one may be left.
        self._objective = BatchObjective(self.model, line_search)
        self._planned = False
        return readout

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
        if self._objective is None:
            return super().training_step(model, inputs, num_items_in_batch)
        line_search = self.line_search
        if line_search is not None and not self._planned:  # here, after a checkpoint was loaded
            line_search.plan(self.state.max_steps, done=self.state.global_step)
            self._planned = True
        if not self._loss_scaling_checked:
            self._check_loss_scaling(self._objective, model, inputs, num_items_in_batch)
        return self._objective.record(self._micro_batch_loss, model, inputs, num_items_in_batch)

    def _micro_batch_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Return the loss that `training_step` differentiates, and differentiate it if asked.

        The search calls this under `torch.no_grad`: one definition of the loss serves both.
        """
        if torch.is_grad_enabled():
            return super().training_step(model, inputs, num_items_in_batch)
        if isinstance(model, DistributedDataParallel):
            model = model.module  # the wrapper's forward prepares a backward that never comes
        with self._evaluating():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Run a training step that differentiates nothing and counts in no metric."""
        backward = self.accelerator.backward
        metrics = {name: value for name, value in vars(self).items() if name in _METRICS}
        self.accelerator.backward = lambda loss, **kwargs: None
        vars(self).update(copy.deepcopy(metrics))
        try:
            yield
        finally:
            self.accelerator.backward = backward
            vars(self).update(metrics)

    def _check_loss_scaling(
        self,
        objective: BatchObjective,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None,
    ) -> None:
        """Find out whether the model normalises its loss by `num_items_in_batch`.

        Trainer assumes so of every model whose `forward` takes keyword arguments, and then does not
        average the loss over micro-batches. Many do not (BERT's classification): their accumulated
        loss, and with it SGD's step, would grow with the number of micro-batches.
        """
        self._loss_scaling_checked = True
        accumulates = self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1
        if (
            not accumulates
            or not self.model_accepts_loss_kwargs
            or num_items_in_batch is None
            or self.compute_loss_func is not None
            or self.label_smoother is not None
        ):
            return
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        inputs = self._prepare_inputs(inputs)
        losses = []
        for items in (num_items_in_batch, 2 * num_items_in_batch):
            with torch.no_grad(), without_trace(self.model), self.compute_loss_context_manager():
                outputs = bare(**inputs, num_items_in_batch=items)
            losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs[0])
        if torch.equal(*losses):
            self.model_accepts_loss_kwargs = False

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if self._objective is not None:
            self._objective.note_clipping(norm, self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if self._objective is not None:
            self._objective.note_gradient_norm(norm)  # computed for the log, so it costs nothing
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, with what the search did since beside them.

        Args:
            logs: Name -> value. Training losses get the latest search and the totals so far
                (`salsa/searches`, `salsa/trials`, `salsa/interval`, `salsa/decrease`,
                `salsa/slope`); the metrics at the end of training the report of the whole run.
            start_time: When training started.
        """
        line_search = self.line_search
        if line_search is not None and "loss" in logs:
            logs["salsa/searches"] = line_search.counters.searches
            logs["salsa/trials"] = line_search.counters.trials
            record = line_search.last_search
            if record is not None:
                logs["salsa/interval"] = record.interval
                logs["salsa/decrease"] = record.decrease
                logs["salsa/slope"] = record.slope
        elif line_search is not None and "train_runtime" in logs:
            logs.update(self._search_report(line_search))
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
        elif self.is_world_process_zero():
            write_model_card(
                Path(str(self.args.output_dir)),
                state=self.state,
                arguments=self.args,
                optimizer=line_search,
                model=self.accelerator.unwrap_model(self.model),
                processing_class=self.processing_class,
                data=self.train_dataset if self.eval_dataset is None else self.eval_dataset,
                **settings,
            )

    def _search_report(self, line_search: LineSearchOptimizer) -> dict[str, float]:
        """Return what the searches of the whole run cost and found."""
        counters = line_search.counters
        # Each evaluation repeats the forward passes of one update.
        forward_passes = counters.trials + self.state.global_step
        applied = [entry["learning_rate"] for entry in self.state.log_history if "loss" in entry]
        return {
            "salsa/searches": counters.searches,
            "salsa/trials": counters.trials,
            "salsa/extra_forward_share": counters.trials / max(forward_passes, 1),
            "salsa/failed_searches": counters.failed_searches,
            "salsa/skipped_steps": counters.skipped_steps,
            "salsa/median_step_size": statistics.median(applied or [line_search.step_size]),
            "salsa/final_step_size": line_search.step_size,
        }


class SaLSaTrainer(SaLSaTrainerMixin, Trainer):
    """`Trainer` without a learning rate.

    Takes what `Trainer` takes. The optimizer is `salsa_adam` unless `SaLSaTrainingArguments.optim`
    names another or `optimizers=(SaLSaSGD(model.parameters()), None)` brings one.

    Example:
        >>> args = SaLSaTrainingArguments("out")
        >>> trainer = SaLSaTrainer(model, args, train_dataset=dataset)
        >>> trainer.train()
    """


class SaLSaSeq2SeqTrainer(SaLSaTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` without a learning rate; see `SaLSaTrainer`."""
