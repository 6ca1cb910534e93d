"""The plan of a merge: for each tensor of the output, where its bytes come from and what is done to them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from boft_export.adapters import AdapterLayer, View
from boft_export.checkpoint import FLOAT_DTYPES, Checkpoint, Shard, TensorRef
from boft_export.checkpoint.places import AnyPath, file_state
from boft_export.errors import Notice
from boft_export.planning.sourced import SourcedAdapter


class Action(StrEnum):
    """What is done to a tensor."""

    COPY = "copy"
    """The base's bytes."""
    CONVERT = "convert"
    """The base's values in another dtype."""
    FOLD = "fold"
    """Rotated and scaled."""
    REPLACE = "replace"
    """The adapter's tensor in place of the base's."""
    ADD = "add"
    """A tensor that the base's files don't have."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor's values come from, before any rotation.

    Attributes:
        ref: The values.
        adapter: The adapter that puts them in the place of those before, by its position; None for the base's own.
    """

    ref: TensorRef
    adapter: int | None = None


@dataclass(frozen=True)
class Step:
    """One adapter layer applied to a segment.

    Attributes:
        adapter: Which adapter, by its position.
        layer: The layer.
        view: How the weight is seen.
        start: The element of the tensor at which the layer's own weight begins.
    """

    adapter: int
    layer: AdapterLayer
    view: View
    start: int = 0

    @property
    def granule(self) -> int:
        """The elements that must be folded together: a row, or the rows of a coupled group."""
        layer = self.layer
        if self.view is View.INPUT:
            return layer.num_features
        return layer.run_size(0, layer.num_factors) * (layer.num_outputs or 1)


@dataclass(frozen=True)
class Segment:
    """A run of a tensor's elements with the steps that apply to it, in order."""

    start: int
    stop: int
    steps: tuple[Step, ...]

    def tile(self, target: int) -> int:
        """Return the elements of a tile: the fewest whole granules that are at least ``target`` elements."""
        granule = math.lcm(*(s.granule for s in self.steps)) if self.steps else 1
        return granule * math.ceil(target / granule)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Its name in the output.
        dtype: Its dtype in the output.
        shape: Its shape.
        action: What is done.
        origins: Where its values come from, before any rotation: each one takes the place of those before it.
        base: The base's tensor it stands for; None where the base has none.
        segments: Its elements in order; without steps where they are only copied or converted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    origins: tuple[Origin, ...]
    base: TensorRef | None
    segments: tuple[Segment, ...]

    @property
    def source(self) -> TensorRef:
        """The origin that counts in a merge: the last."""
        return self.origins[-1].ref

    def mixture(self, segment: Segment, alphas: Sequence[float]) -> dict[int, float]:
        """Return which origins a segment's values are made of, by number, and the weight of each; they add up to 1.

        Each adapter goes linearly from what was there before it to what it brings. Rows that were not there before are
        taken as they are brought, and so is what is no floating-point tensor, unless its adapter is left out.

        Args:
            segment: Elements that each origin has either all or none of.
            alphas: How far to go with each adapter.
        """
        weights: dict[int, float] = {}
        for i, origin in enumerate(self.origins):
            if origin.ref.num_elements < segment.stop:
                continue
            alpha = alphas[origin.adapter] if weights and origin.adapter is not None else 1.0
            if alpha and origin.ref.dtype not in FLOAT_DTYPES:
                alpha = 1.0
            weights = {j: (1 - alpha) * w for j, w in weights.items()} | {i: alpha}
        return {i: w for i, w in weights.items() if w}

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, once each."""
        found: list[Step] = []
        for segment in self.segments:
            found += [s for s in segment.steps if s not in found]
        return tuple(found)


@dataclass(frozen=True)
class SideFile:
    """A file of the output that holds no weights: copied from ``source``, or written from ``text``."""

    name: PurePosixPath
    source: AnyPath | None = None
    text: str | None = None


@dataclass(frozen=True)
class ConfigEdit:
    """A change to ``config.json``: the path of keys, the new value, and why."""

    path: tuple[str, ...]
    value: Any
    reason: str


@dataclass(frozen=True)
class FoldPlan:
    """All that a merge will do, known from headers alone.

    Attributes:
        base: The base checkpoint.
        adapters: The adapters in the order in which they apply.
        shards: The output's weight files.
        side_files: The output's other files, but for the manifest and the model card.
        edits: What changes in ``config.json``.
        notices: All findings, the least first.
        renames: The prefix changes under which the adapters' names were found, by adapter.
        tied: Pairs of changed tensors that are both written, and that a loader takes for one.
    """

    base: Checkpoint
    adapters: tuple[SourcedAdapter, ...]
    shards: tuple[Shard[TensorPlan], ...]
    side_files: tuple[SideFile, ...]
    edits: tuple[ConfigEdit, ...]
    notices: tuple[Notice, ...]
    renames: tuple[tuple[str, ...], ...] = field(default=())
    tied: tuple[tuple[str, str], ...] = field(default=())

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors in the order in which they are written."""
        return tuple(t for s in self.shards for t in s.tensors)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of weights that are read, the adapters' included."""
        blocks = sum(t.nbytes for a in self.adapters for t in a.weights.tensors)
        return blocks + sum(t.source.nbytes for t in self.tensors)

    @property
    def bytes_to_write(self) -> int:
        """Bytes of weight files that are written: the disk space needed."""
        return sum(s.nbytes for s in self.shards)

    def count(self, action: Action) -> int:
        """Return how many tensors have ``action`` done to them."""
        return sum(t.action is action for t in self.tensors)

    def input_files(self) -> dict[str, AnyPath]:
        """Return every file of weights or config that decides the output, by the name the manifest gives it."""
        files = {f"base/{f.name}": f.path for f in self.base.files}
        if self.base.config_text is not None:
            config = self.base.folder / "config.json"
            files[f"base/{config}"] = self.base.root / config
        for i, adapter in enumerate(self.adapters):
            files[f"adapter-{i}/{adapter.weights.name}"] = adapter.weights.path
            if adapter.config_file is not None:
                files[f"adapter-{i}/{adapter.config_file.name}"] = adapter.config_file
        return files

    def fingerprint(self, settings: dict[str, Any]) -> str:
        """Return a digest of all that decides the output's bytes: inputs, plan and ``settings``."""
        stats = {n: (str(p.resolve()), *file_state(p)) for n, p in self.input_files().items()}
        tensors = [
            (s.name, t.name, t.dtype, t.shape, t.action, [(o.ref.name, o.ref.file, o.adapter) for o in t.origins], [
                (g.start, g.stop, [(p.adapter, p.layer.module, p.view, p.start) for p in g.steps]) for g in t.segments
            ])
            for s in self.shards for t in s.tensors
        ]  # fmt: skip
        edits = [(e.path, e.value) for e in self.edits]
        text = json.dumps([settings, stats, tensors, edits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
