"""What a task is: the graphs that a kind of model is exported as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import Notice

# An input's dynamic axes by number, each with the name that is shown for it.
Axes = Mapping[int, str]
# Named tensors, in order.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """One graph of an export.

    Attributes:
        name: Its file's name without the suffix.
        sample: Inputs to trace with, in order; no dynamic axis may be of length 0 or 1.
        axes: The dynamic axes of each input.
        outputs: Names of the outputs, in order.
        forward: Runs the model on named inputs and returns the outputs in order. Only called, never traced through
            anything but tensors.
        most: The largest size to trace an axis for, by its name, where the model looks at that to go another way to the
            same results. The graph takes larger ones.
    """

    name: str
    sample: Tensors
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]
    forward: Callable[[nn.Module, Tensors], Sequence[Tensor]]
    most: Mapping[str, int] = field(default_factory=dict)


# Runs the graph of a name on named inputs and returns its named outputs.
RunGraph = Callable[[str, Tensors], Tensors]


@dataclass(frozen=True)
class Compared:
    """An output of the exported graphs beside the model's own.

    Attributes:
        output: Its name.
        case: What it was run on, for people: ``batch of 3, padded left``.
        expected: The model's, float, its last axis the features or classes.
        actual: The graph's, of the same shape.
        counts: True for each position that stands for a token, in the shape of ``expected`` without its last axis; None
            where all do.
    """

    output: str
    case: str
    expected: Tensor
    actual: Tensor
    counts: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """A kind of model and what it is exported as.

    Attributes:
        name: As the Hub and optimum call it.
        auto_class: The class of transformers that loads a model for it; None for the class that the config names.
        architectures: How the names of the classes end that are meant for it, for finding the task of a config.
        graphs: The graphs of a model.
        compare: Runs the model as its users do, and its graphs, on inputs of other shapes than the samples', and yields
            what came out of both. ``seed`` decides the inputs.
        attention: The attention to trace with, by model type; sdpa where none is named.
        main_input: The only main input of its models, which tells apart classes whose names end alike; any if empty.
        build: Builds the model of a config in a dtype, where it is none of transformers'.
        for_folder: Returns the task as a folder's own files want it.
        notices: What there is to say where it is chosen.
    """

    name: str
    auto_class: str | None
    architectures: tuple[str, ...]
    graphs: Callable[[nn.Module], Sequence[Graph]]
    compare: Callable[[Any, RunGraph, int], Iterator[Compared]]
    attention: Mapping[str, str] = field(default_factory=dict)
    main_input: str = ""
    build: Callable[[Mapping[str, Any], torch.dtype], nn.Module] | None = None
    for_folder: Callable[[Task, Path], Task] | None = None
    notices: tuple[Notice, ...] = ()
