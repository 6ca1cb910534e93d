"""Making the plan: every tensor of adapter and base accounted for, every problem found, before a weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath

from boft_export.adapters import AdapterLayer, Replacement, ReplacementKind
from boft_export.checkpoint import FLOAT_DTYPES, Checkpoint, Shard, TensorRef, index_json, keep_shards, split_shards
from boft_export.checkpoint.layout import safetensors_name
from boft_export.errors import Level, Notice
from boft_export.planning.config_edits import (
    apply_edits,
    resize_vocabulary,
    set_architecture,
    set_dtype,
    set_labels,
    trained_class,
    untie,
)
from boft_export.planning.model import Action, ConfigEdit, FoldPlan, Segment, SideFile, Step, TensorPlan
from boft_export.planning.names import Rule, find_rules, fused_parent, near_matches, spellings
from boft_export.planning.renames import names_in_memory
from boft_export.planning.sourced import SourcedAdapter
from boft_export.planning.tables import (
    HEADS_IN_MEMORY,
    LABEL_WEIGHTS,
    SCALED_TIED_HEADS,
    TIED_HEADS,
    TOKENIZER_FILES,
)
from boft_export.planning.ties import tied_pairs

# Files that the output has of its own.
OWN_FILES = {"boft_export.json", "README.md"}

_COMPARED = 1 << 20
_PART_NUMBER = re.compile(r"-\d+-of-\d+$")


@dataclass
class _Slot:
    """One tensor of the output while the plan is made."""

    base: TensorRef | None
    source: TensorRef
    steps: list[tuple[int, int, Step]] = field(default_factory=list)
    """Each step with the rows it applies to, half open."""

    @property
    def resized(self) -> bool:
        return self.base is not None and self.source.shape != self.base.shape

    @property
    def changed(self) -> bool:
        return bool(self.steps) or self.source is not self.base


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


class _Planner:
    def __init__(
        self, base: Checkpoint, adapters: Sequence[SourcedAdapter], dtype: str | None, max_shard_bytes: int | None
    ) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.in_memory = names_in_memory(base.config, base.tensors)
        self.slots = {name: _Slot(ref, ref) for name, ref in base.tensors.items()}
        self.notices: list[Notice] = base.notices()
        self.edits: list[ConfigEdit] = []
        self.rules: list[list[Rule]] = []
        self.splits: dict[str, tuple[tuple[int, int], str]] = {}
        self.stripped = ""
        """The prefix that the base's names lack, as those of a bare encoder do."""
        self.resized = False
        self.untied = False
        self.still_tied: set[str] = set()

    def note(self, level: Level, code: str, subject: str, message: str, hint: str | None = None) -> None:
        self.notices.append(Notice(level, code, subject, message, hint))

    def plan(self) -> FoldPlan:
        for position, adapter in enumerate(self.adapters):
            self._add_adapter(position, adapter)
        self._check_vocabularies()
        self._settle_ties()
        self._complete_ties()
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
        shards = self._shards()
        self.notices.sort(key=lambda n: list(Level).index(n.level))
        return FoldPlan(
            base=self.base,
            adapters=self.adapters,
            shards=tuple(shards),
            side_files=tuple(self._side_files(shards)),
            edits=tuple(self.edits),
            notices=tuple(dict.fromkeys(self.notices)),
            renames=tuple(tuple(str(r) for r in rules) for rules in self.rules),
        )

    # Matching

    def _add_adapter(self, position: int, source: SourcedAdapter) -> None:
        adapter = source.adapter
        self.notices += adapter.notices
        self._compare_base(source)
        wanted = [layer.weight for layer in adapter.layers] + [r.name for r in adapter.replacements]
        wanted = [name for name in wanted if self._tied_head(name) is None]
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
        self._replace(source, rules)
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
        found = self._find(layer.weight, rules) or self._untie_target(layer)
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
        own, total = layer.num_outputs or 0, tensor.shape[0]
        others = len(parts) - 1
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
        width = math.prod(shape[1:])
        if layer.num_features != width:
            why = ""
            if len(shape) == 2 and layer.num_features == shape[0]:
                why = "; it looks transposed, as GPT-2's Conv1D stores it, which PEFT's BOFT does not adapt"
            if len(shape) == 4:
                why = "; grouped and non-square convolutions are not defined for BOFT"
            return problem(
                "layer-shape",
                f"rotates {layer.num_features} features, {tensor.name} has {width} (shape {shape}){why}",
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
        slot.steps.append((start, stop, Step(position, layer, view, start * width)))

    # Replacing

    def _replace(self, source: SourcedAdapter, rules: Sequence[Rule]) -> None:
        for item in source.adapter.replacements:
            ref = source.refs[item.key]
            found = self._find_replaced(item, rules)
            if found is None:
                self._add(source, item, ref)
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
                slot.source = ref
                if ref.shape != (slot.base.shape if slot.base else ref.shape):
                    self._resize(found, slot, ref, source)
                self._set_labels(item.name, ref)
                if _has_labels(item.name):
                    # The base's head may have been for another task.
                    self.edits += set_architecture(self.base.config, self._trained_class(source)) or []

    def _find_replaced(self, item: Replacement, rules: Sequence[Rule]) -> str | None:
        tied = self._tied_head(item.name)
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

    def _resize(self, name: str, slot: _Slot, ref: TensorRef, source: SourcedAdapter) -> None:
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

    def _add(self, source: SourcedAdapter, item: Replacement, ref: TensorRef) -> None:
        tied = self._tied_head(item.name)
        if tied is not None:
            head, embedding = tied
            if self._check_shape(item, self.base.tensors[embedding], ref):
                self.slots[head] = _Slot(None, ref)
            return
        if item.may_add:
            self.slots[item.name] = _Slot(None, ref)
            trained = self._trained_class(source)
            own = [str(a) for a in self.base.config.get("architectures") or ()]
            if trained is not None and trained in own:
                message = f"the base lacks it, though it is a {trained} as the adapter's model was; it is added"
                self.note(Level.WARNING, "added", item.name, message, "Is this the base the adapter was trained on?")
            else:
                self.note(Level.INFO, "added", item.name, "the base lacks it; it is added")
            self._set_labels(item.name, ref)
            edits = set_architecture(self.base.config, self._trained_class(source))
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
            "is no part of a BOFT layer and the base has no such tensor"
            + (f"; near matches: {', '.join(near)}" if near else ""),
            "Is this the base the adapter was trained on?",
        )

    def _set_labels(self, name: str, ref: TensorRef) -> None:
        if _has_labels(name) and len(ref.shape) == 2:
            self.edits += set_labels(self.base.config, ref.shape[0])

    # Ties

    def _tied_head(self, name: str) -> tuple[str, str] | None:
        """Return a head that the files leave to an embedding, by the name it would have in them, and the embedding."""
        tensors = self.base.tensors
        if name in tensors or _tied_setting(self.base) is False:
            return None
        for pattern, head, _ in TIED_HEADS:
            same = f".{head}".endswith(f".{name}") or HEADS_IN_MEMORY.get(head) == name
            on_disk = head if same else name
            if f".{on_disk}".endswith(f".{head}") and on_disk not in tensors:
                for embedding in self._embeddings(pattern):
                    return on_disk, embedding
        return None

    def _embeddings(self, pattern: str) -> list[str]:
        return [n for n in self.base.tensors if fnmatchcase(n, pattern) or fnmatchcase(self.stripped + n, pattern)]

    def _untie_target(self, layer: AdapterLayer) -> str | None:
        """Give a tied head that is rotated a tensor of its own; return its name."""
        tied = self._tied_head(layer.weight)
        if tied is None:
            return None
        head, embedding = tied
        # The head is the embedding as it was: what an adapter puts in the embedding's place is not in the head.
        self.slots.setdefault(head, _Slot(None, self.base.tensors[embedding]))
        return head

    def _head_of(self, head: str) -> str | None:
        """Return the output's tensor that is ``head``, which may lie in a wrapper."""
        return next((n for n in self.slots if n == head or n.endswith("." + head)), None)

    def _check_vocabularies(self) -> None:
        """Refuse an output whose head has other rows than its embedding, where the base's have the same."""
        for pattern, head, _ in TIED_HEADS:
            for embedding in self._embeddings(pattern):
                found = self._head_of(head)
                if found is None:
                    continue
                one, other = self.slots[embedding], self.slots[found]
                rows, head_rows = one.source.shape[0], other.source.shape[0]
                if rows != head_rows and (other.base is None or other.base.shape == self.base.tensors[embedding].shape):
                    self.note(
                        Level.ERROR,
                        "vocabulary",
                        found,
                        f"has {head_rows} rows with the adapter, {embedding} has {rows}: only one was saved resized",
                        "Save the adapter again with save_embedding_layers=True.",
                    )

    def _settle_ties(self) -> None:
        """Where only one side of a tie changed, or both did differently, write both and untie them in the config."""
        if _tied_setting(self.base) is False:
            return
        architectures = self._classes()
        for pattern, head, classes in TIED_HEADS:
            for embedding in self._embeddings(pattern):
                found = self._head_of(head)
                one = self.slots[embedding]
                if found is None:
                    alone = one.changed and one.base is not None and one.source.shape == one.base.shape
                    if alone and any(re.search(classes, a) for a in architectures):
                        self.slots[head] = _Slot(None, self.base.tensors[embedding])
                        self._set_untied(head, embedding)
                    continue
                other = self.slots[found]
                if not (one.changed or other.changed):
                    continue
                if not _same(one, other):
                    self._set_untied(found, embedding)
                elif other.base is None:
                    del self.slots[found]
                    self.still_tied.add(found)
                    self.note(Level.INFO, "tied-weights", found, f"equals {embedding}; they stay tied")

    def _complete_ties(self) -> None:
        """Write every side of every tie once one of them no longer holds: a loader that unties one unties all.

        What is not in the files is given the base's value, which is what it was trained with; a bias has no copy in
        training and follows its partner.
        """
        if _tied_setting(self.base) is False:
            return
        # Again for ties of ties: a head tied to a decoder's embedding that is itself tied to a shared one.
        for _ in range(2):
            pairs = [p for p in dict.fromkeys(self._pairs_on_disk()) if self.still_tied.isdisjoint(p)]
            for one, other in pairs:
                if not self.untied and self._are_apart(one, other):
                    self._set_untied(other, one)
            for one, other in pairs if self.untied else ():
                partner = self.slots[one]
                source = partner.source if one.endswith(".bias") or partner.base is None else partner.base
                self.slots.setdefault(other, _Slot(None, source))

    def _are_apart(self, one: str, other: str) -> bool:
        """Tell whether a tie no longer holds; a side that the files don't have is what the other was in the base."""
        first, second = self.slots[one], self.slots.get(other)
        if second is not None:
            return (first.changed or second.changed) and not _same(first, second)
        return first.changed and first.base is not None and not first.resized and not one.endswith(".bias")

    def _pairs_on_disk(self) -> Iterator[tuple[str, str]]:
        """Yield ties as (a name that the output has, the other name), in the naming of the files."""
        for target, source in tied_pairs(self._classes()):
            # Some checkpoints keep the parameter under its other name.
            swapped = [(target, source)] if target in self.base.tensors else []
            for one, other in [(source, target), *swapped]:
                # In a whole model, the bare model's names lie under its prefix.
                prefixes = [n[: -len(one)] for n in self.slots if n == one or n.endswith(f".{one}")]
                short = one.removeprefix(self.stripped)
                if prefixes:
                    found = [(p + one, p + other) for p in prefixes]
                elif short in self.slots:
                    found = [(short, self._short(other))]
                elif one in self.in_memory:
                    found = [(self.in_memory[one], other)]
                else:
                    continue
                for a, b in found:
                    yield a, self._on_disk(b)
                break

    def _short(self, name: str) -> str:
        """Return a name as the files have it, which may lack the prefix; what they don't have keeps it."""
        short = name.removeprefix(self.stripped)
        return short if short in self.slots else name

    def _on_disk(self, name: str) -> str:
        """Return a name as the files have it, or would have it."""
        if name in self.slots:
            return name
        heads = {memory: disk for disk, memory in HEADS_IN_MEMORY.items() if disk in self.slots}
        return self.in_memory.get(name) or heads.get(name, name)

    def _classes(self) -> list[str]:
        """Return the classes that the base, and the models that were trained, are of."""
        own = [str(a) for a in self.base.config.get("architectures") or ()]
        return own + [c for a in self.adapters if (c := self._trained_class(a)) is not None]

    def _trained_class(self, source: SourcedAdapter) -> str | None:
        return trained_class(self.base.config, source.adapter.model_class, source.adapter.task)

    def _set_untied(self, head: str, embedding: str) -> None:
        if self.base.config.get("model_type") in SCALED_TIED_HEADS:
            self.note(
                Level.ERROR,
                "tied-weights",
                head,
                f"is tied to {embedding}, and this kind of model computes otherwise where they are not tied",
                "Adapt neither of them, or start from a base whose head is its own.",
            )
            return
        self.note(
            Level.INFO,
            "tied-weights",
            head,
            f"no longer equals {embedding}: both are written, and the config unties them",
        )
        self.untied = True
        self.edits += untie(self.base.config)
        # A bare model has no head; the one that is written now needs the class that was trained.
        for source in self.adapters if head not in self.base.tensors else ():
            self.edits += set_architecture(self.base.config, self._trained_class(source)) or []

    # Output

    def _shards(self) -> list[Shard[TensorPlan]]:
        added = [self._tensor(n) for n in self.slots if n not in self.base.tensors]
        # Loaders give a bare encoder's names the head model's prefix only where no other names are there.
        prefix = self.stripped if added else ""
        files = []
        for file in self.base.files:
            tensors = [self._tensor(t.name, prefix) for t in file.tensors]
            if file is self.base.files[-1]:
                tensors += added
            files.append((file.name, tensors, file.metadata))
        if self.max_shard_bytes is None:
            return keep_shards(files)
        first = PurePosixPath(safetensors_name(files[0][0]))
        stem = _stem_of_parts(first) if len(files) > 1 else first.with_name(_PART_NUMBER.sub("", first.stem))
        tensors = [t for _, group, _ in files for t in group]
        return split_shards(tensors, self.max_shard_bytes, str(stem), files[0][2])

    def _tensor(self, name: str, prefix: str = "") -> TensorPlan:
        slot = self.slots[name]
        source = slot.source
        kept = slot.base.dtype if slot.base is not None else self._dtype_for_added(source)
        dtype = kept if self.dtype is None or kept not in FLOAT_DTYPES else self.dtype
        if slot.steps:
            action = Action.FOLD
        elif slot.base is None:
            action = Action.ADD
        elif source is not slot.base:
            action = Action.REPLACE
        else:
            action = Action.COPY if dtype == source.dtype else Action.CONVERT
        width = math.prod(source.shape[1:])
        cuts = sorted({0, source.num_elements, *(r * width for start, stop, _ in slot.steps for r in (start, stop))})
        segments = tuple(
            Segment(a, b, tuple(s for start, stop, s in slot.steps if start * width <= a and b <= stop * width))
            for a, b in pairwise(cuts)
        )
        return TensorPlan(prefix + name, dtype, source.shape, action, source, slot.base, segments)

    def _dtype_for_added(self, source: TensorRef) -> str:
        """Return the dtype of the base's weights, with which what is added is to fit in; the base's own keep theirs."""
        if source.dtype not in FLOAT_DTYPES or source is self.base.tensors.get(source.name):
            return source.dtype
        sizes: dict[str, int] = {}
        for tensor in self.base.tensors.values():
            if tensor.dtype in FLOAT_DTYPES:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda d: sizes[d]) if sizes else source.dtype

    def _side_files(self, shards: Sequence[Shard[TensorPlan]]) -> list[SideFile]:
        base = self.base
        files = {f: SideFile(f, source=base.root / f) for f in base.side_files if str(f) not in OWN_FILES}
        if self.resized:
            for adapter in self.adapters:
                brought = adapter.tokenizer_files() if adapter.has_tokenizer() else []
                # A tokenizer's files are one whole: the base's others would add tokens that are no longer there.
                for name in TOKENIZER_FILES if brought else ():
                    files.pop(base.folder / name, None)
                for name in brought:
                    target = base.folder / name
                    files[target] = SideFile(target, source=adapter.root / name)
        if base.config_text is not None:
            config = base.folder / "config.json"
            changed = apply_edits(base.config, self.edits) if self.edits else None
            files[config] = SideFile(config, text=changed) if changed else SideFile(config, source=base.root / config)
        first = PurePosixPath(shards[0].name)
        if len(shards) > 1 or _PART_NUMBER.search(first.stem):
            index = _stem_of_parts(first).with_suffix(".safetensors.index.json")
            files[index] = SideFile(index, text=index_json(shards, base.index_metadata))
        return list(files.values())


def _is_vocabulary(name: str) -> bool:
    """Tell whether a tensor has a row for each token."""
    return any(
        fnmatchcase(name, embedding) or fnmatchcase(name, f"*.{embedding}") or name == head or name.endswith("." + head)
        for embedding, head, _ in TIED_HEADS
    )


def _has_labels(name: str) -> bool:
    """Tell whether a weight has a row for each label."""
    return f".{name}".endswith(tuple(f".{label}" for label in LABEL_WEIGHTS))


def _stem_of_parts(file: PurePosixPath) -> PurePosixPath:
    """Return the name, less its suffix, under which loaders look for a checkpoint that ``file`` is a part of."""
    stem = "diffusion_pytorch_model"
    return file.with_name(stem if file.name.startswith(stem) else "model")


def _same(one: _Slot, other: _Slot) -> bool:
    """Tell whether two slots will hold the same bytes; those of two replacements are compared."""
    if one.steps or other.steps or one.source.shape != other.source.shape or one.source.dtype != other.source.dtype:
        return False
    if one.source is other.source:
        return True
    buffers = bytearray(_COMPARED), bytearray(_COMPARED)
    for start in range(0, one.source.nbytes, _COMPARED):
        size = min(_COMPARED, one.source.nbytes - start)
        for slot, buffer in zip((one, other), buffers, strict=True):
            slot.source.read_into(memoryview(buffer)[:size], start)
        if buffers[0][:size] != buffers[1][:size]:
            return False
    return True


def _tied_setting(base: Checkpoint) -> bool | None:
    """Return what the config says of ties, None where it says nothing."""
    for part in (base.config, base.config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
