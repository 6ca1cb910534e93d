"""Exporting: from references to a finished folder with a graph that was proven in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from boft_export.checkpoint import DTYPE_OF_NAME, FLOAT_DTYPES, LocalStaging
from boft_export.checkpoint.places import local_path, parse_path
from boft_export.errors import DamagedFileError, UsageError, raise_for_errors
from boft_export.linalg.path import InterpolationPath
from boft_export.models.loading import quiet_transformers
from boft_export.onnx.card import export_card
from boft_export.onnx.exporters import EXPORTERS, served
from boft_export.onnx.folder import write_side_files
from boft_export.onnx.foreign import verify_patched
from boft_export.onnx.graphs import Job, make_graphs, phases, quantise
from boft_export.onnx.options import ExportOptions
from boft_export.onnx.patch import BaseGraphs, absent_notices, find_places, open_graphs
from boft_export.onnx.session import check_runs, runtime_notices
from boft_export.onnx.skeleton import build_skeleton, graph_dtype, plan_config
from boft_export.onnx.tasks import Task, find_task
from boft_export.onnx.variant import Exporter, Optimize, Quantize, variant
from boft_export.onnx.verify import Agreement, verify
from boft_export.pipeline.devices import Device
from boft_export.pipeline.engine import Engine
from boft_export.pipeline.hashing import file_digest
from boft_export.pipeline.layers import inspect_values
from boft_export.pipeline.manifest import manifest
from boft_export.pipeline.model_card import card_metadata
from boft_export.pipeline.options import Progress
from boft_export.pipeline.prepare import Prepared, check_options, fit_memory, keep_off_inputs, prepare
from boft_export.pipeline.recorded import RecordedFile
from boft_export.pipeline.run import check_effect, devices_for
from boft_export.planning import FoldPlan, make_plan
from boft_export.planning.alphas import Alpha, AlphaMap
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.strength import Interpolation, interpolation


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        output: The folder.
        plan: What was planned, with all notices.
        task: What it was exported for.
        graphs: Each graph's file below the folder, with its number of nodes.
        agreements: How the graphs' outputs compare with the model's.
        manifest: The content of the folder's ``boft_export.json``.
    """

    output: Path
    plan: FoldPlan
    task: str
    graphs: dict[str, int]
    agreements: tuple[Agreement, ...]
    manifest: dict[str, Any]


def export_onnx(
    model: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    *,
    task: str | None = None,
    exporter: Exporter | str = Exporter.DYNAMO,
    opset: int | None = None,
    optimize: Optimize | str = Optimize.STANDARD,
    quantize: Quantize | str = Quantize.NONE,
    base_onnx: Ref | None = None,
    alpha: Alpha | None = None,
    path: InterpolationPath | str = "geodesic",
    alpha_map: AlphaMap | None = None,
    dtype: str | None = "float32",
    compute_dtype: str = "float64",
    device: str = "auto",
    max_memory: str | int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    sources: Sources | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write an ONNX graph of a model with adapters folded into it, proven in ONNX Runtime, all or nothing.

    The weights are never loaded: the graph is traced without them, and they are folded and streamed into the data file
    beside it.

    Args:
        model: The checkpoint: a local path or a Hub id; None for the one the adapter names.
        adapters: None, one or several adapters, in the order in which they apply.
        output: The folder to write; it appears only when it is complete.
        task: What the model is exported for; None for what its config says.
        exporter: What makes the graph: ``dynamo``, which is torch's own, ``optimum``, or ``genai``, the builder of
            onnxruntime-genai; the latter two, packages of their own, load the whole model.
        opset: The version of ONNX's operators; None for what suits the rest, 23 as a rule.
        optimize: ``none`` for what tracing gives, ``standard`` for fewer operators, all of them ONNX's own, or ``ort``
            for those of ONNX Runtime, too.
        quantize: ``none``, ``int8`` for products in 8-bit integers, or ``int4`` for weights of 4 bits. The model is
            loaded for it.
        base_onnx: An ONNX file of the base, or a folder of them, to fold into with no tracing: all but the weights that
            the adapters change stays as it is there, dtype and opset included.
        alpha: How far to go from base (0) to tuned (1), one number for all adapters or one for each.
        path: The path to go on, as ``interpolate`` has it.
        alpha_map: Glob patterns over tensor names, each with its own alpha.
        dtype: The graph's dtype: ``float32``, ``float16`` or ``bfloat16``; None for the base's.
        compute_dtype: ``float64``, after which each element is rounded once, or ``float32``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: Bytes that folding may take, as ``700MiB``.
        jobs: Threads that read, fold and write.
        overwrite: Replace ``output`` where it exists, in one step at the end.
        sources: Where inputs come from.
        progress: Called with bytes written, bytes in all, and the tensor's name.

    Raises:
        CheckFailedError: If the graph's outputs are not the model's, or a trained adapter changed nothing.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If inputs don't fit together or are damaged, or the model can't be exported.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    options = ExportOptions(
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        max_memory=max_memory,
        jobs=jobs,
        overwrite=overwrite,
        sources=sources,
        progress=progress,
        task=task,
        variant=variant(exporter, optimize, quantize, opset),
        base_onnx=base_onnx,
    )
    request = _request(alpha, path, alpha_map)
    devices = devices_for(options)
    graphs = None
    if base_onnx is not None:
        graphs = open_graphs(base_onnx)
        options = _as_in(graphs, options, output)
    ready = prepare_export(model, adapters, output, request, options, devices[0].type)
    with quiet_transformers():
        return _carry_out(ready, request, options, devices, graphs)


def plan_export(
    model: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    *,
    alpha: Alpha | None = None,
    path: InterpolationPath | str = "geodesic",
    alpha_map: AlphaMap | None = None,
    exporter: Exporter | str = Exporter.DYNAMO,
    opset: int | None = None,
    optimize: Optimize | str = Optimize.STANDARD,
    quantize: Quantize | str = Quantize.NONE,
    **options: Any,  # noqa: ANN401  # those of ExportOptions
) -> tuple[Prepared, Task]:
    """Check all that can be known without reading a weight or tracing: what a dry run does.

    Arguments are those of ``export_onnx``.

    Raises:
        BoftExportError: As ``export_onnx`` does.
    """
    asked = ExportOptions(**options, variant=variant(exporter, optimize, quantize, opset))
    device = devices_for(asked)[0].type
    graphs = None
    if asked.base_onnx is not None:
        graphs = open_graphs(asked.base_onnx)
        asked = _as_in(graphs, asked, output)
    ready = prepare_export(model, adapters, output, _request(alpha, path, alpha_map), asked, device)
    with quiet_transformers():
        task = find_task(plan_config(ready.plan), asked.task, local_path(ready.plan.base.root, "ONNX export"))
        if graphs is None:
            build_skeleton(ready.plan, task, graph_dtype(ready.plan))
        else:
            notices = absent_notices(find_places(graphs, ready.plan))
            ready = replace(ready, plan=replace(ready.plan, notices=(*notices, *ready.plan.notices)))
    return ready, task


def _request(alpha: Alpha | None, path: InterpolationPath | str, alpha_map: AlphaMap | None) -> Interpolation:
    return interpolation(1.0 if alpha is None and alpha_map is None else alpha, None, path, alpha_map)


def prepare_export(
    model: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    request: Interpolation,
    options: ExportOptions,
    device_type: str,
) -> Prepared:
    """Check all that headers and options can show.

    Raises:
        BoftExportError: As ``prepare`` does.
    """
    options.variant.check(options.dtype, graph_given=options.base_onnx is not None)
    if options.variant.exporter in EXPORTERS:
        EXPORTERS[options.variant.exporter].check_installed()
    if options.task is not None:
        find_task({}, options.task)
    if options.base_onnx is not None and not adapters:
        raise UsageError("there is no adapter to fold into the graph.", hint="Name one or more after MODEL.")
    ready = _prepared(model, adapters, output, request, options, device_type)
    if options.dtype is None:
        # A graph computes in one dtype, where files may hold several.
        options = replace(options, dtype=_kind(ready.plan))
        if options.dtype not in DTYPE_OF_NAME:
            raise UsageError(f"the base is {options.dtype}, which graphs are not made in.", hint="--dtype float32")
        ready = _prepared(model, adapters, output, request, options, device_type)
    if options.base_onnx is None:
        check_runs(_kind(ready.plan))
    return ready


def _prepared(
    model: Ref | None,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    request: Interpolation,
    options: ExportOptions,
    device_type: str,
) -> Prepared:
    local_path(parse_path(output), "ONNX export")
    if adapters:
        return prepare(model, adapters, output, request, options, device_type, torch=True)
    if model is None or os.fspath(model) == "-":
        raise UsageError("there is neither a model nor an adapter that names one.", hint="Name the checkpoint.")
    check_options(output, options)
    base = (options.sources or Sources()).base(model)
    dtype = DTYPE_OF_NAME[options.dtype] if options.dtype is not None else None
    plan = make_plan(base, (), dtype=dtype)
    keep_off_inputs(Path(output), plan, model, ())
    raise_for_errors(plan.notices, "the model can't be exported")
    return fit_memory(plan, request.course(plan), output, options, device_type)


def _as_in(graphs: BaseGraphs, options: ExportOptions, output: Ref) -> ExportOptions:
    """Return options as graphs that exist decide them.

    Raises:
        UsageError: If the output would be written over the graphs, or another dtype or opset is asked for.
    """
    target, folder = Path(output).resolve(), graphs.folder.resolve()
    beside = Path(options.base_onnx or "").is_file()
    if folder.is_relative_to(target) or (target.is_relative_to(folder) and not beside):
        raise UsageError(
            f"{output} would write into the graph's folder {folder}.", hint="Choose a folder apart from it."
        )
    dtype, opset = FLOAT_DTYPES[graphs.dtype], options.variant.opset
    if options.dtype not in (None, "float32", dtype) or opset not in (None, graphs.opset):
        raise UsageError(
            f"the graph is {dtype} with opset {graphs.opset}, and stays so.", hint="Leave out --dtype and --opset."
        )
    return replace(
        options,
        dtype=dtype,
        variant=replace(options.variant, opset=graphs.opset),
        task=options.task or graphs.task,
    )


def _carry_out(
    ready: Prepared,
    request: Interpolation,
    options: ExportOptions,
    devices: tuple[Device, ...],
    base: BaseGraphs | None,
) -> ExportResult:
    values = [inspect_values(a) for a in ready.plan.adapters]
    untrained = {(i, module) for i, (_, modules) in enumerate(values) for module in modules}
    found = [*runtime_notices(), *(n for notices, _ in values for n in notices)]
    plan = replace(ready.plan, notices=(*found, *ready.plan.notices))
    raise_for_errors(plan.notices, "the adapter can't be folded into this model")
    task = find_task(plan_config(plan), options.task, local_path(plan.base.root, "ONNX export"))
    plan = replace(plan, notices=(*task.notices, *plan.notices))
    settings: dict[str, Any] = {
        "dtype": options.dtype or "keep",
        "compute_dtype": options.compute_dtype,
        "device": devices[0].type,
        "task": task.name,
        **options.variant.document(),
        "torch": torch.__version__,
        **({"base_onnx": base.digests()} if base is not None else {}),
    }
    fingerprint = plan.fingerprint(settings)
    metadata = card_metadata(plan, "onnx")
    target = local_path(ready.output, "ONNX export")
    staging = LocalStaging(target, fingerprint, overwrite=options.overwrite)
    try:
        folder = staging.files / plan.base.folder
        folder.mkdir(parents=True, exist_ok=True)
        engine = Engine(devices, options.compute_dtype, ready.jobs, ready.memory)
        job = Job(ready.course, engine, folder, staging, options)
        made = make_graphs(plan, task, base, job)
        plan, written, inputs = made.plan, made.written, made.inputs
        if plan.fingerprint(settings) != fingerprint:
            raise DamagedFileError(
                "an input file changed while it was read.", hint="Run again once nothing writes to it."
            )
        lost = check_effect(None, written, untrained)
        plan = replace(plan, notices=(*plan.notices, *lost))
        # On the CPU, unless a GPU was asked for or nothing else could run it.
        place = "cuda" if options.device.startswith("cuda") or graph_dtype(plan) is torch.bfloat16 else "cpu"
        check = partial(
            verify if base is None else partial(verify_patched, base),
            plan, served(task, options.variant.exporter), folder, ready.course, engine,
            scratch=staging.root, device=place,
        )  # fmt: skip
        phases(options.progress)("verifying")
        if options.variant.quantises:
            # What quantising does to outputs would hide that something else is wrong, so that is seen first.
            check()
            made = quantise(made, job)
            phases(options.progress)("verifying")
        with ThreadPoolExecutor(1, "hash") as pool:
            hashing = pool.submit(_record, staging.files)
            verified, files = check(), hashing.result()
        plan = replace(plan, notices=(*plan.notices, *verified.notices))
        asked = request.record(written.variant.strength) if not written.variant.strength.is_full else {}
        record = manifest("onnx", plan, inputs, written, files, {**asked, **settings})
        record["verified"] = [a.document() for a in verified.agreements]
        card = export_card(plan, metadata, asked, task.name, made.graphs, verified.agreements)
        write_side_files(plan, staging, record, card)
        staging.publish()
    except BaseException:
        # Nothing of it could be taken up again.
        staging.discard()
        raise
    return ExportResult(target, plan, task.name, made.graphs, verified.agreements, record)


def _record(folder: Path) -> dict[str, RecordedFile]:
    """Return the size and SHA-256 of all files below a folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): RecordedFile(f.stat().st_size, file_digest(f)) for f in files}


def _kind(plan: FoldPlan) -> str:
    return str(graph_dtype(plan)).removeprefix("torch.")
