"""Optimum's exporter, which needs a transformers older than 4.58."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from boft_export.onnx.exporters.foreign import ForeignExporter
from boft_export.onnx.variant import Variant

# What can be exported with a cache is, as ORTModel wants it.
_WITH_CACHE = ("text-generation", "text2text-generation")


def _arguments(checkpoint: Path, output: Path, task: str, variant: Variant) -> list[str]:
    asked = f"{task}-with-past" if task in _WITH_CACHE else task
    opset = ["--opset", str(variant.opset)] if variant.opset is not None else []
    # No decoders merged into one with branches: a graph for each step, as the other exporters have.
    fixed = ["--library-name", "transformers", "--no-post-process"]
    return ["-m", "optimum.exporters.onnx", "-m", str(checkpoint), "--task", asked, *opset, *fixed, str(output)]


def _conflict() -> str | None:
    if int(version("transformers").split(".")[0]) < 5:
        return None
    return f"optimum-onnx does not work with transformers {version('transformers')}"


OPTIMUM = ForeignExporter("optimum-onnx", "onnx-optimum", _arguments, conflict=_conflict)
