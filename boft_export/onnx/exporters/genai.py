"""The builder of onnxruntime-genai, which writes the operators of ONNX Runtime by hand for each kind of decoder."""

from __future__ import annotations

from pathlib import Path

from boft_export.onnx.exporters.foreign import ForeignExporter
from boft_export.onnx.variant import Quantize, Variant


def _arguments(checkpoint: Path, output: Path, _: str, variant: Variant) -> list[str]:
    precision = "int4" if variant.quantize is Quantize.INT4 else "fp32"
    places = ["-i", str(checkpoint), "-o", str(output), "-c", str(checkpoint / "cache")]
    return [
        *("-m", "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", "cpu"),
        *("--extra_options", "hf_remote=false", "hf_token=false"),
    ]


GENAI = ForeignExporter("onnxruntime-genai", "onnx-genai", _arguments, keeps=("genai_config.json",))
