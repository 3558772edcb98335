"""What Accelerate, where it is loaded, wraps around an optimizer and knows of an update."""

import sys

from torch.amp import GradScaler
from torch.optim.optimizer import Optimizer

from .optimizers import LineSearchOptimizer


def unwrap_optimizer(optimizer: Optimizer | None) -> LineSearchOptimizer | None:
    """Return the line-search optimizer inside Accelerate's wrapper, or None if it is another."""
    while _is_accelerated(optimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    return optimizer if isinstance(optimizer, LineSearchOptimizer) else None


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
