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
    from boft_export.pipeline.merge import MergeResult, merge
    from boft_export.pipeline.prepare import plan_merge as plan
    from boft_export.pipeline.rotations import write_rotations
    from boft_export.planning.inputs import Sources
    from boft_export.planning.inspection import Inspection, inspect
    from boft_export.planning.model import FoldPlan

# Where each public name is, and what it is called there.
_PUBLIC = {
    "AccessError": "errors",
    "BoftExportError": "errors",
    "CheckFailedError": "errors",
    "DamagedFileError": "errors",
    "FoldPlan": "planning.model",
    "InputError": "errors",
    "Inspection": "planning.inspection",
    "Level": "errors",
    "MergeResult": "pipeline.merge",
    "Notice": "errors",
    "ReadOptions": "adapters",
    "ResourceError": "errors",
    "Sources": "planning.inputs",
    "UsageError": "errors",
    "inspect": "planning.inspection",
    "merge": "pipeline.merge",
    "plan": "pipeline.prepare:plan_merge",
    "write_rotations": "pipeline.rotations",
}

__all__ = [
    "AccessError",
    "BoftExportError",
    "CheckFailedError",
    "DamagedFileError",
    "FoldPlan",
    "InputError",
    "Inspection",
    "Level",
    "MergeResult",
    "Notice",
    "ReadOptions",
    "ResourceError",
    "Sources",
    "UsageError",
    "__version__",
    "inspect",
    "merge",
    "plan",
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
