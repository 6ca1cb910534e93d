"""A merge on a real Ray cluster of two nodes, with workers that are killed midway and nodes that go."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import write_checkpoint
from typer.testing import CliRunner

import boft_export
from boft_export.cli.main import app
from boft_export.pipeline.hashing import InputHashes, file_digest
from boft_export.pipeline.options import MergeOptions
from boft_export.pipeline.prepare import prepare
from boft_export.planning.strength import Interpolation

ray = pytest.importorskip("ray")
pytest.importorskip("moto")

from ray.cluster_utils import Cluster  # noqa: E402  # where there is no Ray these tests are left out

from boft_export.pipeline import ray_cluster, ray_engine, ray_worker  # noqa: E402

# What Ray itself leaves to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files tell the workers what to do after the first piece of a file: to die, or to wait."""
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def cluster(server: str, orders: Path) -> Iterator[Any]:
    """Two nodes of one CPU each, in which this process takes part."""
    assert server

    def obey() -> None:
        import contextlib
        import os
        import signal
        import time

        from boft_export.pipeline.output_file import OutputFile

        follow = OutputFile.follow

        def followed(self: Any, *arguments: Any) -> None:
            follow(self, *arguments)
            with contextlib.suppress(FileNotFoundError):
                (orders / "die").rename(orders / f"dead-{os.getpid()}")
                os.kill(os.getpid(), signal.SIGKILL)
            while (orders / "wait").exists():
                (orders / f"waits-{os.getpid()}").touch()
                time.sleep(0.05)

        OutputFile.follow = followed

    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "object_store_memory": 80 << 20,
        # How soon a lost node is missed.
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 3},
    }
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(started.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": obey})
    try:
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def base(tmp_path: Path, base: Path) -> Path:
    """The same tensors in four files."""
    tensors = {n: t for f in sorted(base.glob("*.safetensors")) for n, t in load_file(f).items()}
    return write_checkpoint(tmp_path / "base-4", tensors, {"model_type": "test"}, shards=4)


@pytest.fixture(autouse=True)
def no_orders(orders: Path) -> Iterator[None]:
    yield
    for file in orders.iterdir():
        file.unlink()


@pytest.fixture
def on_ray(cluster: Any) -> Callable[..., Any]:
    """Call a function so that the cluster does its work."""
    assert cluster
    return lambda call, *arguments, **named: call(*arguments, **named, engine="ray", jobs=1)


@pytest.fixture
def merge(cluster: Any) -> Callable[..., Any]:
    """Run ``boft-export merge`` so that the cluster does its work."""
    assert cluster
    return lambda *arguments: CliRunner().invoke(app, list(map(str, ["merge", *arguments, "--engine", "ray"])))


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def hidden(output: Path) -> Path:
    return output.with_name(f".{output.name}.boft-export")


def when_waiting(orders: Path, act: Callable[[], None], workers: int = 1) -> threading.Thread:
    """Do something once so many workers are in the middle of a file."""
    (orders / "wait").touch()

    def watch() -> None:
        while len(list(orders.glob("waits-*"))) < workers:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_same_bytes(on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path) -> None:
    boft_export.merge(base, adapter, tmp_path / "local", reversible=True)
    told: list[tuple[int, int, str]] = []
    result = on_ray(
        boft_export.merge, base, adapter, tmp_path / "ray", reversible=True, progress=lambda *n: told.append(n)
    )
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert not hidden(tmp_path / "ray").exists()
    assert told[-1][0] == told[-1][1] == sum(s.nbytes for s in result.plan.shards)
    on_ray(boft_export.unmerge, tmp_path / "ray", adapter, tmp_path / "back")
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_sweep_in_other_files(
    on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several outputs, an input that several files are made of, and paths from the current folder."""
    monkeypatch.chdir(tmp_path)
    named = {"alphas": [0, 0.5, 1], "max_shard_size": "2KB", "dtype": "float32"}
    boft_export.interpolate(base.name, adapter.name, "local", **named)
    on_ray(boft_export.interpolate, base.name, adapter.name, "ray", **named)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert len(list((tmp_path / "ray" / "alpha-0.5").glob("*.safetensors"))) > 4


def test_onto_a_store(on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, bucket: str) -> None:
    import fsspec

    boft_export.merge(base, adapter, tmp_path / "local")
    system = fsspec.filesystem("s3")
    system.put(f"{base}/", f"{bucket}/{base.name}/", recursive=True)
    on_ray(boft_export.merge, f"{bucket}/{base.name}", adapter, f"{bucket}/merged")
    system.invalidate_cache()
    key = f"{bucket.removeprefix('s3://')}/merged"
    found = {n[len(key) + 1 :]: system.cat_file(n) for n in system.find(key)}
    assert found == content(tmp_path / "local")


def test_a_killed_workers_file_is_written_again(
    on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, orders: Path
) -> None:
    boft_export.merge(base, adapter, tmp_path / "local")
    (orders / "die").touch()
    on_ray(boft_export.merge, base, adapter, tmp_path / "ray")
    assert len(list(orders.glob("dead-*"))) == 1
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_a_lost_nodes_file_is_written_again(
    on_ray: Callable[..., Any], cluster: Any, base: Path, adapter: Path, tmp_path: Path, orders: Path
) -> None:
    boft_export.merge(base, adapter, tmp_path / "local")
    added = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()

    def lose() -> None:
        cluster.remove_node(added, allow_graceful=False)
        (orders / "wait").unlink()

    thread = when_waiting(orders, lose, workers=3)
    on_ray(boft_export.merge, base, adapter, tmp_path / "ray")
    thread.join()
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_interrupted_and_resumed(
    merge: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while workers are in the middle of a file, and won't stop by themselves."""
    monkeypatch.setattr("boft_export.pipeline.ray_engine._STOP", 0.5)
    boft_export.merge(base, adapter, tmp_path / "local")
    finished: list[str] = []

    def interrupt(*told: Any) -> None:
        # After the first file.
        if not finished:
            finished.append(told[-1])
            when_waiting(orders, lambda: os.kill(os.getpid(), signal.SIGINT))

    arguments = (base, adapter, "-o", tmp_path / "ray", "-j", 1)
    with monkeypatch.context() as patch:
        patch.setattr("boft_export.cli.output.Output.progress", lambda *_: _Told(interrupt))
        done = merge(*arguments)
    assert done.exit_code == 130, done.stderr
    assert not (tmp_path / "ray").exists()
    (orders / "wait").unlink()
    assert merge(*arguments, "--resume").exit_code == 0
    assert content(tmp_path / "ray") == content(tmp_path / "local")


class _Told:
    """A progress bar that calls a function."""

    def __init__(self, call: Callable[[int, int, str], None]) -> None:
        self._call = call

    def __enter__(self) -> Callable[[int, int, str], None]:
        return self._call

    def __exit__(self, *_: object) -> None:
        pass


def test_a_workers_error_is_the_users(merge: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: v * 1e6 if k.endswith("boft_s") else v for k, v in load_file(file).items()}, file)
    done = merge(base, adapter, "-o", tmp_path / "out", "--dtype", "float16", "-j", 1)
    assert done.exit_code == 3
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not hidden(tmp_path / "out").exists()


def test_a_worker_that_dies_each_time(
    on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, orders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boft_export.pipeline.ray_engine._RETRIES", 0)
    (orders / "die").touch()
    with pytest.raises(boft_export.ResourceError, match="gave up to write model-"):
        on_ray(boft_export.merge, base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_workers_see_otherwise(
    on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boft_export.checkpoint.places import file_state

    monkeypatch.setattr("boft_export.pipeline.ray_engine.file_state", lambda p: (*file_state(p), "else"))
    with pytest.raises(boft_export.AccessError, match="not the file that it is") as caught:
        on_ray(boft_export.merge, base, adapter, tmp_path / "out")
    assert "every node" in str(caught.value.hint)


def test_what_the_cluster_lacks(merge: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    weights = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    torch.save(weights, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (old / "config.json").write_text("{}")
    for source, more, message in (
        (base, ["-j", "9"], "9 CPUs"),
        (base, ["--device", "cuda"], "has a GPU"),
        (base, ["--device", "cuda:1"], "cuda:1"),
        (old, ["-j", "1"], "old form of torch.save"),
        (base, ["--device", "cuda:1", "-n"], "cuda:1"),
        (old, ["-n"], "old form of torch.save"),
        (base, ["--ray-address", "", "-n"], "address is empty"),
        (base, ["--ray-address", ""], "address is empty"),
    ):
        done = merge(source, adapter, "-o", tmp_path / "out", *more)
        assert done.exit_code == 2, done.stderr
        assert message in done.stderr
    assert not hidden(tmp_path / "out").exists()


@dataclass
class Node:
    """What ``ray.nodes`` tells of a node."""

    cpus: float
    memory: int = 8 << 30
    gpus: int = 0

    def told(self) -> dict[str, Any]:
        resources = {"CPU": self.cpus, "memory": float(self.memory), "GPU": self.gpus}
        return {"Alive": True, "Resources": {k: v for k, v in resources.items() if v}}


@pytest.mark.parametrize(
    ("nodes", "device", "cpus"),
    [
        ([Node(4)], "cpu", 4),
        ([Node(64)], "cpu", 8),
        ([Node(64), Node(4, gpus=1)], "cuda", 4),
        ([Node(64, memory=1 << 20), Node(2)], "cpu", 2),
        # It may yet grow.
        ([], "cuda", 8),
        ([Node(0)], "cuda", 8),
    ],
)
def test_a_task_asks_for_what_one_node_has(
    nodes: list[Node], device: str, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [n.told() for n in nodes])
    needs = ray_cluster.worker_needs(8, device, 1 << 30, MergeOptions())
    assert needs == {"num_cpus": cpus, "memory": 1 << 30, **({"num_gpus": 1} if device == "cuda" else {})}
    digesting = ray_engine._needs(ray_worker.Task(None, ("a",), ("a",)), needs)
    assert digesting == {"num_cpus": 1, "memory": ray_engine._DIGEST_MEMORY}


@pytest.mark.parametrize(
    ("nodes", "device", "jobs", "error", "message"),
    [
        ([Node(4), Node(64, gpus=1)], "cpu", 65, boft_export.UsageError, "65 CPUs for one task; the largest has 64"),
        ([Node(64), Node(4, gpus=1)], "cuda", 8, boft_export.UsageError, "8 CPUs for one task beside a GPU"),
        ([Node(64)], "cuda", None, boft_export.UsageError, "has a GPU"),
        ([Node(4, 1 << 20), Node(4, 2 << 20)], "cpu", 1, boft_export.ResourceError, "largest has 2,097,152"),
        ([Node(4), Node(4, 1 << 20, gpus=1)], "cuda", 1, boft_export.ResourceError, "takes beside a GPU"),
    ],
)
def test_what_no_node_has(
    nodes: list[Node],
    device: str,
    jobs: int | None,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [n.told() for n in nodes])
    with pytest.raises(error, match=message):
        ray_cluster.worker_needs(jobs or 8, device, 1 << 30, MergeOptions(jobs=jobs))


def test_small_inputs_are_digested_by_one_task(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan = prepare(base, adapter, tmp_path / "out", Interpolation(), MergeOptions(), "cpu").plan
    sizes = dict.fromkeys(plan.input_files(), 1)
    rest = [t.digests for t in ray_engine._tasks(plan, plan.shards, sizes) if t.shard is None]
    assert len(rest) == 1
    large = next(n for n in rest[0] if n.startswith("adapter"))
    sizes[large] = 1 << 40
    apart = [t.digests for t in ray_engine._tasks(plan, plan.shards, sizes) if t.shard is None]
    assert (large,) in apart
    assert sorted(sum(apart, ())) == sorted(rest[0])
    # Of a run that is resumed nothing is written that would digest the base's files.
    resumed = ray_engine._tasks(plan, (), sizes)
    assert {n for t in resumed for n in t.digests} == set(sizes)


def test_digesting_stops_when_the_run_is_over(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as f:
        f.truncate(5 * ray_worker._DIGEST_PIECE + 1)
    hashes = InputHashes({"large": file})
    said = []

    class Words:
        def say(self, *told: Any) -> None:
            said.append(told)
            if len(said) == 2:
                raise ray_worker._StoppedError

    with pytest.raises(ray_worker._StoppedError):
        ray_worker._digest(file, hashes, cast("ray_worker._Words", Words()))
    assert hashes._state[file][1] == 2 * ray_worker._DIGEST_PIECE
    ray_worker._digest(file, hashes, cast("ray_worker._Words", Words()))
    assert hashes.digests() == {"large": file_digest(file)}


def test_a_silent_cluster_is_told_of_once(
    on_ray: Callable[..., Any],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    orders: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("boft_export.pipeline.ray_engine._SILENCE", 0.3)
    # Another test may have run the program with --quiet.
    caplog.set_level("WARNING", "boft_export")

    def wait() -> None:
        latest = time.monotonic() + 20
        while not caplog.records and time.monotonic() < latest:
            time.sleep(0.02)
        time.sleep(0.6)
        (orders / "wait").unlink()

    thread = when_waiting(orders, wait)
    on_ray(boft_export.merge, base, adapter, tmp_path / "out")
    thread.join()
    (record,) = caplog.records
    assert "each file waits for a node with 1 CPUs and" in record.getMessage()


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = ray_worker.installed_versions("torch")
    monkeypatch.delenv("BOFT_EXPORT_KERNEL", raising=False)
    ray_worker._check_versions(versions)
    with pytest.raises(boft_export.UsageError, match=r"has numpy .*; the run was started with numpy 1\.0") as caught:
        ray_worker._check_versions({**versions, "numpy": "1.0"})
    assert "same versions" in str(caught.value.hint)
    with pytest.raises(boft_export.UsageError, match="with fold kernel abacus"):
        ray_worker._check_versions({**versions, "fold kernel": "abacus"})
    monkeypatch.setattr(ray_worker, "version", lambda n: importlib.metadata.version(f"no-{n}"))
    with pytest.raises(boft_export.UsageError, match="has torch missing"):
        ray_worker._check_versions(versions)


@pytest.mark.parametrize(
    "cause",
    [
        TypeError("do_task() takes 3 positional arguments but 4 were given"),
        importlib.metadata.PackageNotFoundError("torch"),
        RuntimeError("The remote function failed to import.\nModuleNotFoundError: No module named 'boft_export'"),
    ],
)
def test_a_node_with_another_program(cause: Exception) -> None:
    found = ray_engine._cause(ray.exceptions.RayTaskError("do_task", "", cause))
    assert isinstance(found, boft_export.UsageError)
    assert "pip install" in str(found.hint)


def test_the_kernel_is_the_drivers(
    on_ray: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum's last bit, in the manifest, tells which one it was."""
    monkeypatch.setenv("BOFT_EXPORT_KERNEL", "torch")
    boft_export.merge(base, adapter, tmp_path / "local")
    on_ray(boft_export.merge, base, adapter, tmp_path / "ray")
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_asked_to_end(cluster: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    """What Ray does on SIGTERM is not done."""
    code = (
        "import os, signal\nfrom boft_export.pipeline import ray_cluster\n"
        "ray_cluster.check_cluster = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from boft_export.cli.main import main\nmain()\n"
    )
    where = ("--engine", "ray", "--ray-address", cluster.address)
    done = program("merge", base, adapter, "-o", tmp_path / "out", *where, code=code)
    assert done.returncode == 130, done.stderr
    assert "interrupted; nothing was published" in done.stderr


@pytest.mark.parametrize(("more", "heard"), [([], "heard"), (["-q"], "")])
def test_what_is_logged_is_a_line_unless_quiet(base: Path, more: list[str], heard: str) -> None:
    code = (
        "import logging, boft_export.planning.inspection as i\ninspect = i.inspect\n"
        "def told(*a, **k):\n    logging.getLogger('boft_export.some').warning('heard')\n"
        "    return inspect(*a, **k)\n"
        "i.inspect = told\nfrom boft_export.cli.main import main\nmain()\n"
    )
    assert program("inspect", base, *more, code=code).stderr.strip() == heard


@pytest.mark.parametrize("early", [False, True])
def test_a_connection_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, *, early: bool) -> None:
    """Also where it is asked to end while Ray has its own way of that."""
    asked: list[int] = []

    def init(*_: object, **__: object) -> None:
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        if early:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        with pytest.raises(SystemExit) if early else contextlib.nullcontext(), ray_cluster.connected("local"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_a_plan_keeps_its_identities_when_pickled(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The engine tells a tensor's origin from the base's own tensor by identity."""
    ready = prepare(base, adapter, tmp_path / "out", Interpolation(), MergeOptions(), "cpu")
    for tensor in pickle.loads(pickle.dumps(ready.plan)).tensors:  # noqa: S301
        assert tensor.base is tensor.source


# Without that cluster


def program(*arguments: object, code: str = "from boft_export.cli.main import main\nmain()\n") -> Any:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_workers_on_this_machine(base: Path, adapter: Path, tmp_path: Path) -> None:
    """They come, work and go, and say nothing."""
    boft_export.merge(base, adapter, tmp_path / "local")
    done = program("merge", base, adapter, "-o", tmp_path / "ray", "--engine", "ray", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert content(tmp_path / "ray") == content(tmp_path / "local")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--engine", "ray", "--ray-address", "127.0.0.1:9"], 4, "refused"),
        (["--engine", "ray", "--ray-address", "ray://127.0.0.1:9"], 4, "refused"),
        (["--ray-address", "auto"], 2, "--engine ray"),
    ],
)
def test_addresses(base: Path, adapter: Path, tmp_path: Path, more: list[str], code: int, message: str) -> None:
    done = program("merge", base, adapter, "-o", tmp_path / "out", *more)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not hidden(tmp_path / "out").exists()


def test_without_ray(base: Path, adapter: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'ray' else find(n, *a)\n"
        "from boft_export.cli.main import main\nmain()\n"
    )
    for more in ([], ["-n"]):
        done = program("merge", base, adapter, "-o", tmp_path / "out", "--engine", "ray", *more, code=code)
        assert done.returncode == 2
        assert 'pip install "boft-export[ray]"' in done.stderr
