"""The first updates of a run, in which a new head on a trained body is trained alone.

Each is an Armijo line search (Eq. 1) along the signs of the head's gradient, whatever the
optimizer: w - eta sign(g), Adam's first step, which keeps no state. Along the gradient itself a
classifier learns its bias and little else, and the body is ruined as without the phase. A head of
many features fits any mini-batch: where the loss of a new one is above the mean of those before,
the step size is halved before the search. (Where the loss is a sum, a mean over updates of fewer
micro-batches is too low. The phase is so short that nothing is carried over.)
Nothing of the optimizer moves meanwhile, neither moments nor its own step size, of head and body
alike: it starts after the phase. The body's gradients are dropped, so that it has no part in
clipping, in norm and finiteness, and in the step. A learning-rate schedule, which only stock
optimizers have, runs from the first update as ever. The phase comes once: an optimizer that has
taken a step of its own has it behind it, in a second run too.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from torch import Tensor

from ..rules import Line, SaLSa, SaLSaState, SearchRecord, find_first
from .checks import ask
from .evaluation import Evaluation, spacing
from .state import RunState
from .tensors import dots, moment_dtype
from .trial_points import Chunk, TrialPoints, cut, move


@dataclass(frozen=True, kw_only=True)
class HeadRule(SaLSa):
    """`SaLSa` on single mini-batches; the first search goes up, too, from where it starts.

    Targets far from 0, or a bias of 150, are a few steps away then.
    """

    c: float = 0.3
    beta3: float = 0.0
    steps_to_double: float = 5
    backtrack_factor: float = 0.5
    max_search_interval: int = 1

    def search(self, state: SaLSaState, line: Line) -> tuple[SearchRecord, SaLSaState]:
        """Find the largest step size that is accepted."""
        if state.step_size_known:
            return super().search(state, line)
        found, trial_loss, trials, outcome = find_first(line, state.step_size, self.c)
        after = state.accepted(step_size=found) if outcome == "accepted" else state.failed()
        return SearchRecord.of(
            line, after, trial_loss=trial_loss, trials=trials, outcome=outcome
        ), after


HEAD_RULE = HeadRule()
_LARGEST_SHARE = 10  # the phase is at most one in so many updates of the run


def is_head_alone(groups: list[dict[str, Any]]) -> bool:
    """Return whether the coming step trains the head alone."""
    group = groups[0]
    most = group["head_first"]
    if group["run_steps"]:
        most = min(most, max(1, group["run_steps"] // _LARGEST_SHARE))
    begun = group["steps"] > group["head_steps"] + group["skipped_steps"]
    marked = {entry["head"] for entry in groups} == {True, False}
    return marked and not begun and group["head_steps"] < most


def cut_like(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups cut where those of a checkpoint are, if one side has a head only.

    `mark_head` splits groups and keeps the order of the parameters, so joining them is undoing it.
    A model that was loaded from the checkpoint itself shows no new head any more. Groups that
    differ otherwise are returned as they are: torch refuses them.
    """
    if not differ_in_head_only(groups, saved):
        return groups
    params = iter([param for group in groups for param in group["params"]])
    return [{**groups[0], "params": list(islice(params, len(g["params"])))} for g in saved]


def differ_in_head_only(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> bool:
    """Return whether one of two lists of groups is the other one split by `mark_head`."""
    cuts = [{0, *accumulate(len(g["params"]) for g in side)} for side in (groups, saved)]
    marked = [any(g.get("head") for g in side) for side in (groups, saved)]
    coarse, fine = cuts if marked[1] else reversed(cuts)
    same_end = max(coarse) == max(fine)
    return marked[0] != marked[1] and same_end and coarse <= fine


def drop_body_gradients(groups: list[dict[str, Any]]) -> None:
    """Set the gradients of all but the head to None."""
    for group in groups:
        if not group["head"]:
            for param in group["params"]:
                param.grad = None


def chunks_of_gradients(groups: list[dict[str, Any]]) -> list[Chunk]:
    """Cut what has gradients, which is the head once those of the body are dropped."""
    return list(
        cut(
            groups,
            state_of=lambda param, group: {},
            step_numbers=lambda params, group: [0] * len(params),
            backups={},
        )
    )


def train_head(
    chunks: list[Chunk], evaluate: Evaluation, loss: Tensor | float, run: RunState
) -> tuple[SearchRecord, RunState]:
    """Take one step of the head.

    Args:
        chunks: The head's.
        evaluate: The loss of the mini-batch.
        loss: f_k(w_k).
        run: Where the phase stands.

    Returns:
        What the search found, and where the phase stands now.
    """
    known, value = run.head_step_size, float(loss)
    if math.isfinite(value):
        if value * run.head_losses_seen > run.head_losses:
            known /= 2
        losses, seen = run.head_losses + value, run.head_losses_seen + 1
        run = replace(run, head_losses=losses, head_losses_seen=seen)
    state = SaLSaState(known or HEAD_RULE.initial_step_size, searches=int(known > 0))
    with TrialPoints(chunks, _signs) as points:
        line = evaluate.line(
            points, _slope, HEAD_RULE, state, loss=value, epsilon=spacing(loss, chunks)
        )
        record, found = ask(HEAD_RULE, state, line)
    applied = found.step_size if record.accepted else 0.0
    for chunk in chunks:
        move(chunk, _signs(chunk), applied)
    run = replace(
        run,
        head_steps=run.head_steps + 1,
        head_failures=run.head_failures + (not record.accepted),
        head_step_size=applied or run.head_step_size,
        head_applied=applied,
    )
    return record, run


def _signs(chunk: Chunk) -> list[Tensor]:
    return [g.sign().to(moment_dtype(g)) for g in chunk.grads]


def _slope(chunk: Chunk) -> tuple[list[Tensor], list[list[Tensor]]]:
    direction = _signs(chunk)
    return direction, [dots(chunk.grads, direction)]
