"""What a trainer does for a new head that is trained first (`salsa_head_first`)."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.optimizer import Optimizer
from transformers import Trainer

from .accelerated import unwrap_evaluating
from .head import find_head, mark_head
from .objective import BatchObjective
from .optimizers import LineSearchOptimizer
from .optimizers.head_first import HeadFirst, head_first_class
from .search_arguments import SearchArguments, head_first_of

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class HeadFirstMixin(_Base):
    """Finds the head, marks it in the optimizer, and keeps the body out of its updates."""

    _objective: BatchObjective | None = None
    _head: Sequence[str] | None = None  # until it is constructed
    model: nn.Module

    @property
    def head_first(self) -> int:
        """How many updates shall train a new head alone, of an optimizer that is made here."""
        if self.optimizer_cls_and_kwargs is None:
            return head_first_of(self.args)
        cls, options = self.optimizer_cls_and_kwargs
        known = cls.default_settings() if issubclass(cls, LineSearchOptimizer) else {}
        return int({**known, **options}.get("head_first", 0))

    def _new_head(self, model: nn.Module) -> Sequence[str]:
        """Return which parameters are a new head, if it shall be trained first.

        Asked before a checkpoint is loaded, after which a head is no longer new, and before the
        model is wrapped, after which what transformers marked is lost.
        """
        names = self.args.salsa_head if isinstance(self.args, SearchArguments) else None
        return find_head(model, names) if self.head_first else ()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a model made by `model_init`.

        Args:
            trial: Of a hyper-parameter search.
        """
        model = super().call_model_init(trial)
        if self._head is not None:
            self._head = self._new_head(model)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Set up the optimizer, with the new head marked if it shall be trained first.

        Args:
            args: As in `Trainer.create_optimizer`, like `kwargs`.
            kwargs: The same by keyword.
        """
        given = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        evaluating = unwrap_evaluating(optimizer)
        if given is not None or evaluating is None or not evaluating.param_groups[0]["head_first"]:
            return optimizer
        if self._head:
            groups = mark_head(evaluating.param_groups, self.model, self._head)
            evaluating.param_groups[:] = groups
            text = f"The new head is trained first, alone: {', '.join(self._head)}."
        else:
            text = "No new head on a trained body is found, so that none is trained first."
        if self.is_world_process_zero():
            _logger.info(text)
        return optimizer

    @property
    def _searching(self) -> bool:
        return self._objective is not None and self._objective.line_search.search_due

    def _leave_body_alone(self) -> None:
        if self._objective is not None:
            self._objective.line_search.leave_body_alone()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._leave_body_alone()
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._leave_body_alone()
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _get_learning_rate(self) -> Any:
        evaluating = unwrap_evaluating(self.optimizer)
        if isinstance(evaluating, HeadFirst) and evaluating.in_phase:
            return evaluating.step_size  # the head's; the schedule's was not applied
        return super()._get_learning_rate()


def with_head_first(cls: Any, options: dict[str, Any], number: int) -> tuple[Any, dict[str, Any]]:
    """Return a stock optimizer class that trains a new head first, and its options."""
    steps_itself = isinstance(cls, type) and issubclass(cls, Optimizer)
    if not steps_itself or {"model", "optimizer_dict"} & options.keys():
        raise ValueError(
            f"salsa_head_first={number} is not allowed with {cls.__name__}, which does not step as "
            "torch's optimizers do. Leave it out, or choose another optimizer."
        )
    return head_first_class(cls), {**options, "head_first": number}
