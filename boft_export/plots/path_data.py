"""A measured path's document in the order in which it is shown: outputs by alpha, layers by number and kind."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

OTHER = "other"
# Colours of the kinds of module in their order; the last one is that of all others.
KIND_COLOURS = ("#2a6fc9", "#d9700f", "#25915a", "#cf3f4f", "#7d5bd0", "#12899f", "#96751a", "#b5479e", "#7f8791")


@dataclass(frozen=True)
class Layer:
    """A layer along the path.

    Attributes:
        module: Its name.
        kind: What is left of its name without the numbers, as short as tells the kinds apart.
        adapter: The adapter's number.
        num_features: The size of its rotation.
        points: What it is at each output, in the sweep's order.
    """

    module: str
    kind: str
    adapter: int
    num_features: int
    points: Sequence[Mapping[str, float | None]]


@dataclass(frozen=True)
class Sweep:
    """A document in the order in which it is shown: outputs by alpha, layers by number.

    Attributes:
        base: The base's name.
        adapters: The adapters' names.
        path: The path's name.
        program: The program's name and version.
        labels: What each output is called.
        alphas: Each output's alphas, one for each adapter.
        evaluations: Each output's own figures.
        layers: All layers.
    """

    base: str
    adapters: tuple[str, ...]
    path: str
    program: str
    labels: tuple[str, ...]
    alphas: tuple[tuple[float, ...], ...]
    evaluations: tuple[Mapping[str, float | None], ...]
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Sweep:
        """Return a document's outputs and layers in order."""
        outputs = document["outputs"]
        order = sorted(range(len(outputs)), key=lambda i: tuple(outputs[i]["alpha"]))
        layers = _in_model_order(document["layers"])
        kinds = _kinds([printable(x["module"]) for x in layers])
        return cls(
            base=printable(document["base"]),
            adapters=tuple(map(printable, document["adapters"])),
            path=printable(document["path"]),
            program=printable(f"{document['tool']['name']} {document['tool']['version']}"),
            labels=tuple(printable(outputs[i]["label"]) for i in order),
            alphas=tuple(tuple(outputs[i]["alpha"]) for i in order),
            evaluations=tuple(
                {printable(k): _finite(v) for k, v in (outputs[i]["evaluation"] or {}).items()} for i in order
            ),
            layers=tuple(
                Layer(
                    printable(x["module"]),
                    kind,
                    x["adapter"],
                    x["num_features"],
                    [{k: _finite(v) for k, v in x["points"][i].items()} for i in order],
                )
                for x, kind in zip(layers, kinds, strict=True)
            ),
        )

    @property
    def is_scale(self) -> bool:
        """Whether one alpha says it all; else outputs are told apart by their labels."""
        return all(len(set(a)) == 1 for a in self.alphas)

    @property
    def positions(self) -> list[float]:
        """Where each output is on the axis."""
        return [a[0] for a in self.alphas] if self.is_scale else [float(i) for i in range(len(self.alphas))]

    @property
    def metrics(self) -> list[str]:
        """The names of the evaluations' figures, in the order in which they first occur."""
        return list(dict.fromkeys(k for e in self.evaluations for k in e))

    @cached_property
    def colours(self) -> dict[str, str]:
        """The kinds that have a colour of their own, the most frequent ones, and ``OTHER`` where there are more."""
        counts = Counter(layer.kind for layer in self.layers)
        own = len(KIND_COLOURS) - 1
        if len(counts) <= own:
            return dict(zip(counts, KIND_COLOURS, strict=False))
        kept = {kind for kind, _ in counts.most_common(own - 1)}
        return {**dict(zip((k for k in counts if k in kept), KIND_COLOURS, strict=False)), OTHER: KIND_COLOURS[-1]}

    def groups(self) -> dict[str, list[Layer]]:
        """Return the layers by kind, in the order of ``colours``."""
        found: dict[str, list[Layer]] = {kind: [] for kind in self.colours}
        for layer in self.layers:
            found[layer.kind if layer.kind in found else OTHER].append(layer)
        return found

    def column(self, quantity: Quantity, output: int) -> list[float]:
        """Return what the layers are at an output, but for those that have no figure there."""
        values = (quantity(layer.points[output]) for layer in self.layers)
        return [v for v in values if v is not None]


@dataclass(frozen=True)
class Quantity:
    """A figure that each layer has at each output.

    Attributes:
        key: The point's entry.
        factor: By what it is multiplied to be shown.
        offset: What is subtracted first.
    """

    key: str
    factor: float = 1.0
    offset: float = 0.0

    def __call__(self, point: Mapping[str, float | None]) -> float | None:
        """Return what is shown of a point."""
        value = point[self.key]
        return None if value is None else (value - self.offset) * self.factor


RMS_ANGLE = Quantity("rms_angle", math.degrees(1))
LARGEST_ANGLE = Quantity("largest_angle", math.degrees(1))
CHANGE = Quantity("relative_change", 100)
ENERGY = Quantity("energy_ratio", offset=1)
RESIDUAL = Quantity("residual")


def printable(text: object) -> str:
    """Return a text without what has no place in a line of one: control characters, half characters, directions."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def shortened(text: str, length: int) -> str:
    """Return a text's end where it is too long, from a dot on if one is near: names that differ do so at the end."""
    if len(text) <= length:
        return text
    end = text[1 - length :]
    _, dot, rest = end.partition(".")
    return "…" + (rest if dot and len(rest) > length // 2 else end)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _in_model_order(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return layers by adapter and number, layer 2 before layer 10; the rest of their names stays in its order."""
    names = [re.findall(r"[0-9]+|[^0-9]+", layer["module"]) for layer in layers]
    first: dict[str, int] = {}
    for part in (p for name in names for p in name):
        first.setdefault(part, len(first))

    def key(i: int) -> tuple[int, list[tuple[int, int, str]]]:
        # Numbers compare by length, then as text: int refuses very long ones.
        digits = [part.lstrip("0") if part.isdecimal() else "" for part in names[i]]
        return layers[i]["adapter"], [
            (0, len(d), d) if part.isdecimal() else (1, first[part], "")
            for part, d in zip(names[i], digits, strict=True)
        ]

    return [layers[i] for i in sorted(range(len(layers)), key=key)]


def _kinds(modules: Sequence[str]) -> list[str]:
    """Return each module's kind: what follows the last number in its name, cut short where that stays unique."""
    tails = []
    for module in modules:
        parts = module.split(".")
        while len(parts) > 1 and parts[-1].isdecimal():
            parts.pop()
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
        tails.append(tuple(parts[numbers[-1] + 1 if numbers else 0 :]))
    distinct = set(tails)
    endings = Counter(tail[-i:] for tail in distinct for i in range(1, len(tail) + 1))
    short = {t: next((t[-i:] for i in range(1, len(t)) if endings[t[-i:]] == 1), t) for t in distinct}
    return [".".join(short[tail]) for tail in tails]
