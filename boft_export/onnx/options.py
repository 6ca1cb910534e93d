"""How an export is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from boft_export.onnx.variant import Variant
from boft_export.pipeline.options import RunOptions
from boft_export.planning.inputs import Ref


@dataclass(frozen=True)
class ExportOptions(RunOptions):
    """How an export is done.

    Attributes:
        task: What the model is exported for; None for what its config says.
        variant: How graphs are made.
        base_onnx: A graph of the base, or a folder of them, to fold into; None to trace one.
    """

    task: str | None = None
    variant: Variant = field(default_factory=Variant)
    base_onnx: Ref | None = None
