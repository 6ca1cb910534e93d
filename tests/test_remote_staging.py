"""Folders under construction on a store: what holds of those on a disk too, and what only a store can do to them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_support import content, fsspec, hidden

from boft_export.checkpoint import Staging, check_output, open_staging, remote_lock
from boft_export.checkpoint.remote import RemotePath
from boft_export.errors import AccessError, UsageError

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


def test_what_appears_at_the_output_meanwhile_stays(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    finish(staging, "a")
    mine = output / "mine.txt"
    if isinstance(mine, Path):
        output.mkdir()
        mine.write_bytes(b"mine")
    else:
        mine.file_system.pipe_file(mine.key, b"mine")
    with pytest.raises(UsageError, match="exists"):
        staging.publish()
    staging.keep()
    assert files(output) == {"mine.txt": b"mine"}
    staging = open_staging(output, "f", resume=True, overwrite=True)
    assert set(staging.done) == {"a"}
    staging.publish()
    assert files(output) == {"a": b"abc"}


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


def test_workers_of_a_run_that_is_over(output: Path | RemotePath) -> None:
    """What one of an interrupted run still finishes does not take the place of what the next one writes."""
    old = open_staging(output, "f")
    late = pickle.loads(pickle.dumps(old.shared))  # noqa: S301
    with old.shared.write("sub/a") as file:
        file.write(b"abc")
    old.record("sub/a", {"sha256": "x"})
    # On disk it has nowhere to put it.
    with contextlib.suppress(AccessError), contextlib.ExitStack() as stack:
        stack.enter_context(late.write("sub/b")).write(b"old")
        old.keep()
        staging = open_staging(output, "f", resume=True)
        with staging.shared.write("sub/b") as file:
            file.write(b"new")
    with contextlib.suppress(AccessError), late.write("sub/b") as file:
        file.write(b"old")
    assert set(staging.done) == {"sub/a"}
    staging.record("sub/b", {"sha256": "x"})
    with contextlib.suppress(AccessError), late.write("sub/b") as file:
        file.write(b"old")
    staging.publish()
    assert files(output) == {"sub/a": b"abc", "sub/b": b"new"}


def test_what_was_not_recorded_is_removed(output: Path | RemotePath) -> None:
    staging = open_staging(output, "f")
    with staging.shared.write("a") as file:
        file.write(b"abc")
    finish(staging, "b")
    staging.keep()
    staging = open_staging(output, "f", resume=True)
    assert set(staging.done) == {"b"}
    place = hidden(str(output))
    left = files(Path(place)) if isinstance(output, Path) else content(place)
    assert [n for n in left if n.endswith("/a")] == []
    staging.discard()
    assert not files(output)


# Names


@pytest.fixture(params=["s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a store."""
    return f"memory://{tmp_path.name}" if request.param == "memory" else str(request.getfixturevalue("bucket"))


@pytest.mark.parametrize("name", ["merged[12]", "merged*", "merged?", "merged[!x]"])
def test_a_name_is_no_pattern(folder: str, name: str) -> None:
    system, _ = fsspec.core.url_to_fs(folder)
    for other in ("merged1/model.safetensors", ".merged1.boft-export/files/x", "merged1/old1"):
        system.pipe_file(f"{folder}/{other}", b"mine")
    system.pipe_file(f"{folder}/{name}/old*", b"old")
    system.pipe_file(f"{folder}/{name}/old1", b"old")
    output = RemotePath(f"{folder}/{name}")
    for overwrite in (True, False):
        staging = open_staging(output, "f", overwrite=overwrite, resume=not overwrite)
        finish(staging, "old1" if overwrite else "config.json")
        if overwrite:
            staging.keep()
            # As a killed run leaves it.
            fsspec.core.url_to_fs(folder)[0].pipe_file(f"{hidden(output.url)}/publishing.json", b"{}")
        else:
            staging.publish()
    assert files(output) == {"old1": b"abc", "config.json": b"abc"}
    assert content(f"{folder}/merged1") == {"model.safetensors": b"mine", "old1": b"mine"}
    assert content(f"{folder}/.merged1.boft-export") == {"files/x": b"mine"}
    assert not content(hidden(output.url))


@pytest.mark.parametrize("old", ["2_Dense/", "2_Dense//", "a//b", "/config.json", "config.json/"])
def test_keys_that_no_folder_of_files_can_have(bucket: str, old: str) -> None:
    """A console makes an empty object for a folder; what lies in that must stay."""
    system = fsspec.filesystem("s3")
    output = RemotePath(f"{bucket}/merged")
    system.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=f"merged/{old}", Body=b"")
    staging = open_staging(output, "f", overwrite=True)
    for name in ("2_Dense/model.safetensors", "a/b", "config.json"):
        finish(staging, name)
    staging.publish()
    system.invalidate_cache()
    assert set(system.find(output.key)) == {
        f"{output.key}/{n}" for n in ("2_Dense/model.safetensors", "a/b", "config.json")
    }


def test_what_is_published_is_compared_with_what_was_made(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = open_staging(RemotePath(f"{bucket}/out"), "f")
    finish(staging, "model.safetensors")
    finish(staging, "config.json")
    copied = store_call(monkeypatch, "cp_file", lambda source, _: not source.endswith("model.safetensors"))
    with pytest.raises(AccessError, match=r"model\.safetensors is not as large") as caught:
        staging.publish()
    assert len(copied) == 1, "what a loader begins with must not come to lie with what is not whole"
    assert "--resume" in str(caught.value.hint)
    staging.keep()
    monkeypatch.undo()
    open_staging(RemotePath(f"{bucket}/out"), "f", resume=True).publish()
    assert set(files(RemotePath(f"{bucket}/out"))) == {"model.safetensors", "config.json"}


def store_call(monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[..., bool]) -> list[tuple[Any, ...]]:
    """Have ``before`` decide whether a call of the S3 file system is made; return the calls."""
    # It has its own method of that name for each instance.
    system = RemotePath("s3://any").file_system
    real, calls = getattr(system, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **options) if before(*arguments) else None

    monkeypatch.setattr(system, name, call)
    return calls


# The lock


def lock_of(output: RemotePath) -> str:
    return f"{hidden(output.url)}/lock.json"


def others(output: RemotePath, **changed: Any) -> None:
    """Make the lock another run's."""
    system = fsspec.filesystem("s3")
    lock = json.loads(system.cat_file(lock_of(output)))
    system.pipe_file(lock_of(output), json.dumps({**lock, "owner": "other", **changed}).encode())


def test_the_lock_is_renewed_while_nothing_is_written(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one copy takes longer than a lock lives."""
    monkeypatch.setattr(remote_lock, "_LIFE", 3.0)
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    finish(staging, "a")
    refused = []

    def slow(*_: Any) -> bool:
        time.sleep(4)
        with pytest.raises(UsageError, match="another run") as caught:
            open_staging(output, "f", resume=True)
        refused.append(caught.value)
        return True

    store_call(monkeypatch, "cp_file", slow)
    staging.publish()
    assert refused
    assert files(output) == {"a": b"abc"}
    assert "boft-export lock" not in {t.name for t in threading.enumerate()}


@pytest.mark.parametrize("end", ["publish", "discard", "keep"])
def test_the_lock_ends_with_the_run(bucket: str, end: str) -> None:
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    finish(staging, "a")
    getattr(staging, end)()
    assert "boft-export lock" not in {t.name for t in threading.enumerate()}
    assert not fsspec.filesystem("s3").exists(lock_of(output))


def test_a_lock_that_is_lost_ends_the_run_at_its_next_step(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "_LIFE", 0.5)
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    finish(staging, "a")
    while not staging._held._lost:
        # A renewal under way may put the run's own entry back.
        others(output, time=time.time() + 60)
        time.sleep(0.1)
    for step in (lambda: staging.record("a", {}), lambda: staging.write("b").__enter__(), staging.publish):
        with pytest.raises(UsageError, match="another run"):
            step()
    staging.discard()
    assert json.loads(fsspec.filesystem("s3").cat_file(lock_of(output)))["owner"] == "other"
    assert any(n.endswith("/a") for n in content(hidden(output.url))), "what it wrote is the other's now"


def test_no_model_is_published_by_one_that_lost_its_lock_meanwhile(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    for name in ("model.safetensors", "config.json"):
        finish(staging, name)

    def lose(*_: str) -> bool:
        others(output)
        return True

    store_call(monkeypatch, "cp_file", lose)
    with pytest.raises(UsageError, match="another run"):
        staging.publish()
    staging.keep()
    assert set(files(output)) == {"model.safetensors"}


def test_an_output_that_appears_before_the_lock_is_taken(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = RemotePath(f"{bucket}/out")
    take = remote_lock.RemoteLock._take

    def late(lock: remote_lock.RemoteLock) -> None:
        fsspec.filesystem("s3").pipe_file(f"{output}/config.json", b"other's")
        take(lock)

    monkeypatch.setattr(remote_lock.RemoteLock, "_take", late)
    with pytest.raises(UsageError, match="out exists"):
        open_staging(output, "f")
    assert files(output) == {"config.json": b"other's"}
    assert not content(hidden(output.url))


def test_a_forked_process_does_nothing_to_the_lock(bucket: str) -> None:
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    finish(staging, "a")
    child = os.fork()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    staging.publish()
    assert files(output) == {"a": b"abc"}


@pytest.mark.parametrize(
    ("changed", "alive"),
    [
        ({}, True),
        ({"pid": 2**22 + 1}, False),
        ({"pid": 2**22 + 1, "host": "else"}, True),
        ({"pid": 2**22 + 1, "boot": "else"}, True),
        ({"pid": 2**22 + 1, "space": 1}, True),
        ({"host": "else", "time": time.time() - 1000}, False),
        ({"time": time.time() - 1000}, False),
        ({"time": time.time() + 1e6}, False),
        ({"time": float("inf")}, False),
        ({"time": 10**400}, False),
        ({"time": "never"}, False),
        ({"time": None, "pid": "x"}, False),
        ({"pid": 10**30}, False),
    ],
)
def test_whose_lock_is_alive(bucket: str, changed: dict[str, Any], *, alive: bool) -> None:
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    lock = json.loads(fsspec.filesystem("s3").cat_file(lock_of(output)))
    staging.keep()
    text = json.dumps({**lock, "owner": "other", **changed}).encode()
    fsspec.filesystem("s3").pipe_file(lock_of(output), text)
    if alive:
        with pytest.raises(UsageError, match="another run"):
            open_staging(output, "f")
    else:
        open_staging(output, "f").discard()


@pytest.mark.parametrize("error", [OSError(38, "not implemented"), OSError(22, "EINVAL"), TypeError("mode")])
@pytest.mark.parametrize("taken", [True, False])
def test_stores_that_cannot_create_exclusively(
    bucket: str, monkeypatch: pytest.MonkeyPatch, error: Exception, *, taken: bool
) -> None:
    output = RemotePath(f"{bucket}/out")
    system = RemotePath("s3://any").file_system
    real = system.pipe_file

    def pipe(path: str, data: bytes, **options: Any) -> Any:
        if "mode" in options:
            if taken:
                real(path, json.dumps({"owner": "other", "time": time.time()}).encode())
            raise error
        return real(path, data)

    monkeypatch.setattr(system, "pipe_file", pipe)
    if taken:
        with pytest.raises(UsageError, match="another run"):
            open_staging(output, "f")
    else:
        open_staging(output, "f").discard()


# Ends


def test_a_publishing_that_was_begun_is_never_discarded(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    for name in ("model.safetensors", "config.json"):
        finish(staging, name)

    def stop(source: str, _: str) -> bool:
        if source.endswith("config.json"):
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        store_call(patch, "cp_file", stop)
        with pytest.raises(KeyboardInterrupt, match=r"cut short\. .*--resume"):
            staging.publish()
    staging.keep()
    with pytest.raises(UsageError, match="only a part"):
        open_staging(output, "f")
    # As where the input turns out to have changed.
    open_staging(output, "f", resume=True).discard()
    # Starting over and giving up does not make a model of the part either.
    open_staging(output, "f", overwrite=True).discard()
    with pytest.raises(UsageError, match="only a part"):
        open_staging(output, "f")
    staging = open_staging(output, "f", resume=True)
    for name in ("model.safetensors", "config.json"):
        finish(staging, name)
    staging.publish()
    assert set(files(output)) == {"model.safetensors", "config.json"}


def test_what_is_whole_is_never_called_a_part(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run dies, or may not remove anything, right after the last copy."""
    output = RemotePath(f"{bucket}/out")
    staging = open_staging(output, "f")
    finish(staging, "config.json")

    def refuse(key: str) -> bool:
        if not key.endswith("publishing.json"):
            raise PermissionError("AccessDenied")
        return True

    with monkeypatch.context() as patch:
        store_call(patch, "rm_file", refuse)
        staging.publish()
    assert "AccessDenied" in str(staging.left)
    assert files(output) == {"config.json": b"abc"}
    assert "boft-export lock" not in {t.name for t in threading.enumerate()}
    with pytest.raises(UsageError, match="out exists"):
        open_staging(output, "f")
    # The lock could not be removed, and holds nobody up.
    staging = open_staging(output, "f", overwrite=True)
    staging.discard()
    assert not content(hidden(output.url))
