"""What a run guarantees: the same bytes however it is cut, all or nothing however it ends, bounded memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import boft_tensors, expected_merge, read_folder, write_adapter, write_checkpoint
from torch import Tensor

import boft_export
from boft_export import native
from boft_export.onnx.external_data import DataFile
from boft_export.pipeline.memory import Budget

ROOT = Path(__file__).parents[1]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tensor_bytes(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return each tensor's dtype, shape and raw bytes, read by the safetensors format's definition."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], data[start + begin : start + end]
    return found


@dataclass(frozen=True)
class Job:
    """Inputs on disk, and what an unbroken merge of them gives.

    Attributes:
        files: The SHA-256 of every file of the output.
        weight_bytes: The size of its weight files.
        least: The memory that a merge on one thread needs.
        steps: How many reports of progress it makes with no more than that.
        seconds: About how long it takes.
    """

    base: Path
    adapter: Path
    files: dict[str, str]
    weight_bytes: int
    least: int
    steps: int
    seconds: float


# Modules of the large checkpoint: outputs, inputs, factors, block size.
LAYERS = {
    "layers.0.up": (4096, 1024, 2, 4),
    "layers.0.down": (1024, 4096, 1, 8),
    "layers.1.up": (4096, 1024, 5, 2),
    "layers.1.down": (1024, 4096, 3, 16),
    "layers.2.up": (4096, 1024, 1, 32),
    "layers.2.down": (1000, 4096, 7, 2),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Some 75 MB of bfloat16 weights in six files, most of them adapted; no test may change them."""
    folder = tmp_path_factory.mktemp("large")
    tensors: dict[str, Tensor] = {"embed.weight": torch.randn(8000, 1024, generator=generator(0)).bfloat16()}
    adapter: dict[str, Tensor] = {}
    for seed, (module, (out, n, m, b)) in enumerate(LAYERS.items()):
        tensors[f"{module}.weight"] = torch.randn(out, n, generator=generator(seed)).bfloat16()
        tensors[f"{module}.bias"] = torch.randn(out, generator=generator(seed))
        adapter |= boft_tensors(module, n, out, m=m, b=b, seed=seed)
    tensors["conv.weight"] = torch.randn(256, 128, 3, 3, generator=generator(7)).bfloat16()
    adapter |= boft_tensors("conv", 1152, 256, m=2, b=4, seed=7)
    tensors["steps"] = torch.arange(1000)
    base = write_checkpoint(folder / "base", tensors, shards=6)
    (base / "tokenizer.json").write_bytes(b'{"line": "ends"}\r\n')
    write_adapter(folder / "adapter", adapter)
    before = digests(folder)

    start = time.monotonic()
    boft_export.merge(base, folder / "adapter", folder / "out")
    seconds = time.monotonic() - start
    files = digests(folder / "out")
    weight_bytes = sum(p.stat().st_size for p in (folder / "out").glob("*.safetensors"))
    least = smallest_memory(base, folder / "adapter", folder / "none", jobs=1)
    calls: list[int] = []
    boft_export.merge(
        base,
        folder / "adapter",
        folder / "out",
        overwrite=True,
        jobs=1,
        max_memory=least,
        progress=lambda done, *_: calls.append(done),
    )
    shutil.rmtree(folder / "out")
    yield Job(base, folder / "adapter", files, weight_bytes, least, len(calls), seconds)
    assert digests(folder) == before


def smallest_memory(base: Path, adapter: Path, output: Path, *, jobs: int) -> int:
    """Return the least memory that a merge says it needs."""
    with pytest.raises(boft_export.ResourceError) as failure:
        boft_export.merge(base, adapter, output, jobs=jobs, max_memory=1)
    found = re.search(r"needs ([\d,]+)", failure.value.message)
    assert found
    return int(found[1].replace(",", ""))


# Bytes


@pytest.mark.parametrize(
    ("jobs", "spare"),
    [(1, None), (2, None), (3, None), (1, 0), (3, 1), (2, 3 << 20), (1, 9 << 20), (3, 17 << 20), (8, 0), (8, None)],
)
def test_same_bytes(job: Job, tmp_path: Path, jobs: int, spare: int | None) -> None:
    """The memory decides how much is read at once, the jobs how many runs of elements are in work at a time."""
    limit = None
    if spare is not None:
        limit = smallest_memory(job.base, job.adapter, tmp_path / "out", jobs=jobs) + spare
    boft_export.merge(job.base, job.adapter, tmp_path / "out", jobs=jobs, max_memory=limit)
    assert digests(tmp_path / "out") == job.files


def rotated(weight: Tensor, trained: dict[str, Tensor], module: str) -> Tensor:
    """Return a large layer's merged weight in float64: the formula, block by block, on the weight itself."""
    # A row for each feature, so that a block's features are runs of memory.
    x = weight.double().flatten(1).T.contiguous()
    blocks = trained[f"base_model.model.{module}.boft_R"].double()
    b = blocks.shape[-1]
    eye, h = torch.eye(b, dtype=torch.float64), b // 2
    skew = (blocks - blocks.mT) / 2
    q = (eye - skew) @ torch.linalg.inv(eye + skew)
    for i, d in itertools.product(range(blocks.shape[0]), range(blocks.shape[1])):
        g, j = divmod(d, 2**i)
        first, second = g * b * 2**i + j * h, g * b * 2**i + (j + 2**i) * h
        index = torch.tensor([*range(first, first + h), *range(second, second + b - h)])
        x[index] = q[i, d] @ x[index]
    return (trained[f"base_model.model.{module}.boft_s"].double() * x.T).reshape(weight.shape)


def test_result_is_right_and_the_rest_untouched(job: Job, tmp_path: Path) -> None:
    result = boft_export.merge(job.base, job.adapter, tmp_path / "out")

    before, after = tensor_bytes(job.base), tensor_bytes(tmp_path / "out")
    folded = {f"{m}.weight" for m in (*LAYERS, "conv")}
    assert before.keys() == after.keys()
    for name in before.keys() - folded:
        assert after[name] == before[name]
    trained, weights, merged = (read_folder(f) for f in (job.adapter, job.base, tmp_path / "out"))
    for name in folded:
        assert after[name][:2] == before[name][:2]
        exact = rotated(weights[name], trained, name.removesuffix(".weight"))
        # Half a unit in the last of bfloat16's 8 places.
        assert ((merged[name].double() - exact).abs() <= exact.abs() * 2.0**-8).all()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (job.base / "tokenizer.json").read_bytes()
    assert {t.plan.name for t in result.tensors if t.measure is not None} == folded


def test_manifest_has_the_hashes_of_the_files(job: Job, tmp_path: Path) -> None:
    boft_export.merge(job.base, job.adapter, tmp_path / "out")

    record = json.loads((tmp_path / "out" / "boft_export.json").read_text())
    inputs = digests(job.base)
    assert record["base"]["sha256"] == {k: v for k, v in inputs.items() if k.startswith("model-") or k == "config.json"}
    assert len(record["base"]["sha256"]) == 7
    assert record["adapters"][0]["sha256"] == digests(job.adapter)
    outputs = digests(tmp_path / "out")
    assert {k: v["sha256"] for k, v in record["files"].items()} == {
        k: v for k, v in outputs.items() if k.endswith(".safetensors")
    }
    assert all(v["bytes"] == (tmp_path / "out" / k).stat().st_size for k, v in record["files"].items())


@pytest.mark.parametrize(("limit", "files"), [("10MB", 8), (1, 15), ("1GB", 1)])
def test_split_anew(job: Job, tmp_path: Path, limit: str | int, files: int) -> None:
    """Other files, the same tensors; and again the same bytes for any number of jobs."""
    boft_export.merge(job.base, job.adapter, tmp_path / "whole")
    for jobs in (1, 3):
        boft_export.merge(job.base, job.adapter, tmp_path / str(jobs), jobs=jobs, max_shard_size=limit)

    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert tensor_bytes(tmp_path / "1") == tensor_bytes(tmp_path / "whole")
    found = sorted(p.name for p in (tmp_path / "1").glob("*.safetensors"))
    assert len(found) == files
    index = tmp_path / "1" / "model.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        held = {name: file for file in found for name in _names(tmp_path / "1" / file)}
        assert content["weight_map"] == held
        assert content["metadata"]["total_size"] == sum(len(t[2]) for t in tensor_bytes(tmp_path / "1").values())


def _names(file: Path) -> list[str]:
    data = file.read_bytes()
    return [k for k in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if k != "__metadata__"]


def test_a_size_however_it_is_written(job: Job, tmp_path: Path) -> None:
    for name, size in (("a", "20MB"), ("b", 20_000_000), ("c", "0.02 GB")):
        boft_export.merge(job.base, job.adapter, tmp_path / name, max_shard_size=size)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_same_bytes_converted(job: Job, tmp_path: Path, dtype: str) -> None:
    """Tensors that only change their dtype are cut into runs, too."""
    for name, jobs, limit in (("a", 1, None), ("b", 3, None), ("c", 1, job.least + (1 << 20))):
        boft_export.merge(job.base, job.adapter, tmp_path / name, dtype=dtype, jobs=jobs, max_memory=limit)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")
    assert read_folder(tmp_path / "a")["embed.weight"].dtype is getattr(torch, dtype)


def test_same_bytes_for_old_convolutions(tmp_path: Path) -> None:
    """PEFT 0.13's convolutions are rotated in groups of rows of the reshaped weight, so they are cut otherwise."""
    weight = torch.randn(192, 256, 3, 3, generator=generator(0)).bfloat16()
    trained = boft_tensors("conv", 2304, 192, m=3, b=4)
    base = write_checkpoint(tmp_path / "base", {"conv.weight": weight})
    adapter = write_adapter(tmp_path / "adapter", trained, drop=("exclude_modules", "peft_version"))
    least = smallest_memory(base, adapter, tmp_path / "none", jobs=1)

    for name, jobs, limit in (("a", 1, None), ("b", 3, None), ("c", 1, least), ("d", 1, least + (2 << 20))):
        boft_export.merge(base, adapter, tmp_path / name, jobs=jobs, max_memory=limit)

    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c") == digests(tmp_path / "d")
    scale = trained["base_model.model.conv.boft_s"]
    turned = expected_merge(weight.double().reshape(2304, 192).T, {**trained, "boft_s": scale}).T
    exact = turned.reshape(weight.shape)
    merged = read_folder(tmp_path / "a")["conv.weight"].double()
    assert ((merged - exact).abs() <= exact.abs() * 2.0**-8).all()


def test_infinities_are_taken_over(tmp_path: Path) -> None:
    """Masks hold them; they are no damage, and the manifest has numbers all the same."""
    tensors = {"a.weight": torch.randn(8, 16), "a.mask": torch.tensor([[0.0, -torch.inf], [0.5, torch.nan]])}
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8))

    boft_export.merge(base, adapter, tmp_path / "out", dtype="bfloat16")

    mask = read_folder(tmp_path / "out")["a.mask"]
    assert torch.equal(mask.nan_to_num(nan=7.0), tensors["a.mask"].bfloat16().nan_to_num(nan=7.0))
    record = json.loads((tmp_path / "out" / "boft_export.json").read_text())["tensors"]["a.mask"]
    assert record["relative_change"] == 0.0


# Progress


def test_progress(job: Job, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    boft_export.merge(job.base, job.adapter, tmp_path / "out", progress=lambda *call: seen.append(call))

    done = [call[0] for call in seen]
    assert done[0] > 0
    assert all(a < b for a, b in itertools.pairwise(done))
    assert {call[1] for call in seen} == {job.weight_bytes}
    assert done[-1] == job.weight_bytes
    assert {call[2] for call in seen} == set(tensor_bytes(job.base))


# Kills

# Runs a merge in a process of its own; at its k-th report of progress it sends itself a signal.
CHILD = """
import json, os, sys
import boft_export
import torch  # as here, so that the least memory is the same
arguments = json.loads(sys.argv[1])
at, signal = arguments.pop("at"), arguments.pop("signal")
calls = 0
def progress(done, total, name):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal)
boft_export.merge(**arguments, progress=progress)
"""


def child(code: str, **arguments: Any) -> subprocess.Popen[bytes]:
    """Start Python with ``code``, which finds ``arguments`` as JSON in its first argument."""
    text = json.dumps(arguments, default=str)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, text], env=environment, stderr=subprocess.PIPE)


def run(code: str, **arguments: Any) -> tuple[int, str]:
    """Run Python with ``code`` to its end; return its exit status and what it wrote to stderr."""
    process = child(code, **arguments)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def merge_of(job: Job, output: Path) -> dict[str, Any]:
    """Return a merge's arguments with the least memory, so that it comes in many small steps."""
    return {"base": job.base, "adapters": job.adapter, "output": output, "jobs": 1, "max_memory": job.least}


def break_off(job: Job, output: Path, part: float, sent: signal.Signals = signal.SIGKILL) -> None:
    """Run a merge that a signal ends when ``part`` of its steps are done."""
    status, errors = run(CHILD, **merge_of(job, output), at=at_step(job, part), signal=sent)
    assert status == -sent, errors


def finished(output: Path) -> set[str]:
    """Return the weight files that a broken run has finished."""
    staged = output.with_name(f".{output.name}.boft-export") / "files"
    return {p.name for p in staged.glob("*.safetensors")}


def at_step(job: Job, part: float) -> int:
    return min(1 + round(part * job.steps), job.steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "part"),
    [(signal.SIGKILL, p) for p in (0, 0.06, 0.13, 0.2, 0.33, 0.42, 0.5, 0.61, 0.7, 0.8, 0.9, 0.97, 1)]
    + [(signal.SIGINT, p) for p in (0, 0.55, 1)],
)
def test_broken_run_leaves_nothing_and_resumes(job: Job, tmp_path: Path, sent: signal.Signals, part: float) -> None:
    output = tmp_path / "out"
    break_off(job, output, part, sent)

    assert not output.exists()
    whole = finished(output)
    result = boft_export.merge(job.base, job.adapter, output, resume=True)

    # A file may be whole though the journal did not get to say so; only what it says counts.
    assert set(result.resumed) <= whole
    assert len(result.resumed) >= len(whole) - 1
    if part >= 0.5:
        assert result.resumed
    assert digests(output) == job.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_at_any_time(job: Job, tmp_path: Path, seed: int) -> None:
    """By the clock, and again while resuming: at whatever the run is doing then."""
    chance = random.Random(seed)  # noqa: S311  # moments, not secrets
    output = tmp_path / "out"
    staging = tmp_path / ".out.boft-export"
    for _ in range(2):
        process = child(CHILD, **merge_of(job, output), resume=True, at=0, signal=0)
        while process.poll() is None and not staging.exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 1.2 * job.seconds))
        process.kill()
        process.communicate()
        if output.exists():
            break

    if output.exists():
        assert digests(output) == job.files
    else:
        boft_export.merge(job.base, job.adapter, output, resume=True)
        assert digests(output) == job.files


@pytest.mark.slow
def test_interrupted_program(job: Job, tmp_path: Path) -> None:
    """Ctrl-C ends the program with the exit code for it, and --resume goes on."""
    command = [sys.executable, "-m", "boft_export", "merge", job.base, job.adapter, "-o", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not finished(tmp_path / "out"):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "out").exists()
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, check=False, timeout=120)
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "out") == job.files


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out"
    break_off(job, output, 0.7)
    other = tmp_path / "adapter"
    shutil.copytree(job.adapter, other)
    for adapter, options in (
        (job.adapter, {"dtype": "float32"}),
        (job.adapter, {"max_shard_size": "20MB"}),
        (job.adapter, {"compute_dtype": "float32"}),
        (other, {}),
        ([job.adapter, job.adapter], {}),
    ):
        with pytest.raises(boft_export.UsageError, match="can't be resumed"):
            boft_export.merge(job.base, adapter, output, resume=True, **options)
        assert not output.exists()

    # The refusals have cost nothing, and how the work is spread is no such setting.
    result = boft_export.merge(job.base, job.adapter, output, resume=True, jobs=3, max_memory="2GiB")
    assert result.resumed
    assert digests(output) == job.files


@pytest.mark.slow
def test_without_resume_it_starts_over(job: Job, tmp_path: Path) -> None:
    break_off(job, tmp_path / "out", 0.7)
    result = boft_export.merge(job.base, job.adapter, tmp_path / "out")
    assert result.resumed == ()
    assert digests(tmp_path / "out") == job.files


@pytest.mark.slow
def test_progress_of_a_resumed_run(job: Job, tmp_path: Path) -> None:
    break_off(job, tmp_path / "out", 0.7)
    seen: list[tuple[int, int, str]] = []
    result = boft_export.merge(
        job.base, job.adapter, tmp_path / "out", resume=True, progress=lambda *call: seen.append(call)
    )
    taken_over = sum((tmp_path / "out" / name).stat().st_size for name in result.resumed)
    assert 0 < taken_over < seen[0][0]
    assert seen[-1][:2] == (job.weight_bytes, job.weight_bytes)


@pytest.mark.slow
def test_two_runs_at_once(job: Job, tmp_path: Path) -> None:
    """A run that stands still still holds its output; the other is refused and harms nothing."""
    process = child(CHILD, **merge_of(job, tmp_path / "out"), at=at_step(job, 0.5), signal=signal.SIGSTOP)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        for resume in (False, True):
            with pytest.raises(boft_export.UsageError, match="another run"):
                boft_export.merge(job.base, job.adapter, tmp_path / "out", resume=resume)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()
    assert digests(tmp_path / "out") == job.files


# Forks merges, each killed right before its k-th step on the file system, for k = 1, 2, ... until one comes through.
# Then another fork resumes. For each k it writes down how both ended and what was there after them.
EVERY_STEP = """
import hashlib, json, os, shutil, signal, sys, traceback
from pathlib import Path
import boft_export

given = json.loads(sys.argv[1])
folder, old = Path(given["folder"]), given["old"]
output = folder / "out"
inputs = {"base": given["base"], "adapters": given["adapters"]}
STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlopen"}
at = None

def step(event, arguments):
    global at
    if at is not None and (event in STEPS or (event == "open" and str(arguments[0]).startswith(given["root"]))):
        at -= 1
        if at == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def in_fork(kill_at=None, **options):
    global at
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    at = kill_at
    try:
        boft_export.merge(**inputs, output=output, overwrite=old is not None, **options)
        at = None
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def found():
    if not output.exists():
        return None
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.iterdir()}

# Has all modules loaded, which are files that are opened, too.
boft_export.merge(**inputs, output=given["root"] + "/warm-up")
sys.addaudithook(step)
log, k, status = [], 0, -1
while status:
    k += 1
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old:
        shutil.copytree(old, output)
    status = in_fork(kill_at=k)
    after = found()
    resumed = in_fork(resume=True) if after is None or old else None
    log.append([status, after, resumed, found()])
Path(given["log"]).write_text(json.dumps(log))
"""


@pytest.mark.slow
@pytest.mark.parametrize("replace", [False, True], ids=["new", "overwrite"])
def test_kill_before_every_step_on_the_file_system(tmp_path: Path, *, replace: bool) -> None:
    """What is there is at every moment the old state or the new one, whole, and a resumed run ends in the new one."""
    tensors = {f"{i}.weight": torch.randn(8, 16, generator=generator(i)) for i in range(3)}
    base = write_checkpoint(tmp_path / "base", tensors, shards=3)
    for name, seed in (("adapter", 0), ("other", 10)):
        layers = [boft_tensors(f"{i}", 16, 8, seed=seed + i) for i in range(3)]
        write_adapter(tmp_path / name, {k: v for layer in layers for k, v in layer.items()})
    boft_export.merge(base, tmp_path / "adapter", tmp_path / "new")
    boft_export.merge(base, tmp_path / "other", tmp_path / "old")
    new, old = digests(tmp_path / "new"), digests(tmp_path / "old")
    assert new != old

    status, errors = run(
        EVERY_STEP,
        base=base,
        adapters=tmp_path / "adapter",
        folder=tmp_path / "run",
        old=tmp_path / "old" if replace else None,
        root=tmp_path,
        log=tmp_path / "log",
    )

    assert status == 0, errors
    log = json.loads((tmp_path / "log").read_text())
    assert len(log) > 30
    *killed, last = log
    assert last[:2] == [0, new]
    for step, (status, after, resumed, final) in enumerate(killed, 1):
        assert status == signal.SIGKILL, step
        assert after in ([old, new] if replace else [None, new]), step
        assert resumed in (0, None), (step, errors)
        assert final == new, step


# Memory


def test_budget_holds_whoever_would_exceed_it() -> None:
    budget = Budget(100)
    out = 0
    most = 0
    lock = threading.Lock()

    def work(seed: int) -> None:
        nonlocal out, most
        chance = random.Random(seed)  # noqa: S311  # sizes, not secrets
        for _ in range(300):
            size = chance.randint(1, 100)
            assert budget.acquire(size)
            with lock:
                out += size
                most = max(most, out)
            with lock:
                out -= size
            budget.release(size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == 0
    assert 0 < most <= budget.peak <= 100


def acquired(budget: Budget, size: int) -> tuple[threading.Thread, list[bool]]:
    """Start a thread that asks for ``size`` bytes, and return it with the list that gets the answer."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(budget.acquire(size)), daemon=True)
    thread.start()
    return thread, answers


def test_budget_lets_a_request_above_the_limit_go_alone() -> None:
    budget = Budget(10)
    assert budget.acquire(1)
    thread, answers = acquired(budget, 25)
    thread.join(0.05)
    assert answers == []
    budget.release(1)
    thread.join()
    assert answers == [True]
    other, others = acquired(budget, 1)
    other.join(0.05)
    assert others == []
    budget.release(25)
    other.join()
    assert others == [True]


def test_closed_budget_lets_everyone_go() -> None:
    budget = Budget(10)
    assert budget.acquire(10)
    waiting = [acquired(budget, 1) for _ in range(3)]
    for thread, answers in waiting:
        thread.join(0.02)
        assert answers == []
    budget.close()
    for thread, answers in waiting:
        thread.join()
        assert answers == [False]
    assert not budget.acquire(1)


def test_too_little_memory(job: Job, tmp_path: Path) -> None:
    least = smallest_memory(job.base, job.adapter, tmp_path / "out", jobs=2)
    for limit in (1, "1MiB", least - 1):
        with pytest.raises(boft_export.ResourceError, match="memory") as failure:
            boft_export.merge(job.base, job.adapter, tmp_path / "out", jobs=2, max_memory=limit)
        assert failure.value.exit_code == 5
        assert list(tmp_path.iterdir()) == []


# The reader would take the whole base in at once if it could: more than the limit leaves room for.
MEASURED = """
import json, re, sys
import boft_export
arguments = json.loads(sys.argv[1])
if arguments.pop("with_torch"):
    import torch
try:
    boft_export.merge(**arguments, max_memory=1)
except boft_export.ResourceError as error:
    least = int(re.search(r"needs ([\\d,]+)", error.message)[1].replace(",", ""))
boft_export.merge(**arguments, max_memory=least)
with open("/proc/self/status") as status:
    peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(least, int(peak) * 1024, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory was used")
@pytest.mark.parametrize("with_torch", [False, True])
@pytest.mark.parametrize("jobs", [1, 3, 8])
def test_memory_stays_below_the_limit(job: Job, tmp_path: Path, jobs: int, *, with_torch: bool) -> None:
    arguments = {"base": job.base, "adapters": job.adapter, "output": tmp_path / "out", "jobs": jobs}
    status, errors = run(MEASURED, **arguments, with_torch=with_torch)
    assert status == 0, errors
    least, peak, loaded = errors.split()[-3:]
    assert int(peak) <= int(least)
    assert loaded == str(with_torch or native.instruction_set() is None)


# Counts how often the files of trained tensors are opened.
COUNTED = """
import json, sys
import boft_export

opened = 0
def hook(event, arguments):
    global opened
    opened += event == "open" and str(arguments[0]).endswith("adapter_model.safetensors")

sys.addaudithook(hook)
boft_export.merge(**json.loads(sys.argv[1]))
print(opened, file=sys.stderr)
"""


@pytest.mark.slow
def test_each_rotation_is_built_once(tmp_path: Path) -> None:
    """However many adapters there are for a tensor, and however many runs it is cut into."""
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(4096, 512)})
    adapters = [write_adapter(tmp_path / f"{i}", boft_tensors("a", 512, 4096, m=1, seed=i)) for i in range(4)]
    opened = []
    for count in (1, 4):
        output = tmp_path / f"out-{count}"
        status, errors = run(COUNTED, base=base, adapters=adapters[:count], output=output, jobs=1)
        assert status == 0, errors
        opened.append(int(errors.split()[-1]))
    assert opened[1] == 4 * opened[0]


# Disk


def left(folder: Path) -> list[str]:
    """Return all files below ``folder``, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


LIMITED = """
import json, resource, sys
import boft_export
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    boft_export.merge(**json.loads(sys.argv[1]))
except boft_export.BoftExportError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_file_that_can_not_grow(job: Job, tmp_path: Path) -> None:
    """A real error from write(): the kernel's limit on the size of a file."""
    (tmp_path / "work").mkdir()
    status, errors = run(LIMITED, base=job.base, adapters=job.adapter, output=tmp_path / "work" / "out")
    assert status == boft_export.AccessError.exit_code, errors
    assert "cannot write" in errors
    assert not (tmp_path / "work" / "out").exists()
    assert boft_export.merge(job.base, job.adapter, tmp_path / "work" / "out", resume=True).output.exists()
    assert digests(tmp_path / "work" / "out") == job.files


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Give a function that mounts a file system of so many bytes; skip where that is not permitted."""
    mounted: list[Path] = []
    mount, umount = shutil.which("mount"), shutil.which("umount")

    def make(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        if mount is None or umount is None:
            pytest.skip("there is no mount program")
        command = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run([str(umount), folder], check=True)


def test_disk_too_small_from_the_start(job: Job, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(job.weight_bytes // 2)
    with pytest.raises(boft_export.ResourceError, match="disk") as failure:
        boft_export.merge(job.base, job.adapter, disk / "out")
    assert failure.value.exit_code == 5
    assert not (disk / "out").exists()
    assert not any(p.suffix == ".safetensors" for p in disk.rglob("*"))


def test_disk_that_fills_up(job: Job, small_disk: Callable[[int], Path]) -> None:
    """Someone else takes the space meanwhile; once it is free again, the run goes on."""
    disk = small_disk(job.weight_bytes + (8 << 20))
    filler = disk / "filler"

    def fill(done: int, total: int, _: str) -> None:
        if done > total // 2 and not filler.exists():
            with filler.open("wb") as file:
                try:
                    while file.write(bytes(1 << 20)) and not file.flush():
                        pass
                except OSError:
                    pass

    with pytest.raises(boft_export.ResourceError, match="disk is full") as failure:
        boft_export.merge(job.base, job.adapter, disk / "out", progress=fill)
    assert failure.value.exit_code == 5
    assert not (disk / "out").exists()
    filler.unlink()
    result = boft_export.merge(job.base, job.adapter, disk / "out", resume=True)
    assert result.resumed
    assert digests(disk / "out") == job.files


def test_a_data_file_takes_its_space_before_anything_is_written(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(4 << 20)
    with pytest.raises(boft_export.ResourceError, match="disk is full") as failure:
        DataFile(disk / "model.onnx_data", 64 << 20)
    assert failure.value.exit_code == 5


def test_output_where_nothing_can_be_made(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(boft_export.AccessError) as failure:
        boft_export.merge(job.base, job.adapter, tmp_path / "file" / "out")
    assert failure.value.exit_code == 4
    assert left(tmp_path) == ["file"]


def test_output_in_a_read_only_folder(job: Job, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(boft_export.AccessError, match="cannot write"):
        boft_export.merge(job.base, job.adapter, parent / "out")
    assert left(tmp_path) == []


# Inputs that change


@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_base_that_shrinks_while_it_is_read(job: Job, tmp_path: Path, cut: int) -> None:
    base = tmp_path / "base"
    shutil.copytree(job.base, base)
    last = max(base.glob("*.safetensors"))

    def shrink(done: int, _total: int, _name: str) -> None:
        # So little memory lets the reader be only just ahead: it has not come to the last file.
        if done < 10 << 20:
            os.truncate(last, min(last.stat().st_size, (job.base / last.name).stat().st_size - cut))

    with pytest.raises(boft_export.DamagedFileError, match=re.escape(last.name)) as failure:
        boft_export.merge(base, job.adapter, tmp_path / "out", jobs=1, max_memory=job.least, progress=shrink)
    assert failure.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_base_that_vanishes_while_it_is_read(job: Job, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(job.base, base)
    last = max(base.glob("*.safetensors"))

    with pytest.raises(boft_export.AccessError, match=re.escape(last.name)):
        boft_export.merge(
            base,
            job.adapter,
            tmp_path / "out",
            jobs=1,
            max_memory=job.least,
            progress=lambda *_: last.unlink(missing_ok=True),
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.boft-export", "base"]


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["rewritten", "removed"])
def test_input_that_changes_after_it_was_read(tmp_path: Path, name: str, how: str) -> None:
    """The size may be the same and the bytes sound; still nobody knows of which state the output would be."""
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(64, 32)})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 32, 64))
    file = tmp_path / name

    def change(*_: object) -> None:
        if how == "removed":
            file.unlink()
        else:
            before = file.stat()
            file.write_bytes(file.read_bytes())
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    error = boft_export.AccessError if how == "removed" else boft_export.DamagedFileError
    with pytest.raises(error):
        boft_export.merge(base, adapter, tmp_path / "out", progress=change)
    kept = [".out.boft-export"] if how == "removed" else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, "adapter", "base"]


@pytest.mark.parametrize("resume", [True, False])
def test_failing_callback(job: Job, tmp_path: Path, *, resume: bool) -> None:
    """What the caller's own code raises comes through; what is finished stays, and is not discarded in silence."""

    def fail(done: int, total: int, _: str) -> None:
        if done > total // 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        boft_export.merge(job.base, job.adapter, tmp_path / "out", progress=fail)
    assert [p.name for p in tmp_path.iterdir()] == [".out.boft-export"]
    result = boft_export.merge(job.base, job.adapter, tmp_path / "out", resume=resume)
    assert bool(result.resumed) == resume
    assert [n.code for n in result.plan.notices if n.code == "started-over"] == ([] if resume else ["started-over"])
    assert digests(tmp_path / "out") == job.files


# Measures and notices


def test_large_weights_in_float32(tmp_path: Path) -> None:
    """Their squares overflow float32."""
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(8, 16) * 1e25})
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8))
    result = boft_export.merge(base, adapter, tmp_path / "out", compute_dtype="float32")
    assert 0 < result.manifest["tensors"]["a.weight"]["relative_change"] < 10


def test_replaced_tensors_have_no_measures(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(8, 16), "head.weight": torch.randn(4, 8)})
    head = {"base_model.model.head.weight": torch.randn(4, 8)}
    config = {"modules_to_save": ["head"]}
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8) | head, config)
    record = boft_export.merge(base, adapter, tmp_path / "out").manifest["tensors"]["head.weight"]
    assert record["action"] == "replace"
    assert not {"changed_elements", "relative_change", "rounding_loss"} & record.keys()


def scaled(module: str, factor: float, seed: int) -> dict[str, Tensor]:
    """Return a layer's tensors with its rotation made smaller and no scales."""
    tensors = boft_tensors(module, 16, 8, seed=seed)
    return {k: torch.ones_like(t) if k.endswith("boft_s") else t * factor for k, t in tensors.items()}


def test_effect_is_judged_layer_by_layer(tmp_path: Path) -> None:
    """Some layers lost are a warning; all trained ones lost are a failure, whatever else there is."""
    weights = {f"{m}.weight": torch.randn(8, 16, generator=generator(i)).bfloat16() for i, m in enumerate("abc")}
    base = write_checkpoint(tmp_path / "base", weights)
    faint = scaled("b", 1e-9, 1)
    some = write_adapter(tmp_path / "some", scaled("a", 1, 0) | faint | scaled("c", 0, 2))
    none = write_adapter(tmp_path / "none", faint | scaled("c", 0, 2))

    result = boft_export.merge(base, some, tmp_path / "out")
    (notice,) = (n for n in result.plan.notices if n.code == "lost-effect")
    assert "1 of 2 tensors" in notice.message
    assert notice.message.endswith("b.weight")
    assert notice.message in (tmp_path / "out" / "README.md").read_text()
    assert any(n["code"] == "lost-effect" for n in result.manifest["notices"])
    with pytest.raises(boft_export.CheckFailedError, match="changed no element of 1 "):
        boft_export.merge(base, none, tmp_path / "out-2")
    assert not any(p.name.startswith(("out-2", ".out")) for p in tmp_path.iterdir())


def test_rotation_that_can_not_be_built(tmp_path: Path) -> None:
    """Its values are finite, and what is computed of them is not."""
    tensors = boft_tensors("a", 16, 8)
    tensors["base_model.model.a.boft_R"] = torch.full((2, 4, 4, 4), 1.7e308, dtype=torch.float64).triu(1)
    tensors["base_model.model.a.boft_R"] -= tensors["base_model.model.a.boft_R"].mT.clone()
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(8, 16)})
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(boft_export.InputError, match=r"^a: .* too large"):
        boft_export.merge(base, adapter, tmp_path / "out")


# The model card


@pytest.mark.parametrize("tags", ["[{a: b}, kept]", "kept", "[[1]]"])
def test_odd_tags_in_the_card(tmp_path: Path, tags: str) -> None:
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(8, 16)})
    (base / "README.md").write_text(f"---\ntags: {tags}\n---\n")
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8))
    boft_export.merge(base, adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("- kept\n" in card) == ("{" in tags)
    assert "- boft\n" in card


def test_card_names_no_other_base(tmp_path: Path) -> None:
    """An adapter's base id is taken only where nothing speaks against it."""
    adapter = write_adapter(tmp_path / "adapter", boft_tensors("a", 16, 8), {"base_model_name_or_path": "org/other"})
    base = write_checkpoint(tmp_path / "base", {"a.weight": torch.randn(8, 16)}, {"_name_or_path": "org/this"})
    result = boft_export.merge(base, adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    other = any(n.code == "other-base" and n.level is boft_export.Level.WARNING for n in result.plan.notices)
    assert other
    assert "base_model:" not in card
