"""A merge as one document: what ``--json`` prints, and what the table is made from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from boft_export.errors import BoftExportError, Notice
from boft_export.linalg.planner import plan_stages
from boft_export.planning import Action, FoldPlan, TensorPlan
from boft_export.planning.inspection import group_name
from boft_export.planning.strength import Course

if TYPE_CHECKING:
    # At run time this would load torch, which a dry run does without.
    from boft_export.pipeline.interpolate import InterpolationResult
    from boft_export.pipeline.unmerge import UnmergeResult

SCHEMA_VERSION = 1


def plan_document(plan: FoldPlan, course: Course, output: str, memory: int, free_disk: int | None) -> dict[str, Any]:
    """Return what ``--dry-run`` tells: bytes, disk and memory needed, and how each layer will be folded."""
    outputs = [
        {"alpha": list(v.strength.alphas), "label": v.strength.label, "folder": v.path_below(output)}
        for v in course.variants
    ]
    merged = len(outputs) == 1 and course.variants[0].strength.is_full
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": True,
        **plan_head(plan),
        "path": None if merged else course.path.value,
        "outputs": outputs,
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write * len(outputs),
        "disk_free": free_disk,
        "memory": memory,
        "tensors": {t.name: _tensor(t) for t in plan.tensors if t.action is not Action.COPY},
        "notices": notice_list(plan.notices),
    }


def result_document(
    plan: FoldPlan, output: str, manifest: Mapping[str, Any], resumed: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Return what a finished merge tells."""
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": False,
        "output": output,
        **plan_head(plan),
        "bytes_written": plan.bytes_to_write,
        "seconds": seconds,
        "resumed_files": list(resumed),
        "files": manifest["files"],
        **({"undo": manifest["undo"]} if "undo" in manifest else {}),
        "tensors": _measured(plan, manifest),
        "notices": notice_list(plan.notices),
    }


def interpolation_document(
    result: InterpolationResult, evaluations: Sequence[Mapping[str, float | None] | None], seconds: float
) -> dict[str, Any]:
    """Return what a finished interpolation tells; ``evaluations`` has the figures of each output, where there are."""
    plan = result.plan
    return {
        "schema_version": SCHEMA_VERSION,
        "dry_run": False,
        "output": str(result.output),
        **plan_head(plan),
        "path": result.course.path.value,
        "bytes_written": plan.bytes_to_write * len(result.outputs),
        "seconds": seconds,
        "resumed_files": list(result.resumed),
        "outputs": [
            {
                "alpha": list(o.strength.alphas),
                "label": o.strength.label,
                "folder": str(o.folder),
                "files": o.manifest["files"],
                "tensors": _measured(plan, o.manifest),
                "evaluation": dict(figures) if figures is not None else None,
            }
            for o, figures in zip(result.outputs, evaluations, strict=True)
        ],
        "notices": notice_list(plan.notices),
    }


def unmerge_document(result: UnmergeResult, seconds: float) -> dict[str, Any]:
    """Return what a finished unmerge tells."""
    document = result_document(result.plan, str(result.output), result.manifest, result.resumed, seconds)
    document["merged"] = document.pop("base")
    keys = ("expected", "exact", "returned", "identical")
    return {**document, **{key: getattr(result, key) for key in keys}}


def _measured(plan: FoldPlan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {t.name: {**_tensor(t), **manifest["tensors"][t.name]} for t in plan.tensors if t.action is not Action.COPY}


def error_document(error: BoftExportError) -> dict[str, Any]:
    """Return a failure as a document, with all problems that were found."""
    return {
        "schema_version": SCHEMA_VERSION,
        "error": {
            "type": type(error).__name__,
            "exit_code": error.exit_code,
            "message": error.message,
            "hint": error.hint,
        },
        "notices": notice_list(error.notices),
    }


def notice_list(notices: Iterable[Notice]) -> list[dict[str, Any]]:
    """Return notices as JSON objects."""
    return [
        {"level": n.level.value, "code": n.code, "subject": n.subject, "message": n.message, "hint": n.hint}
        for n in notices
    ]


def folded_rows(tensors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each kind of tensor that is not copied, with the worst of what was measured.

    Layers that differ only in number are one kind.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for name, tensor in tensors.items():
        key = (group_name(name), tensor["action"], tuple(tensor["shape"]), tuple(tensor.get("fold", ())))
        groups[key].append(tensor)
    return [
        {
            "name": name,
            "count": len(members),
            "action": action,
            "shape": list(shape),
            "fold": ", then ".join(fold),
            **{
                key: max((m[key] for m in members if m.get(key) is not None), default=None)
                for key in ("relative_change", "rounding_loss", "orthogonality_residual")
            },
            **{
                key: min((m[key] for m in members if m.get(key) is not None), default=None)
                for key in ("returned", "expected")
            },
        }
        for (name, action, shape, fold), members in groups.items()
    ]


def plan_head(plan: FoldPlan) -> dict[str, Any]:
    """Return what every document says of a plan."""
    expected = sum(len(a.adapter.layers) for a in plan.adapters)
    return {
        "base": plan.base.name,
        "adapters": [a.name for a in plan.adapters],
        "layers": {"applied": sum(len(t.steps) for t in plan.tensors), "expected": expected},
        "counts": {action.value: plan.count(action) for action in Action if plan.count(action)},
        "renames": [list(r) for r in plan.renames],
        "config_edits": [{"path": list(e.path), "value": e.value, "reason": e.reason} for e in plan.edits],
        "shards": [s.name for s in plan.shards],
    }


def _tensor(tensor: TensorPlan) -> dict[str, Any]:
    record: dict[str, Any] = {"action": tensor.action.value, "dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.steps:
        record["fold"] = [_fold(s.layer.num_factors, s.layer.block_size, s.layer.run_size) for s in tensor.steps]
        record["rows"] = [[g.start, g.stop] for g in tensor.segments] if len(tensor.segments) > 1 else None
    return record


def _fold(num_factors: int, block_size: int, run_size: Callable[[int, int], int]) -> str:
    stages = " + ".join(str(run_size(i, j)) for i, j in plan_stages(num_factors, run_size))
    return f"m={num_factors} b={block_size} -> {stages}"
