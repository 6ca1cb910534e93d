"""``boft-export rotation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported

NAME = "rotation"
EPILOG = opt.examples(
    "boft-export rotation ./my-adapter -o rotations.safetensors",
    "boft-export rotation ./my-adapter --layer '*.0.attention.*' -o first.safetensors",
)


def command(
    adapter: opt.Adapter,
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.")],
    *,
    layer: Annotated[str, typer.Option(help="Glob pattern of module names.", metavar="GLOB")] = "*",
    overwrite: opt.Overwrite = False,
    adapter_revision: opt.AdapterRevision = None,
    offline: opt.Offline = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = 0,
    no_progress: opt.NoProgress = False,
) -> None:
    """Write the dense orthogonal products of an adapter's layers, in float64."""
    out = Output(as_json, quiet, verbose, no_progress)
    with reported(out):
        from dataclasses import asdict

        from boft_export.pipeline.rotations import write_rotations
        from boft_export.planning.inputs import Sources

        sources = Sources(adapter_revision=adapter_revision, offline=offline)
        with out.progress("writing") as progress:
            written = write_rotations(
                adapter, output, layer=layer, overwrite=overwrite, sources=sources, progress=progress
            )
        out.document({"schema_version": 1, "output": str(output), "rotations": [asdict(r) for r in written]})
        out.table(
            "",
            [("module", "left"), ("size", "right"), ("coupled", "right"), ("residual", "right")],
            [[r.module, str(r.num_features), str(r.group_size), f"{r.residual:.1e}"] for r in written],
        )
        out.line(f"wrote {len(written)} rotations to {output}", "bold green")
