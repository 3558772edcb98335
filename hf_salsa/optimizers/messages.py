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
NO_LOSS_OF_HEAD = (
    "{name}.step() trains the new head alone at first, by a line search, and there is no loss to "
    "re-evaluate. Record the mini-batch: objective = BatchObjective(model, optimizer) once, then "
    "loss = objective.record(loss_fn, batch) in place of loss = loss_fn(batch)."
)
ANOTHER_HEAD = (
    "The checkpoint and this optimizer do not agree on whether there is a new head, which "
    "salsa_head_first trains first. If the model was loaded from the checkpoint, its head is no "
    "longer new: load the model that the run began with, or name the head (salsa_head). If the "
    "checkpoint is of a run without salsa_head_first, leave that out."
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
SKIPPED = (
    "The gradients, or squares of gradients of step {step} are not finite: the step is skipped, "
    "weights and state stay as they are. Said once; counters.skipped_steps has the total, and 20 "
    "in a row are an error."
)
NO_FUNCTION = (
    "step() got a {kind} as closure, which must be a function that returns the loss of the same "
    "mini-batch at the current weights. Write step(closure, loss=loss), or record the mini-batch "
    "with a BatchObjective and write step()."
)
NO_NUMBER = (
    "The closure returned a {kind}; it must return the loss, a number or a tensor with one "
    "element. Is its `return loss` missing?"
)
BACKWARD_IN_CLOSURE = (
    "The closure differentiates something, but it runs without gradients: it must only return the "
    "loss. Call loss.backward() once, before step(closure, loss=loss). A loss that takes a "
    "derivative of its own belongs into a BatchObjective."
)
OTHER_SETTINGS = (
    "The checkpoint has other settings, and they hold: {changed}. To go on with other "
    "ones, set them in param_groups after loading."
)
WRONG_DERIVATIVE = (
    "The gradients are not those of the loss that is searched: at a small step it fell by "
    "{ratio:.3g} times what they predict. Look for: clipping by value, or by norm without telling "
    "(write objective.clip_grad_norm_(max_norm)); a loss that is scaled after record() or in the "
    "closure only; a forgotten optimizer.zero_grad(); gradients changed by hand; a derivative of "
    "the recorded loss taken outside of loss_fn; parts of the loss that are detached (then a line "
    "search cannot be used)."
)
HOPELESS = (
    "None of {searches} searches found a step at which the loss falls as the slope {slope:.3g} "
    "predicts, so nothing was learnt. Look for: a loss whose gradient is not its derivative (a "
    "detached factor), gradients changed by hand, a forward pass that gives another loss each time."
)
_FAILURES = {
    "loss": "the loss is {loss} while the gradients are finite (all labels masked?)",
    "overflow": "its numbers overflowed (loss {loss:.3g}, slope {slope:.3g})",
    "slope": "the tested direction does not descend (slope {slope:.3g})",
    "unresolved": "the changes of the loss {loss:.6g} that count are smaller than its precision "
    "can show",
    "trials": "{trials} forward passes, the most that it may take, found no step size that is "
    "accepted",
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


def failed_head_search(record: SearchRecord) -> str:
    """Return what went wrong in a search of the new head alone."""
    reason = _FAILURES[record.outcome].format(**asdict(record))
    return (
        f"A line search of the new head failed: {reason}; no step is taken. Said once; "
        "counters.failed_searches has the total."
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
