"""Alphas as people write them: in options, as ranges, and in files of patterns."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import Decimal, DecimalException, InvalidOperation, Overflow
from pathlib import Path
from typing import Any

import yaml

from boft_export.checkpoint.folder import read_text
from boft_export.errors import DamagedFileError, UsageError

# One alpha for all adapters, or one for each.
Alpha = float | Sequence[float]
AlphaMap = Mapping[str, Alpha]

_MOST_STEPS = 1000
_FLOAT, _INT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp"))


def several(alpha: object) -> tuple[float, ...]:
    """Return an alpha as the numbers it has, one or more.

    Raises:
        UsageError: If it has others than numbers.
    """
    try:
        if isinstance(alpha, str):
            raise TypeError("a text")
        # -0 is 0.
        values: Iterable[Any] = alpha if isinstance(alpha, Iterable) else (alpha,)
        return tuple(float(a) + 0.0 for a in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"alpha {alpha!r} is not a number, or one for each adapter: {error}.") from error


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
    text = read_text(path)
    try:
        if text.lstrip().startswith("{"):
            content = json.loads(text, object_pairs_hook=_once)
        else:
            content = yaml.load(text, _PlainLoader)  # noqa: S506  # a safe loader's own child
    except (yaml.YAMLError, RecursionError, TypeError, ValueError, OverflowError) as error:
        where = str(getattr(error, "problem_mark", "") or "").strip()
        what = getattr(error, "problem", None) or error
        raise DamagedFileError(
            f"{path} is not valid YAML or JSON: {what} {where}".rstrip() + ".",
            hint="Put patterns in quotes: '*.q_proj.weight': 0.5",
        ) from error
    if not isinstance(content, dict) or not content:
        found = "nothing" if not content else type(content).__name__
        raise DamagedFileError(f"{path} should map patterns to alphas, found {found}.")
    for pattern, value in content.items():
        parts = value if isinstance(value, list) and value else [value]
        if not isinstance(pattern, str) or not all(_is_number(v) for v in parts):
            raise DamagedFileError(
                f"{path}: {pattern} should have a number, or a list with one for each adapter, found {value!r}."
            )
    try:
        return {k: tuple(map(float, v)) if isinstance(v, list) else float(v) for k, v in content.items()}
    except OverflowError as error:
        raise DamagedFileError(f"{path} has a number that is too large: {error}.") from error


def _once(pairs: Iterable[tuple[Hashable, object]]) -> dict[Hashable, object]:
    """Return a mapping whose keys occur once: of the same pattern twice, it is unclear which one is meant."""
    found: dict[Hashable, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} occurs twice")
        found[key] = value
    return found


class _PlainLoader(yaml.SafeLoader):
    """YAML whose numbers are decimal, 1e-3 among them, and whose keys occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:  # noqa: ARG002, FBT001, FBT002  # PyYAML's own signature
        """Return a mapping, refusing a key that occurs twice."""
        return _once((self.construct_object(k, deep=True), self.construct_object(v, deep=True)) for k, v in node.value)


# YAML 1.1 takes 1:30 for 90 and 1e-3 for a text; plain decimal numbers are what is meant.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in {_FLOAT, _INT, _TIME}]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


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
