"""What a forward pass may touch, and what was learnt about it."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LONG = 1000  # entries: what a longer container holds is not looked into


@dataclass
class Scene:
    """Everything that a forward pass may touch.

    Attributes:
        model: The model; its modules, with all that they hold.
        modules: Further modules that the loss uses, as a loss with weights or a teacher.
        objective: What evaluates the loss. It is never put back, whoever holds it: it has to know
            all the while that it evaluates, and how far it is.
        owner: What calls the model and may count, log and collect meanwhile: a trainer.
        stable: Large tensors that a forward pass was seen to leave alone; filled by snapshots.
        moving: Frozen parameters that a forward pass moves (the teacher of a moving average), None
            before the first one was seen.
        warned: What was warned of, and what is `unsaid` yet.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...] = ()
    objective: object | None = None
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
            if isinstance(value, (list, tuple)) and len(value) <= LONG:
                held += value
            elif isinstance(value, dict) and len(value) <= LONG:
                held += value.values()
        roots = [self.model, *self.modules, *(v for v in held if isinstance(v, nn.Module))]
        for root in roots:
            for name, module in root.named_modules():
                if id(module) not in seen and not isinstance(module, DistributedDataParallel):
                    seen.add(id(module))
                    yield name or type(module).__name__, module
