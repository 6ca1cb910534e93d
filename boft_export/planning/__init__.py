"""Joining adapters to a checkpoint: a plan made from headers alone, with every problem found first."""

from boft_export.planning.build import make_plan
from boft_export.planning.model import Action, ConfigEdit, FoldPlan, Segment, SideFile, Step, TensorPlan
from boft_export.planning.sourced import SourcedAdapter, open_adapter

__all__ = [
    "Action",
    "ConfigEdit",
    "FoldPlan",
    "Segment",
    "SideFile",
    "SourcedAdapter",
    "Step",
    "TensorPlan",
    "make_plan",
    "open_adapter",
]
