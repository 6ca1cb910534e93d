"""What ``inspect`` tells of a checkpoint or an adapter, from headers alone."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from boft_export.checkpoint import Checkpoint, TensorRef, locate, open_checkpoint, wanted_weights
from boft_export.errors import Notice
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.sourced import SourcedAdapter, open_adapter

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in layer numbers: ``model.layers.*.self_attn.q_proj.weight``."""

    pattern: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class LayerGroup:
    """Adapter layers that differ only in layer numbers."""

    pattern: str
    count: int
    num_factors: int
    num_blocks: int
    block_size: int
    num_outputs: int | None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint or an adapter holds.

    Attributes:
        kind: ``checkpoint`` or ``adapter``.
        name: How people call it.
        revision: The Hub's commit, where it comes from there.
        files: Its weight files and their sizes in bytes.
        dtypes: Bytes by dtype.
        tensors: Its tensors, alike ones together.
        layers: An adapter's layers, alike ones together.
        details: What its config says, as far as a merge looks at it.
        notices: What is worth knowing about it.
    """

    kind: str
    name: str
    revision: str | None
    files: Mapping[str, int]
    dtypes: Mapping[str, int]
    tensors: tuple[TensorGroup, ...]
    layers: tuple[LayerGroup, ...]
    details: Mapping[str, Any]
    notices: tuple[Notice, ...]

    def document(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {"schema_version": 1, **asdict(self)}


def inspect(ref: Ref, *, sources: Sources | None = None) -> Inspection:
    """Tell what a checkpoint or an adapter holds, without reading a weight.

    Raises:
        InputError: If it is neither.
        AccessError: If it can't be read or found.
    """
    where = sources or Sources()
    found = locate(
        os.fspath(ref),
        revision=where.revision,
        subfolder=where.subfolder,
        offline=where.offline,
        wanted=_wanted,
    )
    folder = found.path.parent if found.path.is_file() else found.path
    names = [found.path.name] if found.path.is_file() else [p.name for p in folder.glob("*")]
    nested = not any(n.endswith((".safetensors", ".bin", ".index.json", "modules.json")) for n in names)
    if any(n.startswith("adapter_") for n in names) or (nested and any(folder.glob("*/adapter_config.json"))):
        return _adapter(open_adapter(found.path, where.options, repo_id=found.repo_id, revision=found.revision))
    return _checkpoint(open_checkpoint(found.path, repo_id=found.repo_id, revision=found.revision))


def group_name(name: str) -> str:
    """Return a name with ``*`` for its layer numbers."""
    return _NUMBER.sub("*", name)


def _wanted(names: Iterable[str]) -> list[str]:
    listed = list(names)
    adapter = [n for n in listed if n.rsplit("/", 1)[-1].startswith("adapter_")]
    return adapter or wanted_weights(listed)


def _adapter(source: SourcedAdapter) -> Inspection:
    adapter = source.adapter
    alike = Counter(
        (group_name(x.module), x.num_factors, x.num_blocks, x.block_size, x.num_outputs) for x in adapter.layers
    )
    return Inspection(
        kind="adapter",
        name=source.name,
        revision=source.revision,
        files={source.weights.name: source.weights.path.stat().st_size},
        dtypes=_dtypes(source.weights.tensors),
        tensors=_groups(source.refs[r.key] for r in adapter.replacements),
        layers=tuple(LayerGroup(key[0], count, *key[1:]) for key, count in alike.items()),
        details={
            "format": adapter.format,
            "base_model": adapter.base_model,
            "base_revision": adapter.base_revision,
            "task": adapter.task,
            "layers": len(adapter.layers),
            "replacements": dict(Counter(r.kind.value for r in adapter.replacements)),
            "dropped": len(adapter.dropped),
        },
        notices=adapter.notices,
    )


def _checkpoint(base: Checkpoint) -> Inspection:
    config = base.config
    wanted = ("architectures", "model_type", "tie_word_embeddings", "dtype", "torch_dtype", "vocab_size")
    return Inspection(
        kind="checkpoint",
        name=base.name,
        revision=base.revision,
        files={f.name: f.path.stat().st_size for f in base.files},
        dtypes=_dtypes(base.tensors.values()),
        tensors=_groups(base.tensors.values()),
        layers=(),
        details={k: config[k] for k in wanted if k in config},
        notices=tuple(base.notices()),
    )


def _dtypes(tensors: Iterable[TensorRef]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return dict(sizes)


def _groups(tensors: Iterable[TensorRef]) -> tuple[TensorGroup, ...]:
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    sizes: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for tensor in tensors:
        key = (group_name(tensor.name), tensor.dtype, tensor.shape)
        counts[key] += 1
        sizes[key] += tensor.nbytes
    return tuple(TensorGroup(k[0], counts[k], k[1], k[2], sizes[k]) for k in counts)
