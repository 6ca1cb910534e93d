"""The names that transformers gives a checkpoint's tensors in memory, where they are not those on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from boft_export.planning.config_edits import class_stem, nested

# Made by tools/make_renames.py from the release named in it.
_TABLE = Path(__file__).with_name("transformers_renames.json")


def names_in_memory(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the names that differ in memory, each with its name on disk.

    A model's own renames and those of the models nested in it apply in turn, as in transformers.

    Args:
        config: The checkpoint's config.
        names: Its tensors' names.
    """
    table = _table()
    rules = [rule for key in dict.fromkeys(_keys(config)) for rule in table.get(key, ())]
    found: dict[str, str] = {}
    for name in names if rules else ():
        renamed = name
        for pattern, replacement in rules:
            renamed = pattern.sub(replacement, renamed, count=1)
        if renamed != name:
            found[renamed] = name
    return found


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names under which the table may have renames for a model: its class, its bare class, its type."""
    for _, part in nested(config):
        classes = [str(a) for a in part.get("architectures") or ()]
        yield from classes
        yield from (f"{stem}Model" for name in classes if (stem := class_stem(name)))
        if "model_type" in part:
            yield str(part["model_type"])


@cache
def _table() -> dict[str, list[tuple[re.Pattern[str], str]]]:
    content = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {key: [(re.compile(p), r) for p, r in rules] for key, rules in content["renames"].items()}
