"""hf_salsa: SaLSa, the optimizer that needs no learning rate, for HuggingFace Trainer.

Names are loaded when they are asked for: the optimizers without transformers and accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Where each public name lives.
_MODULES = {
    "OPTIMIZERS": "optimizers",
    "SLSSGD": "optimizers",
    "BatchObjective": "objective",
    "SLSAdam": "optimizers",
    "SaLSaAdam": "optimizers",
    "SaLSaAdamPlus": "optimizers",
    "SaLSaArgumentsMixin": "training_args",
    "SaLSaSGD": "optimizers",
    "SaLSaSGDPlus": "optimizers",
    "SaLSaSeq2SeqTrainer": "trainer",
    "SaLSaSeq2SeqTrainingArguments": "training_args",
    "SaLSaTrainer": "trainer",
    "SaLSaTrainerMixin": "trainer",
    "SaLSaTrainingArguments": "training_args",
    "head_groups": "head",
}

if TYPE_CHECKING:  # the same names for type checkers and IDEs
    from .head import head_groups as head_groups
    from .objective import BatchObjective as BatchObjective
    from .optimizers import OPTIMIZERS as OPTIMIZERS
    from .optimizers import SLSSGD as SLSSGD
    from .optimizers import SaLSaAdam as SaLSaAdam
    from .optimizers import SaLSaAdamPlus as SaLSaAdamPlus
    from .optimizers import SaLSaSGD as SaLSaSGD
    from .optimizers import SaLSaSGDPlus as SaLSaSGDPlus
    from .optimizers import SLSAdam as SLSAdam
    from .trainer import SaLSaSeq2SeqTrainer as SaLSaSeq2SeqTrainer
    from .trainer import SaLSaTrainer as SaLSaTrainer
    from .trainer import SaLSaTrainerMixin as SaLSaTrainerMixin
    from .training_args import SaLSaArgumentsMixin as SaLSaArgumentsMixin
    from .training_args import SaLSaSeq2SeqTrainingArguments as SaLSaSeq2SeqTrainingArguments
    from .training_args import SaLSaTrainingArguments as SaLSaTrainingArguments

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
