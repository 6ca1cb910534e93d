"""Base, adapter and output on a real S3 server, and what a store can't do as a disk does."""

from __future__ import annotations

import errno
import json
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_support import MAIN, content, fsspec, hidden, kill_at, program, put
from support import write_checkpoint
from typer.testing import CliRunner

import boft_export
from boft_export.checkpoint import locate, open_checkpoint
from boft_export.checkpoint.places import lies_in, parse_path
from boft_export.checkpoint.remote import RemoteBytes, RemotePath
from boft_export.cli.main import app
from boft_export.errors import AccessError, DamagedFileError, ResourceError, UsageError
from boft_export.pipeline.memory import remote_bytes
from boft_export.pipeline.prepare import plan_merge
from boft_export.planning.strength import Interpolation


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
        assert "free" not in done.stdout
    assert not content(f"{bucket}/out")


@pytest.mark.parametrize(("event", "count"), [("put_object", 5), ("copy_object", 5)])
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


def test_names_of_one_store() -> None:
    for names in (("az", "abfs", "abfss"), ("s3", "s3a", "s3n"), ("gs", "gcs")):
        assert len({parse_path(f"{n}://place/x") for n in names}) == 1

    class Twin(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        protocol = ("twin", "other")

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.partition("://")[2]

    for name in Twin.protocol:
        fsspec.register_implementation(name, Twin)
    assert lies_in(RemotePath("twin://place/x/y"), RemotePath("other://place/x"))
    assert not lies_in(RemotePath("twin://place/xy"), RemotePath("other://place/x"))
    assert not lies_in(RemotePath("twin://place/x"), RemotePath("memory://place/x"))


def test_password_in_a_url(base: Path, adapter: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(base), str(adapter), "-o", "ftp://me:secret@host/out"])
    assert done.exit_code == 2
    assert "password" in done.stderr
    assert "secret" not in done.stderr + done.stdout
    with pytest.raises(UsageError, match="password"):
        parse_path("zip://a::s3://me:secret@b/c")
    with pytest.raises(UsageError, match="token"):
        parse_path("HTTPS://secret@host/x")
    assert parse_path("https://host/x@y").name == "x@y"
    assert parse_path("az://container@account.dfs.core.windows.net/x:y@z").name == "x:y@z"
    assert parse_path("github://org:name@main/x").name == "x"


def test_threads_share_a_file_system_only_where_they_can(bucket: str) -> None:
    for url, shared in ((bucket, True), ("memory://x", False)):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda u: RemotePath(u).file_system, url).result()
        assert (RemotePath(url).file_system is other) == shared


def test_base_that_a_config_names_by_a_url(base: Path, adapter: Path, tmp_path: Path) -> None:
    """What was downloaded does not decide which hosts are asked."""
    config = adapter / "adapter_config.json"
    for url in ("http://169.254.169.254/latest", f"file://{base}"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": url}))
        with pytest.raises(UsageError, match="names a URL as its base"):
            boft_export.merge(None, adapter, tmp_path / "out")


def test_places_below_an_output(base: Path, adapter: Path, bucket: str) -> None:
    arguments = ["interpolate", base, adapter, "-o", f"{bucket}/x/", "--alphas", "0:1:0.5", "-n", "--json"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    folders = [o["folder"] for o in json.loads(done.stdout)["outputs"]]
    assert folders == [f"{bucket}/x/alpha-{a}" for a in ("0", "0.5", "1")]


def test_evaluation_of_a_remote_output(base: Path, adapter: Path, tmp_path: Path, bucket: str) -> None:
    script = tmp_path / "figures.py"
    script.write_text("def evaluate(model_dir): return {}")
    arguments = ["interpolate", base, adapter, "-o", f"{bucket}/x", "--alpha", "0.5", "--eval", script]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2
    assert "--eval needs files on this machine" in done.stderr
    assert not content(bucket)


def test_publishing_that_is_interrupted(
    base: Path, adapter: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RemotePath(bucket).file_system, "cp_file", stop)
    done = CliRunner().invoke(app, ["merge", str(base), str(adapter), "-o", f"{bucket}/out", "--json"])
    assert done.exit_code == 130
    assert "nothing" not in done.stderr
    assert json.loads(done.stdout)["error"]["message"] in done.stderr
    assert "was cut short. Finish it with --resume." in done.stderr


def test_output_in_an_input(base: Path, adapter: Path, tmp_path: Path) -> None:
    there = put(base, f"memory://{tmp_path.name}/base")
    with pytest.raises(UsageError, match="into the base's folder"):
        boft_export.merge(there, adapter, f"{there}/out")


def test_pickled_weights(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "pytorch_model.bin")
    system = fsspec.filesystem("memory")
    system.pipe_file(f"/{tmp_path.name}/pytorch_model.bin", (tmp_path / "pytorch_model.bin").read_bytes())
    (tensor,) = open_checkpoint(RemotePath(f"memory://{tmp_path.name}")).tensors.values()
    buffer = bytearray(tensor.nbytes)
    tensor.read_into(memoryview(buffer))
    assert torch.frombuffer(buffer, dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "zipped.bin"])
def test_damaged_pickles(tmp_path: Path, bucket: str, name: str) -> None:
    """As from disk: no store is to blame, and no advice is given to load it unsafely."""
    data = pickle.dumps({"w": print})
    if name == "zipped.bin":
        torch.save({"w": torch.arange(6.0)}, tmp_path / name)
        data = (tmp_path / name).read_bytes()[:-30]
    fsspec.filesystem("s3").pipe_file(f"{bucket}/base/{name}", data)
    done = CliRunner().invoke(app, ["inspect", f"{bucket}/base/{name}"])
    assert done.exit_code == 3, done.stderr
    assert "False" not in done.stderr


def test_what_fails_beside_a_file_is_not_its_failure(bucket: str) -> None:
    system = fsspec.filesystem("s3")
    system.pipe_file(f"{bucket}/file", b"x" * 100)
    path = RemotePath(f"{bucket}/file")
    with pytest.raises(OSError, match="No space"), path.open() as file:
        raise OSError(errno.ENOSPC, "No space left on device", file.read(1))
    with path.open() as file:
        system.rm_file(f"{bucket}/file")
        with pytest.raises(AccessError, match="cannot read"):
            file.read()


def test_full_disk_while_a_remote_file_is_copied(
    base: Path, adapter: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    there = put(base, f"{bucket}/base")
    monkeypatch.setattr("boft_export.pipeline.run.shutil.copyfileobj", fail)
    with pytest.raises(ResourceError, match="disk is full"):
        boft_export.merge(there, adapter, tmp_path / "out")


def test_memory_for_what_is_on_its_way(base: Path, adapter: Path, tmp_path: Path) -> None:
    there, trained = put(base, f"memory://{tmp_path.name}/base"), put(adapter, f"memory://{tmp_path.name}/adapter")
    output = RemotePath(f"memory://{tmp_path.name}/out")

    def held(base: str | Path, adapter: str | Path, output: Path | RemotePath, *, reversible: bool = False) -> int:
        plan = plan_merge(base, adapter)
        return remote_bytes(plan, Interpolation().course(plan), output, 2, reversible=reversible)

    local = tmp_path / "out"
    assert held(base, adapter, local) == 0
    reading, writing = held(there, adapter, local), held(base, adapter, output)
    assert held(base, trained, local) == held(there, trained, local) == reading > 0
    assert held(there, adapter, output) == reading + writing
    assert held(base, adapter, output, reversible=True) == 2 * writing
