"""What an evaluation of the loss must put back, so that nobody can tell that it took place.

`Snapshot` remembers it; `TRACES` lists the kinds, each a function that remembers and returns how
to put back. To put back one more thing, write such a function and add it there.
"""

import inspect
import operator
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .optimizers.tensors import is_sharded

# Puts back what it remembers of a value, in place, and returns the value.
Restore: TypeAlias = Callable[[], Any]

_LARGE_TENSOR = 2**20  # bytes: from here on only what a forward pass was seen to write is copied
_LONG = 1000  # entries: of a longer container only which they are is remembered
_DEPTH = 4  # of containers in containers

_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, deque, tuple)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# FSDP2 exchanges parameters in forward; hooks and compiled code are the module's own business.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"_buffers", "training"}
_UNTOUCHABLE = (nn.Module, nn.Parameter, torch.optim.Optimizer, torch.utils.data.Dataset, Enum)
# Whose objects a trainer holds without their being its own state.
_LIBRARIES = (
    *("torch", "accelerate", "datasets", "tokenizers", "transformers", "peft"),
    __package__.partition(".")[0],
)
_DATA = ("train_dataset", "eval_dataset", "log_history")
_MACHINERY = ("state", "control", "args")  # of a trainer, that a loss may write into all the same


@dataclass
class Scene:
    """Everything that a forward pass may touch.

    Attributes:
        model: The model; its modules, with all that they hold.
        modules: Further modules that the loss uses, as a loss with weights or a teacher.
        owner: What calls the model and may count, log and collect meanwhile: a trainer.
        stable: Large tensors that a forward pass was seen to leave alone; filled by snapshots.
        moving: Frozen parameters that a forward pass moves (the teacher of a moving average), None
            before the first one was seen.
        warned: What was warned of, and what is `unsaid` yet.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...] = ()
    owner: object | None = None
    stable: MutableMapping[int, Tensor] = field(default_factory=WeakValueDictionary)
    moving: list[nn.Parameter] | None = None
    warned: set[str] = field(default_factory=set)
    unsaid: list[str] = field(default_factory=list)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, module) of all modules, each once; a DDP wrapper keeps its own books."""
        seen: set[int] = set()
        held = list(vars(self.owner).values()) if self.owner is not None else []
        for value in [*held]:
            if isinstance(value, (list, tuple)) and len(value) <= _LONG:
                held += value
            elif isinstance(value, dict) and len(value) <= _LONG:
                held += value.values()
        roots = [self.model, *self.modules, *(v for v in held if isinstance(v, nn.Module))]
        for root in roots:
            for name, module in root.named_modules():
                if id(module) not in seen and not isinstance(module, DistributedDataParallel):
                    seen.add(id(module))
                    yield name or type(module).__name__, module


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
    memory = _Memory(scene)
    restores = [
        memory.of_attributes(name, vars(module), lambda _, value: not _is_untouchable(value))
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
    known = isinstance(value, (Tensor, *_GENERATORS)) or name in _MACHINERY
    return name not in _DATA and not _is_untouchable(value) and (not library or known)


def _is_untouchable(value: Any) -> bool:
    if isinstance(value, _CONTAINERS) or type(value) is Tensor:  # quick, and the most
        return False
    return isinstance(value, (*_UNTOUCHABLE, type)) or inspect.isroutine(value)


class _Memory:
    """Remembers values of any kind; each object once, however many refer to it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._seen: dict[int, Restore] = {}

    def of_attributes(
        self,
        name: str,
        attributes: dict[str, Any],
        wanted: Callable[[str, Any], bool],
        inside: bool = False,
    ) -> Restore:
        """Remember the attributes of an object, its `__dict__`."""
        plain: dict[str, Any] = {}
        others: dict[str, Restore] = {}
        for key, value in attributes.items():
            if key in _MODULE_INTERNALS:
                continue
            if type(value) in _SCALARS:
                plain[key] = value
            elif wanted(key, value):
                others[key] = self.of_value(f"{name}.{key}", value, inside=inside)

        def restore() -> None:
            # Through the dictionary: a setter or a module's __setattr__ may do more.
            for key in attributes.keys() - plain.keys() - others.keys() - _MODULE_INTERNALS:
                if type(attributes[key]) in _SCALARS:  # a count that the first pass began
                    del attributes[key]
            for key, value in plain.items():
                now = attributes.get(key, _MISSING)
                # An object that was None is most likely a cache, compiled code, a connection.
                simple = now is _MISSING or isinstance(now, (*_SCALARS, *_CONTAINERS, Tensor))
                if now is not value and (value is not None or simple):
                    attributes[key] = value
            for key, remembered in others.items():
                value = remembered()
                if attributes.get(key, _MISSING) is not value:
                    attributes[key] = value

        return restore

    def of_value(self, name: str, value: Any, depth: int = _DEPTH, inside: bool = False) -> Restore:
        """Remember a value of any kind; `inside` of a plain object no further one."""
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, _SCALARS) or _is_untouchable(value):
            return lambda: value
        self._seen[id(value)] = lambda: value  # an object that holds itself
        self._seen[id(value)] = restore = self._of_new(name, value, depth, inside)
        return restore

    def _of_new(self, name: str, value: Any, depth: int, inside: bool) -> Restore:
        if isinstance(value, Tensor):
            return self._of_tensor(name, value)
        if isinstance(value, np.ndarray):
            return _of_array(value)
        if isinstance(value, _GENERATORS):
            return _of_generator(value)
        if isinstance(value, _CONTAINERS):
            shallow = depth == 0 or len(value) > _LONG
            return self._of_container(name, value, 0 if shallow else depth, inside)
        # torch's own, as the state of FSDP2, is begun once and never taken back.
        if inside or type(value).__module__.partition(".")[0] in ("torch", "accelerate"):
            return lambda: value
        return self._of_object(name, value)

    def _of_object(self, name: str, value: Any) -> Restore:
        """Remember the attributes of a plain object: a meter, a config."""
        own = value.__dict__ if hasattr(value, "__dict__") else {}
        in_dictionary = self.of_attributes(name, own, _is_state_of_object, inside=True)
        slots = [slot for cls in type(value).__mro__ for slot in vars(cls).get("__slots__", ())]
        in_slots = {
            slot: self.of_value(f"{name}.{slot}", getattr(value, slot), inside=True)
            for slot in slots
            if hasattr(value, slot) and slot not in ("__dict__", "__weakref__")
        }

        def restore() -> Any:
            in_dictionary()
            for slot, remembered in in_slots.items():
                object.__setattr__(value, slot, remembered())
            return value

        return restore

    def _of_container(self, name: str, value: Any, depth: int, inside: bool) -> Restore:
        def remembered(key: Any, entry: Any) -> Restore:
            if depth == 0:
                return lambda: entry
            return self.of_value(f"{name}[{key!r}]", entry, depth - 1, inside)

        if isinstance(value, dict):
            entries = {key: remembered(key, entry) for key, entry in value.items()}
            put = OrderedDict.__setitem__ if isinstance(value, OrderedDict) else dict.__setitem__

            def restore_dict() -> Any:
                then = {key: entry() for key, entry in entries.items()}
                if not _same(value.values(), then.values()) or list(value) != list(then):
                    value.clear()
                    for key, entry in then.items():
                        put(value, key, entry)
                return value

            return restore_dict
        items = [remembered(i, entry) for i, entry in enumerate(value)]

        def restore_items() -> Any:
            then = [item() for item in items]
            if not isinstance(value, tuple) and not _same(value, then):
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(then)
            return value

        return restore_items

    def _of_tensor(self, name: str, tensor: Tensor) -> Restore:
        version = _version(tensor)
        large = tensor.nbytes > _LARGE_TENSOR
        stable = self._scene.stable
        known_stable = large and stable.get(id(tensor)) is tensor
        saved = None if known_stable else tensor.detach().clone()

        def restore() -> Tensor:
            counted = version is not None and _version(tensor) == version
            if saved is None:
                if not counted:
                    stable.pop(id(tensor), None)
                    self._warn(name)
                return tensor
            if tensor.shape != saved.shape:
                tensor.set_(saved.clone())  # type: ignore[call-overload]
                return tensor
            # Some kernels, BatchNorm's too, write without counting: values decide, but on an
            # accelerator writing back is cheaper than to wait for the answer.
            compare = counted and (large or tensor.device.type == "cpu")
            if compare and torch.equal(tensor, saved):
                if large:
                    stable[id(tensor)] = tensor
            else:
                # Of an expanded tensor one element stands for all.
                index = tuple(slice(1) if step == 0 else slice(None) for step in tensor.stride())
                with torch.inference_mode(tensor.is_inference()):
                    tensor[index].copy_(saved[index])
            return tensor

        return restore

    def _warn(self, name: str) -> None:
        if name not in self._scene.warned:
            self._scene.warned.add(name)
            self._scene.unsaid.append(
                f"The forward pass changed {name}, a large tensor that it had left alone before: "
                "an evaluation of the loss could not put it back this once. From now on it is "
                "copied."
            )


_MISSING = object()


def _is_state_of_object(name: str, value: Any) -> bool:
    return name not in _DATA and not _is_untouchable(value)


def _same(first: Any, second: Any) -> bool:
    """Return whether two collections hold the very same objects in the same order."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _version(tensor: Tensor) -> int | None:
    """Return the count of in-place changes, or None where torch keeps none."""
    return None if tensor.is_inference() else tensor._version


def _of_array(array: np.ndarray[Any, Any]) -> Restore:
    saved = array.copy()

    def restore() -> Any:
        if array.shape != saved.shape:
            array.resize(saved.shape, refcheck=False)
        if array.flags.writeable:
            array[...] = saved
        return array

    return restore


def _of_generator(generator: Any) -> Restore:
    put_back: Callable[[], Any]
    if isinstance(generator, torch.Generator):
        put_back = partial(generator.set_state, generator.get_state())
    elif isinstance(generator, np.random.Generator):
        put_back = partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    elif isinstance(generator, np.random.RandomState):
        put_back = partial(generator.set_state, generator.get_state())
    else:
        put_back = partial(generator.setstate, generator.getstate())

    def restore() -> Any:
        put_back()
        return generator

    return restore


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
