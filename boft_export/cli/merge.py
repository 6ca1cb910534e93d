"""``boft-export merge``."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.result import show_result, write_nothing
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
    reversible: Annotated[
        bool, typer.Option("--reversible", help="Write what unmerge needs to give the base's bytes again.")
    ] = False,
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
    """Fold adapters into a base checkpoint and write a plain one."""
    out = Output(as_json, quiet, verbose, no_progress, resumable=not dry_run)
    with reported(out):
        from boft_export.pipeline.options import MergeOptions
        from boft_export.planning.strength import Interpolation

        options = MergeOptions(
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
            reversible=reversible,
        )
        if dry_run:
            write_nothing(out, base, adapters, output, Interpolation(), options)
            return
        from boft_export.pipeline.merge import merge
        from boft_export.planning.output import UNDO_FOLDER
        from boft_export.planning.sizes import format_size
        from boft_export.report.merge_report import result_document

        started = time.monotonic()
        with out.progress("merging") as progress:
            result = merge(base, adapters, output, **vars(replace(options, progress=progress)))
        out.notices(result.plan.notices)
        seconds = time.monotonic() - started
        document = result_document(result.plan, output, result.manifest, result.resumed, seconds)
        show_result(out, document)
        if reversible:
            size = format_size(sum(f["bytes"] for f in document["undo"].values()))
            out.line(f"{size} in {UNDO_FOLDER}, from which unmerge gives the base's bytes")
