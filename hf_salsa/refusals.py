"""Trainers and set-ups in which the loss cannot be re-evaluated rightly, and what to do instead."""

from collections.abc import Iterator

from transformers import Trainer
from transformers.trainer_utils import has_length

_GENERATES = (
    "it generates new data in every training step, so there is no mini-batch to evaluate again"
)
# Class name -> why a search on its loss cannot come out right.
_REFUSED_TRAINERS = dict.fromkeys(
    (
        *("A2POTrainer", "AsyncDistillationTrainer", "AsyncGRPOTrainer", "DistillationTrainer"),
        *("GKDTrainer", "GOLDTrainer", "GRPOTrainer", "IWOPDTrainer", "NashMDTrainer"),
        *("OnlineDPOTrainer", "PPOTrainer", "RLOOTrainer", "SDFTTrainer", "SDPOTrainer"),
        "XPOTrainer",
    ),
    _GENERATES,
)
# Value of `loss_type` in TRL's arguments -> the same.
_REFUSED_LOSSES = {
    "dft": "its gradient is not its derivative (the weights of the tokens are detached), so no "
    "step size can be judged by it",
}


def refuse_what_comes_out_wrong(trainer: Trainer, who: str, instead: str) -> None:
    """Raise a `ValueError` with the reason and the alternative, before training starts.

    Args:
        trainer: The trainer, as it was constructed.
        who: What evaluates the loss again: its line-search optimizer, or a setting.
        instead: What to do if the set-up shall stay.
    """
    reason = next(_reasons(trainer), None)
    if reason is not None:
        raise ValueError(f"{who} does not work with {reason}; or {instead}.")


def _reasons(trainer: Trainer) -> Iterator[str]:
    """Yield what stands against a search, and what to do instead."""
    data = trainer.train_dataset
    if data is not None and has_length(data) and len(data) == 0:
        yield (
            "an empty train_dataset: there is nothing to train on. Check the path and the filters "
            "of the data"
        )
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed: its engine steps inside backward, where the loss cannot be re-evaluated. "
            "Use FSDP2 or DDP (torchrun) instead"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        yield (
            "FSDP version 1: it hides the parameters from the optimizer. Use FSDP2 (fsdp_config "
            "version 2) instead"
        )
    if trainer.args.n_gpu > 1:
        yield (
            "nn.DataParallel, which one process with several GPUs falls into. Start one process "
            "per GPU (torchrun --nproc_per_node N script.py) or set CUDA_VISIBLE_DEVICES=0"
        )
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and parallelism.total_size != parallelism.dp_replicate_size:
        yield (
            "context, sequence or tensor parallelism: each rank holds a part of one loss. Use DDP "
            "(torchrun) instead"
        )
    for cls in type(trainer).__mro__:
        if cls.__name__ in _REFUSED_TRAINERS:
            yield f"{cls.__name__}: {_REFUSED_TRAINERS[cls.__name__]}"
    loss_type = vars(trainer.args).get("loss_type")  # TRL's
    for loss in [loss_type] if isinstance(loss_type, str) else list(loss_type or []):
        if loss in _REFUSED_LOSSES:
            yield f"loss_type={loss!r}: {_REFUSED_LOSSES[loss]}"
