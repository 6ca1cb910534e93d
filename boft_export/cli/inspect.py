"""``boft-export inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported

NAME = "inspect"
EPILOG = opt.examples(
    "boft-export inspect ./my-adapter",
    "boft-export inspect meta-llama/Llama-3.1-8B --offline",
    "boft-export inspect ./model --json | jq .dtypes",
)


def command(
    ref: Annotated[str, typer.Argument(help="A checkpoint or an adapter: a folder, a file, a URL or a Hub id.")],
    *,
    revision: opt.Revision = None,
    subfolder: opt.Subfolder = None,
    offline: opt.Offline = False,
    conv_view: opt.ConvMeaning = opt.ConvView.AUTO,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
) -> None:
    """Tell what a checkpoint or an adapter holds, from its headers alone."""
    out = Output(as_json, quiet, verbose)
    with reported(out):
        from boft_export.planning.inspection import inspect
        from boft_export.planning.sizes import format_size

        sources = opt.sources(revision, None, subfolder, offline=offline, conv_view=conv_view)
        found = inspect(ref, sources=sources)
        out.document(found.document())
        out.notices(found.notices)
        total = sum(found.files.values())
        out.line(f"{found.kind} {found.name}" + (f"@{found.revision}" if found.revision else ""), "bold")
        for key, value in found.details.items():
            if value not in (None, {}, []):
                out.line(f"  {key}: {value}")
        out.line(f"  files: {len(found.files)}, {format_size(total)}")
        out.line("  dtypes: " + ", ".join(f"{d} {format_size(n)}" for d, n in found.dtypes.items()))
        out.table(
            "layers",
            [
                ("module", "left"),
                ("", "right"),
                ("factors", "right"),
                ("blocks", "right"),
                ("size", "right"),
                ("out", "right"),
            ],
            [
                [
                    g.pattern,
                    f"x{g.count}",
                    str(g.num_factors),
                    str(g.num_blocks),
                    str(g.block_size),
                    str(g.num_outputs or ""),
                ]
                for g in found.layers
            ],
        )
        out.table(
            "tensors" if found.kind == "checkpoint" else "whole tensors",
            [("tensor", "left"), ("", "right"), ("dtype", "left"), ("shape", "left"), ("bytes", "right")],
            [
                [g.pattern, f"x{g.count}", g.dtype, "x".join(map(str, g.shape)) or "scalar", format_size(g.nbytes)]
                for g in found.tensors
            ],
        )
