"""boft-export: fold orthogonal adapters into checkpoints.

The names below are the public interface. They are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from boft_export.version import __version__

if TYPE_CHECKING:
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
    from boft_export.pipeline.merge import plan_merge as plan
    from boft_export.planning.model import FoldPlan
    from boft_export.planning.inputs import Sources

_PUBLIC = {
    "AccessError": "errors",
    "BoftExportError": "errors",
    "CheckFailedError": "errors",
    "DamagedFileError": "errors",
    "InputError": "errors",
    "Level": "errors",
    "Notice": "errors",
    "ResourceError": "errors",
    "UsageError": "errors",
    "FoldPlan": "planning.model",
    "MergeResult": "pipeline.merge",
    "Sources": "planning.inputs",
    "merge": "pipeline.merge",
    "plan": "pipeline.merge:plan_merge",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604  # the names are those of the table


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
