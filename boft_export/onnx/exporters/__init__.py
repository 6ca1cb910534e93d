"""Exporters of others, each run on a merged checkpoint as a program of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from boft_export.onnx.exporters.foreign import ForeignExporter
from boft_export.onnx.exporters.genai import GENAI
from boft_export.onnx.exporters.optimum import OPTIMUM
from boft_export.onnx.tasks import Task
from boft_export.onnx.variant import Exporter

EXPORTERS: Mapping[Exporter, ForeignExporter] = MappingProxyType({Exporter.OPTIMUM: OPTIMUM, Exporter.GENAI: GENAI})


def served(task: Task, exporter: Exporter) -> Task:
    """Return a task with only those cases that an exporter's graphs are made for."""
    return EXPORTERS[exporter].served(task) if exporter in EXPORTERS else task


__all__ = ["EXPORTERS", "ForeignExporter", "served"]
