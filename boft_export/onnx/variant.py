"""Which variant of a graph is asked for: who makes it, how it is optimised, and how it is quantised."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from boft_export.errors import UsageError

DEFAULT_OPSET = 23
MIN_OPSET, MAX_OPSET = 18, 24
_OPSET_TO_FUSE = 20


class Exporter(StrEnum):
    """What makes the graph of the model."""

    DYNAMO = "dynamo"
    OPTIMUM = "optimum"
    GENAI = "genai"


class Optimize(StrEnum):
    """What is done to a graph once it is traced.

    ``none`` leaves it as it is, ``standard`` uses ONNX's own operators, ``ort`` those of ONNX Runtime, too, which no
    other runtime has.
    """

    NONE = "none"
    STANDARD = "standard"
    ORT = "ort"


class Quantize(StrEnum):
    """What weights are stored in, in place of floating-point numbers."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True)
class Variant:
    """A variant of a graph.

    Attributes:
        exporter: What makes it.
        optimize: How it is optimised.
        quantize: What its weights are stored in.
        opset: The version of ONNX's operators; None for what suits the rest.
    """

    exporter: Exporter = Exporter.DYNAMO
    optimize: Optimize = Optimize.STANDARD
    quantize: Quantize = Quantize.NONE
    opset: int | None = None

    @property
    def quantises(self) -> bool:
        """Whether graphs are quantised once they are made; genai's builder does it itself."""
        return self.quantize is not Quantize.NONE and self.exporter is not Exporter.GENAI

    def opset_for(self, inputs: Collection[str]) -> int:
        """Return the version of ONNX's operators for a graph of these inputs."""
        if self.opset is not None:
            return self.opset
        # From 23 on there is an operator for attention, which ONNX Runtime's own fusions don't know. They serve
        # encoders better than it does; attention with a cache they find in neither form.
        cached = any(name.startswith("past_key_values") for name in inputs)
        return _OPSET_TO_FUSE if self.optimize is Optimize.ORT and not cached else DEFAULT_OPSET

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "exporter": self.exporter.value,
            "opset": self.opset,
            "optimize": self.optimize.value,
            "quantize": self.quantize.value,
        }

    def check(self, dtype: str | None, *, graph_given: bool = False) -> None:
        """See that what is asked for goes together.

        Args:
            dtype: The dtype of the weights; None for the base's.
            graph_given: There is a graph to fold into, which none is made for.

        Raises:
            UsageError: If it does not.
        """
        if self.opset is not None and not graph_given and not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UsageError(f"opset {self.opset} can't be exported.", hint=f"Give --opset {MIN_OPSET} to {MAX_OPSET}.")
        quantized, foreign = self.quantize is not Quantize.NONE, self.exporter is not Exporter.DYNAMO
        genai, ort = self.exporter is Exporter.GENAI, self.optimize is Optimize.ORT
        exporter, quantize = f"--exporter {self.exporter}", f"--quantize {self.quantize}"
        single = dtype == "float32"
        wrong = {
            f"{quantize} starts from float32, not {dtype or 'any dtype'}": quantized and not single,
            f"{exporter} writes float32, not {dtype or 'any dtype'}": foreign and not single,
            f"{exporter} makes graphs, and takes none": foreign and graph_given,
            f"{exporter} has its own way to optimise": foreign and self.optimize is not Optimize.STANDARD,
            f"{exporter} chooses the opset": genai and self.opset is not None,
            f"{exporter} quantises to int4 alone": genai and self.quantize is Quantize.INT8,
            f"--optimize {self.optimize} is for graphs that are made, not for one that exists": graph_given
            and self.optimize is not Optimize.STANDARD,
            "--optimize ort uses operators that don't exist in bfloat16": ort and dtype == "bfloat16",
            f"--optimize ort packs weights into operators in which {quantize} does not find them": ort and quantized,
        }
        for told, is_so in wrong.items():
            if is_so:
                raise UsageError(f"{told}.", hint="Leave out one of the two.")


def variant(exporter: str, optimize: str, quantize: str, opset: int | None) -> Variant:
    """Return a variant by its names.

    Raises:
        UsageError: If there is none of such a name.
    """
    kinds: tuple[tuple[type[StrEnum], str], ...] = ((Exporter, exporter), (Optimize, optimize), (Quantize, quantize))
    for kind, name in kinds:
        if name not in list(kind):
            raise UsageError(f"{kind.__name__.lower()} {name} is not one of {', '.join(kind)}.")
    return Variant(Exporter(exporter), Optimize(optimize), Quantize(quantize), opset)
