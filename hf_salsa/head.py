"""Which parameters are a new head on a trained body, and the groups for training it first.

What the first mini-batches agree on is the shares of the classes, or the mean of the targets. The
head learns that within a few updates; at the step sizes that this allows the body is ruined.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

_LOOK_UPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # of several dimensions, too
# Parts that wrappers put into the names of parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def find_head(model: nn.Module, names: Sequence[str] | None = None) -> list[str]:
    """Return the names of the trainable parameters of a new head on a trained body.

    By default it is looked for: the last modules of the model, in the order in which they are
    registered, as far as they are new and less than half of all. New is what transformers did not
    load (`from_pretrained` marks what it did) and what still has the values that initialisation
    leaves: biases of 0 or, as torch's own layers have them, uniform numbers of the layer's range.
    Normalisations and embeddings alone are no head: their values show too little.
    With PEFT the head is what is new of `modules_to_save`; the factors of an adapter are none.
    Nothing is found in a model from scratch, or where the head was trained or shares its weights
    with the body.

    Args:
        model: The model, before it is wrapped for training.
        names: Names of parameters, or how they begin: the head, whatever it looks like.

    Returns:
        Names as `named_parameters` has them, without those of wrappers.

    Raises:
        ValueError: No trainable parameter has one of `names`, or all of them have.
    """
    trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if names is not None:
        return _named(list(trained), names)
    config = getattr(model, "config", None)  # of transformers' models
    spread = getattr(config, "initializer_range", None)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        saved_whole = [m for m in model.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
        new = [m for m in saved_whole if _is_new_copy(m, spread)]
        ids = {id(p) for m in new for p in m.modules_to_save.parameters()}
        return [name for name, p in trained.items() if id(p) in ids]
    if _from_scratch(model):
        return []
    leaves = [m for m in model.modules() if _own(m)]
    head: list[nn.Module] = []
    for leaf in reversed(leaves):
        if any(_loaded(p) for p in _own(leaf)) or not _as_initialised(leaf, spread):
            break
        head.append(leaf)
    if 2 * len(head) >= len(leaves) or not any(map(_maps, head)):
        return []
    body = {id(p) for leaf in leaves[: len(leaves) - len(head)] for p in _own(leaf)}
    # What is shared belongs to the body.
    found = {id(p) for leaf in head for p in _own(leaf)} - body
    return [name for name, p in trained.items() if id(p) in found]


def _named(trained: list[str], names: Sequence[str]) -> list[str]:
    names = [names] if isinstance(names, str) else names
    head = [name for name in trained if name.startswith(tuple(names))]
    for wanted in names:
        if not any(name.startswith(wanted) for name in trained):
            last = ", ".join(trained[-4:])
            raise ValueError(
                f"head={wanted!r} is not allowed: no trainable parameter has this name or begins "
                f"with it. The last ones are {last}."
            )
    if len(head) == len(trained):
        raise ValueError(
            f"head={list(names)!r} is not allowed: it is all that is trained, so that no body is "
            "left. Name the last layers only, or leave it out."
        )
    return head


def _from_scratch(model: nn.Module) -> bool:
    """Return whether a model is one of transformers of which nothing was loaded."""
    transformers = sys.modules.get("transformers.modeling_utils")
    known = transformers is not None and isinstance(model, transformers.PreTrainedModel)
    return known and not any(map(_loaded, model.parameters()))


def _is_new_copy(wrapper: Any, spread: float | None) -> bool:
    """Return whether what PEFT trains a copy of is new, and the copy is as it was made."""
    copies = [m for m in wrapper.modules_to_save.modules() if _own(m)]
    return (
        not any(_loaded(p) for p in wrapper.original_module.parameters())
        and not any(isinstance(m, _LOOK_UPS) for m in copies)
        and all(_as_initialised(m, spread) for m in copies)
    )


def _maps(module: nn.Module) -> bool:
    """Return whether a module is a layer that maps its input, as linear ones and convolutions."""
    return not isinstance(module, _LOOK_UPS + _NORMS) and any(p.dim() > 1 for p in _own(module))


def _own(module: nn.Module) -> list[Tensor]:
    return list(module.parameters(recurse=False))


def _loaded(param: Tensor) -> bool:
    """Return whether transformers took a parameter from a checkpoint, by its own mark."""
    return bool(vars(param).get("_is_hf_initialized", False))


def _as_initialised(module: nn.Module, spread: float | None) -> bool:
    """Return whether the parameters of a module may be those that it was made with.

    Embeddings show nothing and pass. `spread` is the standard deviation with which transformers
    makes weights, None in other models.
    """
    if isinstance(module, _LOOK_UPS):
        return True
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if own or weight is None:
        return False
    if weight.dim() < 2:  # a normalisation
        return bool((weight == 1).all()) and (bias is None or not bias.any())
    if bias is not None and not bias.any():
        return True
    if bias is None and spread is not None:
        error = 1 / math.sqrt(2 * weight.numel())  # relative, of a standard deviation
        return abs(float(weight.detach().float().std()) / spread - 1) <= 5 * error
    # torch's own start of linear layers and convolutions; training moves some numbers out of it.
    # One number all over, as where somebody filled them, is no random start.
    bound = 1 / math.sqrt(weight[0].numel())
    own_numbers = [p.detach().abs() for p in (weight, bias) if p is not None]
    sizes = [float(end) for numbers in own_numbers for end in numbers.aminmax()]
    return min(sizes) < max(sizes) <= bound


def mark_head(
    groups: Iterable[dict[str, Any]], model: nn.Module, head: Iterable[str]
) -> list[dict[str, Any]]:
    """Return parameter groups split so that each is all of the head or all of the body.

    The order of the parameters stays, so that checkpoints of split and joined groups go together.

    Args:
        groups: Parameter groups, with lists of parameters.
        model: The model that they are of, wrapped or not.
        head: What `find_head` returned.
    """
    wanted = set(head)
    ids = {id(p) for name, p in model.named_parameters() if plain_name(name) in wanted}
    marked = []
    for group in groups:
        for is_head, params in groupby(group["params"], key=lambda param: id(param) in ids):
            marked.append({**group, "params": list(params), "head": is_head})
    return marked


def head_groups(
    model: nn.Module, names: Sequence[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Return the trainable parameters as groups for an optimizer with `head_first`.

    Args:
        model: The model to train, before it is wrapped.
        names: As in `find_head`.
        options: Of both groups, as `weight_decay`.

    Raises:
        ValueError: As in `find_head`.

    Example:
        >>> optimizer = SaLSaAdamPlus(head_groups(model), total_steps=1000)
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return mark_head([{"params": params, **options}], model, find_head(model, names))


def plain_name(name: str) -> str:
    """Return the name of a parameter without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
