"""Which parameters transformers ties, by the class of the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from boft_export.planning.config_edits import class_stem

# Made by tools/make_ties.py from the release named in it.
_TABLE = Path(__file__).with_name("transformers_ties.json")


def tied_pairs(classes: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names that models of ``classes`` tie, those of the bare model inside them too.

    The bare model's names have no prefix here; in the whole model they have one.
    """
    table = _table()
    names = list(classes)
    # MarianMTModel is a head on a MarianModel.
    names += [f"{stem.removesuffix('MT')}Model" for name in names if (stem := class_stem(name))]
    for name in dict.fromkeys(names):
        yield from table.get(name, ())


@cache
def _table() -> dict[str, list[tuple[str, str]]]:
    content = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {name: [(target, source) for target, source in pairs] for name, pairs in content["ties"].items()}
