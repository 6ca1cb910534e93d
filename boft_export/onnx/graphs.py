"""The graphs of an export with their weights, on disk: traced, patched, or made by another exporter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from boft_export.checkpoint import LocalStaging, free_bytes
from boft_export.checkpoint.places import local_path
from boft_export.errors import InputError, Level, Notice, ResourceError
from boft_export.models.loading import model_errors
from boft_export.onnx.exporters import EXPORTERS, ForeignExporter
from boft_export.onnx.external_data import DataFile, Layout, Placed
from boft_export.onnx.graph_file import DATA_NAME, graph_metadata, save_graph
from boft_export.onnx.options import ExportOptions
from boft_export.onnx.patch import BaseGraphs, Rewriting, absent_notices, find_places, patched_plan
from boft_export.onnx.quantize import quantize_graphs
from boft_export.onnx.skeleton import Skeleton, build_skeleton, graph_dtype
from boft_export.onnx.tasks import Task
from boft_export.onnx.trace import Traced, trace
from boft_export.onnx.weights import used_plan, write_weights
from boft_export.pipeline.engine import Engine, OutputResult
from boft_export.pipeline.options import Progress
from boft_export.pipeline.prepare import Prepared
from boft_export.pipeline.run import Verb, carry_out, check_effect
from boft_export.planning import Action, FoldPlan, TensorPlan
from boft_export.planning.strength import Course


@dataclass(frozen=True)
class Job:
    """What making graphs takes."""

    course: Course
    engine: Engine
    folder: Path
    staging: LocalStaging
    options: ExportOptions


@dataclass(frozen=True)
class MadeGraphs:
    """Graphs with their weights, on disk.

    Attributes:
        plan: What was planned, with what was noticed on the way.
        written: What was done to each weight.
        inputs: SHA-256 of the input files.
        graphs: Each graph's file below the output, with its number of nodes.
    """

    plan: FoldPlan
    written: OutputResult
    inputs: dict[str, str]
    graphs: dict[str, int]


def make_graphs(plan: FoldPlan, task: Task, base: BaseGraphs | None, job: Job) -> MadeGraphs:
    """Make the graphs that are asked for, but for quantising them."""
    exporter = job.options.variant.exporter
    if base is not None:
        return _patch(plan, task, base, job)
    if exporter in EXPORTERS:
        return _by_another(plan, task, EXPORTERS[exporter], job)
    return _trace(plan, task, job)


def quantise(made: MadeGraphs, job: Job) -> MadeGraphs:
    """Put quantised graphs in the place of those that are there."""
    quantize = job.options.variant.quantize
    phases(job.options.progress)(f"quantising to {quantize}")
    return replace(made, graphs=_below(made.plan, quantize_graphs(job.folder, quantize, job.staging.root)))


def _below(plan: FoldPlan, graphs: Mapping[str, int]) -> dict[str, int]:
    return {str(plan.base.folder / name): nodes for name, nodes in graphs.items()}


def _by_another(plan: FoldPlan, task: Task, exporter: ForeignExporter, job: Job) -> MadeGraphs:
    """Merge into a checkpoint that another exporter loads, and take over the graphs that it makes."""
    _check_disk(3 * sum(s.nbytes for s in plan.shards), plan, job.staging)
    ready = Prepared(plan, job.course, job.staging.root / "merged", job.engine.memory, job.engine.jobs)
    merged = carry_out(Verb("merge", lambda _: {}, check_effect), ready, job.options, job.engine.devices)
    (made,) = merged.manifests
    inputs = {f"base/{n}": h for n, h in made["base"]["sha256"].items()}
    inputs |= {f"adapter-{i}/{n}": h for i, a in enumerate(made["adapters"]) for n, h in a["sha256"].items()}
    metadata = graph_metadata(plan, inputs, task.name)
    phases(job.options.progress)(f"exporting with {exporter.package}")
    folder = local_path(merged.output, "ONNX export")
    graphs = exporter.export(folder / plan.base.folder, job.folder, task.name, job.options.variant, metadata)
    shutil.rmtree(folder)
    plan = replace(plan, notices=(*exporter.notices, *plan.notices))
    return MadeGraphs(plan, merged.outputs[0], inputs, _below(plan, graphs))


def _trace(plan: FoldPlan, task: Task, job: Job) -> MadeGraphs:
    """Trace a model's graphs, and fold its weights into the data file beside them."""
    phase = phases(job.options.progress)
    phase("building the model")
    skeleton = build_skeleton(plan, task, graph_dtype(plan))
    with model_errors(InputError, f"{type(skeleton.model).__name__} can't be run"):
        graphs = task.graphs(skeleton.model)
    traced = {}
    for graph in graphs:
        phase(f"tracing {graph.name}")
        traced[graph.name] = trace(skeleton, graph, job.options.variant)
    skeleton.check_unchanged()
    used = _used(traced, skeleton)
    said = [n for g in traced.values() for n in g.notices]
    plan = replace(plan, notices=(*_left_out(plan, used), *said, *plan.notices))
    places, weights, layout = _lay_out(traced, skeleton)
    _check_disk(layout.nbytes, plan, job.staging)
    with DataFile(job.folder / DATA_NAME, layout.nbytes) as file:
        written, inputs = write_weights(
            file, places, used_plan(plan, used), job.course, job.engine, job.options.progress
        )
    nodes = {}
    for name, found in traced.items():
        file_name = f"{name}.onnx"
        save_graph(found.model, weights[name], job.folder / file_name, graph_metadata(plan, inputs, task.name))
        nodes[file_name] = found.model.graph.num_nodes()
    return MadeGraphs(plan, written, inputs, _below(plan, nodes))


def _patch(plan: FoldPlan, task: Task, base: BaseGraphs, job: Job) -> MadeGraphs:
    """Fold adapters into graphs of the base."""
    matches = find_places(base, plan)
    plan = replace(plan, notices=(*absent_notices(matches), *plan.notices))
    rewriting = Rewriting(base, matches, plan, task)
    _check_disk(rewriting.nbytes, plan, job.staging)
    folded = patched_plan(plan, matches)
    written, inputs = rewriting.write(job.folder, folded, job.course, job.engine, job.options.progress)
    return MadeGraphs(plan, written, inputs, _below(plan, {name: file.nodes for name, file in base.files.items()}))


def phases(progress: Progress | None) -> Callable[[str], None]:
    """Return what tells of work that can't be counted."""
    return (lambda name: progress(0, 0, name)) if progress is not None else lambda _: None


def _used(traced: Mapping[str, Traced], skeleton: Skeleton) -> dict[str, TensorPlan]:
    """Return the plan's tensors that the graphs use, by name."""
    names = dict.fromkeys(w.name for g in traced.values() for w in g.weights.values())
    skeleton.check_found(names)
    return {t.name: t for t in (skeleton.sources[n] for n in names)}


def _left_out(plan: FoldPlan, used: Mapping[str, TensorPlan]) -> list[Notice]:
    """Return notices of what adapters change and the graphs don't have.

    Raises:
        InputError: If the graphs have nothing of what they change.
    """
    changed = [t.name for t in plan.tensors if t.action not in (Action.COPY, Action.CONVERT)]
    missing = [name for name in changed if name not in used]
    if not missing:
        return []
    message = f"{len(missing)} of {len(changed)} tensors that the adapters change are not used for this task"
    notice = Notice(Level.WARNING, "not-in-graph", missing[0], message, "Name another task with --task.")
    if len(missing) == len(changed):
        raise InputError(f"{notice}.", hint=notice.hint)
    return [notice]


def _lay_out(
    traced: Mapping[str, Traced], skeleton: Skeleton
) -> tuple[dict[str, list[Placed]], dict[str, dict[str, Placed]], Layout]:
    """Give each weight a place, one for all graphs and names that share it.

    Returns:
        The places by the plan's tensor, and for each graph by its initializer, and the layout.
    """
    layout = Layout()
    places: dict[str, list[Placed]] = {}
    made: dict[tuple[str, bool], Placed] = {}
    graphs: dict[str, dict[str, Placed]] = {}
    for name, graph in traced.items():
        graphs[name] = {}
        for initializer, weight in graph.weights.items():
            source = skeleton.sources[weight.name]
            key = source.name, weight.transposed
            if key not in made:
                made[key] = layout.add(source.dtype, source.shape, transposed=weight.transposed)
                places.setdefault(source.name, []).append(made[key])
            graphs[name][initializer] = made[key]
    return places, graphs, layout


def _check_disk(nbytes: int, plan: FoldPlan, staging: LocalStaging) -> None:
    needed = nbytes + sum(f.source.stat().st_size for f in plan.side_files if f.source is not None)
    free = free_bytes(staging.root)
    if needed > free:
        raise ResourceError(
            f"{staging.output} needs {needed:,} bytes of disk, {free:,} are free.",
            hint="Free some space, or choose another -o.",
        )
