"""``boft-export onnx``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from boft_export.cli import options as opt
from boft_export.cli.output import Output
from boft_export.cli.result import free_space, show_changes
from boft_export.cli.run import reported
from boft_export.linalg.path import InterpolationPath
from boft_export.onnx.variant import Exporter, Optimize, Quantize

NAME = "onnx"
EPILOG = opt.examples(
    "boft-export onnx ./base ./my-adapter -o ./onnx",
    "boft-export onnx ./merged -o ./onnx --task text-generation",
    "boft-export onnx ./base ./my-adapter -o ./tuned --base-onnx ./onnx/model.onnx",
)
_GRAPH = "The graph"


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint: a folder, a file or a Hub id; '-' for the one the adapter names.", metavar="MODEL"
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapters to fold in: folders, files, URLs or Hub ids; in the order given.",
            metavar="ADAPTER",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Folder to write; it appears only when it is complete.", metavar="PATH"),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="What the model is for (default: what its config says).", metavar="TASK", rich_help_panel=_GRAPH
        ),
    ] = None,
    exporter: Annotated[
        Exporter,
        typer.Option(
            help="What makes the graph; optimum and genai are packages of their own, and load the whole model.",
            rich_help_panel=_GRAPH,
        ),
    ] = Exporter.DYNAMO,
    opset: Annotated[
        int | None,
        typer.Option(
            help="Version of ONNX's operators (default: 23, or what --optimize ort can fuse).",
            metavar="N",
            show_default=False,
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    optimize: Annotated[
        Optimize,
        typer.Option(
            help="none, ONNX's own operators (standard), or ONNX Runtime's, too (ort).", rich_help_panel=_GRAPH
        ),
    ] = Optimize.STANDARD,
    quantize: Annotated[
        Quantize,
        typer.Option(
            help="int8: products in 8-bit integers; int4: weights of 4 bits. Loads the model.", rich_help_panel=_GRAPH
        ),
    ] = Quantize.NONE,
    base_onnx: Annotated[
        Path | None,
        typer.Option(
            "--base-onnx",
            help="An ONNX file of MODEL, or a folder of them, to fold the adapters into: no tracing, in seconds. Its "
            "nodes, opset and dtype stay.",
            metavar="FILE",
            rich_help_panel=_GRAPH,
        ),
    ] = None,
    dtype: Annotated[
        opt.OutputDtype, typer.Option("--dtype", help="Dtype of the graph's weights.", rich_help_panel=_GRAPH)
    ] = opt.OutputDtype.FLOAT32,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="0 is the base, 1 the tuned model; 0.5,0.2 for two adapters.",
            metavar="ALPHA",
            rich_help_panel=opt.PATH_PANEL,
        ),
    ] = None,
    path: opt.Curve = InterpolationPath.GEODESIC,
    alpha_map: opt.AlphaMapFile = None,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
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
        from boft_export.planning.alphas import parse_alpha, read_alpha_map

        asked: dict[str, Any] = {
            "task": task,
            "base_onnx": base_onnx,
            "exporter": exporter.value,
            "opset": opset,
            "optimize": optimize.value,
            "quantize": quantize.value,
            "alpha": parse_alpha(alpha) if alpha is not None else None,
            "path": path,
            "alpha_map": read_alpha_map(alpha_map) if alpha_map is not None else None,
            "dtype": dtype.kept,
            "compute_dtype": compute_dtype.value,
            "device": device,
            "max_memory": max_memory,
            "jobs": jobs,
            "overwrite": overwrite,
            "sources": opt.sources(revision, adapter_revision, subfolder, offline=offline, conv_view=conv_view),
        }
        if dry_run:
            _write_nothing(out, model, adapters or (), output, asked)
            return
        from boft_export.onnx.export import export_onnx
        from boft_export.report.export_report import export_document

        started = time.monotonic()
        with out.progress("exporting") as progress:
            result = export_onnx(model, adapters or (), output, **asked, progress=progress)
        out.notices(result.plan.notices)
        document = export_document(result, time.monotonic() - started)
        out.document(document)
        _show(out, document)


def _write_nothing(out: Output, model: str, adapters: Sequence[str], output: str, asked: Mapping[str, Any]) -> None:
    """Plan and check an export, and print what it would do."""
    from boft_export.checkpoint import free_bytes
    from boft_export.checkpoint.places import parse_path
    from boft_export.onnx.export import plan_export
    from boft_export.planning.sizes import format_size
    from boft_export.report.export_report import export_plan_document

    ready, task = plan_export(model, adapters, output, **asked)
    out.notices(ready.plan.notices)
    document = export_plan_document(ready.plan, task.name, output, ready.memory.peak, free_bytes(parse_path(output)))
    out.document(document)
    show_changes(out, document)
    layers = f"{document['layers']['applied']} of {document['layers']['expected']} adapter layers"
    out.line(
        f"would export for {task.name} with {layers}: read {format_size(document['bytes_to_read'])}, write at most "
        f"{format_size(document['bytes_to_write'])}{free_space(document)}",
        "bold",
    )


def _show(out: Output, document: Mapping[str, Any]) -> None:
    """Print a finished export: what of its outputs was compared, and a line that sums it up."""
    from boft_export.planning.sizes import format_size
    from boft_export.report.export_report import AGREEMENT_COLUMNS

    verified = document["verified"]
    heads = [(head, "right") for head, _, _ in AGREEMENT_COLUMNS]
    rows = [[a["output"], str(a["cases"]), *(f"{a[k]:{form}}" for _, k, form in AGREEMENT_COLUMNS)] for a in verified]
    out.table("", [("output", "left"), ("cases", "right"), *heads], rows)
    show_changes(out, document)
    for name, graph in document["graphs"].items():
        out.line(f"{name}: {graph['nodes']} nodes")
    ran = ", ".join(dict.fromkeys(p for a in verified for p in a["providers"]))
    beside = ", ".join(dict.fromkeys(a["reference"] for a in verified))
    if verified:
        out.line(f"ran on {ran}, beside PyTorch: {beside}")
    layers = f"{document['layers']['applied']} of {document['layers']['expected']} adapter layers"
    out.line(
        f"exported for {document['task']} with {layers} into {document['output']}: "
        f"{format_size(document['bytes_written'])} in {document['seconds']:.1f} s",
        "bold green",
    )
