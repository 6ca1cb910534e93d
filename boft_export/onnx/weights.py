"""Folded weights, streamed into the data file beside a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from boft_export.checkpoint import Shard
from boft_export.onnx.external_data import Placed
from boft_export.pipeline.engine import Engine, OutputResult, TensorResult, replay_plan
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.options import Progress
from boft_export.pipeline.output_file import check_finite
from boft_export.planning import FoldPlan, TensorPlan
from boft_export.planning.strength import Course


class Target(Protocol):
    """What takes weights piece by piece."""

    def write(self, places: Iterable[Placed], start: int, data: memoryview) -> None:
        """Write a run of a tensor's bytes, from its byte ``start`` on in row-major order, to each of its places."""


def used_plan(plan: FoldPlan, used: Mapping[str, object]) -> FoldPlan:
    """Return the part of a plan whose tensors are used."""
    kept = ((s.name, tuple(t for t in s.tensors if t.name in used)) for s in plan.shards)
    return replace(plan, shards=tuple(Shard(name, tensors, b"") for name, tensors in kept if tensors))


def write_weights(
    file: Target,
    places: Mapping[str, Sequence[Placed]],
    plan: FoldPlan,
    course: Course,
    engine: Engine,
    progress: Progress | None = None,
) -> tuple[OutputResult, dict[str, str]]:
    """Fold a plan's tensors and write each to its places; return what was done, and SHA-256 of the inputs.

    Raises:
        InputError: If a result is not finite.
        DamagedFileError: If an input ends early.
        AccessError: If a file can't be read.
    """
    total = sum(p.nbytes for own in places.values() for p in own[:1])
    done = 0
    measures: dict[str, Measure] = {}
    written = dict.fromkeys(places, 0)
    with replay_plan(plan, course, engine) as replay:
        for tensor, data, tiles in replay.pieces:
            for measure in tiles:
                check_finite(tensor, measure)
                measures[tensor.name] = measures.get(tensor.name, Measure()) + measure
            file.write(places[tensor.name], written[tensor.name], data)
            written[tensor.name] += len(data)
            done += len(data)
            if progress is not None:
                progress(done, total, tensor.name)
        inputs = replay.hashes.digests()
        residuals = replay.layers.residuals

    def result(tensor: TensorPlan) -> TensorResult:
        alphas = course.variants[0].strength.of(tensor.name)
        found = [residuals[s.adapter, s.layer.module, alphas[s.adapter]] for s in tensor.steps if alphas[s.adapter]]
        return TensorResult(tensor, measures.get(tensor.name), max(found, default=None))

    return OutputResult(course.variants[0], tuple(map(result, plan.tensors)), {}), inputs
