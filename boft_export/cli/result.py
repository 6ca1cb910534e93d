"""Showing what a run will do, and what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from boft_export.cli.output import Output

if TYPE_CHECKING:
    from boft_export.pipeline.options import RunOptions
    from boft_export.planning import FoldPlan
    from boft_export.planning.strength import Interpolation

_DONE = {"copy": "untouched", "convert": "converted", "fold": "rotated", "replace": "replaced", "add": "added"}
_MEASURED = {"relative_change": "change", "rounding_loss": "rounding", "orthogonality_residual": "residual"}


def write_nothing(
    out: Output,
    base: str,
    adapters: Sequence[str],
    output: str,
    interpolation: Interpolation,
    options: RunOptions,
) -> None:
    """Plan and check a run, and print what it would do."""
    from boft_export.checkpoint import free_bytes
    from boft_export.checkpoint.places import parse_path
    from boft_export.pipeline.prepare import prepare
    from boft_export.planning.inspection import group_name
    from boft_export.planning.sizes import format_size
    from boft_export.report.merge_report import plan_document

    device_type = "cuda" if options.device.startswith("cuda") else "cpu"
    ready = prepare(base, adapters, output, interpolation, options, device_type)
    check_engine(ready.plan, options)
    out.notices(ready.plan.notices)
    document = plan_document(ready.plan, ready.course, output, ready.memory.peak, free_bytes(parse_path(output)))
    out.document(document)
    _show_tensors(out, document["tensors"])
    show_changes(out, document)
    # What was decided is what a plan is read for; a decision made for every layer alike is one line.
    decided = [n for n in document["notices"] if n["level"] == "info" and n["code"] != "rename"]
    for text in dict.fromkeys(group_name(f"{n['subject']}: {n['message']}") for n in decided):
        out.line(text)
    if document["path"] is not None:
        alphas = ", ".join(o["label"] for o in document["outputs"])
        out.line(f"alpha {alphas} on the {document['path']} path")
    out.line(f"tensors: {_counts(document)} (as planned)")
    files = len(document["shards"]) * len(document["outputs"])
    out.line(
        f"would apply {_layers(document)}: read {format_size(document['bytes_to_read'])}, write "
        f"{format_size(document['bytes_to_write'])} in {files} files{free_space(document)}, memory at most "
        f"{format_size(document['memory'])}",
        "bold",
    )


def free_space(document: Mapping[str, Any]) -> str:
    """Return what to say of the free space where an output goes; of a store nothing."""
    from boft_export.planning.sizes import format_size

    return "" if document["disk_free"] is None else f" ({format_size(document['disk_free'])} free)"


def check_engine(plan: FoldPlan, options: RunOptions) -> None:
    """Check what no cluster could do, without one."""
    if options.engine == "ray":
        from boft_export.pipeline.ray_cluster import check_request
        from boft_export.pipeline.run import devices_for

        devices_for(options)
        check_request(plan, options)


def show_result(out: Output, document: Mapping[str, Any]) -> None:
    """Print a finished merge: a row for each kind of tensor, and a line that sums it up."""
    out.document(document)
    _show_tensors(out, document["tensors"])
    show_changes(out, document)
    out.line(f"tensors: {_counts(document)}")
    _show_end(out, document, f"merged {_layers(document)} into {document['output']}")


def show_interpolation(out: Output, document: Mapping[str, Any]) -> None:
    """Print a finished interpolation: as a merge, or a row for each of several alphas."""
    out.document(document)
    outputs = document["outputs"]
    figures = list(dict.fromkeys(k for o in outputs for k in o["evaluation"] or ()))
    if len(outputs) == 1:
        _show_tensors(out, outputs[0]["tensors"])
        for name in figures:
            out.line(f"{name}: {_number(outputs[0]['evaluation'][name])}")
    else:
        rows = []
        for output in outputs:
            measured = [
                max((t[key] for t in output["tensors"].values() if t.get(key) is not None), default=0.0)
                for key in _MEASURED
            ]
            judged = [_number(output["evaluation"].get(name)) for name in figures]
            rows.append([output["label"], output["folder"], *(f"{m:.1e}" for m in measured), *judged])
        heads = [*_MEASURED.values(), *figures]
        out.table("", [("alpha", "right"), ("folder", "left"), *((h, "right") for h in heads)], rows)
    show_changes(out, document)
    out.line(f"tensors: {_counts(document)}")
    alphas = ", ".join(o["label"] for o in outputs)
    end = f"applied {_layers(document)} at alpha {alphas} ({document['path']}) into {document['output']}"
    _show_end(out, document, end)


def _show_tensors(out: Output, tensors: Mapping[str, Any]) -> None:
    from boft_export.report.merge_report import folded_rows

    rows = folded_rows(tensors)
    measured = any(row[key] is not None for row in rows for key in _MEASURED)
    columns = [("tensor", "left"), ("", "right"), ("shape", "left"), ("factors -> stages", "left")]
    if measured:
        columns += [(head, "right") for head in _MEASURED.values()]
    cells = []
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        cells.append([row["name"], f"x{row['count']}", shape, row["fold"] or _DONE[row["action"]]])
        if measured:
            cells[-1] += ["" if row[key] is None else f"{row[key]:.1e}" for key in _MEASURED]
    out.table("", columns, cells)


def show_changes(out: Output, document: Mapping[str, Any]) -> None:
    """Print under which names the adapter's layers were found, and what changes in the config."""
    for renames in document["renames"]:
        for rename in renames:
            out.line(f"names: {rename}")
    for edit in document["config_edits"]:
        out.line(f"config.json: {'.'.join(edit['path'])} = {edit['value']} ({edit['reason']})")


def _show_end(out: Output, document: Mapping[str, Any], text: str) -> None:
    from boft_export.planning.sizes import format_size

    size = format_size(document["bytes_written"])
    resumed = f", {len(document['resumed_files'])} files resumed" if document["resumed_files"] else ""
    out.line(f"{text}: {size} in {document['seconds']:.1f} s{resumed}", "bold green")


def _counts(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {_DONE[action]}" for action, n in document["counts"].items())


def _layers(document: Mapping[str, Any]) -> str:
    return f"{document['layers']['applied']} of {document['layers']['expected']} adapter layers"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
