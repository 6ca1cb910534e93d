"""What a validation asks for: thresholds, layers that must be there, and findings that are let pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from boft_export.checkpoint.folder import read_text
from boft_export.errors import InputError, Level, UsageError
from boft_export.planning.names import near_matches
from boft_export.validation.model import Check, Outcome

FAIL_ON = ("error", "warning", "inconclusive")
# A policy is written by hand.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Thresholds:
    """Where a check fails. None means that the limit follows from dtypes and sizes.

    Attributes:
        max_residual: By how much |R^T R - I|, the 2-norm, may differ from what a parametrisation has by design; by
            default what float64 makes of a product of that size.
        max_series_residual: Of |R^T R - I| of a series that only comes close to a rotation.
        max_angle: Of the angles of R, in radians; any by default.
        min_scale: Of the output scales, where 0 itself never passes.
        max_scale: Of the output scales.
        arithmetic: Unit roundoff of the arithmetic whose errors are let pass in a merge: float32's by default. 0 wants
            every element correctly rounded.
        max_wrong: Share of a tensor's elements that may not be correctly rounded, even if by the arithmetic's errors.
        max_ulp: Steps of the dtype that an element may be off by.
        gram_factor: Without an adapter: how many times what rounding explains the Gram matrix may be off by.
        functional_factor: How many times the noise of rounding the models' outputs may differ by.
        max_kl: Of KL(reference | merged), in nats.
        min_top1: Share of predictions with the same first choice.
        min_cosine: Of outputs.
        max_difference: Of an ONNX graph's outputs from the model's, as a share of the largest.
    """

    max_residual: float | None = None
    max_series_residual: float = 0.1
    max_angle: float = math.inf
    min_scale: float = -math.inf
    max_scale: float = math.inf
    arithmetic: float = 2.0**-24
    max_wrong: float = 1.0
    max_ulp: float = math.inf
    gram_factor: float = 1.0
    functional_factor: float = 4.0
    max_kl: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None
    max_difference: float | None = None

    def changed(self, values: Mapping[str, object]) -> Thresholds:
        """Return the thresholds with some given other values.

        Raises:
            UsageError: If there is no such threshold, or a value is no number that could be one.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                near = near_matches(name, known)
                raise UsageError(
                    f"there is no threshold {name}" + (f"; near matches: {', '.join(near)}." if near else "."),
                    hint=f"There are {', '.join(known)}.",
                )
        return replace(self, **{name: _threshold(name, value) for name, value in values.items()})


def _threshold(name: str, value: object) -> float:
    """Return a threshold's value; YAML takes 1e-5 for text, as it has no dot."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"threshold {name} should be a number, found {str(value)[:_SHOWN]}.")
    if (
        (number < 0 and name not in _SIGNED)
        or (name in _POSITIVE and not 0 < number < math.inf)
        or (name == "arithmetic" and number >= 1)
    ):
        raise UsageError(f"threshold {name} can't be {number:g}.")
    return number


# Thresholds that may be negative, and those that multiply something.
_SIGNED = {"min_scale", "max_scale", "min_cosine"}
_POSITIVE = {"gram_factor", "functional_factor"}
_SHOWN = 40


@dataclass(frozen=True)
class Policy:
    """What is asked of an adapter and a merge.

    Attributes:
        thresholds: Where checks fail.
        required_layers: Glob patterns of module names; each must match a layer that the adapter rotates.
        allowed_warnings: Findings of level warning that are let pass, as ``finding`` or ``finding:subject``; both may
            be glob patterns.
        allowed_changes: Without an adapter: glob patterns of tensors that may differ from the base in any way.
        fail_on: What fails the whole beside errors: ``warning``, ``inconclusive``.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    required_layers: tuple[str, ...] = ()
    allowed_warnings: tuple[str, ...] = ()
    allowed_changes: tuple[str, ...] = ()
    fail_on: frozenset[str] = frozenset({"error"})

    def let_pass(self, check: Check) -> Check:
        """Return a check as passed where it is a warning that is allowed."""
        if check.outcome is not Outcome.FAIL or check.level is Level.ERROR:
            return check
        told = (check.finding or "", f"{check.finding}:{check.subject}")
        if any(fnmatchcase(t, pattern) for t in told for pattern in self.allowed_warnings):
            return replace(check, outcome=Outcome.PASS, message=f"{check.message} (allowed by the policy)")
        return check


def parse_fail_on(values: Sequence[str]) -> frozenset[str]:
    """Return what fails the whole; errors always do.

    Raises:
        UsageError: If a value is none of ``error``, ``warning``, ``inconclusive``.
    """
    for value in values:
        if value not in FAIL_ON:
            raise UsageError(f"fail-on {value} is not one of {', '.join(FAIL_ON)}.")
    return frozenset({"error", *values})


def parse_thresholds(texts: Sequence[str]) -> dict[str, object]:
    """Return the values in ``NAME=VALUE`` texts.

    Raises:
        UsageError: If a text has no number after ``=``.
    """
    found: dict[str, object] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UsageError(f"threshold {text} should read NAME=NUMBER, as max_angle=0.5.") from None
    return found


def read_policy(path: Path) -> Policy:
    """Read a policy file: YAML (and so JSON) with keys as ``Policy`` has them.

    Raises:
        AccessError: If the file can't be read.
        InputError: If it is not YAML, or a key or a value is none that a policy has.
    """
    text = read_text(path)
    if len(text) > _MOST_BYTES:
        raise InputError(f"{path} has {len(text):,} characters: that is no policy.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        # A date that is none, or a number of thousands of digits, is a ValueError.
        raise InputError(f"{path} is not YAML that can be read: {error}.") from error
    if value is None:
        return Policy()
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold names and values, found {type(value).__name__}.")
    found: dict[str, Any] = {}
    known = [f.name for f in fields(Policy)]
    for key, content in value.items():
        if key not in known:
            raise InputError(f"{path}: there is no {key} in a policy.", hint=f"There are {', '.join(known)}.")
        try:
            found[key] = _value(key, content)
        except UsageError as error:
            raise InputError(f"{path}: {error.message}", hint=error.hint) from error
    return Policy(**found)


def _value(key: str, content: object) -> object:
    if key == "thresholds":
        if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
            raise UsageError("thresholds should be names and numbers.")
        return Thresholds().changed(content)
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise UsageError(f"{key} should be a list of texts.")
    return parse_fail_on(texts) if key == "fail_on" else tuple(texts)
