"""boft-export: fold orthogonal adapters into checkpoints.

The names below are the public interface. They are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from boft_export.version import __version__

if TYPE_CHECKING:
    from boft_export.adapters import ReadOptions
    from boft_export.errors import (
        AccessError,
        BoftExportError,
        CheckFailedError,
        DamagedFileError,
        InputError,
        Level,
        Notice,
        ResourceError,
        UsageError,
    )
    from boft_export.linalg.interpolation import factorwise, geodesic, interpolate_rotation, interpolate_scale
    from boft_export.linalg.path import InterpolationPath
    from boft_export.linalg.rotation import Factor, Rotation
    from boft_export.models.inputs import FunctionalInputs
    from boft_export.onnx.export import ExportResult, export_onnx
    from boft_export.onnx.verify import Agreement
    from boft_export.pipeline.diff import Diff, diff
    from boft_export.pipeline.interpolate import InterpolationResult, interpolate
    from boft_export.pipeline.merge import MergeResult, merge
    from boft_export.pipeline.path_report import PathReport, measure_path
    from boft_export.pipeline.prepare import plan_merge as plan
    from boft_export.pipeline.rotations import LayerRotation, read_rotations, write_rotations
    from boft_export.pipeline.tensor_change import TensorChange
    from boft_export.pipeline.unmerge import UnmergeResult, unmerge
    from boft_export.planning.inputs import Sources
    from boft_export.planning.inspection import Inspection, inspect
    from boft_export.planning.model import FoldPlan
    from boft_export.report.path_report import write_path_report
    from boft_export.validation.model import Check, FunctionalFacts, LayerFacts, Outcome, TensorFacts, Validation
    from boft_export.validation.policy import Policy, Thresholds, read_policy
    from boft_export.validation.validate import validate

# Where each public name is, and what it is called there.
_PUBLIC = {
    "AccessError": "errors",
    "Agreement": "onnx.verify",
    "BoftExportError": "errors",
    "Check": "validation.model",
    "CheckFailedError": "errors",
    "DamagedFileError": "errors",
    "Diff": "pipeline.diff",
    "ExportResult": "onnx.export",
    "Factor": "linalg.rotation",
    "FoldPlan": "planning.model",
    "FunctionalFacts": "validation.model",
    "FunctionalInputs": "models.inputs",
    "InputError": "errors",
    "Inspection": "planning.inspection",
    "InterpolationPath": "linalg.path",
    "InterpolationResult": "pipeline.interpolate",
    "LayerFacts": "validation.model",
    "LayerRotation": "pipeline.rotations",
    "Level": "errors",
    "MergeResult": "pipeline.merge",
    "Notice": "errors",
    "Outcome": "validation.model",
    "PathReport": "pipeline.path_report",
    "Policy": "validation.policy",
    "ReadOptions": "adapters",
    "ResourceError": "errors",
    "Rotation": "linalg.rotation",
    "Sources": "planning.inputs",
    "TensorChange": "pipeline.tensor_change",
    "TensorFacts": "validation.model",
    "Thresholds": "validation.policy",
    "UnmergeResult": "pipeline.unmerge",
    "UsageError": "errors",
    "Validation": "validation.model",
    "diff": "pipeline.diff",
    "export_onnx": "onnx.export",
    "factorwise": "linalg.interpolation",
    "geodesic": "linalg.interpolation",
    "inspect": "planning.inspection",
    "interpolate": "pipeline.interpolate",
    "interpolate_rotation": "linalg.interpolation",
    "interpolate_scale": "linalg.interpolation",
    "measure_path": "pipeline.path_report",
    "merge": "pipeline.merge",
    "plan": "pipeline.prepare:plan_merge",
    "read_policy": "validation.policy",
    "read_rotations": "pipeline.rotations",
    "unmerge": "pipeline.unmerge",
    "validate": "validation.validate",
    "write_path_report": "report.path_report",
    "write_rotations": "pipeline.rotations",
}

__all__ = [
    "AccessError",
    "Agreement",
    "BoftExportError",
    "Check",
    "CheckFailedError",
    "DamagedFileError",
    "Diff",
    "ExportResult",
    "Factor",
    "FoldPlan",
    "FunctionalFacts",
    "FunctionalInputs",
    "InputError",
    "Inspection",
    "InterpolationPath",
    "InterpolationResult",
    "LayerFacts",
    "LayerRotation",
    "Level",
    "MergeResult",
    "Notice",
    "Outcome",
    "PathReport",
    "Policy",
    "ReadOptions",
    "ResourceError",
    "Rotation",
    "Sources",
    "TensorChange",
    "TensorFacts",
    "Thresholds",
    "UnmergeResult",
    "UsageError",
    "Validation",
    "__version__",
    "diff",
    "export_onnx",
    "factorwise",
    "geodesic",
    "inspect",
    "interpolate",
    "interpolate_rotation",
    "interpolate_scale",
    "measure_path",
    "merge",
    "plan",
    "read_policy",
    "read_rotations",
    "unmerge",
    "validate",
    "write_path_report",
    "write_rotations",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
