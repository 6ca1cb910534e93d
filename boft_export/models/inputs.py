"""What models are run on to be compared: texts, images, or random inputs of the sizes that a model takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from boft_export.checkpoint.folder import read_text
from boft_export.errors import InputError, UsageError
from boft_export.models.loading import CannotTellError, model_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 8
_RANDOM_LENGTH, _TEXT_LENGTH = 32, 256
# Models that count positions from the padding's id on, or reserve some, take this many fewer tokens.
_RESERVED_POSITIONS = 4
_IMAGE_SIZE = 64


@dataclass(frozen=True)
class FunctionalInputs:
    """What to run models on; random inputs where neither texts nor images are given.

    Attributes:
        texts: Texts, for the tokenizer that lies beside the merged weights.
        images: Image files, for the processor that lies beside the merged weights.
        samples: How many random inputs.
        length: The most tokens of an input; None for 32 random ones, and 256 of a text.
        seed: Of the random inputs.
    """

    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    samples: int = 4
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UsageError: If nothing is left to run, or texts and images are both given.
        """
        if self.texts and self.images:
            raise UsageError("texts and images are both given.", hint="Give one of them.")
        if self.samples < 1 or (self.length is not None and self.length < 1):
            raise UsageError("a functional comparison needs at least one input of at least one token.")

    @classmethod
    def from_text_file(cls, file: Path, *, length: int | None = None) -> FunctionalInputs:
        """Return the lines of a UTF-8 file as texts.

        Raises:
            InputError: If it has no text.
            AccessError: If it cannot be read.
        """
        texts = tuple(line for line in read_text(file).splitlines() if line.strip())
        if not texts:
            raise InputError(f"{file} holds no text.", hint="Put one text on each line.")
        return cls(texts=texts, length=length)

    @property
    def kind(self) -> str:
        """Which they are: ``text``, ``images`` or ``random``."""
        return "text" if self.texts else "images" if self.images else "random"


@dataclass(frozen=True)
class Batch:
    """Some inputs that run at once.

    Attributes:
        arguments: A model's arguments by name, on the CPU.
        mask: True for each position of an output that stands for a token, shape (rows, tokens); None where all count.
    """

    arguments: Mapping[str, Tensor]
    mask: Tensor | None = None


def make_batches(inputs: FunctionalInputs, model: PreTrainedModel, folder: Path) -> list[Batch]:
    """Return inputs that a model takes.

    Args:
        inputs: What was asked for.
        model: The model.
        folder: Where its tokenizer or processor is.

    Raises:
        CannotTellError: If the model takes inputs of another kind.
        InputError: If there is no tokenizer or processor, or an image can't be read.
    """
    main = model.main_input_name
    needed = {"text": "input_ids", "images": "pixel_values"}.get(inputs.kind, main)
    if main != needed or main not in {"input_ids", "pixel_values"}:
        raise CannotTellError(f"{type(model).__name__} takes {main}, which {inputs.kind} inputs can't be made into.")
    generator = torch.Generator().manual_seed(inputs.seed)
    if main == "pixel_values":
        batches = _read_images(inputs, folder) if inputs.images else [_random_pixels(inputs, model, generator)]
        return [Batch({k: v for k, v in b.items() if k in _parameters(model)}) for b in batches]
    rows = _read_texts(inputs, model, folder) if inputs.texts else _random_tokens(inputs, model, generator)
    # Without an id for padding, models that look for it take one input at a time.
    size = _ROWS if _text_config(model).pad_token_id is not None else 1
    return [_pad(rows[i : i + size], model, generator) for i in range(0, len(rows), size)]


def _parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _text_config(model: PreTrainedModel) -> Any:  # noqa: ANN401  # transformers is untyped here
    return model.config.get_text_config()


def _longest(wanted: int, model: PreTrainedModel) -> int:
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return wanted
    return max(1, min(wanted, positions - _RESERVED_POSITIONS))


def _plain_tokens(model: PreTrainedModel) -> Tensor:
    """Return the ids of all tokens that stand for themselves: no padding, no end of text, no place for an image."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    plain = torch.ones(vocabulary, dtype=torch.bool)
    for config in (model.config, _text_config(model)):
        for key, value in config.to_dict().items():
            if key.endswith(("_token_id", "_token_index")) and value is not None:
                plain[[i for i in torch.tensor(value).flatten().tolist() if 0 <= i < vocabulary]] = False
    return plain.nonzero().flatten() if plain.any() else torch.arange(vocabulary)


def _draw(tokens: Tensor, count: int, generator: torch.Generator) -> list[int]:
    return [int(i) for i in tokens[torch.randint(len(tokens), (count,), generator=generator)]]


def _random_tokens(inputs: FunctionalInputs, model: PreTrainedModel, generator: torch.Generator) -> list[list[int]]:
    """Return rows of tokens that end as a text does; the last row is half as long, so that padding is tried too."""
    length = _longest(inputs.length or _RANDOM_LENGTH, model)
    rows = [_draw(_plain_tokens(model), length, generator) for _ in range(inputs.samples)]
    if len(rows) > 1:
        rows[-1] = rows[-1][: max(1, length // 2)]
    end = _text_config(model).eos_token_id
    if isinstance(end, int) and 0 <= end < model.get_input_embeddings().weight.shape[0]:
        rows = [[*row[:-1], end] for row in rows]
    return rows


def _read_texts(inputs: FunctionalInputs, model: PreTrainedModel, folder: Path) -> list[list[int]]:
    import transformers

    with model_errors(InputError, f"{folder} has no tokenizer that transformers can load"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    length = _longest(inputs.length or _TEXT_LENGTH, model)
    rows = [[int(i) for i in tokenizer(t, truncation=True, max_length=length)["input_ids"]] for t in inputs.texts]
    known = model.get_input_embeddings().weight.shape[0]
    if (highest := max((i for row in rows for i in row), default=-1)) >= known:
        raise InputError(f"the tokenizer in {folder} gives token {highest}, the model has {known}.")
    if not (rows := [row for row in rows if row]):
        raise InputError(f"the tokenizer in {folder} makes no token of the texts given.")
    return rows


def _pad(rows: Sequence[Sequence[int]], model: PreTrainedModel, generator: torch.Generator) -> Batch:
    """Return rows of tokens as one batch, padded at their ends."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padding = _text_config(model).pad_token_id
    ids = torch.full(mask.shape, 0 if padding is None else int(padding))
    ids[mask] = torch.tensor([i for row in rows for i in row])
    arguments = {"input_ids": ids, "attention_mask": mask.long()}
    known = _parameters(model)
    if "decoder_input_ids" in known:
        length = max(1, mask.shape[1] // 2)
        drawn = torch.tensor([_draw(_plain_tokens(model), length, generator) for _ in rows])
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is not None:
            drawn[:, 0] = start
        arguments["decoder_input_ids"] = drawn
    # What comes out stands for the decoder's tokens, none of which is padding.
    return Batch({k: v for k, v in arguments.items() if k in known}, None if "decoder_input_ids" in known else mask)


def _random_pixels(inputs: FunctionalInputs, model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    size = getattr(model.config, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(model.config, "num_channels", None) or 3
    return {"pixel_values": torch.randn(inputs.samples, channels, height, width, generator=generator)}


def _read_images(inputs: FunctionalInputs, folder: Path) -> list[dict[str, Tensor]]:
    import transformers

    with model_errors(InputError, f"{folder} has no image processor that transformers can load"):
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    found = []
    for file in inputs.images:
        with model_errors(InputError, f"{file} can't be read as an image"):
            from PIL import Image

            with Image.open(file) as image:
                found.append(dict(processor(images=image.convert("RGB"), return_tensors="pt")))
    return found
