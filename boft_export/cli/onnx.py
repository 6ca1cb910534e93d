"""``boft-export onnx``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.run import reported
from boft_export.linalg.path import InterpolationPath

NAME = "onnx"
EPILOG = opt.examples(
    "boft-export onnx ./base ./my-adapter -o ./onnx",
    "boft-export onnx ./merged -o ./onnx --task text-generation",
)
_PATH = "How far to go"
_GRAPH = "The graph"


def command(
    model: opt.Base,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters to fold in: folders, files or Hub ids; in the order given.",
            metavar="ADAPTER",
            show_default=False,
        ),
    ] = None,
    *,
    output: opt.Output,
    task: Annotated[
        str | None,
        typer.Option(
            help="What the model is for (default: what its config says).", metavar="TASK", rich_help_panel=_GRAPH
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.", metavar="N", rich_help_panel=_GRAPH)] = 23,
    dtype: Annotated[
        opt.OutputDtype, typer.Option("--dtype", help="Dtype of the graph's weights.", rich_help_panel=_GRAPH)
    ] = opt.OutputDtype.FLOAT32,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="0 is the base, 1 the tuned model; 0.5,0.2 for two adapters.", metavar="ALPHA", rich_help_panel=_PATH
        ),
    ] = None,
    path: Annotated[
        InterpolationPath,
        typer.Option(
            help=f"The curve from base to tuned: {', '.join(InterpolationPath)}.",
            metavar="PATH",
            rich_help_panel=_PATH,
        ),
    ] = InterpolationPath.GEODESIC,
    overwrite: opt.Overwrite = False,
    device: opt.Device = "auto",
    compute_dtype: opt.Compute = opt.ComputeDtype.FLOAT64,
    max_memory: opt.MaxMemory = None,
    jobs: opt.Jobs = None,
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
    """Export a model, with adapters folded in, as an ONNX graph that ONNX Runtime was seen to run right."""
    out = Output(as_json, quiet, verbose, no_progress)
    with reported(out):
        from boft_export.onnx.export import export_onnx
        from boft_export.planning.alphas import parse_alpha

        asked: dict[str, Any] = {
            "task": task,
            "opset": opset,
            "alpha": parse_alpha(alpha) if alpha is not None else None,
            "path": path,
            "dtype": dtype.kept,
            "compute_dtype": compute_dtype.value,
            "device": device,
            "max_memory": max_memory,
            "jobs": jobs,
            "overwrite": overwrite,
            "sources": opt.sources(revision, adapter_revision, subfolder, offline=offline, conv_view=conv_view),
        }
        started = time.monotonic()
        with out.progress("exporting") as progress:
            result = export_onnx(model, adapters or (), output, **asked, progress=progress)
        out.notices(result.plan.notices)
        for a in result.agreements:
            out.line(
                f"{a.output}: {a.relative_difference:.1e} of the largest, cosine {a.smallest_cosine:.6f}, "
                f"top-1 {a.top1_agreement:.0%}, {', '.join(a.providers)}"
            )
        out.line(f"{result.graphs} in {time.monotonic() - started:.1f} s")
