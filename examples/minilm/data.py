"""The task of this example: which standard-library module does a docstring come from?

The texts are the docstrings of the interpreter that runs this, so there is nothing to download. They differ a little
from one Python version to the next, and so do the exact figures; which side of the split a docstring falls on depends
on its qualified name alone.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Where each class's docstrings are looked up. Everything here imports on every platform and without side effects.
SOURCES: dict[str, tuple[str, ...]] = {
    "ast": ("ast",),
    "asyncio": ("asyncio",),
    "collections": ("collections", "collections.abc"),
    "datetime": ("datetime",),
    "decimal": ("decimal",),
    "email": (
        "email.charset",
        "email.generator",
        "email.header",
        "email.headerregistry",
        "email.message",
        "email.parser",
        "email.policy",
        "email.utils",
    ),
    "http": ("http", "http.client", "http.cookiejar", "http.cookies", "http.server"),
    "importlib": ("importlib", "importlib.abc", "importlib.machinery", "importlib.metadata", "importlib.util"),
    "inspect": ("inspect",),
    "logging": ("logging", "logging.config", "logging.handlers"),
    "mailbox": ("mailbox",),
    "math": ("math",),
    "multiprocessing": (
        "multiprocessing",
        "multiprocessing.connection",
        "multiprocessing.managers",
        "multiprocessing.pool",
        "multiprocessing.process",
        "multiprocessing.shared_memory",
        "multiprocessing.util",
    ),
    "pathlib": ("pathlib",),
    "socket": ("socket",),
    "tarfile": ("tarfile",),
    "threading": ("threading",),
    "unittest": ("unittest", "unittest.mock"),
    "urllib": ("urllib.parse", "urllib.request", "urllib.response", "urllib.robotparser"),
    "xml": ("xml.dom.minidom", "xml.etree.ElementTree", "xml.sax.handler", "xml.sax.saxutils", "xml.sax.xmlreader"),
}
CLASSES = tuple(SOURCES)

MIN_WORDS = 5
MAX_WORDS = 30
TEST_SHARE = 0.3
# Caps per class, so that the largest modules do not dominate and everything runs on a laptop.
MAX_TRAIN = 54
MAX_TEST = 24


class Text(NamedTuple):
    """The first words of one docstring, with the name of its module masked."""

    name: str
    words: str
    label: int


class Split(NamedTuple):
    """The texts to learn from and the texts to be judged on."""

    train: list[Text]
    test: list[Text]


def load() -> Split:
    """Collects the docstrings and splits them, the same way on every run."""
    texts = [text for label in range(len(CLASSES)) for text in _texts(label)]
    # A text that several modules share has no right answer.
    owners = Counter(text.words for text in texts)
    split = Split([], [])
    filled = Counter[tuple[int, bool]]()
    for digest, text in sorted((hashlib.sha256(text.name.encode()).digest(), text) for text in texts):
        is_test = digest[0] < 256 * TEST_SHARE
        if owners[text.words] == 1 and filled[text.label, is_test] < (MAX_TEST if is_test else MAX_TRAIN):
            filled[text.label, is_test] += 1
            (split.test if is_test else split.train).append(text)
    return split


def _texts(label: int) -> list[Text]:
    """Returns a class's texts, each one once however many names it goes by."""
    own_name = re.compile(rf"(?<![a-z0-9]){CLASSES[label]}(?![a-z0-9])", re.IGNORECASE)
    names: dict[str, str] = {}
    for module in SOURCES[CLASSES[label]]:
        for name, doc in _docstrings(module):
            words = own_name.sub("[MASK]", doc).split()
            if len(words) >= MIN_WORDS:
                names.setdefault(" ".join(words[:MAX_WORDS]), name)
    return [Text(name, words, label) for words, name in names.items()]


def _docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yields the qualified name and the docstring of each public function, class and class member of a module."""
    package = module.partition(".")[0]
    for name, thing in vars(importlib.import_module(module)).items():
        # Passes over what was imported from elsewhere, but not over the C half of a module: socket's is _socket.
        home = str(getattr(thing, "__module__", "")).partition(".")[0].lstrip("_")
        if home != package or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        documented: dict[str, object] = {name: thing}
        if inspect.isclass(thing):
            # vars() and not dir(), for an inherited docstring belongs to the class that it was written for.
            for key, member in vars(thing).items():
                if inspect.isroutine(member) or inspect.isdatadescriptor(member):
                    documented[f"{name}.{key}"] = member
        for qualname, value in documented.items():
            if isinstance(value.__doc__, str) and "._" not in f".{qualname}":
                yield f"{module}.{qualname}", value.__doc__
