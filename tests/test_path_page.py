"""Pictures and pages of a measured path: valid, complete, self-contained, and safe whatever the names in it."""

from __future__ import annotations

import re
from functools import cache
from html import unescape
from io import BytesIO
from typing import Any

import matplotlib as mpl
import pytest
from html_page import Page, assert_ids_are_unique, assert_self_contained
from matplotlib.image import imread

from boft_export.plots.panel import own_style
from boft_export.plots.path_figure import draw, png_bytes
from boft_export.plots.path_page import page

HOSTILE = "<script>alert(1)</script>&amp;\"'$x_1$\u202e.\n"
KINDS = ("attention.query", "attention.key", "mlp.up", "mlp.down")


def document(
    layers: int = 12,
    alphas: tuple[tuple[float, ...], ...] = ((0.5,), (0.0,), (1.0,)),
    *,
    names: str = "",
    evaluated: bool = True,
    **point: float | None,
) -> dict[str, Any]:
    """A document as of a geodesic path; ``point`` replaces figures of all layers' points."""

    def layer(i: int) -> dict[str, Any]:
        turn = 0.1 + 0.01 * (i % 7)
        points = [
            {
                "alpha": a[0],
                "largest_angle": 2 * turn * a[0],
                "rms_angle": turn * a[0],
                "distance": turn * a[0] * 8,
                "residual": 4e-16 * a[0],
                "relative_change": turn * a[0],
                "energy_ratio": 1 + 1e-7 * a[0],
                **point,
            }
            for a in alphas
        ]
        module = f"model.layers.{i // 4}.{KINDS[i % 4]}{names}"
        return {
            "module": module,
            "tensor": f"{module}.weight",
            "adapter": i % len(alphas[0]) if alphas else 0,
            "num_features": 64,
            "base_energy": 0.7,
            "points": points,
        }

    outputs = [
        {
            "alpha": list(a),
            "label": "_".join(map(str, a)),
            "folder": f"alpha-{a}",
            "evaluation": {f"accuracy{names}": 0.5 + a[0] / 4, "loss": None if a[0] == 0 else 2 - a[0]}
            if evaluated and a[0] != 0.25
            else None,
        }
        for a in alphas
    ]
    return {
        "schema_version": 1,
        "tool": {"name": "boft-export", "version": "0.1.0"},
        "path": "geodesic",
        "base": f"base{names}",
        "adapters": [f"adapter {i}{names}" for i in range(len(alphas[0]) if alphas else 1)],
        "outputs": outputs,
        "layers": [layer(i) for i in range(layers)],
    }


ODD = {
    "usual": document(),
    "no layers": document(0),
    "one layer": document(1),
    "many layers": document(500, ((0.0,), (0.25,), (1.0,))),
    "one output": document(9, ((0.5,),)),
    "one layer and output": document(1, ((0.5,),), evaluated=False, energy_ratio=None),
    "many outputs": document(3, tuple((i / 40,) for i in range(41))),
    "adapters apart": document(6, ((0.5, 0.2), (1.0, 0.0))),
    "beyond": document(6, ((-0.5,), (1.5,))),
    "no energy": document(evaluated=False, energy_ratio=None),
    "linear": document(evaluated=False, residual=0.02, energy_ratio=0.98),
    "huge": document(evaluated=False, residual=1e30, relative_change=1e30, energy_ratio=1e30),
    "still": document(
        evaluated=False, rms_angle=0.0, largest_angle=0.0, relative_change=0.0, residual=0.0, energy_ratio=1.0
    ),
    "own alpha": document(evaluated=False, alpha=0.125),
    "long texts": document(9, tuple((i / 7, 0.123456 * i) for i in range(8)), names="_of_a_name_that_goes_on_and_on"),
    "hostile": document(names=HOSTILE),
    "nothing": document(0, ()),
}


@cache
def page_of(name: str) -> str:
    return page(ODD[name])


@cache
def picture_of(name: str) -> bytes:
    return png_bytes(ODD[name])


each = pytest.mark.parametrize("name", ODD)


@each
def test_pages_are_whole_and_self_contained(name: str) -> None:
    assert_self_contained(page_of(name))


@each
def test_pictures_are_drawn(name: str) -> None:
    pixels = imread(BytesIO(picture_of(name)))
    assert 300 < pixels.shape[1] < 3000
    assert 100 < pixels.shape[0] < 8000
    # Something is on it.
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()


def test_all_that_was_measured_is_told() -> None:
    doc = document()
    text = "".join(Page(page(doc)).text)
    for layer in doc["layers"]:
        assert layer["module"] in text
    for output in doc["outputs"]:
        assert output["label"] in text
    for figure in ("0.625", "0.750", "9.2", "boft-export 0.1.0", "geodesic"):
        assert figure in text, figure


def test_outputs_stand_in_the_order_of_their_alphas() -> None:
    rows = re.findall(r'<th scope="row">([\d.]+)</th>', page(document()))
    assert rows == ["0.0", "0.5", "1.0"]


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    doc = document(48)
    doc["layers"].sort(key=lambda layer: layer["module"])
    found = re.findall(r'class="module">(.*?)</th>', page(doc))
    numbers = [int(re.sub("<wbr>", "", f).split(".")[2]) for f in found]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 11


def test_names_can_do_no_harm() -> None:
    text = page_of("hostile")
    assert "<script" not in text
    assert "\u202e" not in unescape(text)
    assert "alert(1)" in "".join(Page(text).text)


def test_names_can_do_no_harm_in_plots() -> None:
    """Labels, metrics and kinds are the texts that reach the SVG."""
    doc = document(names=HOSTILE, alphas=((0.0, 0.5), (1.0, 0.25)))
    for output in doc["outputs"]:
        output["label"] = "<b>&"
    text = page(doc)
    drawn = re.findall(r"<text[^>]*>(.*?)</text>", text)
    assert "&lt;b&gt;&amp;" in drawn
    assert any("$x_1$" in t for t in drawn)
    assert all("<" not in t and not re.search(r"&(?!(amp|lt|gt|quot);)", t) for t in drawn)


def test_a_layer_with_its_own_alpha_says_so() -> None:
    assert "at 0.125" in "".join(Page(page_of("own alpha")).text)
    assert " at 0" not in "".join(Page(page(document(5))).text).replace("at alpha", "")


def test_long_tables_are_folded_away() -> None:
    assert Page(page(document(40, ((0.5,),)))).tags.count("details") == 0
    assert Page(page(document(41, ((0.5,),)))).tags.count("details") == 1
    many = page_of("many outputs")
    assert Page(many).tags.count("details") == 1
    assert "25 of 41 outputs are shown" in many


def test_kinds_beyond_eight_are_others() -> None:
    doc = document(24)
    for i, layer in enumerate(doc["layers"]):
        layer["module"] = f"model.layers.{i // 12}.part{'abcdefghijkl'[i % 12]}"
    assert re.findall(r"</b>(\w+) \((\d+)\)", page(doc)) == [*((f"part{c}", "2") for c in "abcdefg"), ("other", "10")]


@pytest.mark.parametrize("name", ["usual", "one output", "beyond", "linear", "huge", "long texts"])
def test_texts_stay_within_the_figure_and_apart(name: str) -> None:
    figure = draw(ODD[name])
    with own_style():
        figure.draw_without_rendering()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            if any(t.get_rotation() for t in ticks):
                # What surrounds slanted texts overlaps where they don't.
                continue
            boxes = [t.get_window_extent() for t in ticks if t.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), axes.get_title(loc="left")


def test_ids_of_plots_are_their_own() -> None:
    assert_ids_are_unique(Page(page_of("usual")))


def test_the_same_document_gives_the_same_bytes() -> None:
    name = "hostile"
    first = page_of(name), picture_of(name)
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert (page(ODD[name]), png_bytes(ODD[name])) == first


def test_a_figure_has_a_panel_for_each_kind_of_measure() -> None:
    titles = {a.get_title(loc="left") for a in draw(document()).axes}
    assert {"accuracy", "loss", "Rotation angle, rms (degrees)", "Change of the weights (%)"} <= titles
    assert len(draw(document(), columns=3).axes) == len(draw(document()).axes)
