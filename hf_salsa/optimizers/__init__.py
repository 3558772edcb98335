"""Torch optimizers with a line search, and what a new one is made of.

A rule of one's own: a `StepSizeRule` and `class MyAdam(LineSearchAdam): rule_type = MyRule`. A
direction of one's own: a subclass of `LineSearchOptimizer`.
"""

from .adam import LineSearchAdam, SaLSaAdam, SaLSaAdamPlus, SLSAdam
from .base import LineSearchOptimizer
from .evaluation import Objective
from .sgd import SLSSGD, LineSearchSGD, SaLSaSGD, SaLSaSGDPlus
from .state import Counters
from .trial_points import Chunk
from .updates import Update

# The name for `--optim` of every class; add your own to make it known to the trainer.
OPTIMIZERS: dict[str, type[LineSearchOptimizer]] = {
    "salsa_adam": SaLSaAdam,
    "salsa_sgd": SaLSaSGD,
    "sls_adam": SLSAdam,
    "sls_sgd": SLSSGD,
    "salsa_adam_plus": SaLSaAdamPlus,
    "salsa_sgd_plus": SaLSaSGDPlus,
}

__all__ = [
    "OPTIMIZERS",
    "SLSSGD",
    "Chunk",
    "Counters",
    "LineSearchAdam",
    "LineSearchOptimizer",
    "LineSearchSGD",
    "Objective",
    "SLSAdam",
    "SaLSaAdam",
    "SaLSaAdamPlus",
    "SaLSaSGD",
    "SaLSaSGDPlus",
    "Update",
]
