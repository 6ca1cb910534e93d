"""Any other model that runs on text, images or sound: all tensors that it returns come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from boft_export.errors import InputError, Level, Notice
from boft_export.onnx.tasks.inputs import MAKERS, Case, taken
from boft_export.onnx.tasks.single import single_graph, tensor_fields
from boft_export.onnx.tasks.task import Task

GENERIC = "generic"


def _inputs(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401  # transformers is untyped here
    """Return the model's main inputs and what goes with them."""
    found: dict[str, Tensor] = {}
    for name in taken(type(model)):
        # Language models take images where they have a part that sees.
        if name in MAKERS and (not found or hasattr(model.config, "vision_config")):
            found |= MAKERS[name](model, case, generator)
    if not found:
        raise InputError(
            f"{type(model).__name__} takes {model.main_input_name}, of which no samples can be made.",
            hint="Export it with a task of its own: --task.",
        )
    return found


def generic_task(architecture: str) -> Task:
    """Return the task of a class that no other is made for, which says so."""
    message = f"no task is made for {architecture}: the graph is one run of it, with all tensors that it returns"
    notice = Notice(Level.WARNING, "generic-task", architecture, message, "Look at its inputs and outputs.")
    graphs, compare = single_graph(_inputs, tensor_fields)
    return Task(GENERIC, None, (), graphs, compare, notices=(notice,))
