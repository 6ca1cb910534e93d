"""A plan in the making: the output's tensors as they stand so far, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from boft_export.checkpoint import Checkpoint, TensorRef
from boft_export.errors import Level, Notice
from boft_export.planning.config_edits import trained_class
from boft_export.planning.model import ConfigEdit, Origin, Step
from boft_export.planning.renames import names_in_memory
from boft_export.planning.sourced import SourcedAdapter


@dataclass
class Slot:
    """One tensor of the output while the plan is made.

    Attributes:
        base: The base's tensor; None where the base has none.
        origins: Where its values come from: the base's, then each one that an adapter puts in its place.
        steps: Each step with the rows it applies to, half open.
    """

    base: TensorRef | None
    origins: list[Origin]
    steps: list[tuple[int, int, Step]] = field(default_factory=list)

    @classmethod
    def of_base(cls, ref: TensorRef) -> Slot:
        """Return the slot of one of the base's tensors."""
        return cls(ref, [Origin(ref)])

    @property
    def source(self) -> TensorRef:
        """The origin that counts: the last."""
        return self.origins[-1].ref

    @property
    def resized(self) -> bool:
        """Whether it has another shape than in the base."""
        return self.base is not None and self.source.shape != self.base.shape

    @property
    def changed(self) -> bool:
        """Whether its bytes are to differ from the base's."""
        return bool(self.steps) or self.source is not self.base


class Draft:
    """The state that the parts of planning share.

    Attributes:
        base: The base checkpoint.
        adapters: The adapters in order.
        slots: The output's tensors by the base's naming.
        in_memory: Names that differ in memory, each with its name on disk.
        notices: What was found.
        edits: What changes in the config.
        stripped: The prefix that the base's names lack, as those of a bare encoder do.
        resized: Whether a vocabulary changed its size.
        tied: Pairs of tensors that are both written, and that a loader takes for one.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[SourcedAdapter]) -> None:
        self.base = base
        self.adapters = tuple(adapters)
        self.slots = {name: Slot.of_base(ref) for name, ref in base.tensors.items()}
        self.in_memory = names_in_memory(base.config, base.tensors)
        self.notices: list[Notice] = base.notices()
        self.edits: list[ConfigEdit] = []
        self.stripped = ""
        self.resized = False
        self.tied: list[tuple[str, str]] = []

    def note(self, level: Level, code: str, subject: str, message: str, hint: str | None = None) -> None:
        """Note a finding."""
        self.notices.append(Notice(level, code, subject, message, hint))

    def classes(self) -> list[str]:
        """Return the classes that the base, and the models that were trained, are of."""
        own = [str(a) for a in self.base.config.get("architectures") or ()]
        return own + [c for a in self.adapters if (c := self.trained_class(a)) is not None]

    def trained_class(self, source: SourcedAdapter) -> str | None:
        """Return the class of the model that an adapter was trained on; None where it can't be told."""
        return trained_class(self.base.config, source.adapter.model_class, source.adapter.task)
