"""Measuring finished interpolations: what each layer has become along the path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.checkpoint import TensorRef, read_weight_file
from boft_export.linalg.energy import hyperspherical_energy
from boft_export.linalg.interpolation import interpolate_rotation, path_angles
from boft_export.pipeline.evaluation import Figures
from boft_export.pipeline.interpolate import InterpolationResult
from boft_export.pipeline.layers import build_layer
from boft_export.pipeline.options import Progress
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes
from boft_export.planning import Step, TensorPlan

# Neurons whose energy stands for that of all of a layer's.
_MOST_NEURONS = 512


@dataclass(frozen=True)
class LayerPoint:
    """A layer at one point of the path.

    Attributes:
        alpha: How far the layer goes.
        largest_angle: The largest angle by which R(alpha) turns a plane, in radians.
        rms_angle: The root mean square of its angles over all n directions, in radians.
        distance: |log R(alpha)|, the distance from the identity along the rotations: sqrt(n) times ``rms_angle``.
        residual: max |R(alpha)^T R(alpha) - I|.
        relative_change: |W(alpha) - W| / |W| of the layer's tensor, all adapters and scales included, not yet rounded.
            W is what is rotated: where an adapter replaces the base's weight, what takes its place.
        energy_ratio: The hyperspherical energy of the tensor's neurons over that of the base's; None without a pair.
    """

    alpha: float
    largest_angle: float
    rms_angle: float
    distance: float
    residual: float
    relative_change: float | None
    energy_ratio: float | None


@dataclass(frozen=True)
class LayerCourse:
    """A layer along the path.

    Attributes:
        module: Its name in the model that was trained.
        tensor: The tensor that holds its weight.
        adapter: The adapter's number.
        num_features: The size n of R.
        base_energy: The hyperspherical energy of the base's neurons; None where there is no pair.
        points: One for each output.
    """

    module: str
    tensor: str
    adapter: int
    num_features: int
    base_energy: float | None
    points: tuple[LayerPoint, ...]


@dataclass(frozen=True)
class PathReport:
    """An interpolation, measured.

    Attributes:
        result: What was measured.
        layers: Each adapted layer.
        evaluations: Each output's own figures; None where there are none.
    """

    result: InterpolationResult
    layers: tuple[LayerCourse, ...]
    evaluations: tuple[Figures | None, ...]


def measure_path(
    result: InterpolationResult,
    evaluations: Sequence[Figures | None] | None = None,
    progress: Progress | None = None,
) -> PathReport:
    """Measure every adapted layer of a finished interpolation, one layer in memory at a time.

    Angles and residuals are those of the float64 rotations: O(n g^2) for groups of g coupled features, at each alpha
    but on the geodesic and the linear path. Energies are read from the files: of each layer, the same 512 neurons at
    most, evenly spread.

    Args:
        result: From ``interpolate``; its folders must still be there, and so must its base and adapters.
        evaluations: Figures of each output to report beside, from ``evaluate``.
        progress: Called with layers done, layers in all, and the layer's name.

    Raises:
        AccessError: If a file can't be read.
        DamagedFileError: If a file is not what it was.
    """
    layers = [(t, s) for t in result.plan.tensors for s in t.steps]
    written = [
        {t.name: t for shard in result.plan.shards for t in read_weight_file(o.folder / shard.name).tensors}
        for o in result.outputs
    ]
    courses = []
    for i, (tensor, step) in enumerate(layers):
        if progress is not None:
            progress(i, len(layers), step.layer.module)
        courses.append(_measure(result, tensor, step, [w[tensor.name] for w in written]))
    return PathReport(result, tuple(courses), tuple(evaluations or [None] * len(result.outputs)))


def _measure(result: InterpolationResult, tensor: TensorPlan, step: Step, refs: Sequence[TensorRef]) -> LayerCourse:
    built = build_layer(result.plan.adapters[step.adapter], step.layer)
    base = tensor.origins[0].ref
    numbers = _neuron_numbers(step, min(base.num_elements, tensor.source.num_elements))
    base_energy = hyperspherical_energy(_neurons(base, step, numbers))
    points = []
    for output, ref in zip(result.outputs, refs, strict=True):
        alpha = output.strength.of(tensor.name)[step.adapter]
        measure = next(t.measure for t in output.tensors if t.plan.name == tensor.name)
        energy = hyperspherical_energy(_neurons(ref, step, numbers))
        angles = path_angles(built.rotation, alpha, result.course.path)
        rms = math.sqrt(float((angles**2).mean()))
        points.append(
            LayerPoint(
                alpha=alpha,
                largest_angle=float(angles.abs().max()),
                rms_angle=rms,
                distance=rms * math.sqrt(angles.numel()),
                residual=interpolate_rotation(built.rotation, alpha, result.course.path).residual(),
                relative_change=measure.relative_change if measure is not None else 0.0,
                energy_ratio=energy / base_energy if energy is not None and base_energy is not None else None,
            )
        )
    return LayerCourse(
        step.layer.module, tensor.name, step.adapter, step.layer.num_features, base_energy, tuple(points)
    )


def _neuron_numbers(step: Step, elements: int) -> list[int]:
    """Return which of a layer's neurons to look at, by number: all, or as many as are allowed, evenly spread."""
    width = step.layer.num_features
    count = step.layer.num_outputs or elements // width
    if step.view is View.INPUT:
        count = min(count, elements // width - step.start // width)
    taken = min(count, _MOST_NEURONS)
    return [i * count // taken for i in range(taken)]


def _neurons(ref: TensorRef, step: Step, numbers: Sequence[int]) -> Tensor:
    """Return a layer's neurons, one in each row, float64: what each of its outputs weighs its inputs with."""
    width = step.layer.num_features
    element = ref.nbytes // ref.num_elements

    def run(start: int, count: int) -> Tensor:
        data = read_bytes(ref, start * element, (start + count) * element)
        return data.view(TORCH_DTYPES[ref.dtype]).to(torch.float64)

    if step.view is View.INPUT:
        return torch.stack([run(step.start + i * width, width) for i in numbers])
    # Seen as (n, out), neurons are columns.
    outputs = ref.num_elements // width
    return torch.stack([run(step.start + i * outputs, outputs)[numbers] for i in range(width)], dim=1)
