"""How values of any kind are remembered and put back, each object in place."""

import inspect
import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .scene import LONG, Scene

# Puts back what it remembers of a value, in place, and returns the value.
Restore: TypeAlias = Callable[[], Any]

_LARGE_TENSOR = 2**20  # bytes: from here on only what a forward pass was seen to write is copied
_DEPTH = 4  # of containers in containers

_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, deque, tuple)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# FSDP2 exchanges parameters in forward; hooks and compiled code are the module's own business.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"_buffers", "training"}
_UNTOUCHABLE = (nn.Module, nn.Parameter, torch.optim.Optimizer, torch.utils.data.Dataset, Enum)
_MISSING = object()
DATA = ("train_dataset", "eval_dataset", "log_history")  # never part of what is remembered


def is_untouchable(value: Any) -> bool:
    """Return whether a value is left alone: modules, parameters, data sets, code."""
    if isinstance(value, _CONTAINERS) or type(value) is Tensor:  # quick, and the most
        return False
    return isinstance(value, (*_UNTOUCHABLE, type)) or inspect.isroutine(value)


class Memory:
    """Remembers values of any kind; each object once, however many refer to it."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._seen: dict[int, Restore] = {id(scene.objective): lambda: scene.objective}

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
        if isinstance(value, _SCALARS) or is_untouchable(value):
            return lambda: value
        self._seen[id(value)] = lambda: value  # an object that holds itself
        self._seen[id(value)] = restore = self._of_new(name, value, depth, inside)
        return restore

    def _of_new(self, name: str, value: Any, depth: int, inside: bool) -> Restore:
        if isinstance(value, Tensor):
            return self._of_tensor(name, value)
        if isinstance(value, np.ndarray):
            return _of_array(value)
        if isinstance(value, GENERATORS):
            return _of_generator(value)
        if isinstance(value, _CONTAINERS):
            shallow = depth == 0 or len(value) > LONG
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


def _is_state_of_object(name: str, value: Any) -> bool:
    return name not in DATA and not is_untouchable(value)


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
