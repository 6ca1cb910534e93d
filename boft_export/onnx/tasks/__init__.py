"""The registry of tasks: which graphs each kind of model is exported as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boft_export.errors import InputError, UsageError
from boft_export.onnx.tasks.causal import TEXT_GENERATION
from boft_export.onnx.tasks.encoder import FEATURE_EXTRACTION
from boft_export.onnx.tasks.task import Compared, Graph, RunGraph, Task, Tensors

TASKS = (FEATURE_EXTRACTION, TEXT_GENERATION)

__all__ = ["TASKS", "Compared", "Graph", "RunGraph", "Task", "Tensors", "find_task"]


def find_task(config: Mapping[str, Any], name: str | None = None) -> Task:
    """Return a model's task.

    Args:
        config: The model's config.
        name: The task's name; None for the one that the config's class is made for.

    Raises:
        UsageError: If there is no task of this name.
        InputError: If the config tells of no task.
    """
    known = ", ".join(t.name for t in TASKS)
    if name is not None:
        found = next((t for t in TASKS if t.name == name), None)
        if found is None:
            raise UsageError(f"there is no task {name}.", hint=f"The tasks are {known}.")
        return found
    classes = [str(a) for a in config.get("architectures") or ()]
    for task in TASKS:
        if any(c.endswith(task.architectures) for c in classes):
            return task
    raise InputError(
        f"the config tells of no task: its class is {', '.join(classes) or 'not named'}.",
        hint=f"Name the task with --task: {known}.",
    )
