"""Graphs on disk: the ``.onnx`` file, which refers to the data file for its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from boft_export.checkpoint.staging import file_system_errors
from boft_export.onnx.external_data import Placed
from boft_export.planning import FoldPlan
from boft_export.version import __version__

DATA_NAME = "model.onnx_data"


def graph_metadata(plan: FoldPlan, inputs: Mapping[str, str], task: str) -> dict[str, str]:
    """Return what a graph says of its origin; no paths, and nothing of the machine.

    Args:
        plan: What was folded.
        inputs: SHA-256 of the input files, by the manifest's names.
        task: What it was exported for.
    """
    base = {"name": plan.base.name, "revision": plan.base.revision}
    adapters = [{"name": a.name, "revision": a.revision, "format": a.adapter.format} for a in plan.adapters]
    return {
        "boft_export.version": __version__,
        "boft_export.task": task,
        "boft_export.base": json.dumps(base),
        "boft_export.adapters": json.dumps(adapters),
        "boft_export.sha256": json.dumps(dict(inputs)),
    }


def save_graph(model: ir.Model, weights: Mapping[str, Placed], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph whose weights lie in the data file beside it.

    Args:
        model: The graph.
        weights: The place of each initializer that has no value.
        path: The file to write.
        metadata: What it says of its origin.

    Raises:
        ResourceError: If the disk is full.
        AccessError: If it can't be written.
    """
    for name, place in weights.items():
        value = model.graph.initializers[name]
        if value.dtype is None or value.shape is None:
            raise TypeError(f"{name} has no type")
        value.const_value = ir.ExternalTensor(
            DATA_NAME, place.offset, place.nbytes, value.dtype, shape=value.shape, name=name, base_dir=path.parent
        )
    model.metadata_props.update(metadata)
    with file_system_errors(path):
        ir.save(model, path)


def save_whole(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> int:
    """Write a graph that has its weights, with a data file of its own beside it; return the number of its nodes.

    Raises:
        ResourceError: If the disk is full.
        AccessError: If it can't be written.
    """
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    with file_system_errors(path):
        ir.save(model, path, external_data=f"{path.name}_data")
    return model.graph.num_nodes()
