"""GoodWeights: the way back to where a run stood before it broke down."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .accelerated import unwrap_optimizer
from .optimizers.scale import Parts
from .optimizers.state import RunState, read
from .optimizers.tensors import local
from .optimizers.trial_points import PREVIOUS
from .processes import several_processes
from .rules.plus import Plus, PlusState

_logger = logging.getLogger(__name__)

_SKIPS = 10  # in a row; after 20 the optimizer gives up
_RETURNS = 3  # without a lower loss in between: then it is the data that have changed
_LARGEST_BUFFER = 2**20  # bytes: statistics are smaller, masks and quantised weights do not move


class GoodWeights:
    """Keeps the weights at which the averaged loss was lowest, and goes back to them.

    After a search of a plus optimizer, at w_k:

        keep      the averaged loss is the lowest so far: w_k, moments, buffers of up to 1 MiB and
                  the state of the rule are copied
        go back   it is out of the range of the first ten losses (above their mean by more than two
                  standard deviations; before the tenth, above three times their mean), or the last
                  10 steps were skipped since gradients were not finite: all of that is put back,
                  and the step size is half of the smaller one of then and now

    The steps, and with them the tail, and the data go on. Each return is logged as a warning. After
    three without a lower loss in between it keeps out of it until there is one: then the data have
    become harder. It takes the memory of one more copy of the trainable weights and of their
    moments. `SaLSaTrainer` does all of this with `salsa_go_back=True`.

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
        state, run = self._now()
        self._accepted = state.searches - state.failed_searches  # that were looked at
        self._kept: list[Tensor] = []  # nothing yet
        self._state = state  # that goes with them
        self._step = run.steps  # that found them good
        self._scale = Parts(run.micro_batches, run.loss_factor)  # of the loss then
        self._in_vain = 0  # returns since then

    @torch.no_grad()
    def update(self) -> bool:
        """Keep what the latest step has found good, or go back; call it after every `step()`.

        Returns:
            Whether the run went back.
        """
        state, run = self._now()
        if run.steps % _SKIPS == 0:
            _ = self._optimizer.counters  # waits for skips that the host has not read yet
            state, run = self._now()
        accepted = state.searches - state.failed_searches
        searched, self._accepted = accepted > self._accepted, accepted
        stuck = run.consecutive_skips >= _SKIPS
        if not (searched or stuck):
            return False
        fits = bool(self._kept) and self._shapes() == [t.shape for t in self._kept]
        lost = searched and self._rule.out_of_range(state)
        if lost or stuck:
            if not fits or self._in_vain == _RETURNS:
                return False
            self._go_back(state, run, "gradients are not finite" if stuck else "")
            return True
        scale = Parts(run.micro_batches, run.loss_factor)
        lowest = self._rule.averaged_loss(self._state) * scale.growth_since(self._scale)
        if not fits or self._rule.averaged_loss(state) < lowest:
            # w_k, of which the search has seen the loss; the step from there nobody has judged.
            self._copy([before for _, before in self._tensors()])
            self._state, self._step, self._scale, self._in_vain = state, run.steps, scale, 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what this process keeps: numbers, and tensors that later updates write into."""
        return {
            "returns": self.returns,
            "accepted": self._accepted,
            "kept": self._kept,
            "state": dict(vars(self._state)),
            "step": self._step,
            "scale": (self._scale.micro_batches, self._scale.factor),
            "in_vain": self._in_vain,
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
        self._step, self._scale = state_dict["step"], Parts(*state_dict["scale"])
        self.returns, self._accepted = state_dict["returns"], state_dict["accepted"]
        self._in_vain = state_dict["in_vain"]

    def _now(self) -> tuple[PlusState, RunState]:
        group = self._optimizer.param_groups[0]
        return read(PlusState, group), read(RunState, group)

    def _shapes(self) -> list[torch.Size]:
        return [now.shape for now, _ in self._tensors()]

    def _copy(self, tensors: list[Tensor]) -> None:
        """Keep these, in the memory of those before where they fit."""
        if [t.shape for t in tensors] != [t.shape for t in self._kept]:
            self._kept = []  # its memory may be needed
            self._kept = [torch.empty_like(t) for t in tensors]
        for kept, tensor in zip(self._kept, tensors, strict=True):
            kept.copy_(tensor)

    def _tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is put back, and where its value at w_k is."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        for param in params:
            state = self._optimizer.state.get(param, {})
            if param.requires_grad and PREVIOUS in state:
                yield local(param.detach()), local(state[PREVIOUS])
                for name, moment in state.items():
                    if name != PREVIOUS:
                        yield local(moment), local(moment)
        for buffer in self._model.buffers():
            if buffer.nbytes <= _LARGEST_BUFFER:
                yield buffer, buffer

    def _go_back(self, state: PlusState, run: RunState, reason: str) -> None:
        for (now, _), kept in zip(self._tensors(), self._kept, strict=True):
            if not torch.equal(now, kept):  # an expanded buffer cannot be written
                now.copy_(kept)
        scale = Parts(run.micro_batches, run.loss_factor)
        growth = scale.growth_since(self._scale)
        if growth != 1:
            self._optimizer.rescale(growth)
            self._copy([now for now, _ in self._tensors()])
        step_size = growth**-self._optimizer.degree
        before = self._state.rescaled(loss=growth, step_size=step_size)
        self._state, self._scale = self._rule.gone_back(state, before), scale
        self._optimizer.go_on_with(self._state)
        self.returns += 1
        self._in_vain += 1
        if several_processes() and dist.get_rank():
            return
        loss = f"{self._rule.averaged_loss(state):.4g}"
        _logger.warning(
            f"Step {run.steps}: "
            + (reason or f"the loss has left the range in which the run started (now {loss})")
            + f". Back to the weights before step {self._step} (averaged loss "
            f"{self._rule.averaged_loss(before):.4g}), with step size {self._state.step_size:.3g} "
            f"for {state.step_size:.3g}."
        )
        if self._in_vain == _RETURNS:
            _logger.warning(
                f"The run went back {_RETURNS} times without a lower loss in between. It goes on "
                "as it is until there is one."
            )
