"""What an evaluation of the loss must put back: random streams, buffers.

To put back one more thing, write a function like `random_streams` and add it to `TRACES`.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Integer buffers above this many elements are quantised weights, which no forward pass writes.
_LARGEST_INTEGER_BUFFER = 4096

Restore: TypeAlias = Callable[[], None]


def random_streams(model: nn.Module) -> Restore:
    """Remember the streams of Python, NumPy, torch's CPU and the accelerators of the model."""
    python = random.getstate()
    numpy = np.random.get_state()
    cpu = torch.get_rng_state()
    accelerators = {
        device: torch.get_device_module(device).get_rng_state(*_index(device))
        for device in {param.device for param in model.parameters()}
        if device.type not in ("cpu", "meta")
    }

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for device, state in accelerators.items():
            torch.get_device_module(device).set_rng_state(state, *_index(device))

    return restore


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # MPS has one device and takes no argument


def buffers(model: nn.Module) -> Restore:
    """Remember the values of the buffers, as BatchNorm's running statistics."""
    values = {
        name: buffer.clone()
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
        or buffer.is_complex()
        or buffer.numel() <= _LARGEST_INTEGER_BUFFER
    }

    def restore() -> None:
        # Looked up afresh: a module may have put a new tensor in the place of the old one.
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in values:
                    buffer.copy_(values[name])

    return restore


TRACES: tuple[Callable[[nn.Module], Restore], ...] = (random_streams, buffers)


class Snapshot:
    """Everything that a forward pass of `model` may change, as it is at construction."""

    def __init__(self, model: nn.Module) -> None:
        self._restores = [trace(model) for trace in TRACES]

    def restore(self) -> None:
        """Put it all back. May be called more than once."""
        for restore in self._restores:
            restore()


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Leave everything as it is now, whatever forward passes of `model` run inside."""
    now = Snapshot(model)
    # After a forward pass without gradients DDP would not broadcast buffers for the next one.
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    broadcasts = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, broadcast in zip(wrappers, broadcasts, strict=True):
            wrapper.require_forward_param_sync = broadcast
        now.restore()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 gather the weights anew in the next forward pass.

    It keeps gathered weights after a forward pass: after a trial they are those of the trial, and
    the next pass, of training too, would read them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
