"""``boft-export unmerge``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.result import check_engine, free_space
from boft_export.cli.run import reported

if TYPE_CHECKING:
    from boft_export.pipeline.options import RunOptions

NAME = "unmerge"
EPILOG = opt.examples(
    "boft-export unmerge ./merged ./my-adapter -o ./base-again",
    "boft-export unmerge ./merged ./my-adapter -o ./base-again --dry-run",
    "boft-export unmerge ./merged ./style ./task -o ./base-again --base ./base",
)
_REPLACED = "What an adapter replaced"


def command(
    merged: Annotated[
        str, typer.Argument(help="Merged checkpoint: a folder, a file, a URL or a Hub id.", metavar="MERGED")
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(help="The adapters it holds, in the order in which they were applied.", metavar="ADAPTER"),
    ],
    output: opt.Output,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to take these tensors and the config from, and nothing else.",
            metavar="BASE",
            rich_help_panel=_REPLACED,
        ),
    ] = None,
    keep_replaced: Annotated[
        bool, typer.Option("--keep-replaced", help="Leave these tensors as they are.", rich_help_panel=_REPLACED)
    ] = False,
    dtype: opt.Dtype = opt.OutputDtype.KEEP,
    max_shard_size: opt.MaxShardSize = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    device: opt.Device = "auto",
    compute_dtype: opt.Compute = opt.ComputeDtype.FLOAT64,
    max_memory: opt.MaxMemory = None,
    jobs: opt.Jobs = None,
    resume: opt.Resume = False,
    engine: opt.EngineKind = opt.EngineName.LOCAL,
    ray_address: opt.RayAddress = None,
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
    """Take adapters out of a merged checkpoint again: the inverse rotation, rounded once."""
    out = Output(as_json, quiet, verbose, no_progress, resumable=not dry_run)
    with reported(out):
        from boft_export.pipeline.options import RunOptions

        options = RunOptions(
            dtype=dtype.kept,
            compute_dtype=compute_dtype.value,
            device=device,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            jobs=jobs,
            resume=resume,
            overwrite=overwrite,
            sources=opt.sources(revision, adapter_revision, subfolder, offline=offline, conv_view=conv_view),
            engine=engine.value,
            ray_address=ray_address,
        )
        replaced: dict[str, Any] = {"base": base, "keep_replaced": keep_replaced}
        if dry_run:
            _write_nothing(out, merged, adapters, output, options, replaced)
            return
        from boft_export.pipeline.unmerge import unmerge
        from boft_export.report.merge_report import unmerge_document

        started = time.monotonic()
        with out.progress("unmerging") as progress:
            result = unmerge(merged, adapters, output, **replaced, **vars(replace(options, progress=progress)))
        out.notices(result.plan.notices)
        _show(out, unmerge_document(result, time.monotonic() - started))


def _write_nothing(
    out: Output, merged: str, adapters: Sequence[str], output: str, options: RunOptions, replaced: Mapping[str, Any]
) -> None:
    """Plan and check, and print what would be done."""
    from boft_export.checkpoint import free_bytes
    from boft_export.checkpoint.places import parse_path
    from boft_export.pipeline.unmerge_plan import prepare_unmerge
    from boft_export.planning.sizes import format_size
    from boft_export.report.merge_report import plan_document

    device_type = "cuda" if options.device.startswith("cuda") else "cpu"
    undo, ready = prepare_unmerge(merged, adapters, output, options, device_type, **replaced)
    check_engine(undo.plan, options)
    out.notices(undo.plan.notices)
    document = plan_document(undo.plan, undo.course, output, ready.memory.peak, free_bytes(parse_path(output)))
    document["merged"] = document.pop("base")
    out.document(document)
    _table(out, document["tensors"])
    out.line(
        f"would undo {_layers(document)}: read {format_size(document['bytes_to_read'])}, write "
        f"{format_size(document['bytes_to_write'])} in {len(document['shards'])} files{free_space(document)}, "
        f"memory at most {format_size(document['memory'])}",
        "bold",
    )


def _show(out: Output, document: Mapping[str, Any]) -> None:
    """Print what was undone, and how exactly."""
    from boft_export.planning.sizes import format_size

    out.document(document)
    _table(out, document["tensors"])
    for edit in document["config_edits"]:
        out.line(f"config.json: {'.'.join(edit['path'])} = {edit['value']} ({edit['reason']})")
    if document["returned"] is not None:
        share = _share(document["returned"])
        out.line(f"merging again gives {share} of the rotated elements as they were merged, bit for bit")
    size = format_size(document["bytes_written"])
    exact = "identical to the base (SHA-256)" if document["identical"] else _about(document)
    out.line(
        f"undid {_layers(document)} into {document['output']}, {exact}: {size} in {document['seconds']:.1f} s",
        "bold green",
    )


def _about(document: Mapping[str, Any]) -> str:
    if document["exact"]:
        return "every element as the merge's record has it, in other files than the base's, so not compared by SHA-256"
    if document["expected"] is None:
        return "nothing was rotated"
    return f"about {_share(document['expected'])} of the rotated elements the base's, the others off by rounding"


def _share(value: float) -> str:
    """Return a share as people read it; only what is whole is 100 %."""
    text = f"{100 * value:.2f}"
    return f"{'>99.99' if text == '100.00' and value < 1 else text} %"


def _table(out: Output, tensors: Mapping[str, Any]) -> None:
    from boft_export.report.merge_report import folded_rows

    rows = folded_rows(tensors)
    columns = [("tensor", "left"), ("", "right"), ("shape", "left"), ("factors -> stages", "left")]
    shares = [key for key in ("expected", "returned") if any(row[key] is not None for row in rows)]
    if shares:
        columns += [("change", "right"), *((key, "right") for key in shares)]
    cells = []
    for row in rows:
        cells.append([row["name"], f"x{row['count']}", "x".join(map(str, row["shape"])), row["fold"] or row["action"]])
        if shares:
            cells[-1].append("" if row["relative_change"] is None else f"{row['relative_change']:.1e}")
            cells[-1] += ["" if row[key] is None else _share(row[key]) for key in shares]
    out.table("", columns, cells)


def _layers(document: Mapping[str, Any]) -> str:
    count = document["layers"]["applied"]
    return f"{count} adapter layer{'s' if count != 1 else ''}"
