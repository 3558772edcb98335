"""What the optimizers say when something is missing or goes wrong: the cause, and what to do."""

from dataclasses import asdict

import torch

from ..rules import RuleState, SearchRecord

NO_LOSS = (
    "{name}.step() found gradients but no loss to re-evaluate. Pass step(closure, loss=loss), "
    "where closure() returns the loss of the same mini-batch, or record the mini-batch: "
    "objective = BatchObjective(model, optimizer) once, then "
    "loss = objective.record(loss_fn, batch) in place of loss = loss_fn(batch)."
)
NO_GRADIENTS = (
    "{name}.step() found no gradients. Call loss.backward() before step(closure): the closure only "
    "returns the loss."
)
SPARSE = "{name} does not support sparse gradients. Make the embedding with sparse=False."
NO_END = (
    "{name} cools down over the last part of a run, but the length of this one is not known: pass "
    "total_steps=..., the number of calls of step() in the run, or cool_down=0."
)
LR_WAS_SET = (
    "Something set lr={lr} in the parameter groups of {name} (a learning-rate scheduler?). It is "
    "ignored: the line search sets the step size. Remove the scheduler."
)
REPLAY = (
    "Evaluating the objective again at the same weights gave {replayed:.9g}, training had "
    "{trained:.9g}: the step size is chosen on another loss than the one whose gradient is used. "
    "Look for random numbers that do not come from torch, NumPy or random (or a closure that draws "
    "new dropout masks: use BatchObjective), for state that the forward pass changes, for "
    "torch.compile. From now on f(w_k) is re-evaluated at every search, one more forward pass."
)
_FAILURES = {
    "slope": "the tested direction does not descend (slope {slope:.3g})",
    "unresolved": "no step size that lowers the loss {loss:.6g} by more than its precision can show"
    " was accepted (slope {slope:.3g})",
    "trials": "max_trials={trials} forward passes found no step size that is accepted",
}


def failed_search(record: SearchRecord, state: RuleState) -> str:
    """Return what went wrong in a search, and what happens now."""
    reason = _FAILURES[record.outcome].format(**asdict(record))
    kept = (
        f"the step size {record.step_size:.3g} of before is kept"
        if state.step_size_known
        else "no step is taken, since no step size is known yet"
    )
    return (
        f"A line search failed: {reason}; {kept}. Said once; counters.failed_searches has the "
        "total."
    )


def low_precision(dtype: torch.dtype) -> str:
    """Return what is lost with trainable parameters of a 16-bit type, and what to do."""
    return (
        f"Trainable parameters are {str(dtype).removeprefix('torch.')}: a change of a weight by "
        f"less than about {torch.finfo(dtype).eps / 2:.1g} of its size rounds away, and with it "
        "what the line search measures. At a step size of 1e-5 only 40 % of the predicted decrease "
        "remains, at 1e-6 10 % (bfloat16). Load the model in float32 and train under autocast "
        "instead: dtype=torch.float32 in from_pretrained, and bf16=True in the training arguments."
    )
