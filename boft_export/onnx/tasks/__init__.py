"""The registry of tasks: which graphs each kind of model is exported as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from boft_export.errors import InputError, UsageError
from boft_export.onnx.tasks.causal import TEXT_GENERATION
from boft_export.onnx.tasks.diffusion import UNET
from boft_export.onnx.tasks.encoder import (
    FEATURE_EXTRACTION,
    FILL_MASK,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from boft_export.onnx.tasks.generic import GENERIC, generic_task
from boft_export.onnx.tasks.inputs import taken
from boft_export.onnx.tasks.pooling import SENTENCE_SIMILARITY
from boft_export.onnx.tasks.seq2seq import TEXT_TO_TEXT
from boft_export.onnx.tasks.task import Compared, Graph, RunGraph, Task, Tensors
from boft_export.onnx.tasks.vision import IMAGE_CLASSIFICATION, IMAGE_FEATURES

# The first whose classes end as a config's does is meant: FEATURE_EXTRACTION's end as some others' do.
TASKS = (
    TEXT_GENERATION,
    TEXT_TO_TEXT,
    FILL_MASK,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
    IMAGE_CLASSIFICATION,
    UNET,
    FEATURE_EXTRACTION,
    IMAGE_FEATURES,
    SENTENCE_SIMILARITY,
)

__all__ = ["TASKS", "Compared", "Graph", "RunGraph", "Task", "Tensors", "find_task"]


def find_task(config: Mapping[str, Any], name: str | None = None, folder: Path | None = None) -> Task:
    """Return a model's task; its notices are for who did not name it.

    Args:
        config: The model's config.
        name: The task's name; None for the one that the config's class is made for.
        folder: Where the model's files are, some of which tell more of some tasks.

    Raises:
        UsageError: If there is no task of this name.
        InputError: If the config tells of no task, or the folder's files don't fit the task.
    """
    classes = _classes(config)
    if name == GENERIC:
        return replace(generic_task(", ".join(classes)), notices=())
    known = ", ".join(t.name for t in TASKS)
    if name is not None:
        found = next((t for t in TASKS if t.name == name), None)
        if found is None:
            raise UsageError(f"there is no task {name}.", hint=f"The tasks are {known}.")
    else:
        found = _made_for(classes)
    if found is None:
        raise InputError(
            f"the config tells of no task: its class is {', '.join(classes) or 'not named'}.",
            hint=f"Name the task with --task: {known}.",
        )
    return found.for_folder(found, folder) if found.for_folder is not None and folder is not None else found


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a config names: of transformers, or the one of diffusers."""
    named = config.get("architectures") or config.get("_class_name") or ()
    return [named] if isinstance(named, str) else [str(a) for a in named]


def _made_for(classes: Sequence[str]) -> Task | None:
    """Return the task that is made for the first class, or the generic one where transformers at least has it."""
    import transformers

    if not classes:
        return None
    kind = getattr(transformers, classes[0], None)
    main = taken(kind) if isinstance(kind, type) and hasattr(kind, "forward") else None
    for task in TASKS:
        if classes[0].endswith(task.architectures) and (not task.main_input or main in (None, (task.main_input,))):
            return task
    return generic_task(classes[0]) if main is not None else None
