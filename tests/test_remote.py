"""Base, adapter and output on a real S3 server, and what a store can't do as a disk does."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_checkpoint
from typer.testing import CliRunner

import boft_export
from boft_export.checkpoint import Staging, check_output, locate, open_checkpoint, open_staging
from boft_export.checkpoint.remote import RemoteBytes, RemotePath, parse_path
from boft_export.cli.main import app
from boft_export.errors import AccessError, DamagedFileError, UsageError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto")

MAIN = "from boft_export.cli.main import main\nmain()\n"


def put(folder: Path, url: str) -> str:
    system, _ = fsspec.core.url_to_fs(url)
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"{url}/{file.relative_to(folder)}", file.read_bytes())
    return url


def content(place: str | Path) -> dict[str, bytes]:
    """Return every file below a folder, local or remote."""
    if isinstance(place, Path):
        return {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}
    system, key = fsspec.core.url_to_fs(place)
    system.invalidate_cache()
    return {n[len(key) + 1 :]: system.cat_file(n) for n in system.find(key)}


def hidden(output: str) -> str:
    folder, _, name = output.rpartition("/")
    return f"{folder}/.{name}.boft-export"


def program(*arguments: object, code: str = MAIN, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_every_way_gives_the_same_bytes(base: Path, adapter: Path, tmp_path: Path, bucket: str) -> None:
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("kept")
    expected = tmp_path / "merged"
    boft_export.merge(base, adapter, expected)
    there, trained = put(base, f"{bucket}/base"), put(adapter, f"{bucket}/adapter")
    result = boft_export.merge(there, trained, f"{bucket}/a/merged")
    assert str(result.output) == f"{bucket}/a/merged"
    boft_export.merge(there, trained, tmp_path / "from")
    boft_export.merge(base, adapter, f"{bucket}/to")
    wanted = content(expected)
    assert content(f"{bucket}/a/merged") == content(tmp_path / "from") == content(f"{bucket}/to") == wanted
    assert not content(hidden(f"{bucket}/a/merged"))
    assert not boft_export.validate(trained, base=there, merged=f"{bucket}/to").failures


def test_dry_run_and_inspect_read_no_weights_and_load_no_torch(base: Path, adapter: Path, bucket: str) -> None:
    there, trained = put(base, f"{bucket}/base"), put(adapter, f"{bucket}/adapter")
    code = (
        "import sys, s3fs\n"
        "real, read = s3fs.S3FileSystem._call_s3, []\n"
        "async def call(self, method, *a, **k):\n"
        "    read.append((method, k.get('Key', ''), k.get('Range')))\n    return await real(self, method, *a, **k)\n"
        "s3fs.S3FileSystem._call_s3 = call\n"
        "from boft_export.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
        "import json; print(json.dumps(read), file=sys.stderr)\n"
    )
    for arguments in (["inspect", there], ["merge", there, trained, "-o", f"{bucket}/out", "-n"]):
        done = program(*arguments, code=code)
        assert done.returncode == 0, done.stderr
        requests = json.loads(done.stderr.splitlines()[-1])
        ranges = [r for method, key, r in requests if method == "get_object" and key.endswith(".safetensors")]
        starts = [int(r.removeprefix("bytes=").split("-")[0]) for r in ranges]
        # Two for each file's header.
        assert len(starts) <= 6
        assert set(starts) == {0, 8}
        assert len(requests) < 50, len(requests)
    assert not content(f"{bucket}/out")


def kill_at(event: str, count: int) -> str:
    """Return a program that kills itself before the ``count``-th time that ``event`` is done to the store."""
    return (
        "import os, signal, s3fs\n"
        f"real, left = s3fs.S3FileSystem._call_s3, [{count}]\n"
        "async def call(self, method, *a, **k):\n"
        f"    left[0] -= method == {event!r}\n"
        "    if left[0] <= 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return await real(self, method, *a, **k)\n"
        "s3fs.S3FileSystem._call_s3 = call\n" + MAIN
    )


@pytest.mark.parametrize(("event", "count"), [("put_object", 6), ("copy_object", 5)])
def test_killed_and_resumed(base: Path, adapter: Path, tmp_path: Path, bucket: str, event: str, count: int) -> None:
    boft_export.merge(base, adapter, tmp_path / "merged")
    output = f"{bucket}/merged"
    done = program("merge", base, adapter, "-o", output, code=kill_at(event, count))
    assert done.returncode == -signal.SIGKILL, done.stderr
    # No loader sees a model before it is whole.
    assert "boft_export.json" not in content(output)
    if event == "copy_object":
        refused = program("merge", base, adapter, "-o", output)
        assert refused.returncode == 2
        assert "--resume" in refused.stderr
    again = program("merge", base, adapter, "-o", output, "--resume")
    assert again.returncode == 0, again.stderr
    assert content(output) == content(tmp_path / "merged")
    assert not content(hidden(output))


def test_overwritten(base: Path, adapter: Path, tmp_path: Path, bucket: str) -> None:
    output = f"{bucket}/merged"
    boft_export.merge(base, adapter, output)
    fsspec.filesystem("s3").pipe_file(f"{output}/old/file.txt", b"old")
    with pytest.raises(UsageError, match="exists"):
        boft_export.merge(base, adapter, output)
    boft_export.merge(base, adapter, output, overwrite=True, dtype="float32")
    boft_export.merge(base, adapter, tmp_path / "merged", dtype="float32")
    assert content(output) == content(tmp_path / "merged")


def test_base_that_changes_while_it_is_read(base: Path, adapter: Path, bucket: str) -> None:
    there = put(base, f"{bucket}/base")
    shard = "model-00001-of-00002.safetensors"
    data = bytearray((base / shard).read_bytes())
    data[-1] ^= 1

    def change(*_: Any) -> None:
        fsspec.filesystem("s3").pipe_file(f"{there}/{shard}", bytes(data))

    with pytest.raises(DamagedFileError, match="changed"):
        boft_export.merge(there, adapter, f"{bucket}/out", progress=change)
    assert not content(f"{bucket}/out")


def test_failures_are_for_people(base: Path, adapter: Path, bucket: str) -> None:
    for arguments, code, message in (
        (["inspect", "s3://no-such-bucket-here/base"], 4, "does not exist"),
        (["inspect", f"{bucket}/nothing"], 4, "does not exist"),
        (["inspect", "nosuch://a/b"], 2, "nosuch"),
        (["merge", base, adapter, "-o", "s3://no-such-bucket-here/out"], 4, "does not exist"),
        (["merge", base, adapter, "-o", bucket], 2, "bucket"),
        (["onnx", base, adapter, "-o", f"{bucket}/graph", "-n"], 2, "remote"),
    ):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == code, (arguments, done.exit_code, done.stderr)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    closed = "http://127.0.0.1:9"
    done = program("inspect", f"{bucket}/x", AWS_ENDPOINT_URL_S3=closed, AWS_MAX_ATTEMPTS="1")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    missing = program("inspect", "s3://b/x", code="import sys; sys.modules['s3fs'] = None\n" + MAIN)
    assert missing.returncode == 2
    assert "pip install" in missing.stderr


def test_without_credentials(bucket: str) -> None:
    empty = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    done = program("inspect", f"{bucket}/base", **empty)
    assert done.returncode == 4
    assert "redentials" in done.stderr


# Paths and ranges


def test_bytes_by_ranges_from_several_threads_and_after_pickling() -> None:
    data = torch.randint(0, 256, (10_000_001,), dtype=torch.uint8).numpy().tobytes()
    fsspec.filesystem("memory").pipe_file("/ranges/file", data)
    source = pickle.loads(pickle.dumps(RemoteBytes(RemotePath("memory://ranges/file"), 5)))  # noqa: S301

    def read(start: int) -> bool:
        buffer = bytearray(len(data) - 5 - start)
        source.read_into(memoryview(buffer), start)
        return bytes(buffer) == data[5 + start :]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, 9_000_000, 1_000_000)))
    with pytest.raises(DamagedFileError, match="fewer bytes"):
        source.read_into(memoryview(bytearray(100)), len(data) - 50)


def test_truncated_on_the_server(bucket: str) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/file", b"x" * 100)
    for offset in (50, 200):
        with pytest.raises(DamagedFileError, match="fewer bytes"):
            RemoteBytes(RemotePath(f"{bucket}/file"), offset).read_into(memoryview(bytearray(100)), 0)


@pytest.mark.parametrize("name", ["../x.safetensors", "s3://other/x.safetensors", "/x.safetensors"])
def test_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "base", {"a": torch.zeros(2), "b": torch.zeros(2)}, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name, "b": name}}))
    there = put(folder, f"memory://{tmp_path.name}/base")
    with pytest.raises(DamagedFileError, match="outside"):
        open_checkpoint(locate(there).path)
    with pytest.raises(DamagedFileError):
        RemotePath(there) / name


def test_urls(tmp_path: Path) -> None:
    assert parse_path(f"file://{tmp_path}") == tmp_path
    assert parse_path("s3a://b/x/") == RemotePath("s3://b/x")
    assert parse_path("org/name") == Path("org/name")
    for text in ("s3://b/../c", "s3://", "zip://a::s3://b/c"):
        with pytest.raises(UsageError):
            parse_path(text)


def test_output_in_an_input(base: Path, adapter: Path, tmp_path: Path) -> None:
    there = put(base, f"memory://{tmp_path.name}/base")
    with pytest.raises(UsageError, match="into the base's folder"):
        boft_export.merge(there, adapter, f"{there}/out")


# What holds of every staging


@pytest.fixture(params=["disk", "s3", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path | RemotePath:
    if request.param == "disk":
        return tmp_path / "out"
    if request.param == "memory":
        return RemotePath(f"memory://{tmp_path.name}/out")
    return RemotePath(f"{request.getfixturevalue('bucket')}/out")


def files(output: Path | RemotePath) -> dict[str, bytes]:
    return content(output if isinstance(output, Path) else output.url)


def finish(staging: Staging, name: str, data: bytes = b"abc") -> None:
    with staging.write(name) as file:
        file.write(data)
    staging.record(name, {"sha256": "x"})


def test_nothing_is_there_before_it_is_published(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    finish(staging, "model.safetensors")
    finish(staging, "sub/config.json", memoryview(b"{}"))
    assert not files(output)
    staging.publish()
    assert files(output) == {"model.safetensors": b"abc", "sub/config.json": b"{}"}


def test_a_file_left_midway_is_not_there(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")

    def fail() -> None:
        with staging.write("a") as file:
            file.write(b"abc")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    finish(staging, "b")
    staging.publish()
    assert files(output) == {"b": b"abc"}


def test_files_that_others_write(output: Path | RemotePath) -> None:
    """As the workers of a cluster do: what is half written is not published."""
    staging = open_staging(output, "f")
    other = pickle.loads(pickle.dumps(staging.shared))  # noqa: S301
    with other.write("sub/a") as file:
        file.write(b"abc")
    staging.record("sub/a", {"sha256": "x"})
    # One that was given up, and goes on: on disk it has nowhere to put what it wrote.
    with contextlib.suppress(AccessError), other.write("sub/b") as file:
        file.write(b"half")
        staging.hold()
        staging.publish()
    assert files(output) == {"sub/a": b"abc"}


def test_resume(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    finish(staging, "sub/a")
    staging.keep()
    with pytest.raises(UsageError, match="other inputs"):
        open_staging(output, "g", resume=True)
    staging = open_staging(output, "f", resume=True)
    assert staging.done["sub/a"]["sha256"] == "x"
    staging.keep()
    staging = open_staging(output, "f")
    assert staging.discarded
    assert not staging.done
    staging.discard()
    assert not files(output)


def test_two_at_once(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    with pytest.raises(UsageError, match="another run"):
        open_staging(output, "f", resume=True)
    finish(staging, "a")
    staging.publish()
    assert files(output) == {"a": b"abc"}


def test_a_lock_that_another_run_took_over(bucket: str) -> None:
    place = RemotePath(f"{bucket}/out")
    staging = open_staging(place, "f")
    finish(staging, "a")
    system = fsspec.filesystem("s3")
    lock = json.loads(system.cat_file(f"{hidden(place.url)}/lock.json"))
    system.pipe_file(f"{hidden(place.url)}/lock.json", json.dumps({**lock, "host": "else", "time": 0}).encode())
    other = open_staging(place, "f", resume=True)
    assert set(other.done) == {"a"}
    with pytest.raises(UsageError, match="another run"):
        staging.publish()
    staging.discard()
    other.publish()
    assert files(place) == {"a": b"abc"}


def test_existing_output(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    finish(staging, "a")
    finish(staging, "config.json")
    staging.publish()
    with pytest.raises(UsageError, match="exists"):
        check_output(output, overwrite=False)
    with pytest.raises(UsageError, match="exists"):
        open_staging(output, "f")
    staging = open_staging(output, "f", overwrite=True)
    finish(staging, "b", b"new")
    staging.publish()
    assert files(output) == {"b": b"new"}


def test_large_upload(bucket: str) -> None:
    """An upload in several parts."""
    staging = open_staging(RemotePath(f"{bucket}/out"), "f")
    data = torch.randint(0, 256, (40 << 20,), dtype=torch.uint8).numpy().tobytes()
    with staging.write("model.safetensors") as file:
        for start in range(0, len(data), 7 << 20):
            file.write(memoryview(data)[start : start + (7 << 20)])
    staging.record("model.safetensors", {})
    staging.publish()
    assert files(RemotePath(f"{bucket}/out")) == {"model.safetensors": data}


def test_pickled_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    system = fsspec.filesystem("memory")
    system.pipe_file(f"/{tmp_path.name}/pytorch_model.bin", (tmp_path / "pytorch_model.bin").read_bytes())
    (tensor,) = open_checkpoint(RemotePath(f"memory://{tmp_path.name}")).tensors.values()
    buffer = bytearray(tensor.nbytes)
    tensor.read_into(memoryview(buffer))
    assert torch.frombuffer(buffer, dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]
