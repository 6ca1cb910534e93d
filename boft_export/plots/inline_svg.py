"""Plots as SVG elements of an HTML page: small, in the page's colours, with nothing that touches the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from xml.etree import ElementTree as ET

from matplotlib.figure import Figure

from boft_export.plots.panel import Panel, own_style

# On a phone, a plot of this width is shown at its size: 72 pixels to the inch.
_PAGE_INCHES = (4.4, 2.7)


def panel_svg(panel: Panel, colours: Mapping[str, str]) -> str:
    """Return a plot as an SVG element to stand in an HTML page: without title, as wide as its place.

    Args:
        panel: The plot.
        colours: What to say for this module's colours, such as ``var(--ink)``.
    """
    file = StringIO()
    with own_style():
        figure = Figure(_PAGE_INCHES, layout="constrained")
        panel.draw(figure.add_subplot())
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ET.fromstring(file.getvalue())  # noqa: S314  # matplotlib's own
    return _for_html(root, panel, colours)


def _for_html(root: ET.Element, panel: Panel, colours: Mapping[str, str]) -> str:
    """Return matplotlib's SVG for a page that has several: small, and with nothing that touches the others."""
    linked = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = element.tag.rsplit("}", 1)[-1]
        if element.tag == "style":
            parents[element].remove(element)
        attributes = {k.rsplit("}", 1)[-1]: v for k, v in element.attrib.items()}
        if attributes.get("id", "") not in linked:
            attributes.pop("id", None)
        element.attrib = {k: _for_page(k, v, panel.name, colours) for k, v in attributes.items()}
        if not isinstance(element.text, str) or not element.text.strip():
            element.text = None
        element.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": panel.title}
    return ET.tostring(root, encoding="unicode")


def _for_page(key: str, value: str, prefix: str, colours: Mapping[str, str]) -> str:
    """Return an attribute with ids of the panel's own, the page's colours, and a hundredth of a pixel of precision."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and not value.startswith("#"):
        return value
    value = re.sub(r"(^|\()#(?=\w+(\)|$))", rf"\1#{prefix}-", value)
    if key == "style":
        return re.sub(r"#[0-9a-f]{6}", lambda m: colours.get(m[0], m[0]), value)
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value)
