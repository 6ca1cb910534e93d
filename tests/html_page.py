"""A page as a parser sees it, and what holds of all pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Elements without an end.
VOID = {"meta", "wbr", "br"}


class Page(HTMLParser):
    """A page as a parser sees it: its text, its elements, and whether each one ends where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(text: str) -> Page:
    """Hold a page to what all pages are: whole, without scripts or other files, and without figures that are none."""
    found = Page(text)
    assert found.tags[:2] == ["html", "head"]
    assert not {"script", "iframe", "object", "link", "img"} & set(found.tags)
    for key, value in found.attributes:
        if key in {"src", "href", "xlink:href"}:
            assert value.startswith(("#", "data:image/png;base64,"))
        assert not key.startswith("on")
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "nan" not in re.sub(r"[a-z]{2,}nan|nan[a-z]+", "", "".join(found.text).lower())
    return found


def assert_ids_are_unique(found: Page) -> None:
    """Hold each link within a page to one element that is there."""
    ids = [v for k, v in found.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    links = re.findall(
        r"#([\w-]+)", " ".join(v for k, v in found.attributes if k in {"href", "clip-path", "xlink:href"})
    )
    assert links
    assert set(links) <= set(ids)
