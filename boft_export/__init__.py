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
    from boft_export.pipeline.interpolate import InterpolationResult, interpolate
    from boft_export.pipeline.merge import MergeResult, merge
    from boft_export.pipeline.path_report import PathReport, measure_path
    from boft_export.pipeline.prepare import plan_merge as plan
    from boft_export.pipeline.rotations import LayerRotation, read_rotations, write_rotations
    from boft_export.planning.inputs import Sources
    from boft_export.planning.inspection import Inspection, inspect
    from boft_export.planning.model import FoldPlan
    from boft_export.report.path_report import write_path_report

# Where each public name is, and what it is called there.
_PUBLIC = {
    "AccessError": "errors",
    "BoftExportError": "errors",
    "CheckFailedError": "errors",
    "DamagedFileError": "errors",
    "Factor": "linalg.rotation",
    "FoldPlan": "planning.model",
    "InputError": "errors",
    "Inspection": "planning.inspection",
    "InterpolationPath": "linalg.path",
    "InterpolationResult": "pipeline.interpolate",
    "LayerRotation": "pipeline.rotations",
    "Level": "errors",
    "MergeResult": "pipeline.merge",
    "Notice": "errors",
    "PathReport": "pipeline.path_report",
    "ReadOptions": "adapters",
    "ResourceError": "errors",
    "Rotation": "linalg.rotation",
    "Sources": "planning.inputs",
    "UsageError": "errors",
    "factorwise": "linalg.interpolation",
    "geodesic": "linalg.interpolation",
    "inspect": "planning.inspection",
    "interpolate": "pipeline.interpolate",
    "interpolate_rotation": "linalg.interpolation",
    "interpolate_scale": "linalg.interpolation",
    "measure_path": "pipeline.path_report",
    "merge": "pipeline.merge",
    "plan": "pipeline.prepare:plan_merge",
    "read_rotations": "pipeline.rotations",
    "write_path_report": "report.path_report",
    "write_rotations": "pipeline.rotations",
}

__all__ = [
    "AccessError",
    "BoftExportError",
    "CheckFailedError",
    "DamagedFileError",
    "Factor",
    "FoldPlan",
    "InputError",
    "Inspection",
    "InterpolationPath",
    "InterpolationResult",
    "LayerRotation",
    "Level",
    "MergeResult",
    "Notice",
    "PathReport",
    "ReadOptions",
    "ResourceError",
    "Rotation",
    "Sources",
    "UsageError",
    "__version__",
    "factorwise",
    "geodesic",
    "inspect",
    "interpolate",
    "interpolate_rotation",
    "interpolate_scale",
    "measure_path",
    "merge",
    "plan",
    "read_rotations",
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
