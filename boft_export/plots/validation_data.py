"""A validation's document in the order in which it is shown: layers by kind, findings that are alike together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from boft_export.plots.module_names import OTHER, kind_colours, model_order, module_kinds, printable

# Of a tensor that no merge touches, there is nothing to tell but that.
_UNTOUCHED = {"copy", "identical"}
# By these names of limits a layer's distance from orthogonal is judged.
_DISTANCES = ("deviation", "residual")


@dataclass(frozen=True)
class Part:
    """An adapter layer or a tensor.

    Attributes:
        name: Its name.
        kind: Its kind of module.
        facts: What was measured of it, as in the document.
        failed: Whether a check of it fails the whole.
        limit: How far from orthogonal it may be; None where that was not judged.
    """

    name: str
    kind: str
    facts: Mapping[str, Any]
    failed: bool
    limit: float | None = None


@dataclass(frozen=True)
class Finding:
    """Checks that ended alike.

    Attributes:
        name: What is wrong, or what was checked.
        hint: The next step.
        checks: The checks.
    """

    name: str
    hint: str | None
    checks: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Shown:
    """A document in the order in which it is shown, with texts that can be.

    Attributes:
        document: All of it.
        layers: The adapters' layers by number.
        tensors: The tensors that a merge touches, or that failed, by number.
        untouched: How many other tensors there are.
    """

    document: Mapping[str, Any]
    layers: tuple[Part, ...]
    tensors: tuple[Part, ...]
    untouched: int

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Shown:
        """Return a document's layers and tensors in order.

        Args:
            document: From ``validation_document``.
        """
        clean = {key: _clean(value) for key, value in document.items()}
        failed = {c["subject"] for c in clean["checks"] if c["fails"] and c["outcome"] == "fail"}
        touched = [t for t in clean["tensors"] if t["action"] not in _UNTOUCHED or t["wrong"] or t["name"] in failed]
        # Layers and their weights are of one kind.
        names = [x["module"] for x in clean["layers"]] + [t["name"].removesuffix(".weight") for t in touched]
        kinds = module_kinds(names)
        limits = _limits(clean["checks"])
        layers = [
            Part(x["module"], kind, x, x["module"] in failed, _allowed(x, limits))
            for x, kind in zip(clean["layers"], kinds, strict=False)
        ]
        tensors = [
            Part(t["name"], kind, t, t["name"] in failed) for t, kind in zip(touched, kinds[len(layers) :], strict=True)
        ]
        return cls(
            clean,
            tuple(sorted(_in_order(layers), key=lambda p: p.facts["adapter"])),
            tuple(_in_order(tensors)),
            len(clean["tensors"]) - len(touched),
        )

    @property
    def title(self) -> str:
        """What was validated."""
        document = self.document
        adapters = " and ".join(document["adapters"])
        merged, base = document["merged"] or document["onnx"], document["base"]
        if merged is None:
            return adapters + (f" for {base}" if base is not None else "") or "nothing"
        origin = " with ".join(x for x in (base, adapters) if x)
        return f"{merged} from {origin}" if origin else merged

    @cached_property
    def colours(self) -> dict[str, str]:
        """The colours of the kinds of module."""
        return kind_colours([p.kind for p in self.layers + self.tensors])

    @property
    def kind_counts(self) -> dict[str, int]:
        """How many layers, or tensors where they are more, there are of each kind that has a colour."""
        layers, tensors = self.by_kind(self.layers), self.by_kind(self.tensors)
        return {kind: max(len(layers[kind]), len(tensors[kind])) for kind in self.colours}

    def by_kind(self, parts: Iterable[Part]) -> dict[str, list[Part]]:
        """Return parts by kind, in the order of ``colours``."""
        found: dict[str, list[Part]] = {kind: [] for kind in self.colours}
        for part in parts:
            found[part.kind if part.kind in found else OTHER].append(part)
        return found

    def findings(self, ending: str) -> list[Finding]:
        """Return the checks that fail the whole, that failed without doing so, or that could not be told.

        Args:
            ending: ``fails``, ``warning`` or ``inconclusive``.
        """
        return alike(c for c in self.document["checks"] if how(c) == ending)


def how(check: Mapping[str, Any]) -> str | None:
    """Return whether a check ``fails`` the whole, is a ``warning`` or ``inconclusive``; None where it passed."""
    if check["fails"]:
        return "fails"
    return {"pass": None, "fail": "warning", "inconclusive": "inconclusive"}[check["outcome"]]


def alike(checks: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Return checks with the same name, finding and hint together, in the order in which they first occur."""
    groups: dict[tuple[str, str | None, str | None], list[Mapping[str, Any]]] = defaultdict(list)
    for check in checks:
        groups[check["check"], check["finding"], check["hint"]].append(check)
    return [Finding(finding or name, hint, members) for (name, finding, hint), members in groups.items()]


def figure(value: float | None) -> str:
    """Return a figure of any size in a few digits."""
    if value is None:
        return "no number"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def figures(check: Mapping[str, Any]) -> list[str]:
    """Return what a check measured and what it compared that with: ``residual 0.031 (limit 1e-12)``."""
    measured, limits = check["measured"], check["limits"]
    # What was judged comes first; what could not be measured is told only of that.
    names = [n for n in measured if n in limits] + [n for n, v in measured.items() if n not in limits and v is not None]
    return [f"{words(n)} {figure(measured[n])}" + _limit(limits, n) for n in names]


def _limit(limits: Mapping[str, float | None], name: str) -> str:
    return f" (limit {figure(limits[name])})" if name in limits else ""


def bound(worst: Mapping[str, Any]) -> str:
    """Return the limit of a worst figure with its side, ``≤ 1e-13``; empty without one."""
    return "" if worst["limit"] is None else f"{'≥' if worst['at_least'] else '≤'} {figure(worst['limit'])}"


def words(name: str) -> str:
    """Return a figure's name as it is read."""
    return name.replace("_", " ")


def _clean(value: object, *, lines: bool = False) -> Any:  # noqa: ANN401  # JSON can be anything
    """Return a value with texts that can be shown; messages and hints may have several lines."""
    if isinstance(value, str):
        return "\n".join(map(printable, value.split("\n"))) if lines else printable(value)
    if isinstance(value, Mapping):
        return {printable(k): _clean(v, lines=k in {"message", "hint"}) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def _in_order(parts: Sequence[Part]) -> list[Part]:
    return [parts[i] for i in model_order([p.name for p in parts])]


def _limits(checks: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    return {
        c["subject"]: c["limits"][name]
        for c in checks
        for name in _DISTANCES
        if c["check"] == "orthogonality" and c["limits"].get(name) is not None
    }


def _allowed(layer: Mapping[str, Any], limits: Mapping[str, float]) -> float | None:
    """Return how far from orthogonal a layer may be: as far as its series is by design, and a little more."""
    limit = limits.get(layer["module"])
    return None if limit is None else limit + (layer["expected_residual"] or 0)
