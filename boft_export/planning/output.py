"""The output's files: which tensor goes where, in which dtype, and what lies beside the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath

from boft_export.adapters import View
from boft_export.checkpoint import FLOAT_DTYPES, Shard, TensorRef, index_json, keep_shards, split_shards
from boft_export.checkpoint.layout import safetensors_name
from boft_export.planning.config_edits import apply_edits
from boft_export.planning.draft import Draft
from boft_export.planning.model import Action, Segment, SideFile, TensorPlan
from boft_export.planning.tables import TOKENIZER_FILES

# Files that the output has of its own.
OWN_FILES = {"boft_export.json", "README.md"}
UNDO_FOLDER = "boft_export.undo"

_PART_NUMBER = re.compile(r"-\d+-of-\d+$")


def lay_out(draft: Draft, dtype: str | None, max_shard_bytes: int | None) -> list[Shard[TensorPlan]]:
    """Return the output's weight files: the base's own, or split anew."""
    added = [_tensor(draft, n, dtype) for n in draft.slots if n not in draft.base.tensors]
    # Loaders give a bare encoder's names the head model's prefix only where no other names are there.
    prefix = draft.stripped if added else ""
    files = []
    for file in draft.base.files:
        tensors = [_tensor(draft, t.name, dtype, prefix) for t in file.tensors]
        if file is draft.base.files[-1]:
            tensors += added
        # Where no dtype or shape changes, each tensor lies where the base has it, and untouched bytes can be shared.
        in_place = [(t.dtype, t.shape) for t in tensors] == [(t.dtype, t.shape) for t in file.tensors]
        files.append((file.name, tensors, file.metadata, file.header_size if in_place else 0))
    if max_shard_bytes is None:
        return keep_shards(files)
    first = PurePosixPath(safetensors_name(files[0][0]))
    stem = _stem_of_parts(first) if len(files) > 1 else first.with_name(_PART_NUMBER.sub("", first.stem))
    tensors = [t for _, group, *_ in files for t in group]
    return split_shards(tensors, max_shard_bytes, str(stem), files[0][2])


def _tensor(draft: Draft, name: str, as_dtype: str | None, prefix: str = "") -> TensorPlan:
    slot = draft.slots[name]
    source = slot.source
    kept = slot.base.dtype if slot.base is not None else _dtype_for_added(draft, source)
    dtype = kept if as_dtype is None or kept not in FLOAT_DTYPES else as_dtype
    if slot.steps:
        action = Action.FOLD
    elif slot.base is None:
        action = Action.ADD
    elif source is not slot.base:
        action = Action.REPLACE
    else:
        action = Action.COPY if dtype == source.dtype else Action.CONVERT
    width = math.prod(source.shape[1:])
    origins = slot.origins
    if any(s.view is View.RESHAPED for _, _, s in slot.steps):
        # Its groups of features lie across rows: what has other rows can't be mixed in, and is left out.
        origins = [o for o in origins if o.ref.num_elements >= source.num_elements]
    # A cut also where an origin has fewer rows than the output.
    sizes = {min(o.ref.num_elements, source.num_elements) for o in origins}
    cuts = sorted({0, *sizes, *(r * width for start, stop, _ in slot.steps for r in (start, stop))})
    segments = tuple(
        Segment(a, b, tuple(s for start, stop, s in slot.steps if start * width <= a and b <= stop * width))
        for a, b in pairwise(cuts)
    )
    return TensorPlan(prefix + name, dtype, source.shape, action, tuple(origins), slot.base, segments)


def _dtype_for_added(draft: Draft, source: TensorRef) -> str:
    """Return the dtype of the base's weights, with which what is added is to fit in; the base's own keep theirs."""
    if source.dtype not in FLOAT_DTYPES or source is draft.base.tensors.get(source.name):
        return source.dtype
    sizes: dict[str, int] = {}
    for tensor in draft.base.tensors.values():
        if tensor.dtype in FLOAT_DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda d: sizes[d]) if sizes else source.dtype


def side_files(draft: Draft, shards: Sequence[Shard[TensorPlan]]) -> list[SideFile]:
    """Return the output's files that hold no weights: the base's, the changed config, the index, a new tokenizer."""
    base = draft.base
    files = {f: SideFile(f, source=base.root / f) for f in base.side_files if not _is_own(f)}
    if draft.resized:
        for adapter in draft.adapters:
            brought = adapter.tokenizer_files() if adapter.has_tokenizer() else []
            # A tokenizer's files are one whole: the base's others would add tokens that are no longer there.
            for name in TOKENIZER_FILES if brought else ():
                files.pop(base.folder / name, None)
            for name in brought:
                target = base.folder / name
                files[target] = SideFile(target, source=adapter.root / name)
    if base.config_text is not None:
        config = base.folder / "config.json"
        changed = apply_edits(base.config, draft.edits) if draft.edits else None
        files[config] = SideFile(config, text=changed) if changed else SideFile(config, source=base.root / config)
    first = PurePosixPath(shards[0].name)
    if len(shards) > 1 or _PART_NUMBER.search(first.stem):
        index = _stem_of_parts(first).with_suffix(".safetensors.index.json")
        files[index] = SideFile(index, text=index_json(shards, base.index_metadata))
    return list(files.values())


def _is_own(file: PurePosixPath) -> bool:
    """Tell whether the base's file is one that a merge wrote of itself, when the base was its output."""
    return str(file) in OWN_FILES or file.parts[0] == UNDO_FOLDER


def _stem_of_parts(file: PurePosixPath) -> PurePosixPath:
    """Return the name, less its suffix, under which loaders look for a checkpoint that ``file`` is a part of."""
    stem = "diffusion_pytorch_model"
    return file.with_name(stem if file.name.startswith(stem) else "model")
