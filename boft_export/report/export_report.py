"""An export as one document: what ``--json`` prints, and what the table is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from boft_export.planning import FoldPlan
from boft_export.report.merge_report import SCHEMA_VERSION, notice_list, plan_head

if TYPE_CHECKING:
    # At run time this would load torch, which --help does without.
    from boft_export.onnx.export import ExportResult

# What is shown of an output: the head, the key in its document, and the format.
AGREEMENT_COLUMNS = (
    ("largest", "largest_difference", ".1e"),
    ("relative", "relative_difference", ".1e"),
    ("mean", "mean_difference", ".1e"),
    ("cosine", "smallest_cosine", ".6f"),
    ("top-1", "top1_agreement", ".1%"),
)


def export_plan_document(plan: FoldPlan, task: str, output: str, memory: int, free_disk: int | None) -> dict[str, Any]:
    """Return what ``--dry-run`` tells."""
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": True,
        "output": output,
        "task": task,
        **plan_head(plan),
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "disk_free": free_disk,
        "memory": memory,
        "notices": notice_list(plan.notices),
    }


def export_document(result: ExportResult, seconds: float) -> dict[str, Any]:
    """Return what a finished export tells."""
    files = result.manifest["files"]
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": False,
        "output": str(result.output),
        "task": result.task,
        **plan_head(result.plan),
        "bytes_written": sum(f["bytes"] for f in files.values()),
        "seconds": seconds,
        "files": files,
        "graphs": {name: {"nodes": nodes} for name, nodes in result.graphs.items()},
        "verified": [a.document() for a in result.agreements],
        "notices": notice_list(result.plan.notices),
    }
