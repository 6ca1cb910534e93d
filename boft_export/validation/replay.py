"""Replaying a merge in float64 beside the stored one, tensor by tensor: which elements are not what they must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boft_export.checkpoint import FLOAT_DTYPES, Shard, TensorRef
from boft_export.checkpoint.tensors import BytesInFile
from boft_export.linalg.bits import as_integers, largest_step
from boft_export.pipeline.engine import Engine, replay_plan
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.options import Progress
from boft_export.pipeline.torch_io import TORCH_DTYPES, as_bytes, read_bytes
from boft_export.planning import Action, FoldPlan, TensorPlan
from boft_export.planning.strength import Course

# Places of wrong elements that are kept; where there are more, the whole tensor is suspect.
MOST_PLACES = 1 << 16


@dataclass(frozen=True)
class Comparison:
    """A stored tensor beside the correctly rounded one.

    Attributes:
        plan: What it must be.
        stored: What it is.
        wrong: Elements whose value differs; bytes where it is only copied.
        places: Where they are, ascending, the first ``MOST_PLACES``.
        largest_ulp: By how many steps of the dtype the worst one is off; None where it is no floating-point tensor.
        not_finite: Elements that are not finite though they must be.
        measure: What the merge did; None where it only copied.
    """

    plan: TensorPlan
    stored: TensorRef
    wrong: int = 0
    places: Tensor = torch.empty(0, dtype=torch.int64)  # noqa: RUF009  # never written to
    largest_ulp: int | None = 0
    not_finite: int = 0
    measure: Measure | None = None

    @property
    def all_places_known(self) -> bool:
        """Whether ``places`` has them all."""
        return len(self.places) == self.wrong

    def add(self, start: int, correct: Tensor, stored: Tensor) -> Comparison:
        """Return the comparison with a further run of elements (bytes where they are no floats) from ``start`` on."""
        if correct.dtype not in TORCH_DTYPES.values():
            places = (correct != stored).nonzero().flatten()
            kept = places[: MOST_PLACES - len(self.places)] + start
            return replace(
                self, wrong=self.wrong + len(places), places=torch.cat([self.places, kept]), largest_ulp=None
            )
        # Of NaN, those with the same bits count as the same; -0 is 0.
        differs = (as_integers(correct) != as_integers(stored)) & (correct != stored)
        places = differs.nonzero().flatten()
        a, b = correct[places], stored[places]
        sound = torch.isfinite(a) & torch.isfinite(b)
        kept = places[: MOST_PLACES - len(self.places)] + start
        return replace(
            self,
            wrong=self.wrong + len(places),
            places=torch.cat([self.places, kept]),
            largest_ulp=max(self.largest_ulp or 0, largest_step(a[sound], b[sound])),
            not_finite=self.not_finite
            + int(((torch.isfinite(a) & ~torch.isfinite(b)) | (b.isnan() & ~a.isnan())).sum()),
        )


@dataclass(frozen=True)
class Replayed:
    """A replayed merge.

    Attributes:
        comparisons: Each tensor's, in the plan's order.
        inputs: SHA-256 of the base's and the adapters' files, by the names that manifests give them.
        files: SHA-256 of the merged checkpoint's files.
    """

    comparisons: tuple[Comparison, ...]
    inputs: Mapping[str, str]
    files: Mapping[str, str]


def judged_plan(plan: FoldPlan, stored: Mapping[str, TensorRef]) -> FoldPlan:
    """Return the part of a plan that can be compared: tensors that are stored, in the dtype in which they are."""
    shards = []
    for shard in plan.shards:
        tensors = tuple(_as_stored(t, stored[t.name]) for t in shard.tensors if t.name in stored)
        if tensors:
            shards.append(Shard(shard.name, tensors, b""))
    return replace(plan, shards=tuple(shards))


def _as_stored(tensor: TensorPlan, ref: TensorRef) -> TensorPlan:
    if tensor.dtype == ref.dtype or ref.dtype not in FLOAT_DTYPES:
        return tensor
    action = tensor.action
    if action in (Action.COPY, Action.CONVERT):
        action = Action.COPY if ref.dtype == tensor.source.dtype else Action.CONVERT
    return replace(tensor, dtype=ref.dtype, action=action)


def replay(
    plan: FoldPlan,
    course: Course,
    stored: Mapping[str, TensorRef],
    engine: Engine,
    hashes: InputHashes,
    progress: Progress | None = None,
) -> Replayed:
    """Compare every tensor of a plan with the stored one, in the bounded memory of a merge.

    Args:
        plan: From ``judged_plan``.
        course: How far the merge went.
        stored: The stored tensors, by the names that the plan gives them.
        engine: How to compute.
        hashes: Digests of the merged checkpoint's files, fed as they are read.
        progress: Called with bytes compared, bytes in all, and the tensor's name.

    Raises:
        DamagedFileError: If a file ends early.
        AccessError: If a file can't be read.
    """
    total = sum(t.nbytes for t in stored.values())
    done = 0
    found: list[Comparison] = []
    with replay_plan(plan, course, engine) as merged:
        for tensor, pieces in _by_tensor(merged.pieces, plan):
            comparison = Comparison(tensor, stored[tensor.name])
            offset = 0
            for data, measures in pieces:
                comparison = _compare(comparison, offset, data, measures, hashes)
                offset += len(data)
                done += len(data)
                if progress is not None:
                    progress(done, total, tensor.name)
            found.append(comparison)
        inputs = merged.hashes.digests()
    return Replayed(tuple(found), inputs, hashes.digests())


_Piece = tuple[memoryview, list[Measure]]


def _by_tensor(
    pieces: Iterator[tuple[TensorPlan, memoryview, list[Measure]]], plan: FoldPlan
) -> Iterator[tuple[TensorPlan, Iterator[_Piece]]]:
    """Yield each tensor with its pieces; an empty tensor has none."""
    for tensor in plan.tensors:
        left = _nbytes(tensor)

        def own(left: int = left) -> Iterator[_Piece]:
            while left:
                _, data, measures = next(pieces)
                left -= len(data)
                yield data, measures

        yield tensor, own()


def _nbytes(tensor: TensorPlan) -> int:
    return TensorRef(tensor.name, tensor.dtype, tensor.shape, tensor.source.source, "").nbytes


def _compare(
    comparison: Comparison, offset: int, data: memoryview, measures: list[Measure], hashes: InputHashes
) -> Comparison:
    ref = comparison.stored
    correct = torch.frombuffer(data, dtype=torch.uint8)
    stored = read_bytes(ref, offset, offset + len(data))
    if isinstance(ref.source, BytesInFile):
        hashes.feed(ref.source.path, ref.source.offset + offset, as_bytes(stored))
    dtype = TORCH_DTYPES.get(ref.dtype, torch.uint8)
    if not _same(correct, stored):
        comparison = comparison.add(offset // dtype.itemsize, correct.view(dtype), stored.view(dtype))
    return replace(comparison, measure=sum(measures, comparison.measure or Measure())) if measures else comparison


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether bytes are the same, eight at a time where that is possible."""
    whole = torch.int64 if len(a) % 8 == 0 and a.data_ptr() % 8 == 0 == b.data_ptr() % 8 else torch.uint8
    return torch.equal(a.view(whole), b.view(whole))
