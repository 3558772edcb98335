"""GoodWeights: the way back to where a run stood before it broke down."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .accelerated import unwrap_optimizer
from .optimizers.state import RunState, read
from .optimizers.tensors import local
from .optimizers.trial_points import PREVIOUS
from .rules.plus import Plus, PlusState

_logger = logging.getLogger(__name__)

_SKIPS = 10  # in a row; after 20 the optimizer gives up


class GoodWeights:
    """Keeps the weights at which the averaged loss was lowest, and goes back to them.

    After a search of a plus optimizer, at w_k:

        keep      the averaged loss is the lowest so far: w_k, moments, buffers and the state of
                  the rule are copied
        go back   it is out of the range of the first ten losses (above their mean by more than two
                  standard deviations; before the tenth, above three times their mean), or the last
                  10 steps were skipped since gradients were not finite: all of that is put back,
                  and the step size is half of the smaller one of then and now

    The steps, and with them the tail, and the data go on. Each return is logged as a warning. It
    takes the memory of one more copy of the trainable weights and of their moments, and as much in
    `state_dict()`. `SaLSaTrainer` does all of this with `salsa_go_back=True`.

    Args:
        model: The model that is trained, as the loop calls it.
        optimizer: A plus optimizer, Accelerate's wrapper around it or not.

    Attributes:
        returns: How often the run went back.

    Raises:
        TypeError: The optimizer is no plus optimizer: others know no range of the loss.

    Example:
        >>> good_weights = GoodWeights(model, optimizer)
        >>> for batch in loader:
        ...     objective.record(loss_fn, batch).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     good_weights.update()
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        line_search = unwrap_optimizer(optimizer)
        if line_search is None or not isinstance(line_search.rule, Plus):
            name = type(line_search or optimizer).__name__
            raise TypeError(
                f"GoodWeights cannot go with {name}, which knows no range of the loss. Use "
                "SaLSaAdamPlus or SaLSaSGDPlus."
            )
        self.returns = 0
        self._model = model
        self._optimizer = line_search
        self._rule: Plus = line_search.rule
        self._accepted = 0  # searches that were looked at
        self._kept: list[Tensor] = []  # nothing yet
        self._state = PlusState(self._rule.initial_step_size)  # that goes with them
        self._step = 0  # that found them good
        self._scale = (0.0, 0.0)  # of the loss then

    @torch.no_grad()
    def update(self) -> bool:
        """Keep what the latest step has found good, or go back; call it after every `step()`.

        Returns:
            Whether the run went back.
        """
        group = self._optimizer.param_groups[0]
        state, run = read(PlusState, group), read(RunState, group)
        accepted = state.searches - state.failed_searches
        searched, self._accepted = accepted > self._accepted, accepted
        stuck = run.consecutive_skips >= _SKIPS
        if not (searched or stuck):
            return False
        scale = run.micro_batches, run.loss_factor
        fits = scale == self._scale and self._shapes() == [t.shape for t in self._kept]
        if fits and (stuck or self._rule.out_of_range(state)):
            self._go_back(state, run.steps)
            return True
        lowest, loss = map(self._rule.averaged_loss, (self._state, state))
        if searched and (not fits or loss < lowest):
            # w_k, of which the search has seen the loss; the step from there nobody has judged.
            self._kept = [before.clone() for _, before in self._tensors()]
            self._state, self._step, self._scale = state, run.steps, scale
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what this process keeps: numbers and tensors."""
        return {
            "returns": self.returns,
            "accepted": self._accepted,
            "kept": self._kept,
            "state": vars(self._state),
            "step": self._step,
            "scale": self._scale,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the run did that wrote this; the optimizer has been loaded already.

        Args:
            state_dict: What `state_dict()` returned in the process of the same rank.

        Raises:
            ValueError: It is of another model.
        """
        kept = state_dict["kept"]
        if kept and [t.shape for t in kept] != self._shapes():
            raise ValueError(
                "The good weights of this checkpoint are of another model. Resume without them: "
                "leave salsa_go_back out."
            )
        here = [now for now, _ in self._tensors()]
        self._kept = [t.to(now.device) for t, now in zip(kept, here, strict=False)]
        self._state = PlusState(**state_dict["state"])
        self._step, self._scale = state_dict["step"], tuple(state_dict["scale"])
        self.returns, self._accepted = state_dict["returns"], state_dict["accepted"]

    def _shapes(self) -> list[torch.Size]:
        return [now.shape for now, _ in self._tensors()]

    def _tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is put back, and where its value at w_k is."""
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                state = self._optimizer.state.get(param, {})
                if PREVIOUS in state:
                    yield local(param.detach()), local(state[PREVIOUS])
                for name, moment in state.items():
                    if name != PREVIOUS:
                        yield local(moment), local(moment)
        for buffer in self._model.buffers():
            yield buffer, buffer

    def _go_back(self, state: PlusState, step: int) -> None:
        for (now, _), kept in zip(self._tensors(), self._kept, strict=True):
            now.copy_(kept)
        before, self._state = self._state, self._rule.gone_back(state, self._state)
        self._optimizer.go_on_with(self._state)
        self.returns += 1
        _logger.warning(
            f"Step {step}: the loss has left the range in which the run started (on average "
            f"{self._rule.averaged_loss(state):.4g}). Back to the weights before step {self._step} "
            f"({self._rule.averaged_loss(before):.4g}), with step size "
            f"{self._state.step_size:.3g} for {state.step_size:.3g}."
        )
