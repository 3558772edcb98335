"""The YAML at the head of a model card: it reads back exactly as it was given."""

import math
from typing import Any

import yaml  # type: ignore[import-untyped]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Safe YAML, without references from one place to another."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> Any:
    style = None
    if not text.isprintable():
        style = '"'  # escapes: line breaks of Unicode would come back as others
    elif text[:1] in "+-.0123456789":
        style = "'"  # YAML 1.2 knows more numbers than PyYAML, which quotes those of 1.1
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(str, _represent_text)  # NumPy's strings, names of splits


def front_matter(data: dict[str, Any]) -> str:
    """Return `data` as the block of YAML that the hub reads."""
    # On one line each: folded, some values would be hard to read.
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{text}---"
