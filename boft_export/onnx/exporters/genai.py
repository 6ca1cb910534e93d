"""The builder of onnxruntime-genai, which writes the operators of ONNX Runtime by hand for each kind of decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from boft_export.errors import Level, Notice
from boft_export.onnx.exporters.foreign import ForeignExporter
from boft_export.onnx.tasks import Task
from boft_export.onnx.tasks.causal import TEXT_GENERATION, compare_steps
from boft_export.onnx.variant import Quantize, Variant


def _arguments(checkpoint: Path, output: Path, _: str, variant: Variant) -> list[str]:
    precision = "int4" if variant.quantize is Quantize.INT4 else "fp32"
    places = ["-i", str(checkpoint), "-o", str(output), "-c", str(checkpoint / "cache")]
    return [
        *("-m", "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", "cpu"),
        *("--extra_options", "hf_remote=false", "hf_token=false"),
    ]


def _unpadded(task: Task) -> Task:
    """Return a task without rows that are padded, and with several tokens after others in single rows only."""
    cases = (1, (5, 2, 1, 1), None), (3, (7, 1, 1), None)
    return replace(task, compare=partial(compare_steps, cases=cases)) if task is TEXT_GENERATION else task


_PADDING = Notice(
    Level.WARNING,
    "no-padding",
    "model.onnx",
    "its attention counts tokens from the left: rows of a batch that are padded there come out wrong",
    "Run texts of one length together, or one at a time.",
)
GENAI = ForeignExporter(
    "onnxruntime-genai",
    "onnx-genai",
    _arguments,
    keeps=("genai_config.json",),
    served=_unpadded,
    notices=(_PADDING,),
)
