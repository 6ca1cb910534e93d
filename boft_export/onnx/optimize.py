"""Optimising a traced graph, by the passes of onnxscript: none of them needs the weights' values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from boft_export.errors import Level, Notice
from boft_export.onnx.variant import Optimize

# What onnxscript counts where it finds an attention for ONNX Runtime's own operators.
_ATTENTION = ("gqa", "mha1", "mha2", "sdpa_via_mha")


@dataclass(frozen=True)
class Weight:
    """A weight of a graph.

    Attributes:
        name: Its name in the model.
        transposed: Stored as (columns, rows).
    """

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Optimized:
    """What became of a graph.

    Attributes:
        weights: The initializers without a value, and which weight each one is.
        fused: How often ONNX Runtime's operators took the place of others, by the fusion's name; None if that was not
            asked for.
    """

    weights: Mapping[str, Weight]
    fused: Mapping[str, int] | None = None

    def notices(self, graph: str) -> list[Notice]:
        """Tell where the fusion that matters most, that of attention, did not apply."""
        if self.fused is None or any(self.fused.get(name) for name in _ATTENTION):
            return []
        done = ", ".join(f"{name} {n} times" for name, n in self.fused.items() if n) or "nothing"
        message = f"ONNX Runtime's fused attention fits nowhere in this graph; what was fused: {done}"
        return [Notice(Level.INFO, "not-fused", f"{graph}.onnx", message)]


def optimize(model: ir.Model, level: Optimize) -> Optimized:
    """Optimise a graph in place."""
    if level is Optimize.NONE:
        return Optimized({name: Weight(name) for name in _without_value(model)})
    optimize_ir(model)
    if any(onnx_fusions.fuse(model).values()):
        optimize_ir(model, num_iterations=1)
        _rotate_each_row(model)
    weights = _store_transposed(model)
    if level is Optimize.STANDARD:
        return Optimized(weights)
    # After the weights were turned, as it would make an operator of its own of each product with a transposed one.
    _, fused = optimize_for_ort(model)
    return Optimized({name: weights[name] for name in _without_value(model)}, fused)


def _rotate_each_row(model: ir.Model) -> None:
    """Repeat a rotation that is one for the whole batch, as a fusion leaves it: the operator wants one for each row."""
    made: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain != "":
            continue
        rows, *rotations = node.inputs
        if len(rotations) != 2:
            # They are told by positions, which are there for each row.
            continue
        for i, value in enumerate(rotations, start=1):
            if value is None or (value.shape is not None and value.shape[0] != 1):
                continue
            if value not in made:
                tape = ir.tape.Tape()
                batch = tape.op("Shape", [rows], attributes={"start": 0, "end": 1})
                ones = tape.op("Constant", [], attributes={"value_ints": [1, 1]})
                made[value] = tape.op("Expand", [value, tape.op("Concat", [batch, ones], attributes={"axis": 0})])
                model.graph.insert_before(node, tape.nodes)
            node.replace_input_with(i, made[value])


def _without_value(model: ir.Model) -> list[str]:
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def _store_transposed(model: ir.Model) -> dict[str, Weight]:
    """Let weights that are only used transposed be stored so; return all weights."""
    weights = {}
    for name in _without_value(model):
        value = model.graph.initializers[name]
        uses = [use.node for use in value.uses()]
        transposed = bool(uses) and value.shape is not None and all(map(_swaps_two_axes, uses))
        weights[name] = Weight(name, transposed=transposed)
        if not transposed or value.shape is None:
            continue
        value.shape = ir.Shape(list(value.shape)[::-1])
        for node in uses:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
    return weights


def _swaps_two_axes(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and list(node.attributes["perm"].as_ints()) == [1, 0]
