"""The Gram test: rotations are told from everything else, and from rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import BOFTConfig, get_peft_model
from support import boft_tensors, butterfly_matrix, expected_merge, properties
from torch import Tensor

from boft_export.linalg.gram import ExactGram, GramResult, Rounding, SketchedGram, row_signs
from boft_export.linalg.rounding import round_once

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def gram(
    old: Tensor, new: Tensor, *, exact: bool | None = None, step: int = 32, signs: Tensor | None = None
) -> GramResult:
    rounding = Rounding.of(new.dtype)
    old, new = old.double(), new.double()
    if len(old) <= 64 if exact is None else exact:
        test = ExactGram(*old.shape, rounding)
        for i in range(0, old.shape[1], step):
            test.add(old[:, i : i + step], new[:, i : i + step])
        return test.result()
    lengths, new_lengths = old.norm(dim=1), new.norm(dim=1) * (1 if signs is None else signs)
    whole = SketchedGram(old.shape[1], rounding)
    for i in range(0, len(old), step):
        part = SketchedGram(old.shape[1], rounding)
        rows = slice(i, i + step)
        part.add(i, old[rows], new[rows], lengths[rows], new_lengths[rows])
        whole.merge(part)
    return whole.result(lengths, new_lengths)


def weights(kind: str, rows: int, width: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    thin = torch.randn(2, width, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "low rank": torch.randn(rows, 2, generator=generator, dtype=torch.float64) @ thin + 0.01 * x,
        "heavy tails": x**3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) ** -0.5,
        "outlier columns": x * torch.rand(1, width, generator=generator, dtype=torch.float64).clamp_min(0.01) ** -1,
        "sparse": x * (torch.rand(rows, width, generator=generator) < 0.05),
        "one direction": 0.1 * x + 1,
        "clusters": 1e-3 * x + torch.cat([thin, -thin[:1]])[torch.arange(rows) % 3],
    }[kind] * 0.02


KINDS = ["normal", "low rank", "heavy tails", "outlier columns", "sparse", "one direction", "clusters"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotations_are_never_taken_for_something_else(dtype: torch.dtype) -> None:
    """Over 200 of each dtype: sizes, numbers of factors, block sizes and kinds of weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 2, 1, 2), (8, 24, 2, 4), (32, 24, 3, 8), (64, 100, 4, 8), (72, 130, 1, 8), (256, 65, 4, 16)]
    done = 0
    for seed in range(5):
        for n, out, m, b in shapes:
            layer = boft_tensors("x", n, out, m=m, b=b, seed=seed)
            scale = layer["base_model.model.x.boft_s"].double()
            rotation = butterfly_matrix(layer["base_model.model.x.boft_R"])
            for kind in KINDS:
                old = weights(kind, out, n, generator).to(dtype)
                new = round_once(scale * (old.double() @ rotation.T), dtype)
                found = gram(old, new)
                assert found.holds is not False, (n, out, m, b, kind, seed, found.residual, found.limit)
                done += 1
    assert done >= 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(40, 64), (300, 64), (512, 256), (1000, 27)])
def test_other_changes_are_found(dtype: torch.dtype, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    old = weights("normal", rows, width, generator).to(dtype)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    new = old.double() @ rotation.T
    one_row = new.clone()
    one_row[7] = one_row[7].flip(0)
    stretched = 1 + 0.05 * torch.randn(width, generator=generator, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    changes = {
        "rotation": new,
        "other weights": weights("normal", rows, width, generator),
        "one row": one_row,
        "rows swapped": new[[1, 0, *range(2, rows)]],
        "not orthogonal": (old.double() * stretched) @ rotation.T,
        "noise": new * (1 + max(8 * eps, 1e-5) * noise),
    }
    told = {name: gram(old, round_once(x, dtype)).holds for name, x in changes.items()}
    assert told == {name: name == "rotation" for name in changes}


def test_expected_noise_is_what_rounding_makes() -> None:
    """The model of the noise needs no factor: it gives the residual itself."""
    generator = torch.Generator().manual_seed(2)
    for kind in KINDS:
        for rows in (64, 400):
            ratios = []
            for seed in range(4):
                old = weights(kind, rows, 96, generator).bfloat16()
                new = expected_merge(old, boft_tensors("x", 96, rows, m=2, b=8, std=1, seed=seed)).bfloat16()
                found = gram(old, new)
                ratios.append(found.residual / found.noise)
            # Of rows that are nearly parallel, the errors along them change lengths and no angles.
            least = 0.03 if kind in {"one direction", "low rank", "clusters"} else 0.5
            assert least < sum(ratios) / len(ratios) < 1.2, (kind, rows, ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merges_of_peft(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the arithmetic of the weights' own dtype."""
    # Without its CUDA extension, which would be compiled, it applies one factor.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    torch.manual_seed(0)
    for n, out, b in ((16, 40, 4), (64, 64, 8), (256, 200, 8)):
        model = torch.nn.Sequential(torch.nn.Linear(n, out, bias=False)).to(dtype)
        old = model[0].weight.detach().clone()
        config = BOFTConfig(target_modules=["0"], boft_block_size=b, init_weights=False)
        new = get_peft_model(model, config).merge_and_unload()[0].weight.detach()
        assert not torch.equal(old, new)
        assert gram(old, new).holds


@given(rows=st.integers(1, 90), width=st.integers(1, 20), step=st.integers(1, 40), seed=st.integers(0, 99))
@properties
def test_pieces_make_no_difference_but_where_sums_begin(rows: int, width: int, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = weights("normal", rows, width, generator)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scale = 1 + 0.1 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    new = scale * (old @ rotation.T)
    for exact in (True, False):
        found = gram(old, new, exact=exact, step=step)
        assert found.holds is (True if found.conditions else None)
        torch.testing.assert_close(found.scale.abs(), scale[:, 0].abs())
        if rows == 1 or width == 1:
            assert not found.conditions


def test_signs_of_scales() -> None:
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))[0]
    for rows in (3, 40, 200):
        old = weights("normal", rows, 48, generator).bfloat16()
        scale = torch.where(torch.arange(rows) % 3 == 1, -1.1, 0.9).double()
        new = (scale[:, None] * (old.double() @ rotation.T)).bfloat16()
        few = gram(old[:40], new[:40])
        assert few.holds
        assert torch.equal(few.scale.sign(), scale[:40].sign())
        units, new_units = (torch.nn.functional.normalize(x.double(), dim=1) for x in (old, new))
        references = (units[:16], new_units[:16] * scale[:16].sign()[:, None])
        signs = row_signs(units, new_units, references, Rounding.of(torch.bfloat16))
        assert torch.equal(signs, scale.sign())
        whole = gram(old, new, exact=False, signs=signs)
        assert whole.holds or rows == 3
        assert torch.equal(whole.scale.sign(), scale.sign())
        if rows > 3:
            assert gram(old, new, exact=False).holds is False


def test_zero_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    for rows in (20, 100):
        old = weights("normal", rows, 16, generator)
        old[3] = 0
        new = old @ rotation.T
        found = gram(old, new)
        assert found.holds
        assert found.scale[3] == 1
        new[5] = 0
        assert gram(old, new).holds
        assert gram(old, new).scale[5] == 0
        new[3] = 1
        found = gram(old, new)
        assert found.holds is False
        assert math.isinf(found.residual)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert gram(nothing, nothing).holds is None


def test_conditions_are_those_a_rotation_can_break() -> None:
    """As many as the rank of what rotations and scales can't reach, by their derivatives at a random matrix."""
    generator = torch.Generator().manual_seed(5)
    for rows, width in ((1, 4), (2, 2), (2, 5), (3, 3), (5, 3), (7, 2), (6, 6), (4, 1)):
        old = weights("normal", rows, width, generator)
        pairs = [(i, j) for i in range(width) for j in range(i)]
        moves = []
        for i, j in pairs:
            skew = torch.zeros(width, width, dtype=torch.float64)
            skew[i, j], skew[j, i] = 1, -1
            moves.append((old @ skew).flatten())
        for i in range(rows):
            scaled = torch.zeros_like(old)
            scaled[i] = old[i]
            moves.append(scaled.flatten())
        reached = int(torch.linalg.matrix_rank(torch.stack(moves)))
        assert gram(old, old, exact=True).conditions == rows * width - reached, (rows, width)
