"""A measured path's document in the order in which it is shown: outputs by alpha, layers by number and kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from boft_export.plots.module_names import OTHER, kind_colours, model_order, module_kinds, printable


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
        layers = [document["layers"][i] for i in model_order([x["module"] for x in document["layers"]])]
        layers.sort(key=lambda layer: layer["adapter"])
        kinds = module_kinds([printable(x["module"]) for x in layers])
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
        return kind_colours([layer.kind for layer in self.layers])

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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
