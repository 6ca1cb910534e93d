"""A merge on a real Ray cluster of two nodes, with workers that are killed midway and nodes that go."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import write_checkpoint
from typer.testing import CliRunner

import boft_export
from boft_export.cli.main import app
from boft_export.pipeline.options import MergeOptions
from boft_export.pipeline.prepare import prepare
from boft_export.planning.strength import Interpolation

ray = pytest.importorskip("ray")
pytest.importorskip("moto")

from ray.cluster_utils import Cluster  # noqa: E402  # where there is no Ray these tests are left out

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
    from boft_export.checkpoint.remote import file_state

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
    ):
        done = merge(source, adapter, "-o", tmp_path / "out", *more)
        assert done.exit_code == 2, done.stderr
        assert message in done.stderr
    assert not hidden(tmp_path / "out").exists()


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
