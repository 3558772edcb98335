"""The YAML at the head of a model card: it reads back as it was given; the tags in one's own."""

import math
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import metadata_load


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


def tags_of(readme: Path) -> list[str] | None:
    """Return the tags of a card that may be there; None if it has no front matter to read."""
    if not readme.exists() or not readme.read_bytes().strip():
        return []
    try:
        data = metadata_load(readme)
    except Exception:  # decoding, YAML and what makes values of it each have their own
        return None
    if data is None:
        return None
    tags = data.get("tags") or []
    if isinstance(tags, str):
        return [tags]
    return [tag for tag in tags if tag is not None] if isinstance(tags, list) else None


def keep_aside(path: Path) -> Path:
    """Rename a file to a name that is free beside it, and return that one."""
    kept = path.with_name(f"{path.name}.bak")
    number = 2
    while kept.exists():
        kept = path.with_name(f"{path.stem}-{number}{path.suffix}.bak")
        number += 1
    return path.rename(kept)
