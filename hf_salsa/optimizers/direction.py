"""What a direction brings: which way a step goes, and how it is taken."""

from typing import Any, ClassVar

from torch import Tensor

from .trial_points import Chunk
from .updates import Update


class Direction:
    """The part of a `LineSearchOptimizer` that Adam and SGD do differently.

    Attributes:
        options: Name -> default of the settings of the direction.
        base_name: Whose steps these are, for readers.
        nesterov: Whether their momentum is Nesterov's.
        degree: The direction of a times the loss is a^degree times that of the loss.
        usual_step_size: What people use for weights that were never trained; 0 where no number
            is usual.
    """

    options: ClassVar[dict[str, Any]] = {}
    base_name: ClassVar[str]
    nesterov: ClassVar[bool] = False
    degree: ClassVar[int] = 0
    usual_step_size: ClassVar[float] = 0.0

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first step, of fixed names and shapes."""
        raise NotImplementedError

    def direction(self, chunk: Chunk) -> list[Tensor]:
        """Return -d_k, the tested direction with its sign turned; float32 or wider."""
        raise NotImplementedError

    def direction_and_agreement(self, chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        """Return what `direction` does, and <g_k, p_k> of each piece (see `Line.agreement`)."""
        raise NotImplementedError

    def rescale(self, growth: float) -> None:
        """Carry what a step keeps of earlier gradients over to a loss `growth` times as large.

        Needed where the step size changes with the scale of the loss.
        """

    def take_step(self, update: Update) -> None:
        """Move the moments by one step and the weights along the final direction."""
        raise NotImplementedError

    def step_numbers(self, params: list[Tensor], group: dict[str, Any]) -> list[int]:
        """Return k of each parameter for the coming step, for directions that need it."""
        return [0] * len(params)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ValueError` if options of a group do not go together."""
