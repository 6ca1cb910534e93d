"""An adapter's rotations themselves: one by one, or dense in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from boft_export.adapters import AdapterLayer
from boft_export.checkpoint.safetensors_file import header_bytes
from boft_export.checkpoint.staging import file_system_errors, free_bytes, write_whole
from boft_export.errors import InputError, ResourceError, UsageError, raise_for_errors
from boft_export.linalg.rotation import Rotation
from boft_export.pipeline.layers import build_layer, check_values
from boft_export.pipeline.options import Progress
from boft_export.pipeline.torch_io import as_bytes
from boft_export.planning import SourcedAdapter
from boft_export.planning.inputs import Ref, Sources


@dataclass(frozen=True)
class DenseRotation:
    """One layer's rotation in the file.

    Attributes:
        module: The layer.
        num_features: The size n of R.
        group_size: The features that are coupled: R is block-diagonal in groups of this size.
        residual: max |M^T M - I| over its blocks.
    """

    module: str
    num_features: int
    group_size: int
    residual: float


@dataclass(frozen=True)
class LayerRotation:
    """One layer's rotation and scales, float64: W' = diag(s) W R^T.

    Attributes:
        module: The layer.
        rotation: R, as the product of factors that was trained.
        scale: s, shape (out,); None for none.
    """

    module: str
    rotation: Rotation
    scale: Tensor | None


def read_rotations(adapter: Ref, *, layer: str = "*", sources: Sources | None = None) -> Iterator[LayerRotation]:
    """Yield each layer's rotation and scales, one layer in memory at a time.

    Args:
        adapter: The adapter: a local path or a Hub id.
        layer: A glob pattern of module names; all layers by default.
        sources: Where the adapter comes from.

    Raises:
        InputError: If no layer matches, or the adapter is damaged.
        AccessError: If a file can't be read.
    """
    source, layers = _open(adapter, layer, sources)
    for item in layers:
        built = build_layer(source, item)
        yield LayerRotation(item.module, built.rotation, built.scale)


def write_rotations(
    adapter: Ref,
    output: Ref,
    *,
    layer: str = "*",
    overwrite: bool = False,
    sources: Sources | None = None,
    progress: Progress | None = None,
) -> list[DenseRotation]:
    """Write the dense n-by-n rotation R of each layer, and its scales s, as float64 safetensors.

    ``MODULE.rotation`` is R and ``MODULE.scale`` is s, with W' = diag(s) W R^T. One layer is in memory at a time.

    Args:
        adapter: The adapter: a local path or a Hub id.
        output: The file to write.
        layer: A glob pattern of module names; all layers by default.
        overwrite: Replace ``output`` where it exists.
        sources: Where the adapter comes from.
        progress: Called with bytes written, bytes in all, and the layer's name.

    Raises:
        UsageError: If ``output`` exists, or lies in the adapter's folder.
        InputError: If no layer matches, or the adapter is damaged.
        AccessError: If a file can't be read or written.
        ResourceError: If the disk is too small.
    """
    target = Path(output)
    if target.is_dir() or (target.exists() and not overwrite):
        raise UsageError(f"{target} exists.", hint="Choose another -o, or replace it with --overwrite.")
    source, layers = _open(adapter, layer, sources)
    _keep_off_adapter(target, adapter, source)
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for item in layers:
        entries.append((f"{item.module}.rotation", "F64", (item.num_features, item.num_features)))
        if item.num_outputs is not None:
            entries.append((f"{item.module}.scale", "F64", (item.num_outputs,)))
    header = header_bytes(entries, {"format": "pt", "adapter": source.name})
    total = len(header) + sum(8 * item.num_features**2 + 8 * (item.num_outputs or 0) for item in layers)
    if total > free_bytes(target.parent):
        raise ResourceError(
            f"{target} needs {total:,} bytes of disk, {free_bytes(target.parent):,} are free.",
            hint="Choose fewer --layer.",
        )
    written, done = [], len(header)
    with file_system_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target) as file:
        file.write(header)
        for item in layers:
            built = build_layer(source, item)
            parts = [built.rotation.dense()] + ([built.scale] if built.scale is not None else [])
            for part in parts:
                done += file.write(as_bytes(part.contiguous()))
            if progress is not None:
                progress(done, total, item.module)
            group = item.run_size(0, item.num_factors)
            written.append(DenseRotation(item.module, item.num_features, group, built.rotation.residual()))
    return written


def _open(adapter: Ref, layer: str, sources: Sources | None) -> tuple[SourcedAdapter, list[AdapterLayer]]:
    """Open an adapter, check it, and return it with its layers that match a pattern."""
    source = (sources or Sources()).adapter(adapter)
    raise_for_errors(source.adapter.notices, "the adapter can't be read")
    raise_for_errors(check_values(source), "the adapter can't be used")
    layers = [x for x in source.adapter.layers if fnmatchcase(x.module, layer)]
    if not layers:
        known = ", ".join(x.module for x in source.adapter.layers[:3])
        raise InputError(f"no layer of {source.name} matches {layer}: it has {known}, ...", hint="Quote the pattern.")
    return source, layers


def _keep_off_adapter(output: Path, adapter: Ref, source: SourcedAdapter) -> None:
    """Refuse an output in the adapter's folder, as given or as found: inputs are never written to."""
    target = output.resolve()
    given = [Path(adapter)] if Path(adapter).exists() else []
    for place in (source.root, source.weights.path, *given):
        if target.is_relative_to(place.resolve()):
            raise UsageError(
                f"{output} would write into the adapter's folder {source.root}.", hint="Choose a place outside of it."
            )
