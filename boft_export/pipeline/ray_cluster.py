"""A Ray cluster: the connection to it, and whether it has what a run needs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping

import ray

from boft_export.checkpoint.tensors import HeldBytes
from boft_export.errors import AccessError, ResourceError, UsageError, first_line
from boft_export.pipeline.environment_variable import environment_variable
from boft_export.pipeline.options import RunOptions
from boft_export.planning import FoldPlan
from boft_export.planning.sizes import format_size

# Seconds for a cluster to answer at all.
_CONNECT = 5.0
# Nothing but the plan is in it; Ray's default is a third of the memory.
_OBJECT_STORE = 128 << 20
_USAGE_STATS = "RAY_USAGE_STATS_ENABLED"


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or have one on this machine for as long as that takes.

    A connection that is there already serves, and stays.

    Args:
        address: ``auto``, ``host:port``, ``ray://host:port`` or ``local``; None for what ``RAY_ADDRESS`` says, or a
            cluster on this machine.

    Raises:
        UsageError: If the address is empty.
        AccessError: If the cluster can't be reached.
    """
    place = _place(address)
    if ray.is_initialized():
        yield
        return
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if place == "local" else {}
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        try:
            _check_reached(place)
            with environment_variable(_USAGE_STATS, os.environ.get(_USAGE_STATS, "0")), _own_sigterm():
                ray.init(place, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # of a cluster that can't be reached Ray raises whatever met it on the way
            raise AccessError(
                f"the Ray cluster {place} can't be used: {first_line(error)}.",
                hint="Check it with: ray status --address HOST:PORT. Where it has tokens, set RAY_AUTH_MODE=token.",
            ) from error
        yield
    finally:
        ray.shutdown()
        logger.setLevel(level)


def _place(address: str | None) -> str:
    """Return where the cluster is.

    Raises:
        UsageError: If the address is empty.
    """
    if address is not None and not address.strip():
        raise UsageError("the Ray address is empty.", hint="Leave it out for workers on this machine.")
    return address if address is not None else os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does when it is asked to end, in the place of which Ray puts its own."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        # Ray's was there already when it was asked.
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_reached(place: str) -> None:
    """Fail where nobody listens, for which Ray would wait some minutes.

    Raises:
        OSError: If so.
    """
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()


def check_request(plan: FoldPlan, options: RunOptions) -> None:
    """See that some cluster can do what is planned.

    Raises:
        UsageError: If weights are in a form that can't be read by ranges, or the address is empty.
    """
    _place(options.ray_address)
    # Held in memory, each task would bring them all along.
    for file in (*plan.base.files, *(a.weights for a in plan.adapters)):
        if any(isinstance(t.source, HeldBytes) for t in file.tensors):
            raise UsageError(
                f"{file.path} is in an old form of torch.save, which workers can't read by ranges.",
                hint="Save it as safetensors, or use --engine local.",
            )


def check_cluster(plan: FoldPlan, jobs: int, device: str, options: RunOptions, memory: int) -> None:
    """See that the cluster that this process is connected to can do what is planned.

    Args:
        plan: The plan.
        jobs: Threads of a worker.
        device: ``cpu`` or ``cuda``.
        options: What was asked for.
        memory: Bytes that a worker takes, at most.

    Raises:
        UsageError: If no node can do it, or weights are in a form that can't be read by ranges.
        ResourceError: If no node has the memory.
    """
    check_request(plan, options)
    worker_needs(jobs, device, memory, options)


def worker_needs(jobs: int, device: str, memory: int, options: RunOptions) -> dict[str, float]:
    """Return what a task that writes asks of a node, one CPU for each of its threads.

    Raises:
        UsageError: If there is no such node.
        ResourceError: If none has the memory.
    """
    # A cluster without any of them may yet grow.
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    needs = {"num_cpus": float(jobs), "memory": float(memory)}
    beside = ""
    if device == "cuda":
        needs["num_gpus"] = 1.0
        beside = " beside a GPU"
        with_gpu = [n for n in nodes if n.get("GPU", 0) >= 1]
        if nodes and not with_gpu:
            raise UsageError("no node of the Ray cluster has a GPU.", hint="Use --device cpu.")
        nodes = with_gpu
    if not nodes:
        return needs
    room = int(max(n.get("memory", 0) for n in nodes))
    if memory > room:
        raise ResourceError(
            f"no node of the Ray cluster has the {memory:,} bytes of memory that a worker takes{beside}; the largest "
            f"has {room:,}.",
            hint=f"Give --max-memory {room >> 20}MiB or less, or fewer --jobs.",
        )
    most = int(max(n["CPU"] for n in nodes if n.get("memory", 0) >= memory))
    if jobs > most:
        if options.jobs is not None:
            raise UsageError(
                f"no node of the Ray cluster has {jobs} CPUs for one task{beside}; the largest has {most}.",
                hint=f"Use --jobs {most} or fewer: so many threads work on one file, and files side by side.",
            )
        needs["num_cpus"] = float(most)
    return needs


def needs_text(needs: Mapping[str, float]) -> str:
    """Return what a task asks of a node, for people."""
    gpu = ", a GPU" if "num_gpus" in needs else ""
    return f"{needs['num_cpus']:.0f} CPUs{gpu} and {format_size(int(needs['memory']))} of memory"
