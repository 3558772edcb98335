"""hf_salsa: SaLSa, the optimizer that needs no learning rate, for HuggingFace Trainer."""

from .objective import BatchObjective
from .optimizers import (
    OPTIMIZERS,
    SLSSGD,
    SaLSaAdam,
    SaLSaAdamPlus,
    SaLSaSGD,
    SaLSaSGDPlus,
    SLSAdam,
)
from .trainer import SaLSaSeq2SeqTrainer, SaLSaTrainer, SaLSaTrainerMixin
from .training_args import (
    SaLSaArgumentsMixin,
    SaLSaSeq2SeqTrainingArguments,
    SaLSaTrainingArguments,
)

__version__ = "0.1.0"

__all__ = [
    "OPTIMIZERS",
    "SLSSGD",
    "BatchObjective",
    "SLSAdam",
    "SaLSaAdam",
    "SaLSaAdamPlus",
    "SaLSaArgumentsMixin",
    "SaLSaSGD",
    "SaLSaSGDPlus",
    "SaLSaSeq2SeqTrainer",
    "SaLSaSeq2SeqTrainingArguments",
    "SaLSaTrainer",
    "SaLSaTrainerMixin",
    "SaLSaTrainingArguments",
]
