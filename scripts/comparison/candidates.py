"""The ways to train that are compared."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from comparison import tried_rules
from comparison.former_plus import FormerPlusAdam, FormerPlusSGD
from comparison.plus_parts import CosineTail, MeasuredStart, PlainMomentum
from comparison.rivals import (
    AuthorsOptimizer,
    AuthorsTrainer,
    ComparisonTrainer,
    ScheduleFreeTrainer,
    prodigy,
)
from comparison.tasks import CONSTANT, COSINE, WARM_UP, Task
from hf_salsa import OPTIMIZERS, SaLSaAdam, SaLSaAdamPlus, SaLSaTrainer
from hf_salsa.optimizers import LineSearchOptimizer

CALIBRATED = "adamw_calibrated"
HEAD_FIRST = "adamw_head_first"
SWEPT = (HEAD_FIRST, CALIBRATED)  # with the best of the task's rates, the stronger one first
FORMER = "former_plus"
NAMES = {kind: name for name, kind in OPTIMIZERS.items()}
PLUS = NAMES[SaLSaAdamPlus]
CHOSEN = (NAMES[SaLSaAdam], PLUS, FORMER, CALIBRATED)  # their step sizes are drawn apart


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        label: What readers call it.
        arguments: Training arguments -> value; a rate that depends on the task is in `rate`.
        rate: The peak rate on a task, for those that have one; of `SWEPT` it is searched.
        optimizer: A line search that `Trainer` has no name for, and makes as it makes its own.
        make_optimizer: Makes any other optimizer that it has no name for.
        options: What either of them is made with.
        trainer: The trainer's class.
        package: What must be installed.
        resumes: Whether a checkpoint holds its whole state.
    """

    label: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rate: Callable[[Task], float] | None = None
    optimizer: type[LineSearchOptimizer] | None = None
    make_optimizer: Callable[..., Optimizer] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trainer: type[SaLSaTrainer] = ComparisonTrainer
    package: str | None = None
    resumes: bool = True

    @property
    def configuration(self) -> dict[str, Any]:
        """What makes it another candidate than one with the same arguments."""
        return ({"rule": self.optimizer.__name__} if self.optimizer else {}) | self.options


def trained_as(name: str, task: Task) -> str:
    """Return the candidate whose runs are those of `name` on a task, most often itself.

    Without a new head there is none to train first.
    """
    return CALIBRATED if name == HEAD_FIRST and not task.new_head else name


def _without(
    part: str, optimizer: type[SaLSaAdamPlus] = SaLSaAdamPlus, **options: Any
) -> Candidate:
    """Return `salsa_adam_plus` without one of its parts, or with another one."""
    return Candidate(part, optimizer=optimizer, options=options)


def _former_without(part: str, **options: Any) -> Candidate:
    """Return the former rule without one of its parts."""
    return Candidate(part, optimizer=FormerPlusAdam, options=options)


def _tried(label: str, rule: type[LineSearchOptimizer], **options: Any) -> Candidate:
    """Return a rule that was tried before the former one."""
    return Candidate(label, optimizer=rule, options=options, resumes=False)


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


_OF_PLUS = {
    "plus_no_head_first": _without("without head first", head_first=0),
    "plus_no_trust": _without("without bounds of the change", trust=1e9),
    "plus_plain_momentum": _without("without Nesterov's momentum", PlainMomentum),
    "plus_measured_start": _without("without warm-up", MeasuredStart),
    "plus_full_start": _without("started at the first step size found", first_share=1.0),
    "plus_no_tail": _without("without the tail", cool_down=0.0),
    "plus_cosine_tail": _without("with a cosine as its tail", CosineTail),
    "plus_go_back": Candidate(
        "with going back to good weights", {"optim": PLUS, "salsa_go_back": True}
    ),
}
_OF_FORMER = {
    "former_slow_growth": _former_without("without fast growth", confidence=1e9),
    "former_any_growth": _former_without("with fast growth at all times", confidence=-1e9),
    "former_full_start": _former_without("started at the first step size found", first_share=1.0),
    "former_gradient": _former_without("tested along the gradient", direction="gradient"),
    "former_no_averages": _former_without("without averages", beta3=0.0),
    "former_no_cool_down": _former_without("without cool-down", cool_down=0.0),
    "former_no_clipping": Candidate(
        "without clipping", {"max_grad_norm": 0.0}, optimizer=FormerPlusAdam
    ),
}
# A method, and what is left of it without one part.
ABLATED = {PLUS: _OF_PLUS, FORMER: _OF_FORMER}
ABLATIONS = _OF_PLUS | _OF_FORMER
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
    FORMER: Candidate("former plus", optimizer=FormerPlusAdam),
    "former_plus_head_first": Candidate(
        "former plus, head first",
        optimizer=FormerPlusAdam,
        options={"head_first": 10, "first_share": 0.3},
    ),
    "former_sgd_plus": Candidate("former SGD plus", optimizer=FormerPlusSGD),
    # The strongest baseline first: others are put beside it where it has runs.
    HEAD_FIRST: Candidate(
        "AdamW, best of 5 rates, head first",
        {"optim": "adamw_torch_fused", "salsa_head_first": 10, **COSINE},
    ),
    CALIBRATED: Candidate("AdamW, best of 5 rates", {"optim": "adamw_torch_fused", **COSINE}),
    # What `Trainer` does if nothing is said.
    "adamw_default": Candidate(
        "AdamW at 5e-5",
        {"optim": "adamw_torch_fused", "learning_rate": 5e-5, "lr_scheduler_type": "linear"},
    ),
    "adamw_folk": Candidate(
        "AdamW, folk rule",
        {"optim": "adamw_torch_fused", **COSINE},
        lambda task: task.folk_rate,
    ),
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
    # Its authors: warm up, with 1 to 10 times the rate of a schedule. Their default is about once
    # the folk rule's rate from scratch; three times that, 9e-3, does worse there on Shakespeare.
    "schedule_free_warmup": Candidate(
        "Schedule-Free AdamW, warm-up",
        {"optim": "schedule_free_adamw", **CONSTANT, **WARM_UP},
        lambda task: 3 * task.folk_rate if task.new_head else 2.5e-3,
        trainer=ScheduleFreeTrainer,
        package="schedulefree",
    ),
    # As its authors advise: with these two, and the cosine without a warm-up.
    "prodigy_cosine": Candidate(
        "Prodigy, cosine",
        {"optim": "adamw_torch", "learning_rate": 1.0, "lr_scheduler_type": "cosine"},
        make_optimizer=prodigy,
        options={"use_bias_correction": True, "safeguard_warmup": True},
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
STUDIED = (CALIBRATED, "schedule_free", NAMES[SaLSaAdam], FORMER, *TRIED)
BY_DEFAULT = tuple(name for name in CANDIDATES if name not in ABLATIONS | TRIED)
