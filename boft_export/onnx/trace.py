"""Tracing a skeleton into a graph whose weights are known by name and shape alone."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from boft_export.errors import InputError, Notice
from boft_export.models.loading import model_errors
from boft_export.onnx.optimize import Weight, optimize
from boft_export.onnx.skeleton import Skeleton
from boft_export.onnx.tasks import Graph
from boft_export.onnx.variant import Variant
from boft_export.version import __version__

# Libraries that say on the log what concerns their makers.
_LOUD = ("torch", "onnxscript", "onnx_ir")
_PRODUCER = "boft-export"


@dataclass(frozen=True)
class Traced:
    """A graph whose weights are still to come.

    Attributes:
        model: The graph; a weight is an initializer without a value.
        weights: The name in the model of each weight, by its initializer's name, and whether it is stored transposed.
        notices: What there is to say of how it was optimised.
    """

    model: ir.Model
    weights: Mapping[str, Weight]
    notices: tuple[Notice, ...] = ()


def trace(skeleton: Skeleton, graph: Graph, variant: Variant) -> Traced:
    """Trace one graph of a model, and optimise it.

    Raises:
        InputError: If it can't be traced, or a dynamic axis turned out to be fixed.
    """
    model, mode = skeleton.model, skeleton.mode
    sample = {name: mode.from_tensor(tensor) for name, tensor in graph.sample.items()}
    axes = _dynamic_axes(graph)
    bound = type(model).forward

    def forward(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        model.forward = bound.__get__(model)
        try:
            return tuple(graph.forward(model, inputs))
        finally:
            model.forward = forward

    # In place of the model's own, so that its parameters keep their names.
    model.forward = forward
    try:
        with _quiet(), model_errors(InputError, f"{type(skeleton.model).__name__} can't be traced"):
            with mode, torch.no_grad():
                program = torch.onnx.export(
                    model,
                    kwargs={"inputs": sample},
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                    opset_version=variant.opset_for(graph.sample),
                    dynamic_shapes={"inputs": axes},
                    input_names=list(sample),
                    output_names=list(graph.outputs),
                )
            # Outside of the mode, in which constants would be read as whatever lies in memory.
            traced = program.model if program is not None else ir.Model(ir.Graph((), (), nodes=()), ir_version=10)
            for value in traced.graph.initializers.values():
                if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
                    value.const_value = None
            optimized = optimize(traced, variant.optimize)
    finally:
        model.forward = bound.__get__(model)
    _name_axes(traced, graph)
    ClearMetadataAndDocStringPass()(traced)
    traced.producer_name, traced.producer_version = _PRODUCER, __version__
    return Traced(traced, optimized.weights, tuple(optimized.notices(graph.name)))


def _dynamic_axes(graph: Graph) -> dict[str, dict[int, Any]]:
    """Return the axes as the tracer takes them.

    Axes of one name are one symbol, which makes for fewer comparisons of sizes in the graph; an axis that no other
    shares may well be the sum of others, which a symbol of its own could not be.
    """
    counts = Counter(name for own in graph.axes.values() for name in own.values())
    shared = {name: torch.export.Dim(name, max=graph.most.get(name)) for name, count in counts.items() if count > 1}
    free = torch.export.Dim.DYNAMIC
    return {n: {i: shared.get(name, free) for i, name in graph.axes.get(n, {}).items()} for n in graph.sample}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in _LOUD}
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Give dynamic axes their names in place of the tracer's symbols.

    Raises:
        InputError: If one was fixed by tracing.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in graph.axes.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None else None
            if not isinstance(size, ir.SymbolicDim) or size.value is None:
                raise InputError(
                    f"tracing fixed axis {axis} ({name}) of {value.name} at {size}: the graph would take no other.",
                    hint="Name another task with --task, or another --exporter.",
                )
            names[str(size.value)] = name
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")

    def renamed(size: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(size, int) or size.value is None:
            return size
        return ir.SymbolicDim(symbol.sub(lambda m: names[m[0]], str(size.value)))

    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    for value in values if names else ():
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])
