"""The ways to train that are compared."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from comparison import tried_rules
from comparison.rivals import AuthorsOptimizer, AuthorsTrainer, ComparisonTrainer, prodigy
from comparison.tasks import CONSTANT, COSINE, Task
from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaAdamPlus, SaLSaTrainer

CALIBRATED = "adamw_calibrated"
NAMES = {kind: name for name, kind in OPTIMIZERS.items()}
ABLATED = NAMES[SaLSaAdamPlus]
CHOSEN = (NAMES[SaLSaAdam], ABLATED, CALIBRATED)  # their step sizes are drawn apart


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        label: What readers call it.
        arguments: Training arguments -> value; a rate that depends on the task is in `rate`.
        rate: The peak rate on a task, for those that have one.
        make_optimizer: Makes an optimizer that `Trainer` has no name for.
        trainer: The trainer's class.
        package: What must be installed.
        resumes: Whether a checkpoint holds its whole state.
        changes: What makes a candidate with `make_optimizer` another than its arguments say.
    """

    label: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rate: Callable[[Task], float] | None = None
    make_optimizer: Callable[[Iterator[torch.nn.Parameter]], Optimizer] | None = None
    trainer: type[SaLSaTrainer] = ComparisonTrainer
    package: str | None = None
    resumes: bool = True
    changes: dict[str, Any] = field(default_factory=dict)


def _without(part: str, **changes: Any) -> Candidate:
    """Return `salsa_adam_plus` without one of its parts."""
    return Candidate(
        part,
        {"optim": ABLATED},
        make_optimizer=partial(OPTIMIZERS[ABLATED], **changes),
        changes=changes,
    )


def _tried(label: str, rule: type[SaLSaAdam], **options: Any) -> Candidate:
    """Return a rule that was tried before `salsa_adam_plus`."""
    return Candidate(
        label,
        {"optim": next(NAMES[kind] for kind in rule.__mro__ if kind in NAMES)},
        make_optimizer=partial(rule, **options),
        resumes=False,
        changes={"rule": rule.__name__, **options},
    )


def _label(name: str) -> str:
    """Return what readers call an optimizer of the package: its class's name with the base first.

    salsa_adam_plus, SaLSaAdamPlus -> Adam + SaLSa plus
    """
    spelt = OPTIMIZERS[name].__name__
    if spelt.lower() != name.replace("_", ""):
        return spelt
    lengths = [0, *itertools.accumulate(map(len, name.split("_")))]
    method, base, *variant = (spelt[a:b] for a, b in itertools.pairwise(lengths))
    return " ".join([base, "+", method, *map(str.lower, variant)])


ABLATIONS = {
    "plus_slow_growth": _without("without fast growth", confidence=1e9),
    "plus_any_growth": _without("with fast growth at all times", confidence=-1e9),
    "plus_full_start": _without("started at the first step size found", first_share=1.0),
    "plus_gradient": _without("tested along the gradient", direction="gradient"),
    "plus_no_averages": _without("without averages", beta3=0.0),
    "plus_no_cool_down": _without("without cool-down", cool_down=0.0),
    "plus_no_clipping": Candidate("without clipping", {"optim": ABLATED, "max_grad_norm": 0.0}),
}
TRIED = {
    "tried_cool_down": _tried("SaLSa, cooled down", SaLSaAdam, cool_down=0.6),
    "tried_momentum": _tried("SaLSa along Adam's direction", SaLSaAdam, direction="momentum"),
    "tried_momentum_averaged": _tried(
        "SaLSa along Adam's direction, b = 50, averaged",
        tried_rules.Averaged,
        direction="momentum",
        steps_to_double=50,
    ),
    "tried_adaptive": _tried("SaLSa, adaptive backtracking", tried_rules.AdaptiveBacktracking),
    "tried_non_monotone": _tried("PoNoS", tried_rules.NonMonotone),
    "tried_relative_change": _tried("SaLSa, bounded by the weights", tried_rules.RelativeChange),
    "tried_other_batch": _tried("SaLSa, judged by another mini-batch", tried_rules.OtherBatch),
    "tried_schedule_free": _tried("SaLSa on Schedule-Free", tried_rules.ScheduleFree),
    "tried_plus_other_batch": _tried(
        "plus, judged by another mini-batch", tried_rules.PlusOtherBatch
    ),
    "tried_plus_averaged": _tried(
        "plus, averaged instead of cooled down", tried_rules.PlusAveraged, cool_down=0.0
    ),
}
CANDIDATES = {
    "adam": Candidate("Adam", {"optim": "adamw_torch_fused"}, lambda task: task.adam_rate),
    "sgd": Candidate("SGD", {"optim": "sgd"}, lambda task: task.sgd_rate),
    # The older method before the one that builds on it.
    **{
        name: Candidate(_label(name), {"optim": name})
        for name in sorted(OPTIMIZERS, key=lambda name: not name.startswith("sls"))
    },
    CALIBRATED: Candidate("AdamW, best of 5 rates", {"optim": "adamw_torch_fused", **COSINE}),
    "schedule_free": Candidate(
        "Schedule-Free AdamW",
        {"optim": "schedule_free_adamw", "learning_rate": 2.5e-3, **CONSTANT},
        package="schedulefree",
    ),
    "prodigy": Candidate(
        "Prodigy",
        {"optim": "adamw_torch", "learning_rate": 1.0, **CONSTANT},
        make_optimizer=prodigy,
        package="prodigyopt",
    ),
    "authors": Candidate(
        "SaLSa-Optimizer 0.1.0",
        {"optim": "adamw_torch", "max_grad_norm": 0.0, **CONSTANT},
        make_optimizer=AuthorsOptimizer,
        trainer=AuthorsTrainer,
        package="SaLSa-Optimizer",
        resumes=False,  # its step size and averages are in no state_dict
    ),
    **ABLATIONS,
    **TRIED,
}
STUDIED = (CALIBRATED, "schedule_free", NAMES[SaLSaAdam], ABLATED, *TRIED)
BY_DEFAULT = tuple(name for name in CANDIDATES if name not in ABLATIONS | TRIED)
