"""What every adapter format is read into: data that says which tensors rotate, which replace, which are dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import PureWindowsPath
from typing import Any, Protocol

from boft_export.errors import Notice

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class TensorInfo(Protocol):
    """What a reader may know of an adapter's tensor: its header."""

    @property
    def dtype(self) -> str:
        """Its dtype, by the safetensors format's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


class Storage(StrEnum):
    """How the skew-symmetric generators S of the blocks are stored."""

    MATRIX = "matrix"
    """As A, shape (b, b): S = (A - A^T) / 2."""
    TRIANGLE = "triangle"
    """As the b (b - 1) / 2 entries of S above its diagonal, row by row."""


class Parametrization(StrEnum):
    """How generators S become blocks."""

    CAYLEY = "cayley"
    """(I - S)(I + S)^-1: orthogonal."""
    NEUMANN = "neumann"
    """c_0 I + c_1 S + c_2 S^2 + ..., the first terms of (I + S)(I - S)^-1: only nearly orthogonal."""


class Pairing(StrEnum):
    """Which features the blocks of factor i mix."""

    BUTTERFLY = "butterfly"
    """Half-blocks 2^i apart."""


class View(StrEnum):
    """How a weight tensor is seen as the matrix that is rotated and scaled."""

    INPUT = "input"
    """W as (out, n): diag(s) W R^T. A Conv2d's n is in * k * k."""
    RESHAPED = "reshaped"
    """A Conv2d's bytes read as (n, out), a reshape and no transpose: R W diag(s). PEFT up to 0.13."""


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted weight: a rotation and an output scale, by the names of their tensors.

    Attributes:
        module: The module's name in the model that was trained.
        blocks: Name of the tensor of trained blocks: for each factor, for each of num_blocks, as ``storage`` says.
        scale: Name of the tensor of output scales, one for each output; None for none.
        num_blocks: Blocks in a factor; of ``shared`` ones 1 until the weight is known, which says how often.
        num_outputs: Number of output scales; None without them.
        series: The coefficients c_0, c_1, ... of ``Parametrization.NEUMANN``.
        max_norm: The Frobenius norm to which stored matrices beyond it are scaled down; None for no bound. Of a
            triangle it is that of the whole S.
        transposed: The blocks are those of R^T.
        shared: All blocks are one, stored once.
        views: How to see a weight, by its number of dimensions; what is missing can't be adapted.
        ambiguous_view: Why ``views`` lacks an entry that a flag could supply, by number of dimensions.
        pointwise: Why of convolutions only those with a 1x1 kernel can be merged; None where all can.
    """

    module: str
    blocks: str
    scale: str | None
    num_factors: int
    num_blocks: int
    block_size: int
    num_outputs: int | None
    parametrization: Parametrization = Parametrization.CAYLEY
    pairing: Pairing = Pairing.BUTTERFLY
    storage: Storage = Storage.MATRIX
    series: tuple[float, ...] = ()
    max_norm: float | None = None
    transposed: bool = False
    shared: bool = False
    views: Mapping[int, View] = field(default_factory=dict)
    ambiguous_view: Mapping[int, str] = field(default_factory=dict)
    pointwise: str | None = None

    @property
    def num_features(self) -> int:
        """The size n of the rotation."""
        return self.num_blocks * self.block_size

    @property
    def weight(self) -> str:
        """The name of the weight it adapts, in the model that was trained."""
        return f"{self.module}.weight"

    @property
    def is_orthogonal(self) -> bool:
        """Whether its blocks are rotations, and not only near to some."""
        return self.parametrization is not Parametrization.NEUMANN

    def over(self, width: int) -> AdapterLayer:
        """Return the layer for a weight of ``width`` inputs: a shared block as often as it fits in."""
        return replace(self, num_blocks=max(1, width // self.block_size)) if self.shared else self

    def run_size(self, i: int, j: int) -> int:
        """Return how many features factors i to j - 1 couple."""
        return self.block_size << (j - i - 1)


class ReplacementKind(StrEnum):
    """Why an adapter carries a whole tensor."""

    MODULE = "module"
    """A module trained in full, or an embedding saved with it."""
    BIAS = "bias"
    """A trained bias."""
    BASE_WEIGHT = "base weight"
    """The weight under an adapted layer: substituted, then rotated."""


@dataclass(frozen=True)
class Replacement:
    """A tensor of the adapter that takes the place of the model's tensor ``name``.

    Attributes:
        name: The tensor's name in the model that was trained.
        key: The tensor's key in the adapter.
        kind: Why the adapter carries it.
        may_add: The adapter's config names its module, so that a base without it is given it.
    """

    name: str
    key: str
    kind: ReplacementKind
    may_add: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter, known by its config and headers alone.

    Attributes:
        format: The format's name for people.
        tensors: All tensors of the adapter's file, by key.
        layers: What is rotated.
        replacements: What is replaced.
        dropped: Keys that are left out, with the reason.
        notices: What the reader found, errors included.
        base_model: The base the adapter says it was trained on.
        base_revision: That base's revision.
        model_class: The class of the model that was trained, where known.
        task: PEFT's task type, where known.
    """

    format: str
    tensors: Mapping[str, TensorInfo]
    layers: tuple[AdapterLayer, ...]
    replacements: tuple[Replacement, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[Notice, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None
    model_class: str | None = None
    task: str | None = None

    @property
    def base_name(self) -> str | None:
        """What to call the base in files that are passed on: its Hub id, or the last part of a local path."""
        if self.base_model is None or _HUB_ID.fullmatch(self.base_model):
            return self.base_model
        return PureWindowsPath(self.base_model).name


@dataclass(frozen=True)
class ReadOptions:
    """What a user may have to tell where files don't.

    Attributes:
        conv_view: The meaning of a PEFT BOFT Conv2d adapter; None to tell from the config.
    """

    conv_view: View | None = None


class Reader(Protocol):
    """A format: recognises its config and reads headers into an ``Adapter``."""

    name: str

    def recognises(self, config: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Tell whether an adapter with this config and these keys is of this format."""

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], options: ReadOptions) -> Adapter:
        """Read the adapter; problems go into its notices, all of them."""
