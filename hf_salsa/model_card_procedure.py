"""How a model was trained, in the words of its card."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from .head import plain_name
from .model_card_markdown import code_span
from .optimizers import LineSearchOptimizer
from .optimizers.evaluating import Evaluating

_HEADING = "## Training procedure\n"


def procedure(
    optimizer: LineSearchOptimizer, model: nn.Module, head_updates: int, returns: int = 0
) -> str:
    """Return how the optimizer finds its step sizes, in a paragraph of Markdown.

    Args:
        optimizer: The line search.
        model: The model that was trained.
        head_updates: How many updates trained a new head alone.
        returns: How often the run went back to earlier weights.
    """
    name = code_span(type(optimizer).__name__)
    rule = optimizer.rule.describe()
    momentum = "Nesterov's momentum and " if optimizer.nesterov else ""
    steps = f"{optimizer.base_name}'s steps with {momentum}a step size"
    sentence = f"{name} takes {steps} that {rule}."
    sentences = [sentence, *head_first_sentence(optimizer, model, head_updates)]
    if returns:
        times = "once" if returns == 1 else f"{returns} times"
        sentences.append(
            f"Training broke down {times}, and went back to the weights of its lowest averaged "
            "loss so far, at half the step size."
        )
    return " ".join(sentences)


def head_first_sentence(optimizer: Evaluating, model: nn.Module, head_updates: int) -> list[str]:
    """Return the sentence on a new head that was to be trained first; none if none was.

    Args:
        optimizer: A line search, or a stock optimizer that trains a new head first.
        model: The model that was trained.
        head_updates: How many updates trained the head alone.
    """
    if not optimizer.param_groups[0]["head_first"]:
        return []
    if not head_updates:
        return ["No new head on a trained body was found, so none was trained first."]
    head = {id(p) for group in optimizer.param_groups if group["head"] for p in group["params"]}
    names = [plain_name(name) for name, p in model.named_parameters() if id(p) in head]
    first = "first update" if head_updates == 1 else f"first {head_updates} updates"
    return [
        f"The {first} trained the new head alone{_in_brackets(names)}, by a line search of its own "
        "along the signs of its gradient; the optimizer began after that, on all of the model."
    ]


def _in_brackets(names: Iterable[str]) -> str:
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    return f" ({', '.join(map(code_span, modules))})" if modules else ""


def add_to_procedure(readme: Path, sentences: list[str]) -> None:
    """Add sentences to the section on the training procedure of a card that others wrote.

    Args:
        readme: The card.
        sentences: Markdown.
    """
    if not sentences:
        return
    before, heading, after = readme.read_text(encoding="utf-8").partition(_HEADING)
    start = before + heading if heading else f"{before}\n{_HEADING}"
    text = f"{start}\n{' '.join(sentences)}\n{after}"
    readme.write_text(text, encoding="utf-8", newline="\n")
