"""``boft-export interpolate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output, stdout_to_stderr
from boft_export.cli.result import show_interpolation, write_nothing
from boft_export.cli.run import reported
from boft_export.linalg.path import InterpolationPath

if TYPE_CHECKING:
    from boft_export.pipeline.evaluation import Figures
    from boft_export.pipeline.interpolate import InterpolationResult
    from boft_export.pipeline.path_report import PathReport

NAME = "interpolate"
EPILOG = opt.examples(
    "boft-export interpolate ./base ./my-adapter -o ./half --alpha 0.5",
    "boft-export interpolate ./base ./my-adapter -o ./sweep --alphas 0:1:0.25 --path-report sweep.html",
    "boft-export interpolate ./base ./style ./task -o ./mixed --alpha 0.5,0.2 --path factorwise",
)


def command(
    base: opt.Base,
    adapters: opt.Adapters,
    output: opt.Output,
    *,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            help="0 is the base, 1 the tuned model; 0.5,0.2 for two adapters. Several times: a folder each.",
            metavar="ALPHA",
            rich_help_panel=opt.PATH_PANEL,
        ),
    ] = None,
    alphas: Annotated[
        str | None,
        typer.Option(
            help="Several, both ends included: 0:1:0.25 writes OUT/alpha-0, OUT/alpha-0.25, ...",
            metavar="START:STOP:STEP",
            rich_help_panel=opt.PATH_PANEL,
        ),
    ] = None,
    path: opt.Curve = InterpolationPath.GEODESIC,
    alpha_map: opt.AlphaMapFile = None,
    path_report: Annotated[
        Path | None,
        typer.Option(
            help="Report angles, change and energy along the path: .html, .png or .json.",
            metavar="FILE",
            rich_help_panel=opt.PATH_PANEL,
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="Python file with evaluate(model_dir) -> dict of figures, run on each output.",
            metavar="SCRIPT",
            rich_help_panel=opt.PATH_PANEL,
        ),
    ] = None,
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
    """Go some of the way from base to tuned, along the rotations, and write a plain checkpoint."""
    out = Output(as_json, quiet, verbose, no_progress, resumable=not dry_run)
    with reported(out):
        from boft_export.pipeline.options import RunOptions
        from boft_export.planning.alphas import parse_alpha, parse_sweep, read_alpha_map
        from boft_export.planning.strength import interpolation

        single, several = [parse_alpha(a) for a in alpha or ()], parse_sweep(alphas) if alphas is not None else ()
        sweep = len(single) > 1 or alphas is not None
        asked: dict[str, Any] = {
            "alpha": None if sweep or not single else single[0],
            "alphas": (*single, *several) if sweep else None,
            "path": path,
            "alpha_map": read_alpha_map(alpha_map) if alpha_map is not None else None,
        }
        request = interpolation(**asked)
        if evaluation is not None:
            from boft_export.checkpoint.places import local_path, parse_path
            from boft_export.pipeline.evaluation import check_script

            check_script(evaluation)
            local_path(parse_path(output), "--eval")
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
        if path_report is not None:
            from boft_export.pipeline.prepare import check_further_file, prepare
            from boft_export.report.path_report import check_path_report

            # Before any work, what would come to light after it.
            check_path_report(path_report, overwrite=overwrite)
            ready = prepare(base, adapters, output, request, options, "cpu")
            read = [p for p in (alpha_map, evaluation) if p is not None]
            check_further_file(path_report, ready, base, adapters, read)
            path_report = path_report.absolute()
        if dry_run:
            write_nothing(out, base, adapters, output, request, options)
            return
        from boft_export.pipeline.interpolate import interpolate
        from boft_export.report.merge_report import interpolation_document

        started = time.monotonic()
        with out.progress("interpolating") as progress:
            result = interpolate(base, adapters, output, **asked, **vars(replace(options, progress=progress)))
        seconds = time.monotonic() - started
        out.published = output
        out.notices(result.plan.notices)
        # A script may do anything to this process, so it comes after what is measured here.
        report = _measure(out, result) if path_report is not None else None
        figures: Sequence[Figures | None] = [None] * len(result.outputs)
        try:
            if evaluation is not None:
                figures = _evaluate(out, evaluation, result)
        finally:
            if report is not None and path_report is not None:
                from boft_export.report.path_report import write_path_report

                write_path_report(replace(report, evaluations=tuple(figures)), path_report)
        show_interpolation(out, interpolation_document(result, figures, seconds))
        if path_report is not None:
            out.line(f"reported to {path_report}")


def _measure(out: Output, result: InterpolationResult) -> PathReport:
    from boft_export.pipeline.path_report import measure_path

    with out.progress("measuring", "layers") as progress:
        return measure_path(result, progress=progress)


def _evaluate(out: Output, script: Path, result: InterpolationResult) -> Sequence[Figures | None]:
    from boft_export.checkpoint.places import local_path
    from boft_export.pipeline.evaluation import evaluate

    with out.progress("evaluating", "outputs") as progress, stdout_to_stderr():
        return evaluate(script, [local_path(o.folder, "--eval") for o in result.outputs], progress)
