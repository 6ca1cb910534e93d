"""Merges on a GPU: the same bytes as on the CPU wherever the output is rounded to half precision."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import boft_tensors, read_folder, write_adapter, write_checkpoint

import boft_export

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# Outputs, inputs, factors, block size; the first has more elements than a GPU folds at once.
LAYERS = {
    "wide": (4608, 4096, 2, 4),
    "deep": (512, 4096, 9, 2),
    "single": (100, 96, 1, 32),
    "odd": (7, 15, 1, 3),
}


@dataclass(frozen=True)
class Inputs:
    """A base and two adapters for it, the second one of the time before PEFT 0.14."""

    base: Path
    adapter: Path
    second: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("gpu")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{k}.weight": torch.randn(out, n, generator=generator) for k, (out, n, _, _) in LAYERS.items()}
    tensors["conv.weight"] = torch.randn(64, 32, 3, 3, generator=generator)
    tensors["norm.weight"] = torch.rand(77, generator=generator)
    shapes = {**LAYERS, "conv": (64, 288, 3, 8)}

    def adapter(name: str, first_seed: int, drop: tuple[str, ...] = ()) -> Path:
        trained = {}
        for seed, (module, (out, n, m, b)) in enumerate(shapes.items(), first_seed):
            trained |= boft_tensors(module, n, out, m=m, b=b, seed=seed)
        return write_adapter(folder / name, trained, drop=drop)

    base = write_checkpoint(folder / "base", {k: v.bfloat16() for k, v in tensors.items()}, shards=2)
    return Inputs(base, adapter("adapter", 0), adapter("second", 100, ("exclude_modules", "peft_version")))


def weights(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file; the manifest rightly names another device."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 2])
def test_same_bytes_as_on_the_cpu(inputs: Inputs, tmp_path: Path, dtype: str, count: int) -> None:
    adapters = [inputs.adapter, inputs.second][:count]
    for device in ("cpu", "cuda", "cuda:0", "cuda:all"):
        out = tmp_path / device.replace(":", "-")
        result = boft_export.merge(inputs.base, adapters, out, dtype=dtype, device=device)
        assert result.manifest["settings"]["device"] == device.partition(":")[0]

    on_cpu = weights(tmp_path / "cpu")
    assert len(on_cpu) == 2
    for device in ("cuda", "cuda-0", "cuda-all"):
        assert weights(tmp_path / device) == on_cpu
    assert not torch.equal(
        read_folder(tmp_path / "cuda")["wide.weight"], read_folder(inputs.base)["wide.weight"].to(getattr(torch, dtype))
    )


def test_float32_to_its_own_precision(inputs: Inputs, tmp_path: Path) -> None:
    """Another order of summation moves the float64 result, and at times the float32 it rounds to by one place."""
    for device in ("cpu", "cuda"):
        boft_export.merge(inputs.base, inputs.adapter, tmp_path / device, dtype="float32", device=device)
    on_cpu, on_gpu = read_folder(tmp_path / "cpu"), read_folder(tmp_path / "cuda")
    for name, expected in on_cpu.items():
        assert (on_gpu[name] - expected).abs().max() <= 2.0**-23 * expected.abs().max(), name


def test_same_bytes_however_the_work_is_spread(inputs: Inputs, tmp_path: Path) -> None:
    found = []
    for jobs, limit in ((1, None), (4, None), (1, "2GiB")):
        out = tmp_path / f"{jobs}-{limit}"
        boft_export.merge(inputs.base, inputs.adapter, out, device="cuda", dtype="float32", jobs=jobs, max_memory=limit)
        found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()})
    assert found[0] == found[1] == found[2]


def test_auto_takes_the_gpu(inputs: Inputs, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    result = boft_export.merge(inputs.base, inputs.adapter, tmp_path / "out", device="auto")
    assert result.manifest["settings"]["device"] == "cuda"
    assert torch.cuda.max_memory_allocated() > before


def test_device_that_is_not_there(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(boft_export.UsageError, match="cuda:99"):
        boft_export.merge(inputs.base, inputs.adapter, tmp_path / "out", device="cuda:99")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", list(boft_export.InterpolationPath))
def test_a_sweep_has_the_same_bytes_as_on_the_cpu(inputs: Inputs, tmp_path: Path, path: str) -> None:
    """Rotations are bent on the CPU in either case; the fold is what runs on the GPU."""
    for device in ("cpu", "cuda"):
        boft_export.interpolate(
            inputs.base, inputs.adapter, tmp_path / device, alphas=(0, 0.3, 1), path=path, device=device
        )
    for alpha in ("alpha-0", "alpha-0.3", "alpha-1"):
        assert weights(tmp_path / "cuda" / alpha) == weights(tmp_path / "cpu" / alpha)
