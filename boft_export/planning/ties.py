"""Ties: parameters that are one in the model, and in the files once; what becomes of them where one side changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from boft_export.adapters import AdapterLayer
from boft_export.checkpoint import Checkpoint, TensorRef
from boft_export.errors import Level
from boft_export.planning.config_edits import set_architecture, untie
from boft_export.planning.draft import Draft, Slot
from boft_export.planning.model import Origin
from boft_export.planning.tables import HEADS_IN_MEMORY, SCALED_TIED_HEADS, TIED_HEADS
from boft_export.planning.tie_table import tied_pairs

_COMPARED = 1 << 20


class Ties:
    """The ties of a draft.

    Args:
        draft: The plan in the making; its slots, edits and notices are added to.
    """

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.untied = False
        self.still_tied: set[str] = set()

    def head_on_disk(self, name: str) -> tuple[str, str] | None:
        """Return a head that the files leave to an embedding, by the name it would have in them, and the embedding."""
        tensors = self.draft.base.tensors
        if name in tensors or _tied_setting(self.draft.base) is False:
            return None
        for pattern, head, _ in TIED_HEADS:
            same = f".{head}".endswith(f".{name}") or HEADS_IN_MEMORY.get(head) == name
            on_disk = head if same else name
            if f".{on_disk}".endswith(f".{head}") and on_disk not in tensors:
                for embedding in self._embeddings(pattern):
                    return on_disk, embedding
        return None

    def _embeddings(self, pattern: str) -> list[str]:
        return [
            n
            for n in self.draft.base.tensors
            if fnmatchcase(n, pattern) or fnmatchcase(self.draft.stripped + n, pattern)
        ]

    def give_own(self, layer: AdapterLayer) -> str | None:
        """Give a tied head that is rotated a tensor of its own; return its name."""
        tied = self.head_on_disk(layer.weight)
        if tied is None:
            return None
        head, embedding = tied
        # The head is the embedding as it was: what an adapter puts in the embedding's place is not in the head.
        self.draft.slots.setdefault(head, self._copy_of_base(embedding))
        return head

    def _copy_of_base(self, name: str) -> Slot:
        """Return a slot that the base lacks, with the values of its tensor ``name``."""
        return Slot(None, [Origin(self.draft.base.tensors[name])])

    def _head_of(self, head: str) -> str | None:
        """Return the output's tensor that is ``head``, which may lie in a wrapper."""
        return next((n for n in self.draft.slots if n == head or n.endswith("." + head)), None)

    def check_vocabularies(self) -> None:
        """Refuse an output whose head has other rows than its embedding, where the base's have the same."""
        for pattern, head, _ in TIED_HEADS:
            for embedding in self._embeddings(pattern):
                found = self._head_of(head)
                if found is None:
                    continue
                one, other = self.draft.slots[embedding], self.draft.slots[found]
                rows, head_rows = one.source.shape[0], other.source.shape[0]
                if rows != head_rows and (
                    other.base is None or other.base.shape == self.draft.base.tensors[embedding].shape
                ):
                    self.draft.note(
                        Level.ERROR,
                        "vocabulary",
                        found,
                        f"has {head_rows} rows with the adapter, {embedding} has {rows}: only one was saved resized",
                        "Save the adapter again with save_embedding_layers=True.",
                    )

    def settle(self) -> None:
        """Where only one side of a tie changed, or both did differently, write both and untie them in the config."""
        if _tied_setting(self.draft.base) is False:
            return
        architectures = self.draft.classes()
        for pattern, head, classes in TIED_HEADS:
            for embedding in self._embeddings(pattern):
                found = self._head_of(head)
                one = self.draft.slots[embedding]
                if found is None:
                    alone = one.changed and one.base is not None and one.source.shape == one.base.shape
                    if alone and any(re.search(classes, a) for a in architectures):
                        self.draft.slots[head] = self._copy_of_base(embedding)
                        self._set_untied(head, embedding)
                    continue
                other = self.draft.slots[found]
                if not (one.changed or other.changed):
                    continue
                if not _same(one, other):
                    self._set_untied(found, embedding)
                elif other.base is None:
                    del self.draft.slots[found]
                    self.still_tied.add(found)
                    self.draft.note(Level.INFO, "tied-weights", found, f"equals {embedding}; they stay tied")
                else:
                    self.draft.tied.append((embedding, found))
        self._complete()

    def _complete(self) -> None:
        """Write every side of every tie once one of them no longer holds: a loader that unties one unties all.

        What is not in the files is given the base's value, which is what it was trained with; a bias has no copy in
        training and follows its partner.
        """
        if _tied_setting(self.draft.base) is False:
            return
        # Again for ties of ties: a head tied to a decoder's embedding that is itself tied to a shared one.
        for _ in range(2):
            pairs = [p for p in dict.fromkeys(self._pairs_on_disk()) if self.still_tied.isdisjoint(p)]
            for one, other in pairs:
                if not self.untied and self._are_apart(one, other):
                    self._set_untied(other, one)
            if not self.untied:
                self.draft.tied += [p for p in pairs if p[1] in self.draft.slots and self.draft.slots[p[0]].changed]
            for one, other in pairs if self.untied else ():
                partner = self.draft.slots[one]
                follows = one.endswith(".bias") or partner.base is None
                copy = Slot(None, list(partner.origins)) if follows else self._copy_of_base(one)
                self.draft.slots.setdefault(other, copy)

    def _are_apart(self, one: str, other: str) -> bool:
        """Tell whether a tie no longer holds; a side that the files don't have is what the other was in the base."""
        first, second = self.draft.slots[one], self.draft.slots.get(other)
        if second is not None:
            return (first.changed or second.changed) and not _same(first, second)
        return first.changed and first.base is not None and not first.resized and not one.endswith(".bias")

    def _pairs_on_disk(self) -> Iterator[tuple[str, str]]:
        """Yield ties as (a name that the output has, the other name), in the naming of the files."""
        for target, source in tied_pairs(self.draft.classes()):
            # Some checkpoints keep the parameter under its other name.
            swapped = [(target, source)] if target in self.draft.base.tensors else []
            for one, other in [(source, target), *swapped]:
                # In a whole model, the bare model's names lie under its prefix.
                prefixes = [n[: -len(one)] for n in self.draft.slots if n == one or n.endswith(f".{one}")]
                short = one.removeprefix(self.draft.stripped)
                if prefixes:
                    found = [(p + one, p + other) for p in prefixes]
                elif short in self.draft.slots:
                    found = [(short, self._short(other))]
                elif one in self.draft.in_memory:
                    found = [(self.draft.in_memory[one], other)]
                else:
                    continue
                for a, b in found:
                    yield a, self._on_disk(b)
                break

    def _short(self, name: str) -> str:
        """Return a name as the files have it, which may lack the prefix; what they don't have keeps it."""
        short = name.removeprefix(self.draft.stripped)
        return short if short in self.draft.slots else name

    def _on_disk(self, name: str) -> str:
        """Return a name as the files have it, or would have it."""
        if name in self.draft.slots:
            return name
        heads = {memory: disk for disk, memory in HEADS_IN_MEMORY.items() if disk in self.draft.slots}
        return self.draft.in_memory.get(name) or heads.get(name, name)

    def _set_untied(self, head: str, embedding: str) -> None:
        if self.draft.base.config.get("model_type") in SCALED_TIED_HEADS:
            self.draft.note(
                Level.ERROR,
                "tied-weights",
                head,
                f"is tied to {embedding}, and this kind of model computes otherwise where they are not tied",
                "Adapt neither of them, or start from a base whose head is its own.",
            )
            return
        self.draft.note(
            Level.INFO,
            "tied-weights",
            head,
            f"no longer equals {embedding}: both are written, and the config unties them",
        )
        self.untied = True
        self.draft.edits += untie(self.draft.base.config)
        # A bare model has no head; the one that is written now needs the class that was trained.
        for source in self.draft.adapters if head not in self.draft.base.tensors else ():
            self.draft.edits += set_architecture(self.draft.base.config, self.draft.trained_class(source)) or []


def _same(one: Slot, other: Slot) -> bool:
    """Tell whether two slots will hold the same bytes, however far each adapter goes; replacements are compared."""
    brought = [[o for o in slot.origins if o.adapter is not None] for slot in (one, other)]
    if one.steps or other.steps or [o.adapter for o in brought[0]] != [o.adapter for o in brought[1]]:
        return False
    pairs = zip(*brought, strict=True) if brought[0] else [(one.origins[-1], other.origins[-1])]
    return all(_same_bytes(a.ref, b.ref) for a, b in pairs)


def _same_bytes(one: TensorRef, other: TensorRef) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    buffers = bytearray(_COMPARED), bytearray(_COMPARED)
    for start in range(0, one.nbytes, _COMPARED):
        size = min(_COMPARED, one.nbytes - start)
        for ref, buffer in zip((one, other), buffers, strict=True):
            ref.read_into(memoryview(buffer)[:size], start)
        if buffers[0][:size] != buffers[1][:size]:
            return False
    return True


def _tied_setting(base: Checkpoint) -> bool | None:
    """Return what the config says of ties, None where it says nothing."""
    for part in (base.config, base.config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None
