"""What exporters of others have in common: they load a checkpoint, and write graphs in a form of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx_ir as ir

from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import InputError, Notice, UsageError
from boft_export.onnx.graph_file import save_whole
from boft_export.onnx.tasks import Task
from boft_export.onnx.variant import Variant

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class ForeignExporter:
    """An exporter of others.

    Attributes:
        package: The package that has it.
        extra: The extra that installs it.
        arguments: Returns what Python is started with, from the checkpoint, the folder to write, the task and the
            variant.
        keeps: Further files of its output that belong to the graphs.
        conflict: Returns what keeps it from running here; None if nothing does.
        served: Returns a task with only those cases that its graphs are made for.
        notices: What there is to say of them.
    """

    package: str
    extra: str
    arguments: Callable[[Path, Path, str, Variant], list[str]]
    keeps: tuple[str, ...] = ()
    conflict: Callable[[], str | None] = lambda: None
    served: Callable[[Task], Task] = lambda task: task
    notices: tuple[Notice, ...] = ()

    def check_installed(self) -> None:
        """See that it is here, and can run.

        Raises:
            UsageError: If not.
        """
        try:
            version(self.package)
            told = self.conflict()
        except PackageNotFoundError:
            told = f"{self.package} is not installed"
        if told is not None:
            raise UsageError(
                f"{told}.",
                hint=f"Install it in an environment of its own: python3 -m venv {self.extra}; "
                f'{self.extra}/bin/pip install "boft-export[{self.extra}]"',
            )

    def export(
        self, checkpoint: Path, folder: Path, task: str, variant: Variant, metadata: Mapping[str, str]
    ) -> dict[str, int]:
        """Export a checkpoint into a folder; return the graphs' files, each with its nodes.

        Args:
            checkpoint: The merged model; nothing else is read, from the Hub neither.
            folder: Where the graphs go.
            task: What for.
            variant: How.
            metadata: What the graphs say of their origin.

        Raises:
            InputError: If it fails.
        """
        made = checkpoint / "exported"
        # Without the current folder on its path, and as a process of its own, whose memory goes back when it ends.
        command = [sys.executable, "-P", *self.arguments(checkpoint, made, task, variant)]
        done = subprocess.run(  # noqa: S603  # Python itself, with arguments that are ours
            command, env=os.environ | _OFFLINE, cwd=checkpoint, capture_output=True, text=True, check=False
        )
        if done.returncode or not list(made.glob("*.onnx")):
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
            told = lines[-1].replace(str(checkpoint), "model")
            raise InputError(f"{self.package} can't export this model: {told}", hint="Leave out --exporter.")
        nodes = {f.name: save_whole(ir.load(f), folder / f.name, metadata) for f in sorted(made.glob("*.onnx"))}
        for name in self.keeps:
            with file_system_errors(made / name):
                shutil.move(made / name, folder / name)
        return nodes
