"""What validation finds in merges that went wrong, and that it finds nothing in right ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from sabotage import FIRST, HEAD, SABOTAGES, SECOND, Bed, keep_tie, make_bed
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor, nn

import boft_export
from boft_export.errors import Level
from boft_export.linalg.butterfly import butterfly_index
from boft_export.validation.layer_checks import _orthogonality
from boft_export.validation.model import Check, LayerFacts, Outcome, Validation
from boft_export.validation.policy import Policy, Thresholds
from boft_export.validation.validate import validate

# Beds that differ in what rounding hides: a coarse dtype, a fine one, and little training.
BEDS = ((torch.bfloat16, 0.2), (torch.float16, 0.02), (torch.float32, 0.02))


PART_WAY = ("manifest", "part-way")


def failures(result: Validation) -> list[Check]:
    """Return what did not pass, but for the warning that an interpolation is one."""
    return [c for c in result.checks if c.outcome is not Outcome.PASS and (c.check, c.finding) != PART_WAY]


def judge(bed: Bed, merged: Path | None = None, policy: Policy | None = None) -> Validation:
    return validate(bed.adapter, base=bed.base, merged=merged or bed.merged, policy=policy)


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


def write_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a merge by somebody else: weights and a config, and nothing that says where they come from."""
    return write_checkpoint(folder, tensors)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base of one layer, and two adapters for it."""
    generator = torch.Generator().manual_seed(3)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.randn(24, 32, generator=generator).bfloat16()})
    trained = [boft_tensors("x", 32, 24, m=2, b=4, std=0.2, seed=i) for i in range(2)]
    return base, [write_adapter(tmp_path / f"adapter-{i}", t) for i, t in enumerate(trained)]


@pytest.mark.parametrize(
    ("used", "finding"),
    [((0, 1), None), ((1, 0), "adapters-reversed"), ((0,), "adapter-ignored"), ((1,), "adapter-ignored")],
)
def test_several_adapters(
    used: tuple[int, ...], finding: str | None, two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = two
    merged = boft_export.merge(base, [adapters[i] for i in used], tmp_path / "merged").output
    (merged / "boft_export.json").unlink()
    found = failures(validate(adapters, base=base, merged=merged))
    assert [c.finding for c in found] == ([finding] if finding else [])


def test_a_part_of_a_fused_weight_that_was_skipped(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    name = "model.layers.0.attn.qkv_proj.weight"
    before = {name: torch.randn(24, 16, generator=generator).bfloat16()}
    base = write_checkpoint(tmp_path / "base", before)
    parts = ("q_proj", "k_proj", "v_proj")
    trained: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        trained |= boft_tensors(f"model.layers.0.attn.{part}", 16, 8, m=2, b=4, seed=i)
    adapter = write_adapter(tmp_path / "adapter", trained)
    merged = boft_export.merge(base, adapter, tmp_path / "merged").output
    assert failures(validate(adapter, base=base, merged=merged)) == []
    after = read_folder(merged)[name].clone()
    after[8:16] = before[name][8:16]
    found = failures(validate(adapter, base=base, merged=write_folder(tmp_path / "skipped", {name: after})))
    assert [c.finding for c in found] == ["part-skipped"]
    assert "k_proj" in found[0].message


@pytest.mark.parametrize("view", ["input", "reshaped"])
def test_convolutions(view: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    before = {f"{n}.weight": torch.randn(12, 8, 3, 3, generator=generator).bfloat16() for n in "ab"}
    trained = {k: v for i, n in enumerate("ab") for k, v in boft_tensors(n, 72, 12, m=1, b=8, std=0.1, seed=i).items()}
    base = write_checkpoint(tmp_path / "base", before)
    old = view == "reshaped"
    adapter = write_adapter(tmp_path / "adapter", trained, drop=("peft_version", "exclude_modules") if old else ())
    merged = boft_export.merge(base, adapter, tmp_path / "merged").output
    assert failures(validate(adapter, base=base, merged=merged)) == []
    after = read_folder(merged)
    right = dict(after)
    # Rows or columns of the matrix that the view makes of the weight are scaled.
    scale = trained["base_model.model.a.boft_s"].double().reshape(1, -1) if old else None
    flat = after["a.weight"].double()
    if scale is not None:
        unscaled = (flat.reshape(72, 12) / scale).reshape(12, 8, 3, 3)
    else:
        unscaled = flat / trained["base_model.model.a.boft_s"].double().reshape(-1, 1, 1, 1)
    right["a.weight"] = unscaled.bfloat16()
    found = failures(validate(adapter, base=base, merged=write_folder(tmp_path / "unscaled", right)))
    assert [(c.subject, c.finding) for c in found] == [("a.weight", "scale-dropped")]
    spoiled = write_folder(tmp_path / "swapped", {"a.weight": after["b.weight"], "b.weight": after["a.weight"]})
    found = failures(validate(adapter, base=base, merged=spoiled))
    assert {c.finding for c in found} == {"swapped-layers"}
    assert len(found) == 2


def test_a_merge_saved_under_other_names(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    renamed = {n.removeprefix("model."): v for n, v in read_folder(bed.merged).items()}
    merged = write_folder(tmp_path / "renamed", renamed)
    shutil_config(bed, merged)
    result = judge(bed, merged=merged)
    assert {(c.finding, c.level) for c in failures(result)} <= {
        ("missing-file", Level.WARNING), ("other-names", Level.WARNING)
    }  # fmt: skip
    assert any(c.subject == "names" for c in result.checks)


def shutil_config(bed: Bed, folder: Path) -> None:
    (folder / "config.json").write_bytes((bed.merged / "config.json").read_bytes())


def test_side_files_and_leftovers(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    (bed.merged / "tokenizer.json").unlink()
    found = failures(judge(bed))
    assert [(c.subject, c.finding, c.level) for c in found] == [("tokenizer.json", "missing-file", Level.WARNING)]
    (bed.merged / "adapter_config.json").write_text("{}")
    assert "adapter-left" in {c.finding for c in failures(judge(bed))}


def test_missing_and_further_tensors(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    tensors = read_folder(bed.merged)
    del tensors[FIRST]
    tensors["further.weight"] = torch.zeros(2, 2)
    tensors[SECOND] = tensors[SECOND][:-1].contiguous()
    merged = write_folder(tmp_path / "spoiled", tensors)
    shutil_config(bed, merged)
    found = {c.subject: c.finding for c in failures(judge(bed, merged=merged))}
    assert found.items() >= {
        FIRST: "missing-tensor", SECOND: "other-shape", "further.weight": "unexpected-tensor"
    }.items()  # fmt: skip


def test_correct_rounding_can_be_demanded(tmp_path: Path) -> None:
    """A merge in float32 is let pass, unless every element is to be correctly rounded."""
    bed = make_bed(tmp_path, torch.float32)
    bed.every(lambda w, r, s: ((w.float() @ r.T.float()) * s.float()).double())
    result = judge(bed)
    assert failures(result) == []
    assert any(t.wrong for t in result.tensors)
    strict = failures(judge(bed, policy=Policy(Thresholds(arithmetic=2.0**-53))))
    assert strict
    inexact = failures(judge(bed, policy=Policy(Thresholds(max_wrong=0.0))))
    assert {c.finding for c in inexact} == {"inexact"}
    assert {c.finding for c in failures(judge(bed, policy=Policy(Thresholds(max_ulp=0.0))))} == {"inexact"}


def test_little_damage_is_placed(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    value = read_folder(bed.merged)[FIRST].clone()
    value[7, 3:6] = 1.5
    bed.write(FIRST, value)
    (found,) = failures(judge(bed))
    assert found.finding == "wrong-elements"
    assert "3 of 1,536" in found.message
    assert "[7, 3]" in found.message


def test_an_untrained_adapter_and_its_merge(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.randn(8, 16, generator=generator)})
    trained = {"base_model.model.x.boft_R": torch.zeros(1, 4, 4, 4), "base_model.model.x.boft_s": torch.ones(8, 1)}
    adapter = write_adapter(tmp_path / "adapter", trained)
    merged = boft_export.merge(base, adapter, tmp_path / "merged").output
    found = failures(validate(adapter, base=base, merged=merged))
    assert {(c.finding, c.level) for c in found} == {("untrained", Level.WARNING)}


def test_a_merge_by_its_base_alone(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    result = validate(base=bed.base, merged=bed.merged)
    rotated = {c.subject for c in result.checks if c.check == "rotation" and c.outcome is Outcome.PASS}
    assert rotated == set(bed.rotated)
    assert {c.outcome for c in failures(result)} == {Outcome.INCONCLUSIVE}
    for name in (FIRST, HEAD):
        _, _, s = bed.parts(name)
        check = next(c for c in result.checks if c.subject == name)
        assert check.measured["smallest_scale"] == pytest.approx(float(s.min()), rel=1e-2)
        assert check.measured["largest_scale"] == pytest.approx(float(s.max()), rel=1e-2)


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda w, r, s: torch.cat([(s * (w @ r.T))[:20], w[20:]]), "part-skipped"),
        (lambda w, r, s: w + 0.9 * (s * (w @ r.T) - w), "part-way"),
        (lambda w, r, s: s.roll(1, 0) * (w @ r.T), "wrong-scale"),
        (lambda w, r, s: -s * (w @ r.T), "wrong-scale"),
        (lambda w, _r, _s: torch.zeros_like(w), "wrong-values"),
        (lambda w, r, s: (s * (w @ r.T)).flip(0), "other-base"),
    ],
    ids=["half-of-the-rows", "nine-tenths", "scales-shifted", "scales-negated", "zeros", "rows-reversed"],
)
def test_other_mistakes(
    change: Callable[[Tensor, Tensor, Tensor], Tensor], finding: str, dtype: torch.dtype, std: float, tmp_path: Path
) -> None:
    bed = make_bed(tmp_path, dtype, std=std)
    bed.write(FIRST, change(*bed.parts(FIRST)))
    assert [(c.subject, c.finding) for c in failures(judge(bed))] == [(FIRST, finding)]


def test_an_adapter_without_scales_that_was_not_applied(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.randn(24, 32, generator=generator).bfloat16()})
    triangle = torch.randn(8, 6, generator=generator) * 0.1
    config = {**OFT, "use_cayley_neumann": False}
    adapter = write_adapter(
        tmp_path / "adapter", {"base_model.model.x.oft_R.weight": triangle}, config, drop=("boft_block_num",)
    )
    found = failures(validate(adapter, base=base, merged=base))
    assert [c.finding for c in found] == ["not-applied", "layer-skipped"]


def test_little_training_is_told_from_none(tmp_path: Path) -> None:
    """An effect as small as float32's errors is no reason to take the base for the merge."""
    generator = torch.Generator().manual_seed(10)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.randn(64, 512, generator=generator)})
    trained = boft_tensors("x", 512, 64, m=1, b=8, std=1e-6, seed=1)
    trained["base_model.model.x.boft_s"] = torch.ones(64, 1)
    adapter = write_adapter(tmp_path / "adapter", trained)
    assert {c.finding for c in failures(validate(adapter, base=base, merged=base))} == {"not-applied", "layer-skipped"}
    merged = boft_export.merge(base, adapter, tmp_path / "merged").output
    assert failures(validate(adapter, base=base, merged=merged)) == []


def test_sparse_training_merged_in_float32(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    before = {"x.weight": torch.randn(64, 1024, generator=generator)}
    trained = boft_tensors("x", 1024, 64, m=1, b=8, std=0.1, seed=1)
    trained["base_model.model.x.boft_R"][:, 1:] = 0
    trained["base_model.model.x.boft_s"] = torch.ones(64, 1)
    base, adapter = write_checkpoint(tmp_path / "base", before), write_adapter(tmp_path / "adapter", trained)
    assert failures(validate(adapter, base=base, merged=merged_in_float32(tmp_path / "merged", before, trained))) == []


@pytest.mark.parametrize(("m", "b", "std"), [(4, 8, 1e-2), (2, 64, 1e-4), (1, 256, 1.0)])
def test_large_and_uneven_layers_merged_in_float32(m: int, b: int, std: float, tmp_path: Path) -> None:
    """Columns of outliers, as language models have them, and blocks that are hard to invert in float32."""
    generator = torch.Generator().manual_seed(12)
    weight = torch.randn(48, 1024, generator=generator)
    weight[:, ::97] *= 40
    before = {"x.weight": weight}
    trained = boft_tensors("x", 1024, 48, m=m, b=b, std=std, seed=1)
    base, adapter = write_checkpoint(tmp_path / "base", before), write_adapter(tmp_path / "adapter", trained)
    r = torch.eye(1024)
    blocks = trained["base_model.model.x.boft_R"]
    for i in range(m):
        factor = torch.zeros(1024, 1024)
        for block, index in zip(blocks[i], butterfly_index(i, 1024 // b, b), strict=True):
            skew, eye = (block - block.T) / 2, torch.eye(b)
            factor[index[:, None], index] = torch.linalg.solve(eye + skew, eye - skew, left=False)
        r = factor @ r
    after = {"x.weight": trained["base_model.model.x.boft_s"] * (weight @ r.T)}
    assert failures(validate(adapter, base=base, merged=write_folder(tmp_path / "merged", after))) == []


def test_infinities_and_huge_values(tmp_path: Path) -> None:
    for name, dtype, size in (("half", torch.float16, 6e4), ("double", torch.float64, 1e200)):
        generator = torch.Generator().manual_seed(13)
        weight = torch.randn(16, 32, generator=generator, dtype=torch.float64) * size
        before = {"x.weight": weight.clamp(-size, size).to(dtype)}
        trained = boft_tensors("x", 32, 16, m=1, b=4, std=0.01, seed=1)
        trained["base_model.model.x.boft_s"] = torch.full((16, 1), 0.5)
        base, adapter = write_checkpoint(tmp_path / name, before), write_adapter(tmp_path / f"{name}-adapter", trained)
        merged = boft_export.merge(base, adapter, tmp_path / f"{name}-merged").output
        assert failures(validate(adapter, base=base, merged=merged)) == []
        assert {c.outcome for c in failures(validate(base=base, merged=merged))} <= {Outcome.INCONCLUSIVE}


def test_nan_in_place_of_infinity(tmp_path: Path) -> None:
    before = {"x.weight": torch.ones(4, 8), "mask": torch.tensor([0.0, -torch.inf, 1.0])}
    base = write_checkpoint(tmp_path / "base", before)
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("x", 8, 4, m=1, b=4))
    merged = boft_export.merge(base, adapter, tmp_path / "merged").output
    assert failures(validate(adapter, base=base, merged=merged)) == []
    after = read_folder(merged) | {"mask": torch.tensor([0.0, torch.nan, 1.0])}
    found = failures(validate(adapter, base=base, merged=write_folder(tmp_path / "nan", after)))
    assert [(c.subject, c.finding) for c in found] == [("mask", "not-finite")]


def test_an_untied_head_that_is_lost(tmp_path: Path) -> None:
    """A config that ties what the base kept apart doesn't excuse the head that is missing."""
    bed = make_bed(tmp_path, torch.bfloat16)
    generator = torch.Generator().manual_seed(14)
    before = {**bed.before, HEAD: torch.randn(40, 32, generator=generator).bfloat16()}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    base = write_checkpoint(tmp_path / "untied", before, config)
    trained = {k: v for k, v in bed.trained.items() if "lm_head" not in k}
    adapter = write_adapter(tmp_path / "no-head", trained, {"bias": "boft_only"})
    merged = boft_export.merge(base, adapter, tmp_path / "right").output
    assert failures(validate(adapter, base=base, merged=merged)) == []
    set_config(merged, tie_word_embeddings=True)
    assert {c.finding for c in failures(validate(adapter, base=base, merged=merged))} >= {"stale-tie"}
    after = read_folder(merged)
    del after[HEAD]
    lost = write_checkpoint(tmp_path / "lost", after, {**config, "tie_word_embeddings": True})
    found = {c.finding for c in failures(validate(adapter, base=base, merged=lost))}
    assert found >= {"stale-tie", "missing-tensor"}


def test_a_config_that_says_something_else(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    set_config(bed.base, rope_theta=1e4, rope_scaling={"factor": 2, "type": "linear"})
    set_config(bed.merged, rope_theta=5e5, rope_scaling={"factor": 2, "type": "yarn"}, transformers_version="9")
    found = [c for c in failures(judge(bed)) if c.check == "config"]
    assert {(c.finding, c.level) for c in found} == {("other-config", Level.WARNING)}
    assert [c.message.split(" is ")[0] for c in found] == ["rope_scaling.type", "rope_theta"]


def test_a_manifest_without_hashes_proves_nothing(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16, manifest=True)
    file = bed.merged / "boft_export.json"
    record = json.loads(file.read_text())
    record["base"]["sha256"] = {}
    file.write_text(json.dumps(record))
    found = failures(judge(bed))
    assert [(c.check, c.subject, c.outcome) for c in found] == [("manifest", "base", Outcome.INCONCLUSIVE)]


def test_an_interpolation_at_its_base_has_no_effect(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    boft_export.interpolate(bed.base, bed.adapter, tmp_path / "zero", 0)
    found = [c for c in judge(bed, merged=tmp_path / "zero").checks if c.outcome is Outcome.FAIL]
    assert {(c.finding, c.level) for c in found} == {("part-way", Level.WARNING), ("no-effect", Level.WARNING)}


def test_conversions_are_not_called_the_same_bytes(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.float32)
    merged = boft_export.merge(bed.base, bed.adapter, tmp_path / "narrow", dtype="bfloat16").output
    result = judge(bed, merged=merged)
    assert failures(result) == []
    (check,) = [c for c in result.checks if c.check == "untouched"]
    assert check.message.startswith("0 tensors are the base's, byte for byte, and ")


def test_a_reflection_is_no_rotation() -> None:
    facts = LayerFacts("x", 0, 4, 1, 4, 4, 0.0, 0.0, 0.0, -1.0, 1.0, 1.0, (0.0,), None, None)
    assert _orthogonality(facts, 1e-13, 0.1).finding == "reflection"
    assert _orthogonality(replace(facts, determinant=1.0), 1e-13, 0.1).finding is None
    assert _orthogonality(replace(facts, largest_singular_value=1.1), 1e-13, 0.1).finding == "not-orthogonal"
    assert _orthogonality(replace(facts, smallest_singular_value=0.9), 1e-13, 0.1).finding == "not-orthogonal"


def test_without_the_adapter_config_and_files_are_checked_too(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    keep_tie(bed)
    (bed.merged / "tokenizer.json").unlink()
    (bed.merged / "adapter_config.json").write_text("{}")
    found = {c.finding for c in failures(validate(base=bed.base, merged=bed.merged))}
    assert found >= {"stale-tie", "missing-file", "adapter-left"}


@pytest.mark.parametrize(
    ("name", "finding", "place"),
    [
        ("base-copied", "not-applied", ""),
        ("other-base", "no-rotation-of-base", FIRST),
        ("rotation-dropped", "rotation-dropped", FIRST),
        ("bit-of-untouched", "wrong-elements", "model.layers.0.norm.weight"),
        ("high-bit-of-rotated", "no-rotation-of-base", FIRST),
        ("nan", "not-finite", FIRST),
        ("layers-swapped", "no-rotation-of-base", FIRST),
        ("truncated", "damaged-file", ""),
        ("head-stale", "stale-tie", HEAD),
    ],
)
def test_sabotage_that_shows_without_the_adapter(name: str, finding: str, place: str, tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    SABOTAGES[name][0](bed)
    found = failures(validate(base=bed.base, merged=bed.merged))
    assert [c for c in found if c.finding == finding and (c.subject == place or not place)], found


def test_changes_can_be_allowed(tmp_path: Path) -> None:
    bed = make_bed(tmp_path, torch.bfloat16)
    bed.write(FIRST, torch.randn(48, 32))
    assert FIRST in {c.subject for c in failures(validate(base=bed.base, merged=bed.merged))}
    policy = Policy(allowed_changes=(FIRST, "*.bias"))
    assert failures(validate(base=bed.base, merged=bed.merged, policy=policy)) == []


OFT = {
    "peft_type": "OFT", "peft_version": "0.21.2", "oft_block_size": 4, "r": 0, "coft": False, "eps": 6e-5,
    "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("terms", [2, 5])
@pytest.mark.parametrize("std", [0.003, 0.03, 0.2])
def test_right_merges_of_oft_raise_no_alarm(std: float, terms: int, exact: bool, tmp_path: Path) -> None:
    """A Neumann series isn't orthogonal by design, and is judged by the error that it must have."""
    generator = torch.Generator().manual_seed(terms)
    base = write_checkpoint(tmp_path / "base", {"x.weight": torch.randn(24, 32, generator=generator).bfloat16()})
    for size in (4, 8, 32):
        triangle = torch.randn(32 // size, size * (size - 1) // 2, generator=generator) * std
        config = {**OFT, "oft_block_size": size, "use_cayley_neumann": not exact, "num_cayley_neumann_terms": terms}
        adapter = write_adapter(
            tmp_path / f"adapter-{size}",
            {"base_model.model.x.oft_R.weight": triangle},
            config,
            drop=("boft_block_num",),
        )
        merged = boft_export.merge(base, adapter, tmp_path / f"merged-{size}").output
        result = validate(adapter, base=base, merged=merged)
        assert {(c.finding, c.level) for c in failures(result)} <= {("coarse-series", Level.WARNING)}
        (layer,) = result.layers
        assert (layer.expected_residual == 0) == exact
        if not exact:
            assert layer.residual > 1e-12
            spoiled = read_folder(merged)["x.weight"].double() @ torch.linalg.qr(torch.eye(32).double() + 0.01)[0]
            other = write_folder(tmp_path / f"spoiled-{size}", {"x.weight": spoiled.bfloat16()})
            assert any(c.level is Level.ERROR for c in failures(validate(adapter, base=base, merged=other)))


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_merges_by_peft_itself_raise_no_alarm(tmp_path: Path) -> None:
    """PEFT merges in float32 and stores the base's dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32)).to(dtype)
        folder = tmp_path / str(dtype)
        base = write_checkpoint(folder / "base", net.state_dict())
        config = BOFTConfig(target_modules=["0", "1"], boft_block_size=4, init_weights=False, bias="all")
        model = get_peft_model(net, config).eval()
        for name, parameter in model.named_parameters():
            if "boft_" in name:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder / "adapter")
        merged = write_checkpoint(folder / "merged", model.merge_and_unload().state_dict())
        result = validate(folder / "adapter", base=base, merged=merged)
        assert failures(result) == []


@pytest.mark.parametrize("seed", range(210))
def test_right_merges_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    """Random sizes, dtypes, factors and ways of training; written by us, and by others in float32."""
    base, adapter, merged, path = random_merge(seed, tmp_path)
    assert failures(validate(adapter, base=base, merged=merged)) == []
    if path != "linear":
        found = failures(validate(base=base, merged=merged))
        assert {c.outcome for c in found} <= {Outcome.INCONCLUSIVE}, found


def random_merge(seed: int, folder: Path) -> tuple[Path, Path, Path, str]:
    """Write a base, an adapter and a merge of random sizes; return them, and on which path the merge lies."""
    rng = random.Random(seed)  # noqa: S311  # a test's
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
    written = rng.choice(["keep", "keep", "float32", "bfloat16", "float16"])
    way, path = rng.choice(["ours", "ours", "float32", "half-way"]), "geodesic"
    # Up to 0.13 PEFT meant something else by a convolution's adapter.
    old = way != "float32" and rng.random() < 0.5
    adapter = write_adapter(folder / "adapter", trained, drop=("peft_version", "exclude_modules") if old else ())
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
    return base, adapter, merged, path


@pytest.mark.parametrize("seed", range(60))
def test_right_merges_of_random_oft_raise_no_alarm(seed: int, tmp_path: Path) -> None:
    """PEFT's other format: each way of making R, a shared block or many, linear and 1x1 convolutions."""
    rng = random.Random(seed)  # noqa: S311  # a test's
    generator = torch.Generator().manual_seed(seed)
    stored = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    size, shared = rng.choice([2, 3, 4, 8, 16]), rng.random() < 0.3
    config = {
        **OFT, "oft_block_size": size, "block_share": shared, "use_cayley_neumann": rng.random() < 0.5,
        "num_cayley_neumann_terms": rng.randint(3, 6), "coft": rng.random() < 0.3, "eps": 1e-3,
    }  # fmt: skip
    before: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for i in range(3):
        n, out = size * rng.randint(1, 6), rng.randint(1, 40)
        shape = (out, n, 1, 1) if rng.random() < 0.3 else (out, n)
        before[f"layers.{i}.weight"] = (torch.randn(shape, generator=generator) * 0.05).to(stored)
        triangle = torch.randn(1 if shared else n // size, size * (size - 1) // 2, generator=generator)
        trained[f"base_model.model.layers.{i}.oft_R.weight"] = triangle * rng.choice([0.01, 0.05])
    base = write_checkpoint(tmp_path / "base", before)
    adapter = write_adapter(tmp_path / "adapter", trained, config, drop=("boft_block_num",))
    merged = boft_export.merge(base, adapter, tmp_path / "merged", compute_dtype=rng.choice(["float64", "float32"]))
    result = validate(adapter, base=base, merged=merged.output)
    assert {(c.finding, c.level) for c in failures(result)} <= {("coarse-series", Level.WARNING)}, failures(result)


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
