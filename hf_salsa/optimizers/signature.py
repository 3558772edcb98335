"""Constructors that state their signature and nothing else, and what they refuse."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .state import RULE, RunState, names_of

Init = TypeVar("Init", bound=Callable[..., None])


def explicit_signature(init: Init) -> Init:
    """Let an `__init__` without a body hand its arguments, and their defaults, to the base class.

    The signature is for readers, IDEs and type checkers. Settings of the rule that it does not name
    are passed on as they are.
    """
    signature = inspect.signature(init)
    named = [name for name in signature.parameters if name != "self"]

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        refuse_learning_rate(self, args[1:], kwargs)
        bound = signature.bind(self, *args, **{n: v for n, v in kwargs.items() if n in named})
        bound.apply_defaults()
        arguments = {**kwargs, **{name: bound.arguments[name] for name in named}}
        self.set_up(arguments.pop("params"), arguments.pop("total_steps"), arguments)

    return wrapper  # type: ignore[return-value]  # it takes what `init` takes


def refuse_learning_rate(optimizer: Any, positional: Any, keywords: dict[str, Any]) -> None:
    """Raise a `TypeError` for a learning rate, and for any setting given without its name."""
    name = type(optimizer).__name__
    if "lr" in keywords:
        given = f"lr={keywords['lr']!r}"
    elif positional:
        given = f"{positional[0]!r} as a positional argument"
    else:
        return
    raise TypeError(
        f"{name} got {given}, but there is no learning rate: the line search finds the step size. "
        f"Write {name}(params), with settings by name, for example {name}(params, c=0.3)."
    )


def refuse_names(optimizer: type[Any], settings: dict[str, Any]) -> None:
    """Raise a `TypeError` for settings that are unknown, and where one name has two meanings.

    Args:
        optimizer: A class of line-search optimizers.
        settings: What it was given by name.
    """
    of_rule = names_of(optimizer.rule_type)
    of_rule_state = set(names_of(optimizer.rule_type.state_type))
    of_optimizer = {*names_of(RunState), RULE, "lr", "params", "head", "step_size_factor"}
    if clash := sorted(of_rule_state & of_optimizer):
        raise TypeError(
            f"{clash[0]!r} is a name of the state of {optimizer.rule_type.__name__} and one of "
            f"{optimizer.__name__}'s own; both are kept in one dictionary. Give the rule's another "
            "name."
        )
    if clash := sorted((of_rule_state | of_optimizer) & {*of_rule, *optimizer.options}):
        to_rename = "state" if clash[0] in of_rule_state else "setting"
        raise TypeError(
            f"{clash[0]!r} is a setting and a name of the state of {optimizer.__name__}; both are "
            f"kept in one dictionary. Give the {to_rename} another name."
        )
    unknown = sorted(settings.keys() - optimizer.options.keys() - set(of_rule))
    if unknown:
        raise TypeError(
            f"{optimizer.__name__} has no setting {unknown[0]!r}. It has: "
            f"{', '.join([*of_rule, *optimizer.options, 'total_steps'])}."
        )
