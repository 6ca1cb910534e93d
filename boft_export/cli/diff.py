"""``boft-export diff``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported

NAME = "diff"
EPILOG = opt.examples(
    "boft-export diff ./base ./merged",
    "boft-export diff org/model@v1 org/model@v2 --top 20",
    "boft-export diff ./base ./merged --json | jq '.changed[] | select(.kind == \"replacement\") | .name'",
)
_COLUMNS = [
    ("tensor", "left"),
    ("", "right"),
    ("shape", "left"),
    ("dtype", "left"),
    ("kind", "left"),
    ("change", "right"),
    ("ulp", "right"),
    ("angle", "right"),
    ("scale", "right"),
]
_MOST_GROUPS = 40


def command(
    a: Annotated[str, typer.Argument(help="The checkpoint before: a folder, a file, a URL or a Hub id.", metavar="A")],
    b: Annotated[str, typer.Argument(help="The checkpoint after.", metavar="B")],
    *,
    top: Annotated[
        int | None, typer.Option(min=1, help="Show the N most changed tensors one by one.", metavar="N")
    ] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 where they differ, as git diff.")] = False,
    max_memory: opt.MaxMemory = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", help="Threads that compare (default: cores).", rich_help_panel="How it runs"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="A's branch, tag or commit on the Hub.", rich_help_panel="Where inputs come from"),
    ] = None,
    new_revision: Annotated[str | None, typer.Option(help="B's.", rich_help_panel="Where inputs come from")] = None,
    subfolder: Annotated[
        str | None,
        typer.Option(help="A's folder inside its repository or root.", rich_help_panel="Where inputs come from"),
    ] = None,
    new_subfolder: Annotated[str | None, typer.Option(help="B's.", rich_help_panel="Where inputs come from")] = None,
    offline: opt.Offline = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
    no_progress: opt.NoProgress = False,
) -> None:
    """Compare two checkpoints, tensor by tensor: what changed, by how much, and by what kind of change.

    The change is |B - A| / |A|; ulp the most steps of the dtype that an element is off by; the angle, the largest
    between a row of A and of B, in radians; the scale, the length of rows of B relative to A's.
    """
    out = Output(as_json, quiet, verbose, no_progress)
    with reported(out):
        from boft_export.pipeline.diff import diff
        from boft_export.planning.inputs import Sources
        from boft_export.report.diff_report import diff_document, grouped_rows, summary

        start = time.perf_counter()
        with out.progress("comparing") as progress:
            found = diff(
                a,
                b,
                sources=Sources(revision=revision, subfolder=subfolder, offline=offline),
                new_sources=Sources(revision=new_revision, subfolder=new_subfolder, offline=offline),
                max_memory=max_memory,
                jobs=jobs,
                progress=progress,
            )
        document = diff_document(found, time.perf_counter() - start)
        out.document(document)
        changed = document["changed"]
        if top is None:
            rows = grouped_rows(changed)
            _show_changed(out, rows[:_MOST_GROUPS], len(rows), "kinds of tensors")
        else:
            _show_changed(out, changed[:top], len(changed), "tensors")
        _show_others(out, document)
        out.line(summary(document), "bold green" if document["same"] else "bold")
        if exit_code and not document["same"]:
            raise typer.Exit(1)


def _show_changed(out: Output, rows: Sequence[Mapping[str, Any]], total: int, what: str) -> None:
    out.table("changed", _COLUMNS, [_cells(row) for row in rows])
    if total > len(rows):
        out.line(f"... and {total - len(rows):,} more changed {what} (--top N, --json)")
    for row in rows:
        if row["reason"] is not None and row["kind"] == "unknown":
            out.line(f"{row['name']}: the kind is not known, as {row['reason']}", "dim")


def _cells(row: Mapping[str, Any]) -> list[str]:
    dtype = row["dtype"] if row["dtype"] == row["new_dtype"] else f"{row['dtype']} to {row['new_dtype']}"
    low, high = row["smallest_scale"], row["largest_scale"]
    scale = "" if low is None or high is None else f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return [
        row["name"],
        f"x{row['count']}" if "count" in row else "",
        _shape(row["shape"]),
        dtype,
        row["kind"],
        "" if row["relative_change"] is None else f"{row['relative_change']:.2e}",
        "" if row["largest_ulp"] is None else f"{row['largest_ulp']:,}",
        "" if row["largest_angle"] is None else f"{row['largest_angle']:.2e}",
        scale,
    ]


def _show_others(out: Output, document: Mapping[str, Any]) -> None:
    columns = [("tensor", "left"), ("dtype", "left"), ("shape", "left")]
    for key, title in (("only_a", f"only in {document['a']}"), ("only_b", f"only in {document['b']}")):
        out.table(title, columns, [[t["name"], t["dtype"], _shape(t["shape"])] for t in document[key]])
    rows = [[t["name"], _shape(t["shape"]), _shape(t["new_shape"])] for t in document["reshaped"]]
    out.table("of another shape", [("tensor", "left"), ("A", "left"), ("B", "left")], rows)
    for setting in document["config"]:
        old, new = (setting[k] if setting[k] is not None else "not set" for k in ("old", "new"))
        out.line(f"config.json: {setting['key']}: {old} to {new}")


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
