"""Models in memory, through transformers: the merged one, the base, and the base under an adapter."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from boft_export.checkpoint import TensorRef
from boft_export.errors import BoftExportError, CheckFailedError, InputError, ResourceError, UsageError
from boft_export.models.diffusion import load_diffusion
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes
from boft_export.planning import FoldPlan
from boft_export.planning.config_edits import apply_edits
from boft_export.planning.model import ConfigEdit, TensorPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_SILENT = 60
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

# Returns a tensor, in float32 where it holds floating-point numbers.
ReadTensor = Callable[[TensorRef], Tensor]


class CannotTellError(InputError):
    """Models of this kind can't be run and compared here."""


class BrokenMergeError(CheckFailedError):
    """The merged checkpoint is no model that runs, though base and adapter are."""


@contextlib.contextmanager
def model_errors(kind: type[BoftExportError], message: str, hint: str | None = None) -> Iterator[None]:
    """Raise whatever a foreign library raises as an error of ours; memory that is short stays what it is.

    Raises:
        BoftExportError: Of ``kind``.
        ResourceError: If memory does not suffice.
    """
    try:
        yield
    except BoftExportError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{message}: memory does not suffice.", hint="Try another --device.") from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{message}: the disk is full.", hint="Free some space, then run again.") from error
        told = _ANSI.sub("", str(cause)).strip().partition("\n")[0]
        raise kind(f"{message}: {type(cause).__name__}: {told}", hint=hint) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """Give transformers, with its warnings, log and progress bars switched off and put back as they were after.

    Raises:
        UsageError: If it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers
        except ImportError as error:
            raise UsageError(
                f"models can't be run without transformers: {error}.", hint="pip install transformers peft"
            ) from error
        log = transformers.utils.logging
        verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity(_SILENT)
        log.disable_progress_bar()
        try:
            yield transformers
        finally:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


@dataclass(frozen=True)
class LoadedModel:
    """A model in float32, ready to run.

    Attributes:
        model: The model.
        missing: The parameters that the files lack; they have the same random values in each model of a class.
    """

    model: nn.Module
    missing: frozenset[str]


def load_merged(folder: Path, device: torch.device) -> LoadedModel:
    """Load a checkpoint as its users do.

    Raises:
        CannotTellError: If the installed transformers does not know its kind of model.
        BrokenMergeError: If it can't be loaded.
    """
    with model_errors(BrokenMergeError, f"{folder} can't be loaded"):
        config = _read_config(folder)
        return _load(config, folder, None, device)


def load_plan(
    plan: FoldPlan,
    device: torch.device,
    *,
    tuned: bool,
    read: ReadTensor | None = None,
    kind: type[PreTrainedModel] | None = None,
) -> LoadedModel:
    """Load what a plan's output is before any rotation.

    Args:
        plan: The plan.
        device: Where to.
        tuned: With what the adapters replace and add; otherwise with the base's own wherever it fits.
        read: What reads the tensors; ``read_whole`` where nothing is given.
        kind: The class; None for the one that the config names.
    """
    state = {t.name: (read or read_whole)(t.source if tuned else _before(t)) for t in plan.tensors}
    return load_state(plan, plan.edits, state, device, kind)


def load_base(
    plan: FoldPlan,
    device: torch.device,
    read: ReadTensor | None = None,
    kind: type[PreTrainedModel] | None = None,
) -> LoadedModel:
    """Load the base's own tensors in the class that was trained, tied as the base is."""
    edits = [e for e in plan.edits if e.path[-1] not in {"tie_word_embeddings", "vocab_size"}]
    state = {t.name: (read or read_whole)(t) for t in plan.base.tensors.values()}
    return load_state(plan, edits, state, device, kind)


def load_state(
    plan: FoldPlan,
    edits: Sequence[ConfigEdit],
    state: dict[str, Tensor],
    device: torch.device,
    kind: type[PreTrainedModel] | None = None,
) -> LoadedModel:
    """Load tensors under the base's config with ``edits`` made.

    Raises:
        CannotTellError: If transformers can't.
    """
    if plan.base.config_text is None:
        raise CannotTellError(f"{plan.base.name} has no config.json, which tells what kind of model it is.")
    with model_errors(CannotTellError, f"{plan.base.name} can't be loaded"), tempfile.TemporaryDirectory() as folder:
        text = apply_edits(plan.base.config, edits)
        if "_class_name" in plan.base.config:
            model, missing = load_diffusion(json.loads(text), state)
            return LoadedModel(model.float().to(device).eval(), missing)
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        return _load(_read_config(Path(folder)), None, state, device, kind)


def read_whole(ref: TensorRef) -> Tensor:
    """Return a tensor, in float32 where it holds floating-point numbers.

    Raises:
        CannotTellError: If its dtype is none that models are run in.
    """
    return read_run(ref, 0, ref.num_elements).view(ref.shape)


def read_run(ref: TensorRef, start: int, stop: int) -> Tensor:
    """Return a tensor's elements ``start`` to ``stop``, flat, in float32 where they are floating-point numbers."""
    dtype = TORCH_DTYPES.get(ref.dtype) or _OTHER_DTYPES.get(ref.dtype)
    if dtype is None:
        raise CannotTellError(f"{ref.name} is stored as {ref.dtype}, which no model is run in here.")
    values = read_bytes(ref, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)
    return values.float() if dtype.is_floating_point else values


def find_parameters(parameters: Mapping[str, Tensor], name: str, values: Tensor) -> list[str]:
    """Return the parameters that hold ``values``: the one of this name, or else those whose names end most like it."""

    def same(found: str) -> bool:
        mine = parameters[found]
        return mine.shape == values.shape and torch.equal(mine, values.to(mine.device))

    if name in parameters and same(name):
        return [name]
    best: list[str] = []
    for found in sorted(parameters, key=lambda n: -_common_end(n, name)):
        if best and _common_end(found, name) < _common_end(best[0], name):
            break
        if _common_end(found, name) and same(found) and all(parameters[found] is not parameters[b] for b in best):
            best.append(found)
    return best


def _common_end(one: str, other: str) -> int:
    """Return how many parts two dotted names have in common at their ends."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _before(tensor: TensorPlan) -> TensorRef:
    return next(o.ref for o in tensor.origins if o.ref.shape == tensor.shape)


def _read_config(folder: Path) -> Any:  # noqa: ANN401  # transformers is untyped here
    import transformers

    with model_errors(CannotTellError, "its config.json is of no model that the installed transformers knows"):
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load(
    config: Any,  # noqa: ANN401  # as above
    folder: Path | None,
    state: dict[str, Tensor] | None,
    device: torch.device,
    kind: type[PreTrainedModel] | None = None,
) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        # What the files lack is drawn at random, and must be the same each time.
        torch.manual_seed(0)
        model, info = (kind or _class_of(config)).from_pretrained(
            folder,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
        )
    if info["mismatched_keys"] or info.get("error_msgs"):
        raise ValueError(f"tensors of other shapes than its class has: {json.dumps(info, default=str)}")
    return LoadedModel(model.float().to(device).eval(), frozenset(info["missing_keys"]))


def _class_of(config: Any) -> type[PreTrainedModel]:  # noqa: ANN401  # as above
    """Return the class that a config names; the bare model's where it names none."""
    import transformers

    names = [str(a) for a in config.architectures or ()]
    kinds = [getattr(transformers, n, None) for n in names] or [transformers.MODEL_MAPPING.get(type(config))]
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise CannotTellError(
        f"transformers {transformers.__version__} has no class {', '.join(names) or type(config).__name__}; a model's "
        "own code is not run.",
        hint="Install the release of transformers that has it.",
    )
