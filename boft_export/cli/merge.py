"""``boft-export merge``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from boft_export.adapters import ReadOptions, View
from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported

NAME = "merge"
EPILOG = opt.examples(
    "boft-export merge meta-llama/Llama-3.1-8B ./my-adapter -o ./merged",
    "boft-export merge - ./my-adapter -o ./merged --dry-run",
    "boft-export merge ./base ./style ./task -o ./merged --dtype bfloat16 --max-memory 700MiB",
)


def command(
    base: opt.Base,
    adapters: opt.Adapters,
    output: opt.Output,
    *,
    dtype: opt.Dtype = opt.OutputDtype.KEEP,
    max_shard_size: opt.MaxShardSize = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    device: opt.Device = "auto",
    compute_dtype: opt.Compute = opt.ComputeDtype.FLOAT64,
    max_memory: opt.MaxMemory = None,
    jobs: opt.Jobs = None,
    resume: opt.Resume = False,
    revision: opt.Revision = None,
    adapter_revision: opt.AdapterRevision = None,
    subfolder: opt.Subfolder = None,
    offline: opt.Offline = False,
    conv_view: opt.ConvMeaning = opt.ConvView.AUTO,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
    no_progress: opt.NoProgress = False,
) -> None:
    """Fold adapters into a base checkpoint and write a plain one."""
    out = Output(as_json, quiet, verbose, no_progress, resumable=not dry_run)
    with reported(out):
        from boft_export.planning.inputs import Sources

        view = None if conv_view is opt.ConvView.AUTO else View(conv_view.value)
        sources = Sources(revision, adapter_revision, subfolder, offline, ReadOptions(conv_view=view))
        kept = None if dtype is opt.OutputDtype.KEEP else dtype.value
        if dry_run:
            from boft_export.checkpoint import free_bytes
            from boft_export.pipeline.prepare import prepare
            from boft_export.report.merge_report import plan_document

            ready = prepare(
                base,
                adapters,
                output,
                dtype=kept,
                max_shard_size=max_shard_size,
                max_memory=max_memory,
                jobs=jobs,
                overwrite=overwrite,
                device_type="cuda" if device.startswith("cuda") else "cpu",
                sources=sources,
            )
            out.notices(ready.plan.notices)
            _show(out, plan_document(ready.plan, ready.memory.peak, free_bytes(output)))
            return
        from boft_export.pipeline.merge import merge
        from boft_export.report.merge_report import result_document

        started = time.monotonic()
        with out.progress("merging") as progress:
            result = merge(
                base,
                adapters,
                output,
                dtype=kept,
                compute_dtype=compute_dtype.value,
                device=device,
                max_shard_size=max_shard_size,
                max_memory=max_memory,
                jobs=jobs,
                resume=resume,
                overwrite=overwrite,
                sources=sources,
                progress=progress,
            )
        out.notices(result.plan.notices)
        seconds = time.monotonic() - started
        _show(out, result_document(result.plan, str(output), result.manifest, result.resumed, seconds))


def _show(out: Output, document: Mapping[str, Any]) -> None:
    """Print a plan or a result: a row for each kind of tensor, and a line that sums it up."""
    from boft_export.planning.inspection import group_name
    from boft_export.planning.sizes import format_size
    from boft_export.report.merge_report import folded_rows

    out.document(document)
    done = not document["dry_run"]
    columns = [("tensor", "left"), ("", "right"), ("shape", "left"), ("factors -> stages", "left")]
    if done:
        columns += [("change", "right"), ("rounding", "right"), ("residual", "right")]
    rows = []
    for row in folded_rows(document):
        cells = [row["name"], f"x{row['count']}", "x".join(map(str, row["shape"])), row["fold"] or _PAST[row["action"]]]
        if done:
            measured = (row[k] for k in ("relative_change", "rounding_loss", "orthogonality_residual"))
            cells += ["" if value is None else f"{value:.1e}" for value in measured]
        rows.append(cells)
    out.table("", columns, rows)
    for renames in document["renames"]:
        for rename in renames:
            out.line(f"names: {rename}")
    for edit in document["config_edits"]:
        out.line(f"config.json: {'.'.join(edit['path'])} = {edit['value']} ({edit['reason']})")
    counts = ", ".join(f"{n} {_PAST[action]}" for action, n in document["counts"].items())
    layers = f"{document['layers']['applied']} of {document['layers']['expected']} adapter layers"
    if done:
        size = format_size(document["bytes_written"])
        resumed = f", {len(document['resumed_files'])} files resumed" if document["resumed_files"] else ""
        out.line(f"tensors: {counts}")
        out.line(
            f"merged {layers} into {document['output']}: {size} in {document['seconds']:.1f} s{resumed}", "bold green"
        )
    else:
        # What was decided is what a plan is read for; a decision made for every layer alike is one line.
        decided = [n for n in document["notices"] if n["level"] == "info" and n["code"] != "rename"]
        for text in dict.fromkeys(group_name(f"{n['subject']}: {n['message']}") for n in decided):
            out.line(text)
        out.line(f"tensors: {counts} (as planned)")
        out.line(
            f"would apply {layers}: read {format_size(document['bytes_to_read'])}, write "
            f"{format_size(document['bytes_to_write'])} in {len(document['shards'])} files "
            f"({format_size(document['disk_free'])} free), memory at most {format_size(document['memory'])}",
            "bold",
        )


_PAST = {"copy": "untouched", "convert": "converted", "fold": "rotated", "replace": "replaced", "add": "added"}
