"""The rule of the plus optimizers: a trust region in function space.

Not the paper's method, but what came out of it when one setting had to serve fine-tuning and
training from scratch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .first import find_first
from .rule import Line, RuleState, SearchRecord, StepSizeRule, moving_average

_BETA = 0.7  # of averages: searches are few, and a step size that is gone must not count long
_BETA_LONG = 0.9  # of signs, and of losses to compare with: about the last ten searches
_FALLING = 0.4  # deviations of losses between the averages; 1.5 standard errors of that
_C = 0.4  # of Armijo's criterion (Eq. 1), by which the first step size is found
_FIRST = 10  # searches whose losses are the scale of the run
_SAMPLE_LIMIT = 10  # times its bound; one mini-batch must not decide for long
_STEPS_TO_RETURN = 10  # in which a change at several times its bound comes back to it
_STEPS_TO_COME_UP = 60  # in which one below it comes up to it: growth must not outrun its average
_AGREED = 2  # times the square of p: share of growth where a fall of the loss may be chance
_GROWN_TO = 2  # times the bound: so far trained weights grow
_TOLERATED = 3  # times the bound: so far they keep their step size
_RESOLVED = 10  # times the loss's resolution: a change of that size shows
_OUT_OF_RANGE = 2  # standard deviations of the first losses above their mean
_UNKNOWN_RANGE = 3  # times their mean, as long as they are too few for a deviation
_HARDLY = 100  # times less than the bound: such changes do not keep the loss out of range
_DENSE = 9  # searches in the beginning, before they grow rare
_RUN = 500  # steps; a shorter run has a share of the 9 and of the 60
_WARM_UP = 0.05  # of the run, where there is one
_OF_MATRICES = 0.02  # of `Line.matrix_scale`: where a warm-up after a head phase ends
_UNKNOWN_WARM_UP = 50  # steps of it, in a run without a known end


@dataclass(frozen=True)
class PlusState(RuleState):
    """What `Plus` hands to the next step besides. All averages start at 0.

    Attributes:
        rule_version: Of this rule; a checkpoint of another one is refused.
        first_losses: Sum of the losses of the first ten searches, each at most three times the mean
            of those before.
        first_squares: The same of their squares.
        loss: Smoothed loss.
        longer_loss: Smoothed loss of about the last ten searches, each at most three times the mean
            of the first ten.
        longer_squares: The same of its square.
        change: Smoothed C.
        progress: Smoothed sign of f(w - u) - f(w), from -1 to 1. While they are few it stays near
            0.
        samples: How many searches the averages have seen.
        started_at: The step of the run at which the first step size was found; in a second run that
            of its first search, if that is earlier.
        untrained: Whether the weights were never trained before, at the first search.
        all_trained: Whether they were trained and none is known to be new, at the first search.
        warm_up_to: Where the warm-up ends, as it stands; 0 if there is none.
        warming_up: Whether the step size still rises to it.
    """

    units: ClassVar[dict[str, tuple[int, int]]] = RuleState.units | {
        "first_losses": (1, 0),
        "first_squares": (2, 0),
        "loss": (1, 0),
        "longer_loss": (1, 0),
        "longer_squares": (2, 0),
        "change": (1, 0),
        "warm_up_to": (0, 1),
    }

    rule_version: int = 12
    first_losses: float = 0.0
    first_squares: float = 0.0
    loss: float = 0.0
    longer_loss: float = 0.0
    longer_squares: float = 0.0
    change: float = 0.0
    progress: float = 0.0
    samples: int = 0
    started_at: int = 0
    untrained: bool = False
    all_trained: bool = False
    warm_up_to: float = 0.0
    warming_up: bool = False

    @classmethod
    def is_former(cls, saved: Mapping[str, Any]) -> bool:
        """Return whether a former version of the rule wrote this."""
        version = saved.get("rule_version", cls.rule_version)
        return "warm_up_over" in saved or version != cls.rule_version


@dataclass(frozen=True, kw_only=True)
class Plus(StepSizeRule[PlusState]):
    """A search looks back at the last step, with a mini-batch that this step has not seen.

    With u the last step, f and g those of the next mini-batch, one forward pass gives

        D = f(w - u) - f(w) + <g, u>

    the part of the loss's change that the gradient did not foresee: how much a step bends the
    function. n are the steps since the last search; averages are exponential (0.7); in the tail D
    is divided by the square of the tail's factor.

        first       training starts at `first_share` of the largest step size that the first
                    mini-batch accepts: f(w) - f(w + eta d) >= 0.4 eta slope (Eq. 1)
        warm-up     eta rises linearly instead, over 5 % of the run (50 steps without a known end):
                    where the weights were never trained, to the usual step size of the direction
                    (sharpness follows the step size, so that a run that starts with short steps
                    would be held to them); after a new head was trained alone, to 0.02 of the step
                    size whose steps may be as large as the matrices of the trained body
                    (`Line.matrix_scale`). Where no step size is usual (SGD), there is none
        change      C is D where that is above 0, else 0: some mini-batches bend down where most
                    bend up, and batch normalisation has many of them. Untrained, C is |D|. One
                    sample counts at most ten times its bound
        bound       B is `trust` times the mean loss of the first ten searches
        C > L       L is 3 B (untrained: B). eta shrinks by (L / C)^(n / 10), at most by half, and
                    the average of C by the square of that. Between G and L it stays. A warm-up goes
                    on meanwhile, from scratch to an end that shrinks with eta, else to its own
        C <= G      G is 2 B (untrained: B). eta grows by (G / C)^(n / 60), at most by
                    2^(n / steps_to_double) and by 2
        progress    p, the average of the sign of f(w - u) - f(w) over about the last ten searches,
                    0 at first: whether steps lower the loss of mini-batches that they have not
                    seen. eta does not grow unless p > 0. On trained weights it grows with
                    n min(1, 2 p^2) for n, as their loss often only seems to fall, but for those of
                    which none is known to be new (`Line.all_trained`)
        loss        it does not grow unless the average of the loss is 0.4 standard deviations below
                    that of about the last ten (before the tenth: at most the mean so far), and
                    halves while it is above the mean of the first ten by more than two standard
                    deviations (before the tenth: above three times the mean) and C is above
                    `trust` / 100 times that: a run needs steps to come back
        tail        it does not grow

    Searches are 1 + (steps so far) / 9 steps apart, at most `max_search_interval`. Runs of less
    than 500 steps have their share of the 9, at least 1, and of the 60.

    The loss must not be negative: its size at the start is what a change is measured by.

    Args:
        first_share: Share of the first step size found at which training starts, in (0, 1].
        trust: Change of the loss that a step may make beside what the gradient foresees, as a
            share of the loss at the start, above 0. Steps of trained weights grow up to twice it,
            and shrink above three times it.
        steps_to_double: Steps in which the step size may double, at least 1; with a new head or
            adapters on trained weights, and with SGD, more, the fewer of them make progress.
        max_search_interval: Most steps between two searches, at least 1.
        initial_step_size: Where the first search starts, above 0. It goes up and down from there.
        cool_down: As in `StepSizeRule`.

    Raises:
        ValueError: A setting is out of range.
        RuntimeError: In one of the first ten searches: the loss is negative.
    """

    state_type: ClassVar[type[RuleState]] = PlusState
    looks_back: ClassVar[bool] = True
    looks_at_weights: ClassVar[bool] = True

    first_share: float = 0.3
    trust: float = 0.009
    steps_to_double: float = 8
    max_search_interval: int = 20
    initial_step_size: float = 2**-7
    cool_down: float = 0.6

    def wants_slope(self, state: PlusState) -> bool:
        """Return whether the first step size is to be found: later the last step tells it all."""
        return not state.step_size_known

    def search(self, state: PlusState, line: Line) -> tuple[SearchRecord, PlusState]:
        """Look back once, and move the step size; or find the first one."""
        if line.loss < 0 and state.samples + 1 < _FIRST:
            raise RuntimeError(
                f"The loss is {line.loss:.6g}, but the plus optimizers need one that is not "
                "negative: they measure changes by the size of the loss at the start. Add a "
                "constant to it, or use another line search (optim='salsa_adam')."
            )
        if not state.step_size_known:
            return self._start(state, line)
        if line.step < state.started_at:  # a second run counts its own steps
            state = replace(state, started_at=line.step)
        taken = state.step_size
        warming_up, state = state.warming_up, self._warmed_up(state, line)
        seen = state
        if state.samples + 1 < _FIRST:
            # A run that breaks down meanwhile must not be its own measure.
            most = _UNKNOWN_RANGE * state.first_losses / (state.samples + 1)
            loss = min(line.loss, most) if most > 0 else line.loss
            seen = replace(
                state,
                first_losses=state.first_losses + loss,
                first_squares=state.first_squares + loss * loss,
            )
        mean = seen.first_losses / min(state.samples + 2, _FIRST)
        bound = self.trust * mean
        precise = line.resolution * _RESOLVED
        hidden = bound < precise
        # A change that at the start would have shown, a loss of thousands of times its size hides.
        far_off = hidden and bound * line.loss > precise * mean
        if hidden and not far_off:
            failed = replace(state.failed(), search_interval=self._interval(state, line))
            return SearchRecord.of(line, failed, outcome="unresolved"), failed
        # At the start of a second run the tail of the first one is not known any more.
        shown = not hidden and line.last_factor > 0 and bound * line.last_factor**2 >= precise
        loss_before, slope_before = line.look_back() if shown else (math.nan, 0.0)
        stood_still = slope_before == 0 and loss_before == line.loss
        if not (shown or far_off) or stood_still:  # nothing to learn from: the next search may tell
            searched = state.accepted(search_interval=self._interval(state, line))
            return self._record(line, searched, loss_before, 0.0, trials=int(shown)), searched

        change = loss_before - line.loss + slope_before  # D
        if not math.isfinite(change):
            change = math.inf
        # With trained weights some mini-batches bend down, and more so with batch normalisation:
        # they do not say that steps are too long.
        change = abs(change) if state.untrained else max(change, 0.0)
        factor = line.last_factor or 1.0  # 0 only where nothing was looked at
        slope = -slope_before / factor / taken  # where the step ended
        if not math.isfinite(slope):
            slope = 0.0
        change = min(change / factor**2, _SAMPLE_LIMIT * bound)
        decrease = loss_before - line.loss
        loss = min(line.loss, _UNKNOWN_RANGE * mean)  # one mini-batch must not decide
        seen = replace(
            seen,
            loss=moving_average(state.loss, line.loss, _BETA),
            longer_loss=moving_average(state.longer_loss, loss, _BETA_LONG),
            longer_squares=moving_average(state.longer_squares, loss * loss, _BETA_LONG),
            change=moving_average(state.change, change, _BETA),
            progress=moving_average(state.progress, (decrease > 0) - (decrease < 0), _BETA_LONG),
            samples=state.samples + 1,
        )
        if not warming_up:
            seen = self._moved(seen, line, bound)
        elif seen.untrained:
            seen = self._lowered(seen, bound)
        searched = seen.accepted(search_interval=self._interval(seen, line))
        return self._record(line, searched, loss_before, slope, trials=int(shown)), searched

    def _moved(self, state: PlusState, line: Line, bound: float) -> PlusState:
        """Return the state with the step size moved as its averages want it."""
        steps = state.steps_since_search + 1
        change = state.change / (1 - _BETA**state.samples)
        # Where its steps hardly show, only more of them can bring it back.
        out_of_range = self.out_of_range(state) and change > bound / _HARDLY
        limit = bound if state.untrained else _TOLERATED * bound
        goal = bound if state.untrained else _GROWN_TO * bound
        if change > limit or out_of_range:
            shrinkage = 0.5 if out_of_range else self._shrinkage(change, limit, steps)
            return self._shrunk(state, shrinkage)
        may_grow = state.progress > 0 and self._falls(state)
        if change > goal or line.last_factor < 1 or not may_grow:
            return state
        all_count = state.untrained or state.all_trained
        growing = steps * (1.0 if all_count else min(1.0, _AGREED * state.progress**2))
        growth = 2 ** min(1.0, growing / self.steps_to_double)
        if change > 0:
            # In logarithms: a change may be so small that the power overflows.
            room = math.log(goal / change) * growing / (_STEPS_TO_COME_UP * self._share(line))
            growth = min(growth, math.exp(min(room, 1.0)))
        return replace(state, step_size=state.step_size * growth)

    def _lowered(self, state: PlusState, bound: float) -> PlusState:
        """Return the state with the end of a warm-up lowered where steps change too much."""
        change = state.change / (1 - _BETA**state.samples)
        if change <= bound:
            return state
        shrinkage = self._shrinkage(change, bound, state.steps_since_search + 1)
        return replace(self._shrunk(state, shrinkage), warm_up_to=state.warm_up_to * shrinkage)

    @staticmethod
    def _shrunk(state: PlusState, shrinkage: float) -> PlusState:
        return replace(
            state,
            step_size=state.step_size * shrinkage,
            # Else the average would go on shrinking what no longer makes such changes.
            change=state.change * shrinkage**2,
        )

    @staticmethod
    def _shrinkage(change: float, limit: float, steps: int) -> float:
        """Return by what a step size shrinks: the more, the further its change is above."""
        shrinkage: float = (limit / change) ** (steps / _STEPS_TO_RETURN)
        return max(0.5, shrinkage)

    @staticmethod
    def averaged_loss(state: PlusState) -> float:
        """Return the averaged loss of the mini-batches of the searches."""
        return state.loss / (1 - _BETA**state.samples) if state.samples else state.first_losses

    def out_of_range(self, state: PlusState) -> bool:
        """Return whether the averaged loss is out of the range in which the run started."""
        mean, deviation = self._start_of_run(state)
        return self.averaged_loss(state) > mean + _OUT_OF_RANGE * deviation

    @classmethod
    def _falls(cls, state: PlusState) -> bool:
        """Return whether the loss falls by more than mini-batches differ.

        It is not enough that it has not risen: on a plateau, or after a loss that went up, little
        bends, and nothing would stop a step size that grows.
        """
        if state.samples + 1 < _FIRST:
            return cls.averaged_loss(state) <= cls._start_of_run(state)[0]
        weight = 1 - _BETA_LONG**state.samples
        longer = state.longer_loss / weight
        deviation = math.sqrt(max(0.0, state.longer_squares / weight - longer * longer))
        return cls.averaged_loss(state) < longer - _FALLING * deviation

    @staticmethod
    def gone_back(state: PlusState, kept: PlusState) -> PlusState:
        """Return the state with which a run goes on from earlier weights, at half the step size.

        Args:
            state: As it is now.
            kept: As it was with those weights.
        """
        step_size = min(state.step_size, kept.step_size) / 2
        shrinkage = step_size / kept.step_size
        return replace(
            kept,
            step_size=step_size,
            change=kept.change * shrinkage**2,
            search_interval=1,
            steps_since_search=0,
            searches=state.searches,
            failed_searches=state.failed_searches,
            warming_up=False,
        )

    @staticmethod
    def _start_of_run(state: PlusState) -> tuple[float, float]:
        """Return mean and standard deviation of the losses of the first searches.

        Of fewer than ten it says too little: the range ends at three times the mean then.
        """
        count = min(state.samples + 1, _FIRST)
        mean = state.first_losses / count
        if count < _FIRST:
            return mean, (_UNKNOWN_RANGE - 1) * mean / _OUT_OF_RANGE
        return mean, math.sqrt(max(0.0, state.first_squares / count - mean * mean))

    def _start(self, state: PlusState, line: Line) -> tuple[SearchRecord, PlusState]:
        """Begin with a warm-up, or where this mini-batch says; learn nothing else of it."""
        begun = {
            "first_losses": line.loss,
            "first_squares": line.loss * line.loss,
            "started_at": line.step,
            "untrained": line.untrained,
            "all_trained": line.all_trained,
        }
        warm_up_to = line.usual_step_size or _OF_MATRICES * line.matrix_scale
        if warm_up_to:
            found = state.accepted(
                step_size=warm_up_to / self._warm_up_steps(line),
                warm_up_to=warm_up_to,
                warming_up=self._warm_up_steps(line) > 1,
                **begun,
            )
            return SearchRecord.of(line, found, trial_loss=line.loss), found  # no step before
        step_size, trial_loss, trials, outcome = find_first(line, state.step_size, _C)
        if outcome == "accepted":
            found = state.accepted(step_size=self.first_share * step_size, **begun)
        else:
            found = state.failed()
        record = SearchRecord.of(line, found, trial_loss=trial_loss, trials=trials, outcome=outcome)
        return record, found

    def _warmed_up(self, state: PlusState, line: Line) -> PlusState:
        """Return the state with the step size of the warm-up, if this step is part of one."""
        if not state.warming_up:
            return state
        share = min(1.0, (self._steps(state, line) + 1) / self._warm_up_steps(line))
        return replace(state, step_size=share * state.warm_up_to, warming_up=share < 1)

    @staticmethod
    def _warm_up_steps(line: Line) -> int:
        """Return the steps of a warm-up; the last one, or the first search after it, is full."""
        return max(1, int(_WARM_UP * line.total_steps)) if line.total_steps else _UNKNOWN_WARM_UP

    def _interval(self, state: PlusState, line: Line) -> int:
        """Return the steps to the next search: early ones tell most."""
        interval = 1 + int(self._steps(state, line) / max(1.0, _DENSE * self._share(line)))
        return min(interval, self.max_search_interval)

    @staticmethod
    def _steps(state: PlusState, line: Line) -> int:
        """Return the steps since the start."""
        return line.step - state.started_at

    @staticmethod
    def _share(line: Line) -> float:
        """Return the share that a short run has of what is counted in steps."""
        return min(1.0, line.total_steps / _RUN) if line.total_steps else 1.0

    def _record(
        self, line: Line, state: PlusState, loss_before: float, slope: float, trials: int
    ) -> SearchRecord:
        """Return the record; decrease and slope are those of the last step, on this mini-batch."""
        record = SearchRecord.of(line, state, trial_loss=loss_before, trials=trials)
        return replace(record, decrease=loss_before - line.loss, slope=slope)

    def describe(self) -> str:
        """Return how the step size is found, for cards."""
        when = "every step"
        if self.max_search_interval > 1:
            when += (
                " in the beginning, and ever less often later, up to "
                f"{self.max_search_interval} steps apart"
            )
        double = f"{self.steps_to_double:.3g} step{'' if self.steps_to_double == 1 else 's'}"
        return (
            f"it finds on the mini-batches themselves: it starts at {self.first_share:.3g} of what "
            "the first one allows (the Armijo line search of [Kenneweg, Kenneweg, Fumagalli, "
            "Hammer, IJCNN 2024](https://arxiv.org/abs/2407.20650)), or with a warm-up where the "
            "weights were never trained or a new head was trained first, may double within "
            f"{double} while the loss falls, where its steps change little and lower the loss of "
            "new mini-batches (with a new head or adapters, as with SGD: the more slowly, the "
            "fewer do), and is kept where a step changes that of the next one beside what its "
            f"gradient foresees by at most {100 * self.trust:.3g} % of the loss at the start, or, "
            "where the weights were trained before, raises it by at most "
            f"{100 * _TOLERATED * self.trust:.3g} %. "
            f"{self.describe_tail()}; the search ran at {when}"
        )
