"""What Accelerate, where it is loaded, wraps around an optimizer and knows of an update."""

import sys

from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from .optimizers import LineSearchOptimizer
from .optimizers.evaluating import Evaluating


def unwrap_optimizer(optimizer: Optimizer | None) -> LineSearchOptimizer | None:
    """Return the line-search optimizer inside Accelerate's wrapper, or None if it is another."""
    evaluating = unwrap_evaluating(optimizer)
    return evaluating if isinstance(evaluating, LineSearchOptimizer) else None


def unwrap_evaluating(optimizer: Optimizer | None) -> Evaluating | None:
    """Return the optimizer inside Accelerate's wrapper if it evaluates the loss again, or None.

    That is a line-search optimizer, or a stock one that trains a new head first.
    """
    optimizer = innermost(optimizer)
    return optimizer if isinstance(optimizer, Evaluating) else None


def innermost(optimizer: Optimizer | None) -> Optimizer | None:
    """Return the optimizer inside Accelerate's wrappers."""
    while _is_accelerated(optimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    return optimizer


def _is_accelerated(optimizer: Optimizer | None) -> bool:
    # Where Accelerate is not loaded, nothing is wrapped; to import it costs a second.
    accelerate = sys.modules.get("accelerate.optimizer")
    return accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer)


def scaler_of(optimizer: Optimizer) -> GradScaler | None:
    """Return the gradient scaler that Accelerate uses with an optimizer."""
    return optimizer.scaler if _is_accelerated(optimizer) else None  # type: ignore[attr-defined]


def synchronises_gradients() -> bool:
    """Return whether this micro-batch ends an update, as far as Accelerate knows."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is None or bool(accelerate.GradientState().sync_gradients)
