"""Tasks of one graph, which is one run of the model: inputs in, named outputs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import InputError
from boft_export.models.loading import model_errors
from boft_export.onnx.tasks.inputs import CASES, LONG, SAMPLE, Case, axes, taken
from boft_export.onnx.tasks.task import Axes, Compared, Graph, RunGraph, Task, Tensors

# Makes a model's inputs for a case.
MakeInputs = Callable[[Any, Case, torch.Generator], dict[str, Tensor]]
# Runs a model on inputs and returns its outputs by name.
RunModel = Callable[[Any, Tensors], Tensors]
# The dynamic axes of a model's inputs.
FindAxes = Callable[[Any, Tensors], Mapping[str, Axes]]


def single_graph(
    make: MakeInputs, run_model: RunModel, find_axes: FindAxes = axes, most: Mapping[str, int] | None = None
) -> tuple[Callable[[nn.Module], Sequence[Graph]], Callable[[Any, RunGraph, int], Iterator[Compared]]]:
    """Return what makes the graph of a task, and what compares it with the model."""

    def graphs(model: nn.Module) -> Sequence[Graph]:
        sample = make(model, SAMPLE, torch.Generator().manual_seed(0))
        # Without values: it is for the names of what comes out.
        with torch.no_grad(), model_errors(InputError, f"{type(model).__name__} can't be run"):
            outputs = tuple(run_model(model, sample))
        if not outputs:
            raise InputError(f"nothing that {type(model).__name__} returns is a tensor.")

        def forward(module: nn.Module, inputs: Tensors) -> list[Tensor]:
            found = run_model(module, inputs)
            return [found[n] for n in outputs]

        return [Graph("model", sample, find_axes(model, sample), outputs, forward, most or {})]

    def compare(model: Any, run: RunGraph, seed: int) -> Iterator[Compared]:  # noqa: ANN401  # transformers is untyped
        generator = torch.Generator().manual_seed(seed)
        for case in (*CASES, *([Case(1, LONG)] if "input_ids" in taken(type(model)) else [])):
            inputs = make(model, case, generator)
            actual = run("model", inputs)
            expected = run_model(model, inputs)
            told = ", ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in list(inputs.items())[:1])
            told += f", padded {case.padding}" if "attention_mask" in inputs and case.padding != "none" else ""
            for name, wanted in expected.items():
                counts = _counts(wanted, inputs.get("attention_mask"))
                yield Compared(name, told, wanted, actual[name], counts)

    return graphs, compare


def _counts(value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return which positions of an output stand for tokens; None where it has none."""
    return mask.bool() if mask is not None and value.ndim == 3 and value.shape[:2] == mask.shape else None


def fields(*names: str) -> RunModel:
    """Return what runs a model and takes the named tensors of what it returns, as far as they are there."""

    def run(model: Any, inputs: Tensors) -> Tensors:  # noqa: ANN401  # as above
        found = tensor_fields(model, inputs)
        return {n: found[n] for n in names if n in found}

    return run


def tensor_fields(model: Any, inputs: Tensors) -> Tensors:  # noqa: ANN401  # as above
    """Run a model and return all tensors that it names, but for single numbers."""
    found = model(**inputs, return_dict=True)
    return {n: t for n, t in found.items() if isinstance(t, Tensor) and t.ndim}


def single(
    name: str, auto_class: str | None, architectures: tuple[str, ...], main: str, make: MakeInputs, run: RunModel
) -> Task:
    """Return a task of one graph."""
    graphs, compare = single_graph(make, run)
    return Task(name, auto_class, architectures, graphs, compare, main_input=main)
