"""Alphas as people write them: in options, as ranges, and in files of patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, DecimalException, InvalidOperation, Overflow
from pathlib import Path

import yaml

from boft_export.checkpoint.folder import read_text
from boft_export.errors import DamagedFileError, UsageError

# One alpha for all adapters, or one for each.
Alpha = float | Sequence[float]
AlphaMap = Mapping[str, Alpha]

_MOST_STEPS = 1000


def several(alpha: Alpha) -> tuple[float, ...]:
    """Return an alpha as the numbers it has, one or more."""
    return tuple(map(float, alpha)) if isinstance(alpha, Sequence) else (float(alpha),)


def number_text(value: float) -> str:
    """Return a number as people write it: 0.25, 1, -0.5."""
    return repr(value + 0.0).removesuffix(".0")


def parse_alpha(text: str) -> Alpha:
    """Return the alpha, or the alphas in the order of the adapters, that ``0.5`` or ``0.5,0.2`` stands for.

    Raises:
        UsageError: If it is not a number, or not several with commas between them.
    """
    values = [float(_decimal(part, text)) for part in text.split(",")]
    return values[0] if len(values) == 1 else tuple(values)


def parse_sweep(text: str) -> tuple[float, ...]:
    """Return the alphas of ``START:STOP:STEP``, both ends included where the steps meet them.

    Raises:
        UsageError: If it is not three numbers, or the steps don't lead from one to the other.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"{text} is not a range of alphas.", hint="Write START:STOP:STEP, as 0:1:0.25.")
    # In decimals 0.1 is what it says, and so is ten times it.
    start, stop, step = (_decimal(p, text) for p in parts)
    try:
        count = (stop - start) / step
    except Overflow:
        count = Decimal("Infinity")
    except DecimalException:
        count = Decimal(-1)
    if count < 0:
        raise UsageError(f"{text} leads nowhere: steps of {step} from {start} do not come to {stop}.")
    if count > _MOST_STEPS:
        raise UsageError(f"{text} is {count:.3g} alphas, more than the {_MOST_STEPS} that one run may write.")
    return tuple(float(start + i * step) for i in range(int(count) + 1))


def read_alpha_map(path: Path) -> dict[str, Alpha]:
    """Return the patterns and alphas of a YAML or JSON file, in order.

    Raises:
        AccessError: If it can't be read.
        DamagedFileError: If it is not a mapping of patterns to numbers, or to lists of them.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        where = str(getattr(error, "problem_mark", "") or "").strip()
        raise DamagedFileError(
            f"{path} is not valid YAML: {getattr(error, 'problem', None) or 'nested too deep'} {where}".rstrip() + ".",
            hint="Put patterns in quotes: '*.q_proj.weight': 0.5",
        ) from error
    if not isinstance(content, dict) or not content:
        raise DamagedFileError(f"{path} should map patterns to alphas, found {type(content).__name__}.")
    for pattern, value in content.items():
        parts = value if isinstance(value, list) and value else [value]
        if not isinstance(pattern, str) or not all(_is_number(v) for v in parts):
            raise DamagedFileError(
                f"{path}: {pattern} should have a number, or a list with one for each adapter, found {value!r}."
            )
    return {k: tuple(map(float, v)) if isinstance(v, list) else float(v) for k, v in content.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decimal(text: str, whole: str) -> Decimal:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite():
        raise UsageError(f"{text.strip() or 'nothing'} in alpha {whole!r} is not a finite number.")
    return value
