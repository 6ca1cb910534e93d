"""What a merge changes in ``config.json``, so that the output loads as what was trained."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from boft_export.planning.model import ConfigEdit
from boft_export.planning.tables import CLASS_SUFFIX_OF_TASK

_STEM = re.compile(r"(?P<stem>.+?)(For[A-Z]\w*|Model|LMHeadModel|DoubleHeadsModel|WithLMHeadModel|LMModel)$")


def apply_edits(config: Mapping[str, Any], edits: Sequence[ConfigEdit]) -> str:
    """Return the text of ``config`` with ``edits`` made."""
    result = copy.deepcopy(dict(config))
    for edit in edits:
        owner = result
        for key in edit.path[:-1]:
            owner = owner[key]
        owner[edit.path[-1]] = edit.value
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def nested(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield the config and every config nested in it, with their paths."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or key in {"decoder", "encoder"}):
            yield from nested(value, (*path, key))


def untie(config: Mapping[str, Any]) -> list[ConfigEdit]:
    """Say that output head and input embedding are no longer one, wherever the config could say otherwise."""
    reason = "head and embedding differ after the merge"
    key = "tie_word_embeddings"
    return [
        ConfigEdit((*path, key), value=False, reason=reason)
        for path, part in nested(config)
        if part.get(key) is not False and (not path or key in part or path[-1] in {"text_config", "llm_config"})
    ]


def resize_vocabulary(config: Mapping[str, Any], rows: int, old_rows: int) -> list[ConfigEdit]:
    """Set the vocabulary's size wherever the config has the old one."""
    reason = f"the adapter's embedding has {rows} rows, the base's {old_rows}"
    return [
        ConfigEdit((*path, "vocab_size"), rows, reason)
        for path, part in nested(config)
        if part.get("vocab_size") == old_rows
    ]


def set_dtype(config: Mapping[str, Any], name: str) -> list[ConfigEdit]:
    """Set the dtype that loaders read from the config, wherever it is there."""
    return [
        ConfigEdit((*path, key), name, "the output's dtype")
        for path, part in nested(config)
        for key in ("torch_dtype", "dtype")
        if isinstance(part.get(key), str) and part[key] != name
    ]


def set_labels(config: Mapping[str, Any], count: int) -> list[ConfigEdit]:
    """Give the config ``count`` labels where it has another number; two are what a config without labels means."""
    if len(config.get("id2label") or (0, 1)) == count:
        return []
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    reason = f"the adapter's head has {count} labels"
    return [
        ConfigEdit(("id2label",), names, reason),
        ConfigEdit(("label2id",), {label: int(i) for i, label in names.items()}, reason),
    ]


def class_stem(name: str) -> str | None:
    """Return what a class name begins with: ``Bert`` for ``BertForMaskedLM``; None for a name of another form."""
    match = _STEM.match(name)
    return match["stem"] if match else None


def trained_class(config: Mapping[str, Any], model_class: str | None, task: str | None) -> str | None:
    """Return the class that was trained, by what the adapter says and the base's class; None if it can't be told."""
    suffix = CLASS_SUFFIX_OF_TASK.get(task or "")
    stem = next((class_stem(str(a)) for a in config.get("architectures") or ()), None)
    return model_class or (stem + suffix if stem and suffix else None)


def set_architecture(config: Mapping[str, Any], model_class: str | None) -> list[ConfigEdit] | None:
    """Name the class that was trained; None where it is not known."""
    if model_class is None:
        return None
    if list(config.get("architectures") or []) == [model_class]:
        return []
    return [ConfigEdit(("architectures",), [model_class], "the class that the adapter was trained on")]
