"""A model without weights: what transformers builds of a config, with parameters of a shape and dtype and no values."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from boft_export.errors import InputError
from boft_export.models.loading import CannotTellError, model_errors, read_whole
from boft_export.onnx.tasks import Task
from boft_export.pipeline.torch_io import TORCH_DTYPES
from boft_export.planning import FoldPlan
from boft_export.planning.config_edits import apply_edits
from boft_export.planning.model import TensorPlan
from boft_export.planning.names import matched_names
from boft_export.planning.renames import names_in_memory

_SHOWN = 4


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        model: The model; its parameters are fake tensors, what it computes of its config is there.
        mode: What the fake tensors belong to.
        sources: The plan's tensor that each parameter, and each buffer that is saved, is filled from; what the files
            lack has none.
        unused: Tensors of the plan that nothing is filled from.
        settings: What the modules say of themselves, by name: how they go about their work.
    """

    model: nn.Module
    mode: FakeTensorMode
    sources: dict[str, TensorPlan]
    unused: tuple[str, ...]
    settings: dict[str, object]

    def check_unchanged(self) -> None:
        """See that running the model left it as it was.

        Where a model goes another way for long inputs, it may note that it went the one for short ones, as those of
        samples are, and a graph has only that.

        Raises:
            InputError: If it did not.
        """
        found = _settings(self.model)
        changed = next((n for n, value in self.settings.items() if found.get(n, value) != value), None)
        if changed is not None:
            raise InputError(
                f"{type(self.model).__name__} goes several ways, as its inputs are, and a graph can go only one: it "
                f"set {changed} from {self.settings[changed]} to {found[changed]}.",
                hint="Set it in the model's config, if the one way is enough.",
            )

    def check_found(self, used: Iterable[str]) -> None:
        """See that all parameters that a graph uses are in the files.

        Raises:
            InputError: If one is not.
        """
        names = list(used)
        missing = [n for n in names if n not in self.sources]
        if missing:
            beside = f"; no parameter has the name of {_listed(self.unused)}" if self.unused else ""
            raise InputError(
                f"{len(missing)} of {len(names)} parameters of {type(self.model).__name__} are not in the files: "
                f"{_listed(missing)}{beside}.",
                hint="Name the task that the model was trained for with --task. If its files have the weights in "
                "another form than its class, it can't be exported.",
            )


def build_skeleton(plan: FoldPlan, task: Task, dtype: torch.dtype) -> Skeleton:
    """Build the model that a plan's output is loaded into, without reading a weight.

    Raises:
        InputError: If transformers can't build it, or a tensor's shape is not the model's.
    """
    with (
        model_errors(InputError, f"{plan.base.name} is no model that {task.name} could export"),
        _parameters_on_meta(),
        torch.random.fork_rng(devices=[]),
    ):
        model = _build(plan, task, dtype).eval()
    sources = _sources(model, plan)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _compute(model, sources)
    _fill(model, sources, mode)
    used = {t.name for t in sources.values()}
    unused = tuple(t.name for t in plan.tensors if t.name not in used)
    return Skeleton(model, mode, sources, unused, _settings(model))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _settings(model: nn.Module) -> dict[str, object]:
    """Return the modules' plain attributes."""
    return {
        f"{prefix}.{name}".lstrip("."): value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, str | int | float | bool) and not name.startswith("_")
    }


def _build(plan: FoldPlan, task: Task, dtype: torch.dtype) -> nn.Module:
    if task.build is not None:
        return task.build(plan_config(plan), dtype)
    config = _read_config(plan)
    attention = task.attention.get(config.model_type)
    chosen = {"attn_implementation": attention} if attention else {}
    built: nn.Module = _class_for(config, task)._from_config(config, dtype=dtype, **chosen)  # noqa: SLF001  # it is what from_config of the Auto classes calls
    return built


def model_class(plan: FoldPlan, task: Task) -> Any:  # noqa: ANN401  # transformers is untyped here
    """Return the class of transformers that a plan's output is exported as; None for what is none of its models.

    Raises:
        CannotTellError: If transformers has none.
    """
    return _class_for(_read_config(plan), task) if task.build is None else None


def _config_text(plan: FoldPlan) -> str:
    if (text := _edited(plan)) is None:
        raise CannotTellError(
            f"{plan.base.name} has no config.json, which tells what kind of model it is.",
            hint="Give the whole folder as MODEL.",
        )
    return text


def _edited(plan: FoldPlan) -> str | None:
    return apply_edits(plan.base.config, plan.edits) if plan.edits else plan.base.config_text


def _read_config(plan: FoldPlan) -> Any:  # noqa: ANN401  # transformers is untyped here
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(_config_text(plan), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _class_for(config: Any, task: Task) -> Any:  # noqa: ANN401  # as above
    """Return the config's own class where the task's Auto class would load it, and else the one that it would load."""
    import transformers

    named = config.architectures or ()
    if task.auto_class is None:
        kind = getattr(transformers, next(iter(named), ""), None)
        if kind is None:
            raise CannotTellError(
                f"transformers {transformers.__version__} has no class {', '.join(named) or '(none is named)'}.",
                hint="Name the task that the model was trained for with --task.",
            )
        return kind
    mapping = getattr(transformers, task.auto_class)._model_mapping  # noqa: SLF001  # the Auto classes' table has no public name
    if type(config) not in mapping:
        raise CannotTellError(
            f"transformers {transformers.__version__} has no {config.model_type} model for {task.name}.",
            hint="Name another task with --task.",
        )
    found = mapping[type(config)]
    kinds = list(found) if isinstance(found, tuple | list) else [found]
    return next((k for k in kinds if k.__name__ in named), kinds[0])


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules keep no parameter's values; buffers are made as they are."""
    register = nn.Module.register_parameter

    def without_values(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = without_values  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """Return all that a checkpoint of the model holds, each name of what is shared."""
    return dict(model.state_dict(keep_vars=True))


def _sources(model: nn.Module, plan: FoldPlan) -> dict[str, TensorPlan]:
    """Find the plan's tensor of each of the model's.

    Raises:
        InputError: If one is of another shape.
    """
    tensors = {t.name: t for t in plan.tensors}
    in_memory = names_in_memory(plan.base.config, tensors)
    available = tensors | {new: tensors[old] for new, old in in_memory.items()}
    saved = _saved(model)
    found, _ = matched_names(list(saved), available)
    # What is tied is one tensor under several names, of which the files need to have one.
    by_identity = {id(saved[n]): found[n] for n in saved if n in found}
    sources = {n: by_identity[id(t)] for n, t in saved.items() if id(t) in by_identity}
    stored = next((n for n, t in sources.items() if saved[n].is_floating_point() and t.dtype not in TORCH_DTYPES), None)
    if stored is not None:
        raise InputError(
            f"{sources[stored].name} is stored as {sources[stored].dtype}, and a graph needs floating-point numbers.",
            hint="Give the model as it was before it was quantised.",
        )
    wrong = [n for n, t in sources.items() if t.shape != tuple(saved[n].shape)]
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{first} is {tuple(saved[first].shape)} in {type(model).__name__}, the files have {sources[first].shape}"
            + (f" ({len(wrong)} such)" if len(wrong) > 1 else "")
            + "."
        )
    return sources


def _compute(model: nn.Module, sources: dict[str, TensorPlan]) -> None:
    """Let a model make the parameters that it never saves, since it computes them, such as tables of positions."""
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        prefix, _, own = name.rpartition(".")
        if name in sources or name not in dict(model.named_parameters()):
            continue
        module = model.get_submodule(prefix)
        made = []
        # What comes out the same each time was not drawn at random.
        for _ in range(2):
            blank = torch.full_like(module.get_parameter(own), torch.nan, device="cpu")
            module._parameters[own] = nn.Parameter(blank, requires_grad=False)  # noqa: SLF001  # as in _fill
            with torch.random.fork_rng(devices=[]):
                torch.seed()
                model._init_weights(module)  # type: ignore[operator]  # noqa: SLF001  # what transformers itself calls
            made.append(module.get_parameter(own))
        if not torch.equal(*made):
            module._parameters[own] = nn.Parameter(blank.to("meta"), requires_grad=False)  # noqa: SLF001  # as above


def _fill(model: nn.Module, sources: dict[str, TensorPlan], mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of what is streamed later, and real ones where values decide the graph."""
    made: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):  # noqa: SLF001  # assigning would register anew
            for name, tensor in slots.items():
                source = sources.get(f"{prefix}.{name}" if prefix else name)
                if tensor is None or (source is None and tensor.device.type != "meta"):
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _stand_in(tensor, source, mode)
                slots[name] = made[id(tensor)]


def _stand_in(tensor: Tensor, source: TensorPlan | None, mode: FakeTensorMode) -> Tensor:
    if source is not None and not tensor.is_floating_point():
        return read_whole(source.source).to(tensor.dtype)
    with mode:
        # As it is streamed later, whatever dtype its class would have it in.
        empty = torch.empty(tensor.shape, dtype=TORCH_DTYPES[source.dtype] if source is not None else tensor.dtype)
        return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def plan_config(plan: FoldPlan) -> dict[str, Any]:
    """Return the config of the plan's output."""
    return json.loads(_edited(plan) or "{}")  # type: ignore[no-any-return]  # it was parsed as an object before


def graph_dtype(plan: FoldPlan) -> torch.dtype:
    """Return the dtype of most weights: that of the graph."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.dtype in TORCH_DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.source.num_elements
    return TORCH_DTYPES[max(sizes, key=lambda d: sizes[d])] if sizes else torch.float32
