"""Making the plan: every tensor of adapter and base accounted for, every problem found, before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from boft_export.adapters import AdapterLayer, Replacement, ReplacementKind
from boft_export.checkpoint import FLOAT_DTYPES, Checkpoint, TensorRef
from boft_export.errors import Level
from boft_export.planning.config_edits import (
    resize_vocabulary,
    set_architecture,
    set_dtype,
    set_labels,
)
from boft_export.planning.draft import Draft, Slot
from boft_export.planning.model import FoldPlan, Origin, Step
from boft_export.planning.names import Rule, find_rules, fused_parent, near_matches, spellings
from boft_export.planning.output import lay_out, side_files
from boft_export.planning.sourced import SourcedAdapter
from boft_export.planning.tables import (
    LABEL_WEIGHTS,
    TIED_HEADS,
)
from boft_export.planning.ties import Ties


@dataclass(frozen=True)
class _Place:
    """Where a layer's weight is on disk: a tensor, and which of its rows."""

    name: str
    rows: tuple[int, int]


def make_plan(
    base: Checkpoint,
    adapters: Sequence[SourcedAdapter],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
) -> FoldPlan:
    """Plan a merge from headers alone; all problems are in the result's notices.

    Args:
        base: The base checkpoint.
        adapters: The adapters, in the order in which they apply.
        dtype: The output's float dtype, by the safetensors format's name; None keeps each tensor's own.
        max_shard_bytes: Split the output anew into files of at most this size; None keeps the base's files.
    """
    return _Planner(base, adapters, dtype, max_shard_bytes).plan()


class _Planner(Draft):
    def __init__(
        self, base: Checkpoint, adapters: Sequence[SourcedAdapter], dtype: str | None, max_shard_bytes: int | None
    ) -> None:
        super().__init__(base, adapters)
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.rules: list[list[Rule]] = []
        self.splits: dict[str, tuple[tuple[int, int], str]] = {}
        self.ties = Ties(self)

    def plan(self) -> FoldPlan:
        for position, adapter in enumerate(self.adapters):
            self._add_adapter(position, adapter)
        self.ties.check_vocabularies()
        self.ties.settle()
        if self.dtype is not None and "quantization_config" in self.base.config:
            self.note(
                Level.ERROR,
                "quantised-base",
                self.base.name,
                "is quantised: another dtype would break the scales that belong to its weights",
                "Leave --dtype out, or start from the full-precision base.",
            )
        if self.dtype is not None:
            self.edits += set_dtype(self.base.config, FLOAT_DTYPES[self.dtype])
        # Two findings may ask for the same change; without a config there is nothing to change.
        self.edits = list({e.path: e for e in self.edits}.values()) if self.base.config_text is not None else []
        shards = lay_out(self, self.dtype, self.max_shard_bytes)
        self.notices.sort(key=lambda n: list(Level).index(n.level))
        return FoldPlan(
            base=self.base,
            adapters=self.adapters,
            shards=tuple(shards),
            side_files=tuple(side_files(self, shards)),
            edits=tuple(self.edits),
            notices=tuple(dict.fromkeys(self.notices)),
            renames=tuple(tuple(str(r) for r in rules) for rules in self.rules),
            tied=tuple(dict.fromkeys(self.tied)) if not self.ties.untied else (),
        )

    # Matching

    def _add_adapter(self, position: int, source: SourcedAdapter) -> None:
        adapter = source.adapter
        self.notices += adapter.notices
        self._compare_base(source)
        wanted = [layer.weight for layer in adapter.layers] + [r.name for r in adapter.replacements]
        wanted = [name for name in wanted if self.ties.head_on_disk(name) is None]
        rules, ambiguities = find_rules(
            wanted, [*self.slots, *self.in_memory], lambda name: self._find(name, ()) is not None
        )
        self.rules.append(rules)
        for found in ambiguities:
            self.note(
                Level.ERROR,
                "ambiguous-name",
                found.name,
                f"fits two tensors of the base equally well: {' and '.join(found.images)}",
                "Use the checkpoint that the adapter was trained on.",
            )
        for rule in rules:
            self.note(Level.INFO, "rename", source.name, f"its names are found in the base as {rule}")
        if len(rules) == 1 and not rules[0].new:
            self.stripped = rules[0].old
        self._replace(position, source, rules)
        taken: dict[str, list[tuple[tuple[int, int], str]]] = {}
        for layer in adapter.layers:
            place = self._place(layer, rules)
            if place is None:
                continue
            start, stop = place.rows
            before = taken.setdefault(place.name, [])
            other = next((module for (a, b), module in before if a < stop and start < b), None)
            before.append((place.rows, layer.module))
            if other is not None:
                self.note(Level.ERROR, "double-match", layer.module, f"and {other} both match {place.name} in the base")
                continue
            self._rotate(position, layer, place)

    def _compare_base(self, source: SourcedAdapter) -> None:
        trained_on = source.adapter.base_model
        if not trained_on:
            return
        root = self.base.root
        known = [self.base.repo_id, self.base.config.get("_name_or_path"), root.name, root.resolve().name]
        tails = {str(k).rstrip("/").rsplit("/", 1)[-1].lower() for k in known if k}
        if self.base.repo_id is None and "snapshots" in self.base.root.parts:
            return
        if trained_on.rstrip("/").rsplit("/", 1)[-1].lower() not in tails:
            self.note(
                Level.WARNING,
                "other-base",
                source.name,
                f"it was trained on {source.adapter.base_name}, the base is {self.base.name}; the shapes alone can't "
                "tell whether they are the same",
                "Merge into the base it was trained on.",
            )
        revision = source.adapter.base_revision
        if revision and self.base.revision and not self.base.revision.startswith(revision) and len(revision) >= 7:
            self.note(
                Level.WARNING,
                "other-base",
                source.name,
                f"it was trained on revision {revision}, not {self.base.revision}",
            )

    def _find(self, name: str, rules: Iterable[Rule]) -> str | None:
        """Return the tensor on disk that is, or holds, ``name``."""
        for spelling in spellings(name, rules):
            if spelling in self.slots:
                return spelling
            if spelling in self.in_memory:
                return self.in_memory[spelling]
            for fused, _, _ in fused_parent(spelling):
                if fused in self.slots:
                    return fused
        return None

    def _place(self, layer: AdapterLayer, rules: Sequence[Rule]) -> _Place | None:
        """Find a layer's weight and check that the layer fits it; problems are noted."""
        found = self._find(layer.weight, rules) or self.ties.give_own(layer)
        if found is None:
            near = near_matches(layer.weight, self.slots)
            self.note(
                Level.ERROR,
                "no-match",
                layer.module,
                "no tensor of the base has this name" + (f"; near matches: {', '.join(near)}" if near else ""),
                "The base is quantised: merge into the full-precision base, then quantise the result."
                if "quantization_config" in self.base.config
                else "Is this the base the adapter was trained on? boft-export inspect lists the names of both.",
            )
            return None
        tensor = self.slots[found].source
        rows = (0, tensor.shape[0] if tensor.shape else 0)
        for spelling in spellings(layer.weight, rules):
            if found in (spelling, self.in_memory.get(spelling)):
                break
            for fused, parts, part in fused_parent(spelling):
                if fused == found:
                    return self._fused_place(layer, tensor, parts, part)
        return _Place(found, rows) if self._fits(layer, tensor, rows[1]) else None

    def _fused_place(self, layer: AdapterLayer, tensor: TensorRef, parts: tuple[str, ...], part: int) -> _Place | None:
        """Find the rows of one part in a fused weight: the first may differ in size, the others share one."""
        total, others = tensor.shape[0], len(parts) - 1
        own = layer.num_outputs if layer.num_outputs is not None else self._rows_of_part(total, others, part)
        if own is None:
            self.note(
                Level.ERROR,
                "layer-shape",
                layer.module,
                f"is fused with {others} others into {tensor.name}, and neither the adapter nor the base's config "
                "tells which of its rows are its own",
                "Put the base's config.json beside its weights.",
            )
            return None
        first = own if part == 0 else total - others * own
        rest = (total - first) // others if others else 0
        start = 0 if part == 0 else first + (part - 1) * rest
        # Queries come in whole groups, each with its keys and values; gate and up are of one size.
        even = rest > 0 and first > 0 and first + others * rest == total and first % rest == 0
        if not even or (others == 1 and first != rest):
            self.note(
                Level.ERROR,
                "layer-shape",
                layer.module,
                f"has {own} outputs, which don't divide {tensor.name}'s {total} rows",
            )
            return None
        split, module = self.splits.setdefault(tensor.name, ((first, rest), layer.module))
        if split != (first, rest):
            self.note(
                Level.ERROR,
                "layer-shape",
                layer.module,
                f"has {own} outputs, with which {tensor.name}'s {total} rows divide otherwise than with {module}",
            )
            return None
        if not self._fits(layer, tensor, own):
            return None
        self.note(
            Level.INFO, "fused", layer.module, f"is rows {start} to {start + own} of {tensor.name}, fused on disk"
        )
        return _Place(tensor.name, (start, start + own))

    def _rows_of_part(self, total: int, others: int, part: int) -> int | None:
        """Return the rows of one part in a fused weight by the base's config: two are halves, three go by heads."""
        if others == 1:
            return total // 2
        nested = self.base.config.get("text_config")
        config = nested if isinstance(nested, dict) else self.base.config
        heads = config.get("num_attention_heads")
        pairs = config.get("num_key_value_heads") or heads
        if not isinstance(heads, int) or not isinstance(pairs, int) or min(heads, pairs) < 1:
            return None
        size, left = divmod(total, heads + others * pairs)
        return None if left else size * (pairs if part else heads)

    def _fits(self, layer: AdapterLayer, tensor: TensorRef, rows: int) -> bool:
        """Check a layer against the tensor it is to rotate; note what doesn't fit."""

        def problem(code: str, message: str, hint: str | None = None) -> bool:
            self.note(Level.ERROR, code, layer.module, message, hint)
            return False

        shape = list(tensor.shape)
        if tensor.dtype not in FLOAT_DTYPES:
            return problem(
                "quantised-base",
                f"{tensor.name} is stored as {tensor.dtype}: a quantised weight can't be rotated",
                "Merge into the full-precision base, then quantise the result.",
            )
        if len(shape) in layer.ambiguous_view:
            return problem(
                "ambiguous-conv",
                f"a convolution whose meaning can't be told: {layer.ambiguous_view[len(shape)]}",
                "Say it: --conv-view input (PEFT 0.14 and later) or --conv-view reshaped (PEFT up to 0.13).",
            )
        if len(shape) not in layer.views:
            return problem("layer-shape", f"{tensor.name} has {len(shape)} dimensions {shape}: expected 2 or 4")
        if layer.pointwise is not None and len(shape) == 4 and shape[2:] != [1, 1]:
            return problem(
                "conv-kernel",
                f"{tensor.name} is a {shape[2]}x{shape[3]} convolution: {layer.pointwise}",
                "Leave convolutions out of the adapter, or train them with BOFT.",
            )
        width = math.prod(shape[1:])
        features = layer.over(width).num_features
        if features != width:
            why = ""
            if len(shape) == 2 and features == shape[0]:
                why = "; it looks transposed, as GPT-2's Conv1D stores it, which PEFT's BOFT and OFT don't adapt"
            if len(shape) == 4:
                why = "; grouped and non-square convolutions are not defined for BOFT and OFT"
            what = f"a block of {layer.block_size} again and again" if layer.shared else f"{features} features"
            return problem(
                "layer-shape",
                f"rotates {what}, {tensor.name} has {width} (shape {shape}){why}",
                "Is this the base the adapter was trained on?",
            )
        if layer.num_outputs is not None and layer.num_outputs != rows:
            return problem(
                "layer-shape", f"scales {layer.num_outputs} outputs, {tensor.name} has {rows} (shape {shape})"
            )
        if len(shape) == 4 and shape[2:] != [1, 1]:
            self.note(
                Level.INFO,
                "conv",
                layer.module,
                f"a {shape[2]}x{shape[3]} convolution: if it is dilated or does not pad with zeros, PEFT trained it "
                "without, and the merged model will rightly differ from training",
            )
        return True

    def _rotate(self, position: int, layer: AdapterLayer, place: _Place) -> None:
        slot = self.slots[place.name]
        view = layer.views[len(slot.source.shape)]
        start, stop = place.rows
        width = math.prod(slot.source.shape[1:])
        slot.steps.append((start, stop, Step(position, layer.over(width), view, start * width)))

    # Replacing

    def _replace(self, position: int, source: SourcedAdapter, rules: Sequence[Rule]) -> None:
        for item in source.adapter.replacements:
            origin = Origin(source.refs[item.key], position)
            ref = origin.ref
            found = self._find_replaced(item, rules)
            if found is None:
                self._add(source, item, origin)
                continue
            slot = self.slots[found]
            if slot.steps:
                self.note(
                    Level.ERROR,
                    "conflict",
                    item.name,
                    f"{source.name} replaces a tensor that an adapter before it rotates: that rotation would be lost",
                    "Merge the adapters in another order, or one of them alone.",
                )
                continue
            if slot.source is not slot.base:
                self.note(
                    Level.WARNING, "replaced-twice", item.name, f"{source.name} replaces it again; the last one counts"
                )
            if self._check_shape(item, slot.source, ref):
                slot.origins.append(origin)
                if ref.shape != (slot.base.shape if slot.base else ref.shape):
                    self._resize(found, slot, ref, source)
                self._set_labels(item.name, ref)
                if _has_labels(item.name):
                    # The base's head may have been for another task.
                    self.edits += set_architecture(self.base.config, self.trained_class(source)) or []

    def _find_replaced(self, item: Replacement, rules: Sequence[Rule]) -> str | None:
        tied = self.ties.head_on_disk(item.name)
        names = [*spellings(item.name, rules), *(tied[:1] if tied else ())]
        names = [self.in_memory.get(n, n) if n not in self.slots else n for n in names]
        return next((n for n in names if n in self.slots), None)

    def _check_shape(self, item: Replacement, old: TensorRef, new: TensorRef) -> bool:
        if old.dtype != new.dtype and not {old.dtype, new.dtype} <= set(FLOAT_DTYPES):
            self.note(
                Level.ERROR, "replacement-dtype", item.name, f"the adapter's is {new.dtype}, the base's {old.dtype}"
            )
            return False
        if old.shape == new.shape:
            return True
        rows_only = 0 < len(old.shape) == len(new.shape) and old.shape[1:] == new.shape[1:]
        weight = f"{item.name.removesuffix('bias')}weight" if item.kind is ReplacementKind.BIAS else item.name
        if rows_only and (_is_vocabulary(weight) or (item.may_add and _has_labels(weight))):
            return True
        if rows_only and item.may_add:
            self.note(
                Level.WARNING,
                "resized-module",
                item.name,
                f"the adapter's has {new.shape[0]} rows, the base's {old.shape[0]}; config.json may have to say so",
                "Check that the output loads, and edit its config by hand where it does not.",
            )
            return True
        self.note(
            Level.ERROR,
            "replacement-shape",
            item.name,
            f"the adapter's has shape {list(new.shape)}, the base's {list(old.shape)}",
            "Is this the base the adapter was trained on?",
        )
        return False

    def _resize(self, name: str, slot: Slot, ref: TensorRef, source: SourcedAdapter) -> None:
        if slot.base is None or not _is_vocabulary(name):
            return
        rows, old = ref.shape[0], slot.base.shape[0]
        self.resized = True
        self.edits += resize_vocabulary(self.base.config, rows, old)
        level, verb = (Level.WARNING, "shrinks") if rows < old else (Level.INFO, "grows")
        self.note(level, "vocabulary", name, f"the vocabulary {verb} from {old} to {rows} rows")
        if not source.has_tokenizer():
            self.note(
                Level.WARNING,
                "tokenizer",
                source.name,
                f"it changes the vocabulary to {rows} rows but holds no tokenizer; the base's is kept",
                "Put the tokenizer it was trained with beside it.",
            )

    def _add(self, source: SourcedAdapter, item: Replacement, origin: Origin) -> None:
        ref = origin.ref
        tied = self.ties.head_on_disk(item.name)
        if tied is not None:
            head, embedding = tied
            if self._check_shape(item, self.base.tensors[embedding], ref):
                self.slots[head] = Slot(None, [Origin(self.base.tensors[embedding]), origin])
            return
        if item.may_add:
            self.slots[item.name] = Slot(None, [origin])
            trained = self.trained_class(source)
            own = [str(a) for a in self.base.config.get("architectures") or ()]
            if trained is not None and trained in own:
                message = f"the base lacks it, though it is a {trained} as the adapter's model was; it is added"
                self.note(Level.WARNING, "added", item.name, message, "Is this the base the adapter was trained on?")
            else:
                self.note(Level.INFO, "added", item.name, "the base lacks it; it is added")
            self._set_labels(item.name, ref)
            edits = set_architecture(self.base.config, self.trained_class(source))
            if edits is None:
                self.note(
                    Level.WARNING,
                    "architecture",
                    item.name,
                    "the class that was trained can't be told from the adapter; architectures in config.json stays",
                    "Set it by hand, or load the output with the class itself.",
                )
            self.edits += edits or []
            return
        near = near_matches(item.name, self.slots)
        self.note(
            Level.ERROR,
            "unused-key",
            item.key,
            "is no part of a layer that is rotated and the base has no such tensor"
            + (f"; near matches: {', '.join(near)}" if near else ""),
            "Is this the base the adapter was trained on?",
        )

    def _set_labels(self, name: str, ref: TensorRef) -> None:
        if _has_labels(name) and len(ref.shape) == 2:
            self.edits += set_labels(self.base.config, ref.shape[0])


def _has_labels(name: str) -> bool:
    """Tell whether a weight has a row for each label."""
    return f".{name}".endswith(tuple(f".{label}" for label in LABEL_WEIGHTS))


def _is_vocabulary(name: str) -> bool:
    """Tell whether a tensor has a row for each token."""
    return any(
        fnmatchcase(name, embedding) or fnmatchcase(name, f"*.{embedding}") or name == head or name.endswith("." + head)
        for embedding, head, _ in TIED_HEADS
    )
