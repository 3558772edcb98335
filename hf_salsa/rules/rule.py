"""What a step-size rule is: settings and state as plain numbers, and one method, `search`.

A rule decides how long a step is. It sees the loss along one direction, a `Line`, and knows neither
tensors nor which optimizer made the direction. Nothing here imports torch.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

from ..settings import check_setting

Outcome = Literal["accepted", "loss", "slope", "unresolved", "trials", "overflow"]
State = TypeVar("State", bound="RuleState")


def _no_last_step() -> tuple[float, float]:
    raise RuntimeError("This line cannot look back: set looks_back = True in the rule's class.")


@dataclass(frozen=True)
class Line:
    """The loss of one mini-batch along the tested direction: f_k(w_k + eta d_k).

    Attributes:
        loss_at: Step size eta -> f_k(w_k + eta d_k). One forward pass each; may be infinite or NaN.
        loss: f_k(w_k), finite.
        slope: -<g_k, d_k>, minus the derivative of the loss by eta at 0; finite. ||g_k||^2 for SGD.
            0 where the rule does not want it (`StepSizeRule.wants_slope`).
        resolution: The smallest change of the loss that its precision can show, above or equal 0.
        look_back: Returns f_k(w_k - u) and <g_k, u>, u the last step taken (all of it, weight decay
            too), for one forward pass. u is 0 where no step is known: before the first one and for
            parameters that are new. Only for rules with `looks_back`.
        agreement: <g_k, p_k>, where -p_k is what earlier gradients put into the step: above 0 where
            the loss of this mini-batch still falls along them. 0 unless the rule has
            `wants_agreement` and wants the slope.
        last_factor: The factor of the tail (`StepSizeRule.factor`) in the last step taken; 0 where
            it is not known, since the run has not taken one.
        step: How many steps the run has behind it.
        total_steps: Steps of the run; 0 where they are not known.
        untrained: Whether the weights were never trained. Asked before the first step size is
            found, if the rule has `looks_at_weights`; else False, like those below False or 0.
        all_trained: Whether they were trained and none is known to be new: no head was trained
            alone, and no parameter is 0 throughout, as the second matrix of new adapters is. False
            where no step size is usual.
        usual_step_size: What people use along this direction for such weights. 0 where they were
            trained, and where no number is usual (SGD).
        matrix_scale: After a new head was trained alone: the step size at which one step may be as
            large as the matrices of the trained body. 0 without such a phase, where the matrices do
            not say, and where no step size is usual.
    """

    loss_at: Callable[[float], float]
    loss: float
    slope: float
    resolution: float
    look_back: Callable[[], tuple[float, float]] = _no_last_step
    agreement: float = 0.0
    last_factor: float = 1.0
    step: int = 0
    total_steps: int = 0
    untrained: bool = False
    all_trained: bool = False
    usual_step_size: float = 0.0
    matrix_scale: float = 0.0


@dataclass(frozen=True)
class RuleState:
    """What every rule hands from one step to the next; a rule's own state adds its scalars.

    All fields are bools, ints or floats: they are kept in the optimizer's `param_groups`, where
    checkpoints find them. Their names must not be those of a setting, nor of what the optimizer
    itself keeps there (`steps`, `trials`, ...): that is a `TypeError`.

    `units` says for each field that depends on the scale of the loss, in which powers of loss and
    step size it is measured: (1, -1) for a slope. `rescaled` needs that; a field without an entry
    stays as it is.

    Attributes:
        step_size: eta_{k-1}, the step size of the last search.
        search_interval: L_k, steps from one search to the next.
        steps_since_search: Steps taken since the last search, that search's own step not counted.
        searches: Searches so far.
        failed_searches: Searches that found no step size.
    """

    units: ClassVar[dict[str, tuple[int, int]]] = {"step_size": (0, 1)}

    step_size: float
    search_interval: int = 1
    steps_since_search: int = 0
    searches: int = 0
    failed_searches: int = 0

    @property
    def search_due(self) -> bool:
        """Whether the coming step searches."""
        return self.steps_since_search + 1 >= self.search_interval

    @property
    def step_size_known(self) -> bool:
        """Whether any search has been accepted yet."""
        return self.searches > self.failed_searches

    def rescaled(self, loss: float, step_size: float) -> Self:
        """Return the state of the same run with another scale of the loss.

        Args:
            loss: What losses are multiplied by from now on, above 0.
            step_size: What step sizes are multiplied by, to take the same steps.
        """
        return replace(
            self,
            **{
                name: getattr(self, name) * loss**of_loss * step_size**of_step_size
                for name, (of_loss, of_step_size) in self.units.items()
            },
        )

    @classmethod
    def is_former(cls, saved: Mapping[str, Any]) -> bool:
        """Return whether this was written by a rule that had this name in a former version.

        Args:
            saved: A parameter group of a checkpoint.
        """
        return False

    def accepted(self, **changes: Any) -> Self:
        """Return the state after a search that found a step size, with `changes` to its fields."""
        return replace(self, searches=self.searches + 1, steps_since_search=0, **changes)

    def failed(self) -> Self:
        """Return the state after a search that found none: only the counters move."""
        return replace(
            self,
            searches=self.searches + 1,
            failed_searches=self.failed_searches + 1,
            steps_since_search=0,
        )


@dataclass(frozen=True)
class SearchRecord:
    """What the latest search saw and decided.

    Attributes:
        step_size: The step size chosen; the one of before if the search failed.
        loss: f_k(w_k).
        trial_loss: f_k at the chosen trial point (plus: before the last step); of the last trial if
            the search failed, NaN if there was none.
        decrease: `loss - trial_loss` (plus: of the last step, `trial_loss - loss`).
        slope: Minus the directional derivative of f_k along the tested direction, ||g||^2 for SGD
            (plus: along the last step, where it ended).
        trials: Step sizes tried, each one forward pass.
        outcome: `"accepted"`; or why the search failed: `"loss"` (f_k(w_k) is not finite),
            `"slope"` (the tested direction does not descend), `"unresolved"` (the loss's precision
            cannot show the decrease of any smaller step; plus: nor the changes that decide),
            `"trials"` (`max_trials` forward passes were not enough), `"overflow"` (an average would
            no longer be finite).
        interval: L_k, steps until the next search.
    """

    step_size: float
    loss: float
    trial_loss: float
    decrease: float
    slope: float
    trials: int
    outcome: Outcome
    interval: int

    @classmethod
    def of(
        cls,
        line: Line,
        state: RuleState,
        *,
        trial_loss: float = math.nan,
        trials: int = 0,
        outcome: Outcome = "accepted",
    ) -> "SearchRecord":
        """Return the record of a search on `line` that led to `state`."""
        return cls(
            step_size=state.step_size,
            loss=line.loss,
            trial_loss=trial_loss,
            decrease=line.loss - trial_loss,
            slope=line.slope,
            trials=trials,
            outcome=outcome,
            interval=state.search_interval,
        )

    @property
    def accepted(self) -> bool:
        """Whether the search found a step size."""
        return self.outcome == "accepted"


@dataclass(frozen=True, kw_only=True)
class StepSizeRule(ABC, Generic[State]):
    """A rule for the step size: its settings, and how to search.

    A subclass is a frozen, keyword-only dataclass of settings, with a `search` that returns a new
    state and leaves all else alone. State that it needs beside `RuleState`'s goes into a dataclass
    of its own, `state_type = MyState`; the optimizer keeps it in its checkpoints. Settings that
    `hf_salsa.settings` knows are checked on construction; to check others, override
    `__post_init__` and call `super().__post_init__()` first.

    The step size before the first search is `initial_step_size`, most often far too large: a rule
    that does not backtrack starts with a smaller one, or searches its first step size as `SaLSa`
    does.

    Args:
        initial_step_size: eta_0, where the first search starts, above 0.
        cool_down: Share of the run, in [0, 1], over which at its end the step size is applied by a
            factor that falls linearly from 1 to 0. 0 applies it as it is.

    Raises:
        ValueError: A setting is out of range; the message has the range.
    """

    state_type: ClassVar[type[RuleState]] = RuleState
    # Whether `Line.look_back` is used. It costs a copy of the trainable weights.
    looks_back: ClassVar[bool] = False
    # Whether `Line.agreement` is used. It costs a pass over the gradients.
    wants_agreement: ClassVar[bool] = False
    # Whether `Line.untrained`, `all_trained`, `usual_step_size` and `matrix_scale` are used. They
    # cost a look at the weights, once.
    looks_at_weights: ClassVar[bool] = False
    # Whether gradients are clipped as Trainer does it, unless the user says otherwise.
    clips_gradients: ClassVar[bool] = True

    initial_step_size: float = 1.0
    cool_down: float = 0.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            check_setting(entry.name, getattr(self, entry.name))

    def first_trial(self, state: State) -> float:
        """Return the step size that the coming search most likely tries first.

        It is written into the weights while the slope is measured, which saves a pass over memory.
        """
        return state.step_size

    def wants_slope(self, state: State) -> bool:
        """Return whether the coming search uses `Line.slope` or `Line.agreement`.

        They cost a pass over memory. A first search without them is no check of the gradients.
        """
        return True

    @abstractmethod
    def search(self, state: State, line: Line) -> tuple[SearchRecord, State]:
        """Find the step size of this step.

        Args:
            state: As the step before left it.
            line: The loss along the tested direction.

        Returns:
            The record of the search, and the state of the next step: `state.accepted(...)` or
            `state.failed()`.
        """

    def describe(self) -> str:
        """Return how the step size is found, for cards: it completes "a step size that ..."."""
        return f"a rule finds, {type(self).__name__}. {self.describe_tail()}"

    def describe_tail(self) -> str:
        """Return what `cool_down` did, as the start of a sentence."""
        if self.cool_down:
            return (
                f"No rate was set; over the last {100 * self.cool_down:.3g} % of the run the step "
                "size fell linearly to 0"
            )
        return "No rate and no schedule was set"

    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor by which the step size of a step is applied.

        min(1, (T - k) / (cool_down T)): 1, but over the last `cool_down` of the run falling
        linearly to 0 at step T. Should there be steps from T on, they keep the factor of step
        T - 1.

        Args:
            step: k, the number of the step: 0, 1, ..., T - 1.
            total_steps: T, steps of the run; 0 where they are not known.
        """
        if self.cool_down * total_steps == 0:
            return 1.0
        return min(1.0, max(1, total_steps - step) / (self.cool_down * total_steps))


def moving_average(average: float, value: float, beta: float) -> float:
    """Return `beta * average + (1 - beta) * value` (Eq. 5, 8)."""
    return beta * average + (1 - beta) * value


def grown(state: RuleState, steps_to_double: float) -> float:
    """Return eta_{k-1} * 2^(n/b), n the steps since the last search: Algorithm 1's growth.

    2^(1/b) per training step, whatever the interval.
    """
    doublings = (state.steps_since_search + 1) / steps_to_double
    growth = 2 ** min(doublings, sys.float_info.max_exp - 1)
    return min(state.step_size * growth, sys.float_info.max)
