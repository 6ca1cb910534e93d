"""Comparing a tensor of one checkpoint with that of another: what is measured, and how the kind of change is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from boft_export.checkpoint import TensorRef
from boft_export.linalg.bits import as_integers, largest_step
from boft_export.linalg.gram import EXACT_ROWS, ExactGram, GramResult, Rounding, SketchedGram, row_signs
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.options import Progress
from boft_export.pipeline.tensor_change import ChangeKind, TensorChange
from boft_export.pipeline.tensor_pair import BLOCK_BYTES, Block, TensorPair
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes
from boft_export.pipeline.workers import Workers, workers

# What tells most changed tensors from unchanged ones.
_GLANCE_BYTES = 1 << 16
# Conditions that must hold by chance else, for something as rare as a rotation of the outputs.
_SURE = 10
# Rows that tell the signs of others, and columns that are looked at for a rotation of the outputs.
_REFERENCES = 16
_COLUMNS = 64
# A correctly rounded s_i w, with s_i known to some digits only, is off by no more steps than this; float64, in which it
# is computed, has no digits to spare.
_SCALE_STEPS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 2, torch.float64: 64}
# An edit's changes are this many times what rounding would be: less may be the trace of a rotation that is lost.
_EDIT_JUMP = 8.0


def measure_change(
    a: TensorRef, b: TensorRef, *, pool: Workers | None = None, progress: Progress | None = None
) -> TensorChange:
    """Compare a tensor with what it was, in bounded memory, whatever its size.

    The result is the same for any number of threads.

    Args:
        a: The tensor before.
        b: The tensor after, of the same shape.
        pool: From ``workers``, for many tensors; by default one thread computes.
        progress: Called with bytes of ``b`` done, all its bytes, and its name; what has to be looked at again is not
            counted.

    Raises:
        ValueError: If the shapes differ.
        DamagedFileError: If a file ends early.
        AccessError: If a file can't be read.
    """
    if a.shape != b.shape:
        raise ValueError(f"{b.name} has shape {b.shape}, not {a.shape}")
    if pool is None:
        with workers(1) as own:
            return measure_change(a, b, pool=own, progress=progress)
    report = progress or (lambda _done, _total, _name: None)
    if a.dtype == b.dtype and _same_bytes(a, b, pool, report):
        return TensorChange(ChangeKind.IDENTICAL)
    if a.dtype not in TORCH_DTYPES or b.dtype not in TORCH_DTYPES:
        return _of_other_dtypes(a, b)
    if not b.num_elements:
        return TensorChange(ChangeKind.CONVERTED)
    return _Comparison(TensorPair(a, b), pool).change(report)


def comparing_bytes(a: TensorRef, b: TensorRef, jobs: int) -> int:
    """Return the bytes that ``measure_change`` takes at most, beside the program itself."""
    floats = a.dtype in TORCH_DTYPES and b.dtype in TORCH_DTYPES
    same = (jobs + 1) * 2 * BLOCK_BYTES
    return max(same, TensorPair(a, b).memory(jobs)) if floats and b.num_elements else same


def _same_bytes(a: TensorRef, b: TensorRef, pool: Workers, report: Progress) -> bool:
    """Tell whether two tensors have the same bytes; stop where they don't."""

    def same(start: int, size: int = BLOCK_BYTES) -> bool:
        stop = min(start + size, b.nbytes)
        return np.array_equal(read_bytes(a, start, stop).numpy(), read_bytes(b, start, stop).numpy())

    # What differs mostly does so from the beginning, and then nothing else need be read twice.
    if not same(0, _GLANCE_BYTES):
        return False
    done = 0
    for equal in pool.in_order(same, range(0, b.nbytes, BLOCK_BYTES)):
        if not equal:
            return False
        done = min(done + BLOCK_BYTES, b.nbytes)
        report(done, b.nbytes, b.name)
    return True


def _of_other_dtypes(a: TensorRef, b: TensorRef) -> TensorChange:
    """Return what can be said of dtypes that aren't computed with: how many elements differ."""
    changed = None
    if a.dtype == b.dtype and b.num_elements and b.nbytes % b.num_elements == 0:
        width = b.nbytes // b.num_elements
        changed = 0
        for start in range(0, b.nbytes, BLOCK_BYTES // width * width):
            stop = min(start + BLOCK_BYTES // width * width, b.nbytes)
            old, new = read_bytes(a, start, stop).view(-1, width), read_bytes(b, start, stop).view(-1, width)
            changed += int((old != new).any(1).sum())
    other = a.dtype if a.dtype not in TORCH_DTYPES else b.dtype
    reason = f"values of dtype {other} are not compared"
    return TensorChange(ChangeKind.UNKNOWN, changed, None, None, reason=reason)


@dataclass(frozen=True)
class _Part:
    """What was measured of a block: sums over each of its rows, float64, and the rest over all of it.

    Attributes:
        block: Which one.
        sums: Squares of A, of B, and of B - A, shape (3, rows).
        changed: Elements that differ, of each row.
        largest_ulp: By how many steps at most.
        bad: Elements of A and of B that are not finite.
        gram: What it adds to the test for a rotation; None where there is none.
    """

    block: Block
    sums: Tensor
    changed: Tensor
    largest_ulp: int
    bad: tuple[int, int]
    gram: ExactGram | SketchedGram | None


@dataclass(frozen=True)
class _Sums:
    """What was measured of the whole tensor; as of a block."""

    squares: Tensor
    squares_new: Tensor
    squares_change: Tensor
    changed: Tensor
    largest_ulp: int
    bad: tuple[int, int]
    gram: ExactGram | SketchedGram | None

    def gram_result(self) -> GramResult | None:
        """Return what the test for a rotation found."""
        if isinstance(self.gram, SketchedGram):
            return self.gram.result(self.squares.sqrt(), self.squares_new.sqrt())
        return self.gram.result() if self.gram is not None else None


class _Comparison:
    """A comparison of two tensors."""

    def __init__(self, pair: TensorPair, pool: Workers) -> None:
        self._pair = pair
        self._pool = pool
        self._dtype = TORCH_DTYPES[pair.b.dtype]
        self._rounding = Rounding.of(self._dtype)

    def change(self, report: Progress) -> TensorChange:
        """Measure it, and tell what was done."""
        sums = self._measure(report)
        known = _measured(sums)
        if not int(sums.changed.sum()):
            return replace(known, kind=ChangeKind.CONVERTED)
        if any(sums.bad):
            return replace(known, reason="not all values are finite")
        if not math.isfinite(float(sums.squares.sum() + sums.squares_new.sum())):
            return replace(known, reason="the squares of its values are too large for float64")
        return self._tell(known, sums)

    def _tell(self, known: TensorChange, sums: _Sums) -> TensorChange:
        """Tell what was done to a tensor of finite values, the simplest that explains it."""
        if sums.largest_ulp <= 1:
            return replace(known, kind=ChangeKind.ROUNDING)
        if self._is_scaled(sums):
            return replace(known, kind=ChangeKind.SCALE)
        if self._is_edited(sums):
            return replace(known, kind=ChangeKind.EDIT)
        gram = sums.gram_result()
        if gram is None:
            return replace(
                known, reason=f"{self._pair.rows} rows of {self._pair.width} are too long to be told from a rotation"
            )
        if gram.holds is False and not self._pair.few:
            gram = self._with_signs() or gram
        if gram.holds is None:
            reason = "any of its rows can be rotated into any other of the same length"
            return replace(
                known, reason=reason if self._pair.rows > 1 else "a single row can be rotated into any other"
            )
        known = _with_gram(known, gram)
        if gram.holds:
            return replace(known, kind=ChangeKind.ROTATION)
        for rows, width in self._views():
            output = self._column_gram(rows, width)
            if output.holds and output.conditions >= _SURE:
                return replace(_with_gram(known, output), kind=ChangeKind.ROTATION_OUTPUT)
            if output.holds is not False:
                return replace(known, reason="its columns could be the old ones rotated, and are too few to tell")
        return replace(known, kind=ChangeKind.REPLACEMENT)

    def _measure(self, report: Progress) -> _Sums:
        sums = torch.zeros(3, self._pair.rows, dtype=torch.float64)
        changed = torch.zeros(self._pair.rows, dtype=torch.int64)
        largest, bad, bad_new, done = 0, 0, 0, 0
        gram = self._new_gram()
        size = self._pair.b.nbytes // self._pair.b.num_elements
        for part in self._pool.in_order(self._measure_block, self._pair.blocks()):
            rows = slice(part.block.row, part.block.row + part.block.rows)
            sums[:, rows] += part.sums
            changed[rows] += part.changed
            largest = max(largest, part.largest_ulp)
            bad, bad_new = bad + part.bad[0], bad_new + part.bad[1]
            if gram is not None and part.gram is not None:
                gram.merge(part.gram)
            done += part.block.rows * part.block.columns * size
            report(done, self._pair.b.nbytes, self._pair.b.name)
        return _Sums(sums[0], sums[1], sums[2], changed, largest, (bad, bad_new), gram)

    def _new_gram(self, sketch_dtype: torch.dtype = torch.float64) -> ExactGram | SketchedGram | None:
        if not self._pair.whole:
            return None
        if self._pair.few:
            return ExactGram(self._pair.rows, self._pair.width, self._rounding)
        return SketchedGram(self._pair.width, self._rounding, sketch_dtype)

    def _measure_block(self, block: Block) -> _Part:
        old, new = self._pair.read(self._pair.a, block), self._pair.read(self._pair.b, block)
        sums = torch.zeros(3, block.rows, dtype=torch.float64)
        changed = torch.zeros(block.rows, dtype=torch.int64)
        largest, bad, bad_new = 0, 0, 0
        # float32 holds narrower values exactly, and is exact enough for their sketch.
        narrow = torch.float32 if max(old.element_size(), new.element_size()) < 4 else torch.float64
        gram = self._new_gram(narrow)
        for rows, columns in self._pair.tiles(block):
            x, y = old[rows, columns], new[rows, columns].contiguous()
            short, short_new = x.to(narrow), y.to(narrow)
            a, b = short.to(torch.float64), short_new.to(torch.float64)
            same = x.contiguous() if x.dtype is y.dtype else round_once(a, self._dtype)
            keys, keys_new = same, y
            differs = as_integers(same).numpy() != as_integers(y).numpy()
            changed[rows] += torch.from_numpy(np.count_nonzero(differs, axis=1))
            squares, squares_new = _row_squares(a), _row_squares(b)
            if not math.isfinite(float(squares.sum() + squares_new.sum())):
                wrong, wrong_new = ~torch.isfinite(a), ~torch.isfinite(b)
                bad, bad_new = bad + int(wrong.sum()), bad_new + int(wrong_new.sum())
                left_out = wrong | wrong_new | ~torch.isfinite(same)
                a, b = a.masked_fill(left_out, 0), b.masked_fill(left_out, 0)
                short, short_new = a.to(narrow), b.to(narrow)
                keys, keys_new = same.masked_fill(left_out, 0), y.masked_fill(left_out, 0)
                squares, squares_new = _row_squares(a), _row_squares(b)
            sums[:, rows] += torch.stack([squares, squares_new, _row_squares(b - a)])
            largest = max(largest, largest_step(keys, keys_new))
            if isinstance(gram, SketchedGram):
                gram.add(block.row + rows.start, short, short_new, squares.sqrt(), squares_new.sqrt())
            elif gram is not None:
                gram.add(a, b)
        return _Part(block, sums, changed, largest, (bad, bad_new), gram)

    def _is_scaled(self, sums: _Sums) -> bool:
        """Tell whether each row is a multiple of what it was, but for rounding; may look at all elements again."""
        lengths, new_lengths = sums.squares.sqrt(), sums.squares_new.sqrt()
        if bool(((lengths == 0) & (new_lengths > 0)).any()):
            return False
        angles = row_angles(sums.squares, sums.squares_new, sums.squares_change)
        # A rounding error is half a step at most.
        info = torch.finfo(self._dtype)
        smallest = info.smallest_normal * info.eps * math.sqrt(self._pair.width)
        half_step = 0.51 * (info.eps + smallest / new_lengths) + 1e-7
        turned = torch.minimum(angles, math.pi - angles)
        if bool((turned > half_step)[(lengths > 0) & (new_lengths > 0)].any()):
            return False
        sign = torch.where(angles > math.pi / 2, -1.0, 1.0)
        scale = torch.where(lengths > 0, sign * new_lengths / lengths, 1.0)
        steps = self._pool.in_order(partial(self._steps_from_scaled, scale), self._pair.blocks())
        allowed = _SCALE_STEPS[self._dtype]
        return all(step <= allowed for step in steps)

    def _steps_from_scaled(self, scale: Tensor, block: Block) -> int:
        old, new = self._pair.read(self._pair.a, block), self._pair.read(self._pair.b, block)
        factor = scale[block.row : block.row + block.rows, None]
        largest = 0
        for rows, columns in self._pair.tiles(block):
            expected = round_once(old[rows, columns].to(torch.float64) * factor[rows], self._dtype)
            largest = max(largest, largest_step(expected, new[rows, columns].contiguous()))
        return largest

    def _is_edited(self, sums: _Sums) -> bool:
        """Tell whether half of the rows are untouched, and others changed by more than a lost rotation would leave."""
        touched = sums.changed > 0
        if len(self._pair.b.shape) > 1:
            # What is zero stays so whatever is done.
            share = touched.sum() / ((sums.squares > 0) | touched).sum()
        else:
            share = sums.changed.sum() / self._pair.width
        jump = (sums.squares_change / sums.changed)[touched]
        steps = 12 * (self._rounding.relative * sums.squares_new / self._pair.width + self._rounding.absolute)[touched]
        return bool(share <= 0.5) and bool((jump > _EDIT_JUMP**2 * steps).any())

    def _with_signs(self) -> GramResult | None:
        """Test again with the signs of s, which a few rows tell, if these are rotated and some sign is negative."""
        numbers = [i * self._pair.rows // EXACT_ROWS for i in range(EXACT_ROWS)]
        old, new = (
            torch.cat([self._pair.read(ref, Block(i, 1, 0, self._pair.width)) for i in numbers]).to(torch.float64)
            for ref in (self._pair.a, self._pair.b)
        )
        some = ExactGram(EXACT_ROWS, self._pair.width, self._rounding)
        some.add(old, new)
        found = some.result()
        if not found.holds:
            return None
        used = torch.nonzero((found.scale != 0) & (old != 0).any(1)).flatten()
        used = used[torch.linspace(0, len(used) - 1, min(_REFERENCES, len(used))).long()]
        references = (_unit(old[used]), _unit(new[used]) * found.scale[used].sign()[:, None])
        gram = SketchedGram(self._pair.width, self._rounding)
        lengths = torch.zeros(2, self._pair.rows, dtype=torch.float64)
        for block, part, part_lengths in self._pool.in_order(
            partial(self._signed_block, references), self._pair.blocks()
        ):
            gram.merge(part)
            lengths[:, block.row : block.row + block.rows] = part_lengths
        return gram.result(lengths[0], lengths[1]) if bool((lengths[1] < 0).any()) else None

    def _signed_block(self, references: tuple[Tensor, Tensor], block: Block) -> tuple[Block, SketchedGram, Tensor]:
        old, new = self._pair.read(self._pair.a, block), self._pair.read(self._pair.b, block)
        gram = SketchedGram(self._pair.width, self._rounding)
        lengths = torch.zeros(2, block.rows, dtype=torch.float64)
        for rows, _ in self._pair.tiles(block):
            a, b = old[rows].to(torch.float64), new[rows].to(torch.float64)
            signs = row_signs(_unit(a), _unit(b), references, self._rounding)
            lengths[:, rows] = torch.stack([_row_squares(a).sqrt(), _row_squares(b).sqrt() * signs])
            gram.add(block.row + rows.start, a, b, lengths[0, rows], lengths[1, rows])
        return block, gram, lengths

    def _views(self) -> Iterator[tuple[int, int]]:
        """Yield rows and columns of matrices of which the columns may have been rotated.

        PEFT up to 0.13 read a convolution's bytes as (in k k, out).
        """
        if self._pair.rows > 1:
            yield self._pair.rows, self._pair.width
        if len(self._pair.b.shape) > 2 and self._pair.width > 1:
            yield self._pair.width, self._pair.rows

    def _column_gram(self, rows: int, width: int) -> GramResult:
        """Test whether columns are rotated, as far as some of them tell."""
        count = min(_COLUMNS, width)
        taken = torch.tensor([i * width // count for i in range(count)])
        gram = ExactGram(count, rows, self._rounding)
        step = max(1, BLOCK_BYTES // (width * 8))
        for part in self._pool.in_order(partial(self._columns_block, width, taken, step), range(0, rows, step)):
            gram.merge(part)
        return gram.result()

    def _columns_block(self, width: int, taken: Tensor, step: int, row: int) -> ExactGram:
        total = self._pair.b.num_elements
        gram = ExactGram(len(taken), total // width, self._rounding)
        pair = []
        for ref in (self._pair.a, self._pair.b):
            size = ref.nbytes // ref.num_elements
            data = read_bytes(ref, row * width * size, min((row + step) * width, total) * size)
            pair.append(data.view(TORCH_DTYPES[ref.dtype]).view(-1, width)[:, taken].T.to(torch.float64))
        gram.add(*pair)
        return gram


def row_angles(squares: Tensor, squares_new: Tensor, squares_change: Tensor) -> Tensor:
    """Return the angle between each row u before and v after, in radians; 0 where one is zero.

    With the chord |u/|u| - v/|v||^2 = (|v - u|^2 - (|v| - |u|)^2) / (|u| |v|), which loses no digits of small
    angles as a cosine does.

    Args:
        squares: |u|^2 of each row, float64.
        squares_new: |v|^2.
        squares_change: |v - u|^2.
    """
    a, b = squares.sqrt(), squares_new.sqrt()
    chord = ((squares_change - (b - a).square()) / (a * b)).clamp(0, 4).nan_to_num(0.0)
    return 2 * torch.atan2(chord.sqrt(), (4 - chord).sqrt())


def _measured(sums: _Sums) -> TensorChange:
    """Return all but the kind."""
    whole, change = float(sums.squares.sum()), float(sums.squares_change.sum())
    angles = row_angles(sums.squares, sums.squares_new, sums.squares_change)
    angles = angles[(sums.squares > 0) & (sums.squares_new > 0)]
    change_known = math.isfinite(whole) and math.isfinite(change)
    relative = (math.sqrt(change / whole) if whole else math.inf if change else 0.0) if change_known else None
    known = TensorChange(
        ChangeKind.UNKNOWN,
        changed=int(sums.changed.sum()),
        relative_change=relative,
        largest_ulp=sums.largest_ulp,
        mean_angle=float(angles.mean()) if len(angles) and change_known else None,
        largest_angle=float(angles.max()) if len(angles) and change_known else None,
        nonfinite=sums.bad[0],
        nonfinite_new=sums.bad[1],
    )
    return _with_scale(known, (sums.squares_new.sqrt() / sums.squares.sqrt())[sums.squares > 0])


def _with_gram(known: TensorChange, gram: GramResult) -> TensorChange:
    measured = replace(known, residual=gram.residual, noise=gram.noise, limit=gram.limit)
    return _with_scale(measured, gram.scale) if gram.holds else measured


def _with_scale(known: TensorChange, scale: Tensor) -> TensorChange:
    if not len(scale) or not bool(torch.isfinite(scale).all()):
        return known
    return replace(
        known,
        smallest_scale=float(scale.min()),
        mean_scale=float(scale.mean()),
        largest_scale=float(scale.max()),
    )


def _row_squares(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1)
    return lengths.square()


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length > 0, x / length, 0.0)
