"""What an evaluation of the loss must put back, so that nobody can tell that it took place.

`Snapshot` remembers it; `TRACES` lists the kinds, each a function that remembers and returns how
to put back. To put back one more thing, write such a function and add it there.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .memory import DATA, GENERATORS, Memory, Restore, is_untouchable
from .optimizers.tensors import is_sharded
from .scene import Scene

# Whose objects a trainer holds without their being its own state.
_LIBRARIES = (
    *("torch", "accelerate", "datasets", "tokenizers", "transformers", "peft"),
    __package__.partition(".")[0],
)
_MACHINERY = ("state", "control", "args")  # of a trainer, that a loss may write into all the same


def random_streams(scene: Scene) -> Restore:
    """Remember the streams of Python, NumPy, torch's CPU and the accelerators of the model."""
    python = random.getstate()
    numpy = np.random.get_state()
    cpu = torch.get_rng_state()
    accelerators = {
        device: torch.get_device_module(device).get_rng_state(*_index(device))
        for device in {param.device for param in scene.model.parameters()}
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


def attributes(scene: Scene) -> Restore:
    """Remember buffers and Python attributes of modules, and the attributes of the owner.

    Numbers, tensors, generators, built-in containers and plain objects (a config, a meter), one in
    another not. Parameters, modules, hooks, optimizers, data sets, histories and objects that did
    not exist before (a cache that is made when it is needed) are left alone.
    """
    memory = Memory(scene)
    restores = [
        memory.of_attributes(name, vars(module), lambda _, value: not is_untouchable(value))
        for name, module in scene.named_modules()
    ]
    if scene.owner is not None:
        owner = scene.owner
        restores.append(memory.of_attributes(type(owner).__name__, vars(owner), _is_owner_state))

    def restore() -> None:
        for restore in restores:
            restore()

    return restore


def frozen_parameters(scene: Scene) -> Restore:
    """Remember parameters that are not trained but that a forward pass moves: a teacher's.

    Which they are shows in the first pass. A frozen body larger than what is trained is not copied
    for that, so that the first search of a large body with a moving part is not exact.
    """
    every = [p for _, module in scene.named_modules() for p in module.parameters(recurse=False)]
    unknown = scene.moving is None
    frozen = [p for p in every if not p.requires_grad and not is_sharded(p)]
    params = frozen if scene.moving is None else scene.moving
    size = sum(p.nbytes for p in params)
    copied = not unknown or size <= sum(p.nbytes for p in every if p.requires_grad)
    saved = [p.detach().clone() for p in params] if copied else []
    norms = torch._foreach_norm([p.detach() for p in params]) if unknown and params else ()

    def restore() -> None:
        if unknown and scene.moving is None:  # the first pass is over
            after = torch._foreach_norm([p.detach() for p in params]) if params else ()
            same = [bool(a == b) for a, b in zip(norms, after, strict=True)]
            scene.moving = [p for p, unmoved in zip(params, same, strict=True) if not unmoved]
        for param, value in zip(params, saved, strict=False):
            if not torch.equal(param, value):
                param.copy_(value)

    return restore


TRACES: tuple[Callable[[Scene], Restore], ...] = (random_streams, attributes, frozen_parameters)


class Snapshot:
    """Everything that a forward pass may change, as it is at construction."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._restores = [trace(scene) for trace in TRACES]

    def restore(self) -> None:
        """Put it all back. May be called more than once."""
        with torch.no_grad():
            for restore in self._restores:
                restore()
        while self._scene.unsaid:  # now that everything is back: a warning may be an error
            warnings.warn(self._scene.unsaid.pop(), stacklevel=2)


@contextmanager
def without_trace(scene: Scene) -> Iterator[None]:
    """Leave everything as it is now, whatever forward passes run inside."""
    now = Snapshot(scene)
    # After a forward pass without gradients DDP would not broadcast buffers for the next one.
    wrappers = [m for m in scene.model.modules() if isinstance(m, DistributedDataParallel)]
    broadcasts = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, broadcast in zip(wrappers, broadcasts, strict=True):
            wrapper.require_forward_param_sync = broadcast
        now.restore()


def _is_owner_state(name: str, value: Any) -> bool:
    """Return whether an attribute of a trainer is its own, not the machinery of a library."""
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    known = isinstance(value, (Tensor, *GENERATORS)) or name in _MACHINERY
    return name not in DATA and not is_untouchable(value) and (not library or known)


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
