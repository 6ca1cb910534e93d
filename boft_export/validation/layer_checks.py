"""Judging an adapter by itself: is each layer's R orthogonal, and are its scales sound?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from boft_export.adapters import AdapterLayer
from boft_export.errors import InputError, Level
from boft_export.linalg.batched_lu import log_determinant
from boft_export.linalg.rotation import Rotation
from boft_export.pipeline.layers import LayerOperator, build_layer, expected_residual
from boft_export.planning import SourcedAdapter
from boft_export.validation.model import Check, LayerFacts, Outcome
from boft_export.validation.policy import Thresholds

_EPS = torch.finfo(torch.float64).eps
# How many times the error that float64 is expected to make is let pass.
_MARGIN = 16
# Elements of groups that are measured at once.
_AT_ONCE = 1 << 20
# Points of the spectrum that are told.
_QUANTILES = 20


def layer_facts(adapter: int, layer: AdapterLayer, built: LayerOperator, expected: float) -> LayerFacts:
    """Measure a layer's rotation, each coupled group of g features on its own: O(n g^2).

    Args:
        adapter: The adapter's number.
        layer: The layer.
        built: Its operator.
        expected: The residual that it has by design.
    """
    groups = built.rotation.groups().blocks
    # A few groups at a time, so that what is made of them stays small beside them.
    parts = [_measured(part) for part in torch.split(groups, max(1, _AT_ONCE // groups[0].numel()))]
    error, norms, squares, sign, log, angles = (torch.cat(x) for x in zip(*parts, strict=True))
    return LayerFacts(
        module=layer.module,
        adapter=adapter,
        num_features=layer.num_features,
        num_factors=layer.num_factors,
        block_size=layer.block_size,
        group_size=groups.shape[-1],
        residual=float(error.max()),
        residual_norm=float(torch.linalg.vector_norm(norms)),
        expected_residual=expected,
        determinant=float(sign.prod() * log.sum().exp()),
        smallest_singular_value=math.sqrt(max(float(squares.min()), 0.0)),
        largest_singular_value=math.sqrt(float(squares.max())),
        angles=tuple(_quantiles(angles)),
        smallest_scale=None if built.scale is None else float(built.scale.min()),
        largest_scale=None if built.scale is None else float(built.scale.max()),
    )


def _measured(groups: Tensor) -> tuple[Tensor, ...]:
    """Return what is measured of each group, with E = R^T R - I.

    max |E|, the norm of E, the squares of the singular values, sign and logarithm of the determinant, angles.
    """
    error = torch.bmm(groups.mT, groups) - torch.eye(groups.shape[-1], dtype=groups.dtype)
    # Of R^T R = I + E the singular values are sqrt(1 + eig(E)), accurate however small E is.
    squares = 1 + torch.linalg.eigvalsh(error)
    sign, log = log_determinant(groups)
    norms = torch.linalg.matrix_norm(error)
    return error.abs().amax(dim=(1, 2)), norms, squares.reshape(-1), sign, log, _angles(groups)


def _angles(groups: Tensor) -> Tensor:
    """Return the angles by which orthogonal groups turn their planes, each plane's twice, in radians, 0 to pi.

    (R - I)^T (R - I) has the eigenvalues 4 sin^2(angle / 2).
    """
    change = groups - torch.eye(groups.shape[-1], dtype=groups.dtype)
    half_sines = torch.linalg.eigvalsh(torch.bmm(change.mT, change)).clamp_min(0).sqrt() / 2
    return 2 * torch.asin(half_sines.clamp_max(1)).reshape(-1)


def _quantiles(values: Tensor) -> list[float]:
    ordered = values.sort().values
    places = torch.linspace(0, len(ordered) - 1, _QUANTILES + 1).round().long()
    return [float(v) for v in ordered[places]]


def check_layers(
    number: int, source: SourcedAdapter, limits: Thresholds
) -> Iterator[tuple[LayerFacts | None, list[Check]]]:
    """Measure and judge an adapter's layers, one in memory at a time.

    Args:
        number: The adapter's number.
        source: The adapter.
        limits: Where checks fail.

    Yields:
        What was measured of each layer, None where its values give no rotation, and its checks.

    Raises:
        AccessError: If the adapter's file can't be read.
    """
    for layer in source.adapter.layers:
        try:
            built = build_layer(source, layer)
        except InputError as error:
            check = Check(
                "orthogonality", layer.module, Outcome.FAIL, error.message, finding="no-rotation", hint=error.hint
            )
            yield None, [check]
            continue
        facts = layer_facts(number, layer, built, expected_residual(source, layer))
        limit = limits.max_residual
        if limit is None:
            limit = _residual_limit(facts, built.rotation, len(layer.series))
        checks = [_orthogonality(facts, limit, limits.max_series_residual)]
        if built.scale is not None:
            checks.append(_scales(layer.module, built.scale, limits))
        if math.isfinite(limits.max_angle):
            checks.append(_angle(facts, limits))
        yield facts, checks


def _orthogonality(facts: LayerFacts, limit: float, coarse: float) -> Check:
    """Judge |R^T R - I|_2 against what it is by design: 0, or the error that a series must have."""
    values = facts.smallest_singular_value, facts.largest_singular_value
    norm = max(abs(v**2 - 1) for v in values)
    measured = {
        "deviation": abs(norm - facts.expected_residual),
        "residual": facts.residual,
        "residual_norm": facts.residual_norm,
        "expected_residual": facts.expected_residual,
        "determinant": facts.determinant,
        "smallest_singular_value": values[0],
        "largest_singular_value": values[1],
        "largest_angle": facts.angles[-1],
    }

    def check(outcome: Outcome, message: str, finding: str | None = None, level: Level = Level.ERROR) -> Check:
        return Check(
            "orthogonality", facts.module, outcome, message, level, finding, measured=measured,
            limits={"deviation": limit},
        )  # fmt: skip

    expected = f"{facts.expected_residual:.1e}" if facts.expected_residual else "0"
    if not measured["deviation"] <= limit:
        return check(
            Outcome.FAIL, f"|R^T R - I| is {norm:.1e}, expected was {expected} to within {limit:.1e}", "not-orthogonal"
        )
    if facts.determinant < 0:
        return check(Outcome.FAIL, f"R is a reflection: its determinant is {facts.determinant:.6g}", "reflection")
    if facts.expected_residual > coarse:
        message = f"its series is far from a rotation: |R^T R - I| is {expected}"
        return check(Outcome.FAIL, message, "coarse-series", Level.WARNING)
    note = ", which is the error that its series must have" if facts.expected_residual else ""
    return check(Outcome.PASS, f"|R^T R - I| is {norm:.1e}{note}")


def _residual_limit(facts: LayerFacts, rotation: Rotation, terms: int) -> float:
    """Return what float64 may make of the residual: of m factors, over g coupled features, of generators of their size.

    A Cayley transform is orthogonal to about eps |S|; each term of a series adds its own errors, of the series' size.
    """
    sizes = [float(torch.linalg.matrix_norm(f.generator).max()) for f in rotation.factors if f.generator is not None]
    size = 1 + max(sizes, default=0.0)
    return _MARGIN * _EPS * facts.num_factors * math.sqrt(facts.group_size) * size * (
        max(terms, 1) * (1 + facts.expected_residual)
    )  # fmt: skip


def _scales(module: str, scale: Tensor, limits: Thresholds) -> Check:
    low, high = float(scale.min()), float(scale.max())
    measured = {"smallest_scale": low, "largest_scale": high, "zeros": int((scale == 0).sum())}
    told = {"smallest_scale": limits.min_scale, "largest_scale": limits.max_scale}
    told = {k: v for k, v in told.items() if math.isfinite(v)}

    def failed(finding: str, message: str, level: Level) -> Check:
        return Check("scale", module, Outcome.FAIL, message, level, finding, measured=measured, limits=told)

    if not torch.isfinite(scale).all():
        return failed("not-finite", "output scales are not finite", Level.ERROR)
    if low < limits.min_scale or high > limits.max_scale:
        bounds = f"{limits.min_scale:.6g} to {limits.max_scale:.6g}"
        return failed(
            "scale-out-of-bounds", f"output scales are {low:.6g} to {high:.6g}, allowed is {bounds}", Level.ERROR
        )
    if zeros := measured["zeros"]:
        return failed(
            "zero-scale", f"{zeros} output scales are 0: these outputs vanish, which can't be undone", Level.WARNING
        )
    if low < 0:
        count = int((scale < 0).sum())
        return failed("negative-scale", f"{count} output scales are negative, down to {low:.6g}", Level.WARNING)
    return Check(
        "scale", module, Outcome.PASS, f"output scales are {low:.6g} to {high:.6g}", measured=measured, limits=told
    )


def _angle(facts: LayerFacts, limits: Thresholds) -> Check:
    largest = facts.angles[-1]
    measured, told = {"largest_angle": largest}, {"largest_angle": limits.max_angle}
    message = f"R turns by up to {largest:.4g} rad"
    if largest > limits.max_angle:
        message += f", at most {limits.max_angle:.4g} is allowed"
        return Check(
            "angle", facts.module, Outcome.FAIL, message, finding="large-angle", measured=measured, limits=told
        )
    return Check("angle", facts.module, Outcome.PASS, message, measured=measured, limits=told)


def check_required(patterns: Sequence[str], modules: Sequence[str]) -> list[Check]:
    """Check that each pattern matches a layer that is rotated."""
    found = []
    for pattern in patterns:
        count = sum(fnmatchcase(m, pattern) for m in modules)
        if count:
            found.append(Check("required-layers", pattern, Outcome.PASS, f"{count} layers", measured={"layers": count}))
        else:
            message = "no layer that the adapter rotates matches"
            found.append(Check("required-layers", pattern, Outcome.FAIL, message, finding="missing-layer"))
    return found
