"""What validation finds in merges that went wrong, and that it finds nothing in right ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from sabotage import FIRST, HEAD, SABOTAGES, Bed, make_bed
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor

import boft_export
from boft_export.errors import Level, UsageError
from boft_export.linalg.rounding import round_once
from boft_export.validation.model import Check, Outcome, Validation
from boft_export.validation.policy import Policy, Thresholds
from boft_export.validation.validate import validate

# Beds that differ in what rounding hides: a coarse dtype, a fine one, and little training.
BEDS = ((torch.bfloat16, 0.2), (torch.float16, 0.02), (torch.float32, 0.02))


def failures(result: Validation) -> list[Check]:
    return [c for c in result.checks if c.outcome is not Outcome.PASS]


def judge(bed: Bed, **more: object) -> Validation:
    return validate(bed.adapter, base=bed.base, merged=bed.merged, **more)


@pytest.mark.parametrize(("dtype", "std"), BEDS, ids=str)
@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_found_by_name(name: str, dtype: torch.dtype, std: float, tmp_path: Path) -> None:
    spoil, finding, place = SABOTAGES[name]
    bed = make_bed(tmp_path, dtype, std=std)
    assert failures(judge(bed)) == []
    spoil(bed)
    found = failures(judge(bed))
    assert [c for c in found if c.finding == finding and (c.subject == place or not place)], found
    assert all(c.outcome is Outcome.FAIL and c.level is Level.ERROR for c in found)
    # Nothing is called something else that it isn't.
    consequences = {
        "not-applied": {"layer-skipped", "stale-tie", "bias-lost"},
        "other-base": {"other-values"},
    }
    assert {c.finding for c in found} <= {finding, *consequences.get(finding, ())}


@pytest.mark.parametrize("seed", range(210))
def test_right_merges_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    """Random sizes, dtypes, factors and ways of training; written by us, and by others in float32."""
    bed = random_merge(seed, tmp_path)
    found = failures(bed)
    assert found == []


def random_merge(seed: int, folder: Path) -> Validation:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    m, b = rng.choice([(1, 2), (1, 3), (1, 8), (2, 2), (2, 4), (3, 2), (3, 4), (4, 2), (2, 8)])
    stored = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    std = rng.choice([0.003, 0.02, 0.1, 0.5, 2.0])
    before: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for i in range(3):
        n, out = b * 2 ** (m - 1) * rng.randint(1, 6), rng.randint(1, 40)
        shape = (out, n)
        if n % 4 == 0 and rng.random() < 0.3:
            shape = (out, n // 4, 2, 2)
        spread = torch.randn(out, *[1] * (len(shape) - 1), generator=generator).exp() if rng.random() < 0.5 else 1.0
        before[f"layers.{i}.w.weight"] = (torch.randn(shape, generator=generator) * 0.05 * spread).to(stored)
        trained |= boft_tensors(f"layers.{i}.w", n, out, m=m, b=b, std=std, seed=seed * 10 + i)
        before[f"layers.{i}.norm.weight"] = torch.ones(n).to(stored)
    base = write_checkpoint(folder / "base", before, shards=rng.choice([1, 2]))
    adapter = write_adapter(folder / "adapter", trained)
    written = rng.choice(["keep", "keep", "float32", "bfloat16", "float16"])
    way = rng.choice(["ours", "ours", "float32", "half-way"])
    if way == "float32" and stored is not torch.float64:
        merged = merged_in_float32(folder / "merged", before, trained)
    elif way == "half-way":
        merged = folder / "merged"
        path = rng.choice(["geodesic", "factorwise", "cayley", "linear"])
        boft_export.interpolate(base, adapter, merged, 0.5, path=path)
    else:
        merged = folder / "merged"
        compute = rng.choice(["float64", "float32"])
        boft_export.merge(base, adapter, merged, dtype=None if written == "keep" else written, compute_dtype=compute)
    return validate(adapter, base=base, merged=merged)


def merged_in_float32(folder: Path, before: dict[str, Tensor], trained: dict[str, Tensor]) -> Path:
    """Merge as PEFT does on a CPU: a dense product in float32, stored in the base's dtype."""
    after = dict(before)
    for name, weight in before.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.boft_R" in trained:
            r = butterfly_matrix(trained[f"{prefix}.boft_R"]).float()
            flat = weight.float().reshape(len(weight), -1)
            after[name] = ((flat @ r.T) * trained[f"{prefix}.boft_s"]).to(weight.dtype).reshape(weight.shape)
    return write_checkpoint(folder, after)
