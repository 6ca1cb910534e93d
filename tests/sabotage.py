"""Merges that went wrong in known ways, each done to the folder of a right one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from torch import Tensor

import boft_export
from boft_export.linalg.rounding import round_once

# Modules of the small model: outputs and inputs. Two are of one shape, to be exchanged.
MODULES = {"layers.0.up": (48, 32), "layers.0.down": (32, 48), "layers.1.up": (48, 32), "layers.1.down": (32, 48)}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FIRST, SECOND = "model.layers.0.up.weight", "model.layers.1.up.weight"
NORM = "model.layers.0.norm.weight"
BIAS = "model.layers.0.up.bias"


@dataclass(frozen=True)
class Bed:
    """A base, an adapter and a right merge of the two.

    Attributes:
        base: The base's folder.
        adapter: The adapter's folder.
        merged: The merge's folder, to be spoiled.
        dtype: The base's dtype.
        before: The base's tensors.
        trained: The adapter's tensors.
    """

    base: Path
    adapter: Path
    merged: Path
    dtype: torch.dtype
    before: Mapping[str, Tensor] = field(repr=False)
    trained: Mapping[str, Tensor] = field(repr=False)

    def parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return a rotated tensor's W, R and s, float64."""
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        weight = self.before[EMBEDDING if name == HEAD else name].double()
        return weight, butterfly_matrix(self.trained[f"{prefix}.boft_R"]), self.trained[f"{prefix}.boft_s"].double()

    def write(self, name: str, value: Tensor) -> None:
        """Put a tensor in the place of a merged one, in its dtype."""
        for file in self.merged.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                rounded = round_once(value.double(), tensors[name].dtype).reshape(tensors[name].shape)
                tensors[name] = value if value.dtype == tensors[name].dtype else rounded
                save_file(tensors, file, metadata={"format": "pt"})

    @property
    def rotated(self) -> list[str]:
        """The names of the rotated tensors."""
        return [f"model.{m}.weight" for m in MODULES] + [HEAD]

    def every(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Merge every rotated tensor anew, as ``change`` does of W, R and s."""
        for name in self.rotated:
            self.write(name, change(*self.parts(name)))


def make_bed(folder: Path, dtype: torch.dtype, *, manifest: bool = False, std: float = 0.2) -> Bed:
    """Write a small language model with a tied head, an adapter for all its layers and its head, and their merge."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    before = {EMBEDDING: randn(40, 32)}
    before |= {f"model.{m}.weight": randn(*shape) for m, shape in MODULES.items()}
    before |= {f"model.layers.{i}.up.bias": randn(48) for i in range(2)}
    before |= {f"model.layers.{i}.norm.weight": 1 + randn(32) for i in range(2)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_checkpoint(folder / "base", before, config, shards=2)
    (base / "tokenizer.json").write_text("{}")
    trained: dict[str, Tensor] = {}
    for seed, (module, (out, n)) in enumerate(MODULES.items()):
        trained |= boft_tensors(f"model.{module}", n, out, m=2, b=4, std=std, seed=seed)
    trained |= boft_tensors("lm_head", 32, 40, m=2, b=4, std=std, seed=9)
    trained["base_model.model.model.layers.0.up.base_layer.bias"] = randn(48).float() + 0.05
    adapter = write_adapter(folder / "adapter", trained, {"bias": "boft_only"})
    merged = boft_export.merge(base, adapter, folder / "merged").output
    if not manifest:
        (merged / "boft_export.json").unlink()
    return Bed(base, adapter, merged, dtype, before, trained)


def copy_base(bed: Bed) -> None:
    shutil.rmtree(bed.merged)
    shutil.copytree(bed.base, bed.merged)


def skip_layer(bed: Bed) -> None:
    bed.write(FIRST, bed.before[FIRST])


def swap_layers(bed: Bed) -> None:
    merged = read_folder(bed.merged)
    bed.write(FIRST, merged[SECOND])
    bed.write(SECOND, merged[FIRST])


def swap_rotations(bed: Bed) -> None:
    for name, other in ((FIRST, SECOND), (SECOND, FIRST)):
        weight, (_, r, s) = bed.parts(name)[0], bed.parts(other)
        bed.write(name, s * (weight @ r.T))


def transpose_rotation(bed: Bed) -> None:
    bed.every(lambda w, r, s: s * (w @ r))


def drop_scale(bed: Bed) -> None:
    bed.every(lambda w, r, _: w @ r.T)


def scale_twice(bed: Bed) -> None:
    bed.every(lambda w, r, s: s * s * (w @ r.T))


def drop_rotation(bed: Bed) -> None:
    bed.every(lambda w, _, s: s * w)


def ignore_factor(bed: Bed) -> None:
    for name in bed.rotated:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        only = butterfly_matrix(bed.trained[f"{prefix}.boft_R"][:1])
        weight, _, s = bed.parts(name)
        bed.write(name, s * (weight @ only.T))


def merge_in_bfloat16(bed: Bed) -> None:
    def merge(w: Tensor, r: Tensor, s: Tensor) -> Tensor:
        rotated = w.bfloat16() @ r.T.bfloat16()
        return s.bfloat16() * rotated

    bed.every(merge)


def take_another_base(bed: Bed) -> None:
    generator = torch.Generator().manual_seed(99)
    for name, value in bed.before.items():
        bed.write(name, torch.randn(value.shape, generator=generator) * 0.1)
    for name in bed.rotated:
        weight, r, s = bed.parts(name)
        other = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.1
        bed.write(name, s * (other @ r.T))


def take_another_adapter(bed: Bed) -> None:
    for seed, name in enumerate(bed.rotated):
        weight, _, s = bed.parts(name)
        tensors = boft_tensors("x", weight.shape[1], weight.shape[0], m=2, b=4, std=0.2, seed=50 + seed)
        bed.write(name, s * (weight @ butterfly_matrix(tensors["base_model.model.x.boft_R"]).T))


def flip_bit(bed: Bed, name: str, bit: int) -> None:
    value = read_folder(bed.merged)[name].clone()
    integer = {2: torch.int16, 4: torch.int32}[value.element_size()]
    value.view(-1).view(integer)[17] ^= 1 << bit
    bed.write(name, value)


def truncate_file(bed: Bed) -> None:
    file = max(bed.merged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def put_nan(bed: Bed) -> None:
    value = read_folder(bed.merged)[FIRST].clone()
    value[3, 5] = torch.nan
    bed.write(FIRST, value)


def keep_tie(bed: Bed) -> None:
    config = json.loads((bed.merged / "config.json").read_text())
    (bed.merged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def stale_head(bed: Bed) -> None:
    bed.write(HEAD, bed.before[EMBEDDING])


def lose_bias(bed: Bed) -> None:
    bed.write(BIAS, bed.before[BIAS])


# What was done, what it is called, and where it shows; an empty place stands for the whole.
SABOTAGES: dict[str, tuple[Callable[[Bed], None], str, str]] = {
    "base-copied": (copy_base, "not-applied", ""),
    "layer-skipped": (skip_layer, "layer-skipped", FIRST),
    "layers-swapped": (swap_layers, "swapped-layers", FIRST),
    "rotations-swapped": (swap_rotations, "swapped-layers", SECOND),
    "transposed": (transpose_rotation, "transposed-rotation", FIRST),
    "rotation-dropped": (drop_rotation, "rotation-dropped", FIRST),
    "scale-dropped": (drop_scale, "scale-dropped", FIRST),
    "scale-twice": (scale_twice, "scale-twice", FIRST),
    "factor-ignored": (ignore_factor, "factor-ignored", HEAD),
    "bfloat16": (merge_in_bfloat16, "low-precision", FIRST),
    "other-base": (take_another_base, "other-base", ""),
    "other-adapter": (take_another_adapter, "other-adapter", FIRST),
    "low-bit-of-rotated": (lambda bed: flip_bit(bed, FIRST, 0), "flipped-bit", FIRST),
    "high-bit-of-rotated": (lambda bed: flip_bit(bed, FIRST, 13), "flipped-bit", FIRST),
    "bit-of-untouched": (lambda bed: flip_bit(bed, NORM, 1), "flipped-bit", NORM),
    "truncated": (truncate_file, "damaged-file", ""),
    "nan": (put_nan, "not-finite", FIRST),
    "tie-kept": (keep_tie, "stale-tie", "config.json"),
    "head-stale": (stale_head, "stale-tie", HEAD),
    "bias-lost": (lose_bias, "bias-lost", BIAS),
}
