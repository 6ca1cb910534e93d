"""A measured interpolation as a document, and the files that can be made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boft_export.checkpoint.staging import file_system_errors, write_whole
from boft_export.errors import UsageError
from boft_export.version import __version__

if TYPE_CHECKING:
    # At run time this would load torch, which checking a file's name does without.
    from boft_export.pipeline.path_report import PathReport

SCHEMA_VERSION = 1


def path_document(report: PathReport) -> dict[str, Any]:
    """Return a report as a document: angles in radians, one point of each layer for each output."""
    result = report.result
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "boft-export", "version": __version__},
        "path": result.course.path.value,
        "base": result.plan.base.name,
        "adapters": [a.name for a in result.plan.adapters],
        "outputs": [
            {
                "alpha": list(o.strength.alphas),
                "label": o.strength.label,
                "folder": o.folder.name,
                "evaluation": dict(figures) if figures is not None else None,
            }
            for o, figures in zip(result.outputs, report.evaluations, strict=True)
        ],
        "layers": [asdict(layer) for layer in report.layers],
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _html(document: Mapping[str, Any]) -> bytes:
    from boft_export.plots.path_page import page

    return page(document).encode()


def _png(document: Mapping[str, Any]) -> bytes:
    from boft_export.plots.path_figure import png_bytes

    return png_bytes(document)


_WRITERS: dict[str, Callable[[Mapping[str, Any]], bytes]] = {".html": _html, ".png": _png, ".json": _json}


def check_path_report(file: Path, *, overwrite: bool) -> None:
    """Refuse a report that could not be written in the end.

    Raises:
        UsageError: If its kind is unknown, what draws it is missing, or it exists.
    """
    if file.suffix not in _WRITERS:
        raise UsageError(f"{file} is no kind of report: expected {', '.join(_WRITERS)}.")
    if file.suffix != ".json" and find_spec("matplotlib") is None:
        raise UsageError(
            f"{file} takes matplotlib, which is not installed.",
            hint="pip install 'boft-export[plots]', or write a .json report.",
        )
    if file.is_dir() or (file.exists() and not overwrite):
        raise UsageError(f"{file} exists.", hint="Choose another --path-report, or replace it with --overwrite.")


def write_path_report(report: PathReport, file: Path | str) -> None:
    """Write a report as an HTML page, a PNG image or a JSON document, by the file's suffix.

    Raises:
        UsageError: If the suffix is none of these, or matplotlib is missing.
        AccessError: If it can't be written.
    """
    file = Path(file)
    check_path_report(file, overwrite=True)
    content = _WRITERS[file.suffix](path_document(report))
    with file_system_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(file) as opened:
        opened.write(content)
