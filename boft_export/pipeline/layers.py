"""Building an adapter layer's rotation from its trained tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from boft_export.adapters import AdapterLayer, Pairing, Parametrization, Storage, View
from boft_export.errors import InputError, Level, Notice
from boft_export.linalg import neumann
from boft_export.linalg.arrays import Array, namespace
from boft_export.linalg.batched_lu import inverse
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, from_triangle, shrink, skew
from boft_export.linalg.path import InterpolationPath
from boft_export.linalg.planner import KERNEL_COSTS, TORCH_COSTS
from boft_export.linalg.rotation import Factor, Rotation
from boft_export.pipeline.array_io import read_array
from boft_export.pipeline.kept import Kept
from boft_export.pipeline.memory import rotation_bytes
from boft_export.pipeline.one_blas_thread import LARGEST_ALONE, ONE_BLAS_THREAD
from boft_export.pipeline.one_torch_thread import ONE_TORCH_THREAD
from boft_export.planning import FoldPlan, SourcedAdapter, Step
from boft_export.planning.strength import Course

if TYPE_CHECKING:
    import torch

# The matrices that are stored, and the blocks made of their skew parts.
_MATRIX: dict[Storage, Callable[[Array, int], Array]] = {
    Storage.MATRIX: lambda trained, _: trained,
    Storage.TRIANGLE: from_triangle,
}
_ORTHOGONAL: dict[Parametrization, Callable[[Array, AdapterLayer], Array]] = {
    Parametrization.CAYLEY: lambda s, _: cayley(s),
    Parametrization.NEUMANN: lambda s, layer: neumann.polynomial(s, layer.series),
}
_INDEX = {Pairing.BUTTERFLY: butterfly_index}


@dataclass(frozen=True)
class LayerOperator:
    """What a layer does to its weight: R and s, of tensors or of numpy arrays.

    Attributes:
        rotation: R, over n features.
        scale: s, shape (out,); None for none.
        weight: How much of diag(s) W R^T the result is; the rest is W as it was.
    """

    rotation: Rotation
    scale: Array | None
    weight: float = 1.0

    def at(self, alpha: float, path: InterpolationPath) -> LayerOperator:
        """Return the operator of tensors at ``alpha`` of a path; at 1 it is this one.

        Raises:
            ValueError: If there is no such point.
        """
        if alpha == 1:
            return self
        if path is InterpolationPath.LINEAR:
            return replace(self, weight=alpha)
        from boft_export.linalg.interpolation import interpolate_rotation, interpolate_scale

        scale = None if self.scale is None else interpolate_scale(self.scale, alpha)
        return LayerOperator(interpolate_rotation(self.rotation, alpha, path), scale)

    def inverse(self) -> LayerOperator:
        """Return the operator that undoes this one: R^-1 and 1/s; what a scale of 0 made of a weight stays 0.

        Raises:
            ValueError: If the result is a mixture with the weight as it was.
            LinAlgError: If a block has no inverse.
        """
        if self.weight != 1:
            raise ValueError("a weighted sum of weights before and after a rotation is not undone by a rotation")
        # Blocks that are only nearly orthogonal are not undone by their transposes.
        factors = (Factor(inverse(f.blocks), f.index) for f in reversed(self.rotation.factors))
        scale = self.scale
        if scale is not None:
            # Of 0 the inverse is 0.
            xp = namespace(scale)
            scale = xp.where(scale == 0, 0, 1 / xp.where(scale == 0, 1, scale))
        return LayerOperator(Rotation(tuple(factors)), scale)

    def tensors(self) -> LayerOperator:
        """Return the operator of numpy arrays as one of tensors on the CPU."""
        import torch

        scale = None if self.scale is None else torch.from_numpy(self.scale)
        return replace(self, rotation=self.rotation.tensors(), scale=scale)


def build_layer(source: SourcedAdapter, layer: AdapterLayer) -> LayerOperator:
    """Return a layer's R, factor by factor as it was trained, and s; float64 tensors on the CPU.

    Raises:
        InputError: If the trained values give no rotation.
        AccessError: If the adapter's file cannot be read.
    """
    return build_arrays(source, layer).tensors()


@np.errstate(all="ignore")
def build_arrays(source: SourcedAdapter, layer: AdapterLayer) -> LayerOperator:
    """Return what ``build_layer`` does as numpy arrays, without torch.

    Raises:
        InputError: If the trained values give no rotation.
        AccessError: If the adapter's file cannot be read.
    """
    generators = _generators(layer, read_array(source.refs[layer.blocks]))
    try:
        with _on_one_thread(layer.block_size):
            blocks = _ORTHOGONAL[layer.parametrization](generators, layer)
    except np.linalg.LinAlgError as error:
        raise _no_rotation(source, layer) from error
    if not np.isfinite(blocks).all():
        raise _no_rotation(source, layer)
    if layer.shared:
        blocks, generators = (np.tile(x, (1, layer.num_blocks, 1, 1)) for x in (blocks, generators))
    index = _INDEX[layer.pairing]
    factors = (
        Factor(
            blocks[i],
            index(i, layer.num_blocks, layer.block_size, np),
            generators[i] if layer.parametrization is Parametrization.CAYLEY else None,
        )
        for i in range(layer.num_factors)
    )
    scale = None if layer.scale is None else read_array(source.refs[layer.scale]).reshape(-1)
    return LayerOperator(Rotation(tuple(factors)), scale)


@np.errstate(all="ignore")
def expected_residual(source: SourcedAdapter, layer: AdapterLayer) -> float:
    """Return the residual ||R^T R - I||_2 that a layer's blocks have by design: 0 for exact transforms.

    Raises:
        InputError: If the trained values give no rotation.
        AccessError: If the adapter's file cannot be read.
    """
    if layer.is_orthogonal:
        return 0.0
    generators = _generators(layer, read_array(source.refs[layer.blocks]))
    if not np.isfinite(generators).all():
        raise _no_rotation(source, layer)
    return neumann.expected_residual(generators, layer.series)


def _generators(layer: AdapterLayer, trained: Array) -> Array:
    """Return the skew-symmetric generators S of a layer's blocks, shape (m, D, b, b); one block where it is shared."""
    size = layer.block_size
    matrices = _MATRIX[layer.storage](trained, size).reshape(layer.num_factors, -1, size, size)
    if layer.max_norm is not None:
        matrices = shrink(matrices, layer.max_norm)
    # Blocks of -S are the transposed blocks of S.
    return skew(-matrices if layer.transposed else matrices)


def _on_one_thread(size: int) -> contextlib.AbstractContextManager[None]:
    """Hold numpy to one thread where matrices are of such a ``size`` that it would take more."""
    return ONE_BLAS_THREAD if size > LARGEST_ALONE else contextlib.nullcontext()


def _no_rotation(source: SourcedAdapter, layer: AdapterLayer) -> InputError:
    return InputError(
        f"{layer.module}: the values in {source.name} are too large to give a rotation.",
        hint="The training diverged, or the file is damaged. Use an earlier adapter.",
    )


def check_values(source: SourcedAdapter) -> list[Notice]:
    """Read every trained tensor of an adapter and note what no header shows: damage, zeros, no training at all."""
    return inspect_values(source)[0]


@np.errstate(all="ignore")
def inspect_values(source: SourcedAdapter) -> tuple[list[Notice], list[str]]:
    """Return what ``check_values`` notes, and the modules that are untrained."""
    notices = []
    untrained = []
    for layer in source.adapter.layers:
        blocks = read_array(source.refs[layer.blocks])
        scale = None if layer.scale is None else read_array(source.refs[layer.scale])
        for key, values in ((layer.blocks, blocks), (layer.scale, scale)):
            if values is not None and not np.isfinite(values).all():
                bad = int((~np.isfinite(values)).sum())
                message = f"{bad} of {values.size} values are not finite: the training diverged, or the file is damaged"
                notices.append(Notice(Level.ERROR, "not-finite", str(key), message, "Use an earlier adapter."))
        if scale is not None and (scale == 0).any():
            message = f"{int((scale == 0).sum())} output scales are 0: these outputs vanish, which can't be undone"
            notices.append(Notice(Level.WARNING, "zero-scale", layer.module, message))
        if not _generators(layer, blocks).any() and (scale is None or (scale == 1).all()):
            untrained.append(layer.module)
    if untrained:
        count = f"{len(untrained)} of {len(source.adapter.layers)} layers"
        message = f"{count} are untrained (no rotation, all scales 1) and leave their weights as they are"
        notices.append(Notice(Level.WARNING, "untrained", source.name, f"{message}; the first: {untrained[0]}"))
    return notices, untrained


# A layer's operators by alpha.
Operators = dict[float, LayerOperator]


class LayerCache:
    """Operators ready to fold with, fused and on their device: built once each, the last few kept.

    Args:
        plan: The plan whose steps will be asked for.
        course: The path, and how far each output goes.
        dtype: The dtype to compute in on a device of torch's: ``float64`` or ``float32``.
        limit: Bytes that those kept may take, as ``rotation_bytes`` counts them.
        inverse: Give the operators that undo.
    """

    def __init__(self, plan: FoldPlan, course: Course, dtype: str, limit: int, *, inverse: bool = False) -> None:
        self._plan = plan
        self._path = course.path
        self._alphas = course.alphas_of_layers(plan)
        self._dtype = dtype
        self._inverse = inverse
        self._kept: Kept[tuple[int, str, torch.device | None], Operators] = Kept(limit)
        self.residuals: dict[tuple[int, str, float], float] = {}

    def get(self, step: Step, alpha: float, device: torch.device | None) -> LayerOperator:
        """Return the operator of ``step`` at ``alpha`` on ``device``; threads that ask at once share one build.

        Without a device it is one of numpy arrays in float64, in the stages that suit the compiled kernel. Torch is
        loaded then for no more than a way between base and tuned that bends.
        """
        key = (step.adapter, step.layer.module, device)
        size = rotation_bytes(step, self._path, self._alphas[key[:2]])
        return self._kept.get(key, size, lambda: self._build(step, device))[alpha]

    @np.errstate(all="ignore")
    def _build(self, step: Step, device: torch.device | None) -> Operators:
        """Build a layer's operators at all its alphas at once, from one decomposition."""
        source = self._plan.adapters[step.adapter]
        alphas = self._alphas[step.adapter, step.layer.module]
        built = build_arrays(source, step.layer)
        whole = {1.0} if self._path is not InterpolationPath.LINEAR else set(alphas)
        is_bent = not whole.issuperset(alphas)
        bent = built.tensors() if is_bent else built
        operators: Operators = {}
        for alpha in alphas:
            there = built if alpha in whole else bent
            with (
                _on_one_thread(step.layer.run_size(0, step.layer.num_factors)),
                ONE_TORCH_THREAD if is_bent else contextlib.nullcontext(),
            ):
                try:
                    there = there.at(alpha, self._path)
                    residual = there.rotation.residual()
                    there = there.inverse() if self._inverse else there
                except (ValueError, namespace(there.rotation.factors[0].blocks).linalg.LinAlgError) as error:
                    raise _no_rotation(source, step.layer) from error
                self.residuals[step.adapter, step.layer.module, alpha] = residual
                operators[alpha] = self._ready(there, step.view, device)
        return operators

    def _ready(self, operator: LayerOperator, view: View, device: torch.device | None) -> LayerOperator:
        """Return an operator fused, and as what ``device`` takes."""
        costs = KERNEL_COSTS if device is None else TORCH_COSTS
        # Seen as (n, out), a weight is folded group by group: the rotation must come apart there.
        rotation = operator.rotation.fused(costs.smallest if view is View.INPUT else 1, costs)
        scale = operator.scale
        is_array = isinstance(rotation.factors[0].blocks, np.ndarray)
        if device is None:
            if is_array:
                return replace(operator, rotation=rotation)
            return replace(operator, rotation=rotation.arrays(), scale=None if scale is None else scale.numpy())
        there = replace(operator, rotation=rotation)
        there = there.tensors() if is_array else there
        from boft_export.pipeline.torch_io import DTYPE_NAMED

        dtype = DTYPE_NAMED[self._dtype]
        scale = None if there.scale is None else there.scale.to(device, dtype)
        there = replace(there, rotation=there.rotation.to(device, dtype), scale=scale)
        for factor in there.rotation.factors:
            factor.prepare()
        return there
