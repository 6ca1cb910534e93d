"""The model that a merge must equal: the base with its adapters applied on the fly, by PEFT or by hooks of our own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from boft_export.adapters import View
from boft_export.models.activation_hooks import ActivationHooks, PlainLayer, read_plain_layer, rotate_kernel
from boft_export.models.loading import (
    CannotTellError,
    ReadTensor,
    find_parameters,
    load_base,
    load_plan,
    model_errors,
    read_run,
    read_whole,
)
from boft_export.planning import FoldPlan
from boft_export.planning.model import Step, TensorPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How PEFT calls a layer's parameters, by the beginning of the format's name: of the trained blocks, and of the scales.
_PEFT_NAMES = {
    "PEFT BOFT": ("{module}.boft_R.{adapter}", "{module}.boft_s.{adapter}"),
    "PEFT OFT": ("{module}.oft_R.{adapter}.weight", None),
}
# For BOFT, PEFT multiplies dense n-by-n matrices in each run of a layer. Beyond this many multiplications for each of
# them, m n^3 over all layers, that takes minutes where the hooks take seconds.
_PEFT_LIMIT = {"cpu": 2e10, "cuda": 5e12}


@dataclass
class Reference:
    """The base under its adapters.

    Attributes:
        model: What is run.
        kind: What applies the adapters: ``peft`` or ``hooks``, and ``hooks and rotated kernels`` with convolutions.
        missing: The parameters that the files lack.
        weights: The parameters that a merge rounds.
        layers: The adapted modules by name.
        idle: The names of those that were not run yet.
    """

    model: nn.Module
    kind: str
    missing: frozenset[str]
    weights: list[Tensor]
    layers: dict[str, nn.Module]
    idle: dict[str, None] = field(init=False)

    def __post_init__(self) -> None:
        """Watch the adapted modules."""
        self.idle = dict.fromkeys(self.layers)
        for name, module in self.layers.items():
            module.register_forward_pre_hook(lambda _module, _args, name=name: self.idle.pop(name, None))

    def check_all_ran(self) -> None:
        """See that each adapted module was run as one.

        Raises:
            CannotTellError: If the model goes round one, or the inputs don't reach it.
        """
        if self.idle:
            raise CannotTellError(
                f"{len(self.idle)} of {len(self.layers)} adapted layers were not run by these inputs, the first: "
                f"{next(iter(self.idle))}."
            )


class _NotAppliedError(Exception):
    """PEFT left something of the adapter out."""


def load_reference(
    plan: FoldPlan,
    device: torch.device,
    *,
    read: ReadTensor | None = None,
    kind: type[PreTrainedModel] | None = None,
) -> Reference:
    """Load the base with its adapters applied on the fly: by PEFT where it can, and otherwise by hooks.

    Args:
        plan: The base and its adapters.
        device: Where to.
        read: What reads the base's tensors; ``read_whole`` where nothing is given.
        kind: The class; None for the one that the config names.

    Raises:
        CannotTellError: If neither can.
    """
    if _peft_may(plan, device):
        try:
            return _with_peft(plan, device, read, kind)
        except (_NotAppliedError, CannotTellError):
            # The hooks may know better, or say what is wrong.
            pass
    return _with_hooks(plan, device, read, kind)


def _layers(plan: FoldPlan) -> Iterator[tuple[TensorPlan, Step]]:
    return ((t, s) for t in plan.tensors for s in t.steps)


def _weight_under(tensor: TensorPlan, step: Step) -> Tensor:
    """Return what a step rotates, before any rotation: the tensor, or its rows of a fused one."""
    shape = tensor.shape
    rows = step.layer.num_outputs or shape[0]
    size = rows * (tensor.source.num_elements // shape[0])
    return read_run(tensor.source, step.start, step.start + size).view(rows, *shape[1:])


def _replaced(plan: FoldPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield what the adapters bring whole, by the names that the trained model has for it; the last one counts."""
    found = {r.name: a.refs[r.key] for a in plan.adapters for r in a.adapter.replacements}
    return ((name, read_whole(ref)) for name, ref in found.items())


# Hooks


def _with_hooks(
    plan: FoldPlan, device: torch.device, read: ReadTensor | None, kind: type[PreTrainedModel] | None
) -> Reference:
    loaded = load_plan(plan, device, tuned=True, read=read, kind=kind)
    model = loaded.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers: dict[str, list[PlainLayer]] = {}
    for tensor, step in sorted(_layers(plan), key=lambda pair: pair[1].adapter):
        name = f"{step.layer.module}.weight"
        weight = _weight_under(tensor, step)
        found = find_parameters(parameters, name, weight)
        if len(found) != 1:
            raise CannotTellError(
                f"{step.layer.module}: {len(found) or 'no'} modules of {type(model).__name__} have its weight; "
                "transformers may fuse or convert it in memory."
            )
        layer = read_plain_layer(plan.adapters[step.adapter], step.layer, step.view, len(weight))
        layers.setdefault(found[0], []).append(layer)
    applied, modules = "hooks", {}
    weights: list[Tensor] = [parameters[n] for n in layers]
    weights += [parameters[n] for name, value in _replaced(plan) for n in find_parameters(parameters, name, value)[:1]]
    for name, own in layers.items():
        module = modules[name.removesuffix(".weight")] = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, nn.Conv2d):
            applied = "hooks and rotated kernels"
            module.weight.data.copy_(rotate_kernel(module.weight.data, own))
        elif isinstance(module, nn.Linear):
            ActivationHooks.install(module, own)
        else:
            raise CannotTellError(f"{name} is in a {type(module).__name__}, which the hooks don't know.")
    return Reference(model, applied, loaded.missing, weights, modules)


# PEFT


def _peft_may(plan: FoldPlan, device: torch.device) -> bool:
    """Tell whether PEFT is here and could apply these adapters, at a bearable cost."""
    layers = [s.layer for _, s in _layers(plan)]
    formats = {_peft_names(a.adapter.format) for a in plan.adapters}
    alike = len({(x.block_size, x.num_factors) for x in layers}) == 1
    alone = len(plan.adapters) == 1 or (alike and not any(a.adapter.replacements for a in plan.adapters))
    return (
        alone
        and len(formats) == 1
        and None not in formats
        # Up to 0.17 PEFT ended its series otherwise than it does today.
        and all(x.is_orthogonal or x.series[-1] == 1 for x in layers)
        and all(s.view is View.INPUT for _, s in _layers(plan))
        and sum(x.num_factors * x.num_features**3 for x in layers if x.scale) <= _PEFT_LIMIT.get(device.type, 0)
        and _has_peft()
        and (all(x.num_factors == 1 for x in layers) or _has_extension(device))
    )


def _peft_names(form: str) -> tuple[str, str | None] | None:
    """Return how PEFT calls the parameters of a format that it applies on the fly."""
    return next((names for start, names in _PEFT_NAMES.items() if form.startswith(start)), None)


def _has_peft() -> bool:
    try:
        import peft.tuners.boft
    except ImportError:
        return False
    return hasattr(peft.tuners.boft, "BOFTModel")


def _has_extension(device: torch.device) -> bool:
    """Tell whether PEFT's CUDA extension, without which it can't do several factors, can be had here."""
    if device.type != "cuda":
        return False
    from peft.tuners.boft import layer
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or not cpp_extension.is_ninja_available():
        return False
    with _silenced_output():
        return layer.get_fbd_cuda() is not None


@contextlib.contextmanager
def _silenced_output() -> Iterator[None]:
    """Keep a compiler's words off stdout and stderr, to which it writes past Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device, no path
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for fd, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, fd)
            os.close(copy)


@contextlib.contextmanager
def _no_compiler(wanted: bool) -> Iterator[None]:  # noqa: FBT001  # one of two ways, asked for in one place
    """Spare PEFT the attempt to compile its extension, where one factor has no use for it."""
    from peft.tuners.boft import layer

    before = layer.get_fbd_cuda
    if not wanted:
        layer.get_fbd_cuda = lambda: None
    try:
        yield
    finally:
        layer.get_fbd_cuda = before


def _with_peft(
    plan: FoldPlan, device: torch.device, read: ReadTensor | None, kind: type[PreTrainedModel] | None
) -> Reference:
    from peft import PeftModel

    loaded = load_base(plan, device, read, kind)
    several = any(s.layer.num_factors > 1 for _, s in _layers(plan))
    names = ["default", *(f"adapter_{i}" for i in range(1, len(plan.adapters)))]
    with model_errors(CannotTellError, "PEFT can't apply the adapter"), _no_compiler(wanted=several):
        adapted = PeftModel.from_pretrained(loaded.model, plan.adapters[0].root, torch_device=str(device))
        for name, adapter in zip(names[1:], plan.adapters[1:], strict=True):
            adapted.load_adapter(adapter.root, name, torch_device=str(device))
        adapted.base_model.set_adapter(names)
    # Without its wrapper, which has arguments of its own, the model still has PEFT's layers.
    model = adapted.get_base_model().eval()
    weights = _applied(plan, model, names)
    layers = {s.layer.module: model.get_submodule(s.layer.module) for _, s in _layers(plan)}
    return Reference(model, "peft", loaded.missing, weights, layers)


def _applied(plan: FoldPlan, model: nn.Module, names: list[str]) -> list[Tensor]:
    """Return the parameters that a merge rounds, after seeing that all of the adapters is in the model.

    PEFT only warns of keys that it finds no place for.
    """
    inner = dict(model.named_parameters(remove_duplicate=False))
    plain = {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): parameter
        for name, parameter in inner.items()
        if ".original_module." not in name
    }
    found: list[Tensor] = []
    for tensor, step in _layers(plan):
        layer, source = step.layer, plan.adapters[step.adapter]
        module = model.get_submodule(layer.module) if layer.module in dict(model.named_modules()) else None
        conv = getattr(module, "base_layer", None)
        if isinstance(conv, nn.Conv2d) and not _is_plain(conv):
            raise _NotAppliedError(layer.module)
        for key, name in zip((layer.blocks, layer.scale), _peft_names(source.adapter.format) or (), strict=True):
            if (key is None) != (name is None):
                raise _NotAppliedError(layer.module)
            if key is None or name is None:
                continue
            mine = inner.get(name.format(module=layer.module, adapter=names[step.adapter]))
            if mine is None or not torch.equal(mine.cpu().flatten(), read_whole(source.refs[key]).flatten()):
                raise _NotAppliedError(layer.module)
        found += [plain[n] for n in find_parameters(plain, layer.weight, _weight_under(tensor, step))[:1]]
    for name, value in _replaced(plan):
        places = find_parameters(plain, name, value)
        if not places:
            raise _NotAppliedError(name)
        found.append(plain[places[0]])
    return found


def _is_plain(conv: nn.Conv2d) -> bool:
    """Tell whether PEFT computes a convolution as the model would: it leaves out what makes it special."""
    even = all(isinstance(x, tuple) and len(set(x)) == 1 for x in (conv.stride, conv.padding))
    return even and set(conv.dilation) == {1} and conv.padding_mode == "zeros" and conv.groups == 1
