"""A validation as one document: what ``--json`` prints, and what tables, pages and CI reports are made from."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from boft_export.errors import Level
from boft_export.validation.model import Check, Outcome, Validation
from boft_export.version import __version__

SCHEMA_VERSION = 1

_WORDS = {Outcome.PASS: "valid", Outcome.FAIL: "not valid", Outcome.INCONCLUSIVE: "inconclusive"}


def validation_document(validation: Validation, seconds: float) -> dict[str, Any]:
    """Return a validation as a JSON object, as ``schemas/validate.schema.json`` describes it.

    What is not finite becomes None, and half characters in names become question marks: JSON has no place for them.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "boft-export", "version": __version__},
        "adapters": validation.adapters,
        "base": validation.base,
        "merged": validation.merged,
        "onnx": validation.onnx,
        "outcome": validation.outcome,
        "headline": _headline(validation),
        "fail_on": sorted(validation.fail_on),
        "counts": _counts(validation.checks),
        "summary": _summary(validation),
        "checks": [{**vars(c), "fails": validation.fails(c)} for c in validation.checks],
        "layers": [vars(x) for x in validation.layers],
        "tensors": [vars(t) for t in validation.tensors],
        "functional": vars(validation.functional) if validation.functional else None,
        "seconds": seconds,
    }
    return {key: _plain(value) for key, value in document.items()}


def _plain(value: object) -> object:
    """Return a value in JSON's own types."""
    if isinstance(value, str):
        # A StrEnum's member too becomes a plain text.
        return str(value).encode(errors="replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    return value


def _ending(check: Check) -> str:
    """Return under which of the counts a check falls; whether it fails the whole is another question."""
    if check.outcome is Outcome.FAIL and check.level is not Level.ERROR:
        return "warning"
    return check.outcome.value


def _counts(checks: Sequence[Check]) -> dict[str, int]:
    counts = Counter(map(_ending, checks))
    return {key: counts[key] for key in ("pass", "fail", "warning", "inconclusive")}


def _headline(validation: Validation) -> str:
    """Return the outcome in a line."""
    total = len(validation.checks)
    counts = _counts(validation.checks)
    failed = sum(c.outcome is Outcome.FAIL for c in validation.failures)
    warnings = counts["fail"] + counts["warning"] - failed
    told = []
    if failed:
        told.append(f"{failed} of {total} checks failed")
    if undecided := counts["inconclusive"]:
        told.append(f"{undecided} could not be told" if told else f"{undecided} of {total} checks could not be told")
    if not told:
        told.append(f"{counts['pass']} check{'s' * (counts['pass'] != 1)} passed" if total else "nothing was checked")
    if warnings:
        told.append(f"{warnings} warning{'s' * (warnings != 1)}")
    return f"{_WORDS[validation.outcome]}: {', '.join(told)}"


def _summary(validation: Validation) -> list[dict[str, Any]]:
    """Return a row for each kind of check, in the order in which they first occur."""
    groups: dict[str, list[Check]] = defaultdict(list)
    for check in validation.checks:
        groups[check.check].append(check)
    return [
        {
            "check": name,
            **_counts(checks),
            "fails": sum(map(validation.fails, checks)),
            "worst": _worst(checks),
        }
        for name, checks in groups.items()
    ]


def _worst(checks: Sequence[Check]) -> dict[str, Any] | None:
    """Return the figure that is closest to its limit or farthest beyond it; one of a failed check, if any failed.

    Where nothing has a limit, it is the largest first figure of what failed; None where nothing failed.
    """
    lower = _lower_limits(checks)
    found = [
        (check.outcome is Outcome.FAIL, _nearness(check.measured[name], limit, at_least=name in lower), check, name)
        for check in checks
        for name, limit in check.limits.items()
        if name in check.measured and limit is not None
    ] or [
        (True, _nearness(next(iter(check.measured.values())), 0, at_least=False), check, next(iter(check.measured)))
        for check in checks
        if check.outcome is Outcome.FAIL and check.measured
    ]
    if not found:
        return None
    _, _, check, name = max(found, key=lambda f: f[:2])
    return {
        "subject": check.subject,
        "figure": name,
        "measured": check.measured[name],
        "limit": check.limits.get(name),
        "at_least": name in lower,
    }


def _nearness(measured: float | None, limit: float, *, at_least: bool) -> tuple[float, float]:
    """Return how near a figure comes to its limit: above 1 beyond it; then, by how much, where the limit is 0."""
    if measured is None or not math.isfinite(measured):
        return (math.inf, math.inf)
    low, high = (measured, limit) if at_least else (limit, measured)
    ratio = high / low if low > 0 else math.inf if high > low else 0.0
    return (ratio, high - low)


def _lower_limits(checks: Sequence[Check]) -> set[str]:
    """Return the figures whose limit is a least one, as the outcomes show: most are the most that is allowed."""
    votes: Counter[str] = Counter()
    for check in checks:
        compared = [
            (name, value - limit)
            for name, limit in check.limits.items()
            if (value := check.measured.get(name)) is not None and limit is not None
        ]
        # Of a check that failed by one of several figures, it is not said which.
        if check.outcome is Outcome.INCONCLUSIVE or (check.outcome is Outcome.FAIL and len(compared) > 1):
            continue
        for name, excess in compared:
            passed = check.outcome is Outcome.PASS
            votes[name] += (excess > 0) - (excess < 0) if passed else (excess < 0) - (excess > 0)
    return {name for name, vote in votes.items() if vote > 0}
