"""From one validation to all its outputs: document, JUnit, annotations, summary, page and table."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest
import typer
from html_page import Page, assert_ids_are_unique, assert_self_contained
from jsonschema import Draft202012Validator
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from validation_samples import HOSTILE, VALIDATIONS, healthy, sabotaged

from boft_export import errors
from boft_export.cli.output import Output
from boft_export.cli.run import reported
from boft_export.cli.validation_result import show_validation
from boft_export.errors import Level, Notice
from boft_export.plots.validation_page import page
from boft_export.report.github import error_annotations, error_summary, step_summary, validation_annotations
from boft_export.report.junit import junit_error, junit_xml
from boft_export.report.schemas import schema
from boft_export.report.validation_report import validation_document
from boft_export.validation.model import Check, FunctionalFacts, LayerFacts, Outcome, TensorFacts, Validation

VALIDATOR = Draft202012Validator(schema("validate"))
each = pytest.mark.parametrize("name", VALIDATIONS)


@cache
def document_of(name: str) -> dict[str, Any]:
    return validation_document(VALIDATIONS[name], 12.5)


@cache
def page_of(name: str) -> str:
    return page(document_of(name))


def checks(count: int, outcome: Outcome = Outcome.FAIL, level: Level = Level.ERROR) -> Validation:
    found = tuple(
        Check("replay", f"layers.{i}.weight", outcome, "is wrong", level, "flipped-bit") for i in range(count)
    )
    return Validation(("adapter",), "base", "merged", found)


def measured(*figures: tuple[Outcome, float, float]) -> Validation:
    """Checks with a figure and its limit each."""
    found = tuple(
        Check("c", str(i), outcome, "", measured={"f": value}, limits={"f": limit})
        for i, (outcome, value, limit) in enumerate(figures)
    )
    return Validation((), None, None, found)


# The document and its schema


def test_the_schema_is_one_and_says_what_each_field_is() -> None:
    whole = schema("validate")
    Draft202012Validator.check_schema(whole)

    def objects(node: object) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for value in node.values():
                yield from objects(value)
        elif isinstance(node, list):
            for value in node:
                yield from objects(value)

    found = list(objects(whole))
    assert len(found) >= 12
    for node in found:
        assert node["description"].endswith(".")
        assert "additionalProperties" in node
        for name, field in node.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, name
            if "description" in field:
                assert field["description"].endswith("."), name


def test_the_schema_has_the_fields_of_the_results() -> None:
    definitions = schema("validate")["$defs"]
    for name, kind in (("layer", LayerFacts), ("tensor", TensorFacts), ("functional", FunctionalFacts)):
        assert list(definitions[name]["properties"]) == [f.name for f in dataclasses.fields(kind)]
    assert set(definitions["check"]["properties"]) == {f.name for f in dataclasses.fields(Check)} | {"fails"}
    assert set(definitions["result"]["properties"]) == set(document_of("empty"))


def test_the_schema_is_part_of_the_package() -> None:
    assert files("boft_export.report.schemas").joinpath("validate.schema.json").is_file()
    root = Path(__file__).parent.parent
    build = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.json" in build["package-data"]["*"]
    with pytest.raises(FileNotFoundError):
        schema("nothing")


@each
def test_documents_are_valid(name: str) -> None:
    document = document_of(name)
    VALIDATOR.validate(document)
    text = json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(text) == document
    assert sum(document["counts"].values()) == len(document["checks"])
    assert {k: sum(s[k] for s in document["summary"]) for k in document["counts"]} == document["counts"]


def test_the_schema_refuses_what_is_no_document() -> None:
    document = document_of("sabotaged")
    for place in ((), ("checks", 0), ("layers", 0), ("tensors", 0), ("functional",), ("counts",), ("summary", 0)):
        for change in ("extra", *_at(document, place)):
            changed = json.loads(json.dumps(document))
            node = _at(changed, place)
            if change in node:
                del node[change]
            else:
                node[change] = 1
            assert not VALIDATOR.is_valid(changed), (place, change)
    for place, value in (
        (("outcome",), "passed"), (("fail_on",), []), (("schema_version",), 2), (("seconds",), -1), (("base",), 3),
        (("checks", 0, "level"), "fatal"), (("checks", 0, "measured"), {"a": "b"}), (("tensors", 0, "shape"), [1.5]),
        (("error",), {}), (("counts", "pass"), -1), (("layers", 0, "angles"), None),
    ):  # fmt: skip
        changed = json.loads(json.dumps(document))
        _at(changed, place[:-1])[place[-1]] = value
        assert not VALIDATOR.is_valid(changed), place


def _at(node: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        node = node[key]
    return node


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("no such option"), 2),
        (errors.InputError("a: b", hint="c", notices=[Notice(Level.WARNING, "rename", "a", "b")]), 3),
        (errors.DamagedFileError("truncated"), 3),
        (errors.AccessError("no network"), 4),
        (errors.ResourceError("no memory"), 5),
        (MemoryError("no memory"), 5),
        (OSError(28, "No space left on device", "x"), 4),
        (ZeroDivisionError("a bug"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_before_a_result_are_valid_documents(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop, reported(Output(as_json=True)):
        raise error
    document = json.loads(capsys.readouterr().out)
    assert stop.value.exit_code == document["error"]["exit_code"] == code
    VALIDATOR.validate(document)


@pytest.mark.parametrize(
    ("validation", "headline"),
    [
        (VALIDATIONS["healthy"], "valid: 675 checks passed"),
        (VALIDATIONS["functional only"], "valid: 1 check passed"),
        (VALIDATIONS["sabotaged"], "not valid: 10 of 50 checks failed, 1 could not be told, 1 warning"),
        (VALIDATIONS["warnings fail"], "not valid: 11 of 50 checks failed, 1 could not be told"),
        (VALIDATIONS["undecided"], "inconclusive: 1 of 57 checks could not be told"),
        (VALIDATIONS["undecided fails"], "not valid: 1 of 57 checks could not be told"),
        (VALIDATIONS["empty"], "valid: nothing was checked"),
        (checks(3, level=Level.WARNING), "valid: 0 checks passed, 3 warnings"),
        (checks(1, level=Level.INFO), "valid: 0 checks passed, 1 warning"),
    ],
)
def test_the_headline_says_how_it_ended(validation: Validation, headline: str) -> None:
    assert validation_document(validation, 1)["headline"] == headline


P, F = Outcome.PASS, Outcome.FAIL


@pytest.mark.parametrize(
    ("figures", "subject", "at_least"),
    [
        ([(P, 1, 10), (P, 3, 10), (P, 2, 10)], "1", False),
        # Nearer to its own limit, though smaller.
        ([(P, 1, 10), (P, 0.5, 1)], "1", False),
        ([(P, 0, 0), (P, 0, 0)], "0", False),
        ([(F, 5, 0), (P, 0, 0), (F, 7, 0)], "2", False),
        # One that failed comes before one that passed.
        ([(P, 9.99, 10), (F, 11, 10)], "1", False),
        ([(P, 9.9, 10), (P, 9, 10), (F, 1, 10)], "2", False),
        ([(F, 11, 10), (F, math.nan, 10)], "1", False),
        # Limits from below.
        ([(P, 0.99, 0.9), (P, 0.95, 0.9), (P, 1, 0.9)], "1", True),
        ([(F, 0.5, 0.9), (P, 0.95, 0.9)], "0", True),
        ([(F, -1, 0), (F, -3, 0)], "1", True),
    ],
)
def test_the_worst_figure_is_the_one_nearest_to_its_limit(
    figures: list[tuple[Outcome, float, float]], subject: str, at_least: bool
) -> None:
    (row,) = validation_document(measured(*figures), 1)["summary"]
    assert (row["worst"]["subject"], row["worst"]["at_least"]) == (subject, at_least)


def test_without_limits_the_worst_figure_is_that_of_a_failure() -> None:
    def worst(*found: tuple[Outcome, float]) -> Any:
        each = tuple(
            Check("c", str(i), outcome, "", measured={"f": v, "g": 99}) for i, (outcome, v) in enumerate(found)
        )
        document = validation_document(Validation((), None, None, each), 1)
        VALIDATOR.validate(document)
        return document["summary"][0]["worst"]

    told = worst((P, 9), (F, 2), (F, 3), (F, 1))
    assert (told["subject"], told["figure"], told["measured"], told["limit"]) == ("2", "f", 3, None)
    assert worst((P, 9), (P, 8)) is None


# JUnit


@each
def test_junit_is_read_by_a_real_parser(name: str) -> None:
    validation = VALIDATIONS[name]
    content = junit_xml(validation, 2.5)
    whole = JUnitXml.fromstring(content)
    (suite,) = whole
    cases = list(suite)
    results = [case.result[0] if case.result else None for case in cases]
    found = Counter(type(r) for r in results)
    for counted in (whole, suite):
        assert counted.tests == len(cases) == len(validation.checks)
        assert counted.failures == found[Failure] == len(validation.failures)
        assert counted.skipped == found[Skipped]
        assert counted.errors == found[Error] == 0
        assert counted.time == 2.5
    assert len({(c.classname, c.name) for c in cases}) == len(cases)
    assert all(c.name and c.classname for c in cases)
    ET.fromstring(content)  # noqa: S314  # our own
    assert junit_xml(validation, 2.5) == content


def test_junit_tells_what_was_found() -> None:
    cases = {(c.classname, c.name): c for c in next(iter(JUnitXml.fromstring(junit_xml(sabotaged(), 1))))}
    replay = cases["replay", "model.layers.0.self_attn.q_proj.weight"]
    (failure,) = replay.result
    assert failure.type == "transposed-rotation"
    assert "16,704,211 of 16,777,216 elements are wrong" in failure.message
    assert "Merge with W R^T" in failure.text
    assert "wrong 16,754,211 (limit 0)" in replay.system_out
    # What is about the whole is called by what was checked.
    assert cases["untouched", "untouched"].result == []
    assert cases["invariant", "lm_head.weight"].result[0].message.startswith("has fewer rows")
    warned = cases["scale", "model.layers.0.mlp.down_proj (2)"]
    assert warned.result == []
    assert warned.system_out.startswith("warning: zero-scale: 2 output scales are 0")


def test_junit_keeps_names_but_for_what_xml_forbids() -> None:
    root = ET.fromstring(junit_xml(VALIDATIONS["hostile"], 1))  # noqa: S314  # our own
    names = {c.attrib["name"] for c in root.iter("testcase")}
    kept = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd").replace("\ud800", "?")
    assert f"model.layers.0.self_attn.q_proj{kept}" in names
    assert kept in {p.attrib["value"] for p in root.iter("property")}


def test_every_forbidden_character_is_replaced() -> None:
    nasty = "".join(
        map(chr, [*range(0x20), 0x7F, 0x85, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF])
    )
    check = Check(nasty, nasty, Outcome.FAIL, nasty, finding=nasty, hint=nasty, measured={nasty: 1})
    (case,) = next(iter(JUnitXml.fromstring(junit_xml(Validation((nasty,), nasty, nasty, (check,)), 1))))
    assert len(case.name) == len(nasty)
    JUnitXml.fromstring(junit_error(errors.InputError(nasty, hint=nasty), 1))


REFUSED = errors.InputError("a\nb", hint="c", notices=[Notice(Level.ERROR, "x", "y", "z")])


@pytest.mark.parametrize("error", [REFUSED, KeyboardInterrupt(), OSError(1, "x")], ids=lambda e: type(e).__name__)
def test_a_run_without_a_result_is_an_error(error: BaseException) -> None:
    whole = JUnitXml.fromstring(junit_error(error, 0.5))
    ((case,),) = whole
    assert (whole.tests, whole.errors, whole.failures, whole.skipped, whole.time) == (1, 1, 0, 0, 0.5)
    (found,) = case.result
    assert isinstance(found, Error)
    assert found.type == type(error).__name__
    assert found.message
    if error is REFUSED:
        assert (found.message, found.text) == ("a", "a\nb\nc\ny: z")


# GitHub


def unescaped(text: str, *, prop: bool) -> str:
    """What GitHub's runner makes of an escaped text."""
    for mark, code in ((":", "%3A"), (",", "%2C")) if prop else ():
        text = text.replace(code, mark)
    return text.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")


def parsed(line: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"::(\w+) title=([^:,\r\n]*)::([^\r\n]*)", line)
    assert found, line
    return found[1], unescaped(found[2], prop=True), unescaped(found[3], prop=False)


def test_annotations_say_what_was_found() -> None:
    lines = [parsed(line) for line in validation_annotations(sabotaged())]
    assert Counter(level for level, _, _ in lines) == {"error": 10, "warning": 1, "notice": 1}
    assert lines[0][:2] == ("error", "transposed-rotation: model.layers.0.self_attn.q_proj.weight")
    assert lines[0][2].splitlines() == [
        "16,704,211 of 16,777,216 elements are wrong; with R instead of R^T, all are right",
        "Merge with W R^T: R turns the input features.",
    ]
    assert lines[-1][1] == "invariant: lm_head.weight"
    assert validation_annotations(healthy(1)) == []


def test_annotations_are_escaped() -> None:
    check = Check("c", "a%:,\n\r::error::x%3A", Outcome.FAIL, "50 %\r\n::set-output name=a::b", finding="f")
    (line,) = validation_annotations(Validation((), None, None, (check,)))
    assert line == "::error title=f%3A a%25%3A%2C\ufffd\ufffd%3A%3Aerror%3A%3Ax%253A::50 %25%0A::set-output name=a::b"
    for hostile in (*validation_annotations(VALIDATIONS["hostile"]), *error_annotations(errors.InputError(HOSTILE))):
        level, title, message = parsed(hostile)
        hostile.encode()
        assert level in {"error", "warning", "notice"}
        assert "<script>" in title + message


@pytest.mark.parametrize("count", [1, 9, 10, 11, 12, 5000])
@pytest.mark.parametrize(
    ("outcome", "level", "word"),
    [(F, Level.ERROR, "error"), (F, Level.WARNING, "warning"), (Outcome.INCONCLUSIVE, Level.ERROR, "notice")],
)
def test_at_most_ten_of_a_level(count: int, outcome: Outcome, level: Level, word: str) -> None:
    lines = [parsed(line) for line in validation_annotations(checks(count, outcome, level))]
    assert len(lines) == min(count, 10)
    assert {found for found, _, _ in lines} == {word}
    if count > 10:
        assert lines[-1][2].startswith(f"... and {count - 9} more")
    else:
        assert "more" not in lines[-1][2]


def test_long_texts_fit_an_annotation() -> None:
    check = Check("c", "s" * 10**5, Outcome.FAIL, "m" * 10**6)
    (line,) = validation_annotations(Validation((), None, None, (check,)))
    _, title, message = parsed(line)
    assert (len(title), len(message)) == (255, 4000)


class Cells(Page):
    """A page's tables as lists of rows of texts."""

    def __init__(self, text: str) -> None:
        self.rows: list[list[str]] = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def rendered(text: str) -> Cells:
    return Cells(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


@each
def test_summaries_are_markdown(name: str) -> None:
    validation = VALIDATIONS[name]
    text = step_summary(validation, 3.0)
    found = rendered(text)
    assert set(found.tags) <= {"h2", "h3", "p", "code", "strong", "br", "table", "thead", "tbody", "tr", "th", "td"}
    assert document_of(name)["headline"] in "".join(found.text)
    assert {len(row) for row in found.rows} <= {3, 8}
    subjects = [row[0] for row in found.rows if len(row) == 3 and row[0] != "subject"]
    assert len(subjects) == sum(c.outcome is not P for c in validation.checks)
    assert step_summary(validation, 3.0) == text
    text.encode()


def test_summaries_show_names_as_they_are() -> None:
    name = "a|b`c`<!--<b>d</b>&amp;__e__*f*~~g~~[h](i)\\|$j$@k#1"
    check = Check("c", name, Outcome.FAIL, name, finding=name, hint=name, measured={name: 1}, limits={name: 0})
    found = rendered(step_summary(Validation((name,), name, name, (check,)), 1))
    shown = name.replace("_", " ")
    assert found.rows[-1] == [name, name, f"{shown} 1 (limit 0)"]
    assert "".join(found.text).count(name) >= 7
    many = replace(check, subject="a\nb\r\nc", message="d\ne")
    row = rendered(step_summary(Validation((), None, None, (many,)), 1)).rows[-1]
    assert row[:2] == ["abc", "de"]


def test_summaries_tell_findings_and_worst_figures() -> None:
    found = rendered(step_summary(sabotaged(), 3.0))
    text = "".join(found.text)
    for told in ("transposed-rotation", "Merge with W R^T", "zero-scale", "Failures (10)", "org/boft-math", "3.0 s"):
        assert told in text
    heads = {row[0]: row for row in found.rows if len(row) == 8}
    assert heads["replay"][1:] == [
        "8", "6", "", "", "wrong 16,754,211", "≤ 0", "model.layers.0.self_attn.q_proj.weight",
    ]  # fmt: skip
    assert heads["functional"][5:7] == ["largest difference 3.4", "≤ 0"]


@pytest.mark.parametrize("distinct", [False, True])
def test_summaries_stay_below_a_mebibyte(distinct: bool) -> None:
    long = "&" * 3000 + "😀" * 3000
    found = tuple(
        Check(f"c{i % 500}{long}", f"{i}{long}", F, long, finding=f"{i if distinct else 0}{long}", hint=long,
              measured={long: 1.0}, limits={long: 0.0})
        for i in range(3000)
    )  # fmt: skip
    text = step_summary(Validation((long,) * 1000, long, long, found), 1)
    assert 100_000 < len(text.encode()) < 1 << 20
    assert "more" in text[-100:]


NASTY = errors.InputError(HOSTILE, hint=HOSTILE, notices=[Notice(Level.ERROR, "x", HOSTILE, HOSTILE)])


@pytest.mark.parametrize("error", [NASTY, KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_a_run_without_a_result_has_a_summary(error: BaseException) -> None:
    text = error_summary(error, 1.5)
    found = rendered(text)
    assert set(found.tags) <= {"h2", "p", "strong", "br", "ul", "li"}
    assert "no result" in text
    assert type(error).__name__ in text
    text.encode()


# The page


@each
def test_pages_are_whole_and_self_contained(name: str) -> None:
    found = assert_self_contained(page_of(name))
    text = "".join(found.text)
    headline = document_of(name)["headline"]
    assert headline[1:] in text
    for check in VALIDATIONS[name].failures:
        if name != "hostile":
            assert check.subject in text
            assert check.message in text
            assert (check.finding or "") in text
            assert (check.hint or "") in text


def test_ids_of_plots_are_their_own() -> None:
    assert_ids_are_unique(Page(page_of("sabotaged")))


def test_names_can_do_no_harm() -> None:
    text = page_of("hostile")
    assert "<script" not in text
    assert not re.search("[\u202e\x00\x1b\ud800]", unescape(text))
    assert "alert(1)" in "".join(Page(text).text)


def test_the_same_document_gives_the_same_page() -> None:
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert page(document_of("sabotaged")) == page_of("sabotaged")


@pytest.mark.parametrize(
    ("name", "plots"),
    [
        ("sabotaged", ["orthogonal", "angles", "Change", "Rounding"]),
        ("adapter only", ["orthogonal", "angles"]),
        ("no adapter", ["rotated and scaled base"]),
        ("functional only", []),
        ("broken", []),
        ("empty", []),
    ],
)
def test_sections_without_data_are_left_out(name: str, plots: list[str]) -> None:
    text = page_of(name)
    titles = re.findall(r"<figure><h3>(.*?)</h3>", text)
    assert len(titles) == len(plots)
    assert all(word in title for word, title in zip(plots, titles, strict=True))
    heads = set(re.findall(r"<h2>(\w+)", text))
    document = document_of(name)
    for head, key in (("Layers", "layers"), ("Tensors", "tensors"), ("Outputs", "functional"), ("Checks", "checks")):
        assert (head in heads) == bool(document[key])
    assert ("Failures" in heads) == bool(VALIDATIONS[name].failures)


def test_failures_come_first_and_alike_ones_are_one_finding() -> None:
    text = page_of("sabotaged")
    assert text.index("<h2>Failures (10)") < text.index("<h2>Warnings (1)") < text.index("<h2>Not to be told (1)")
    assert text.index("<h2>Not to be told (1)") < text.index("<h2>Checks")
    assert text.count("Merge with W R^T: R turns the input features.") == 1
    assert "transposed-rotation <small>replay, 6 checks</small>" in text


def test_long_lists_are_folded_away() -> None:
    assert page(validation_document(checks(10), 1)).count("<details") == 0
    text = page(validation_document(checks(500), 1))
    assert text.count("<details") == 1
    assert "<summary>492 more</summary>" in text
    assert text.count("is wrong") == 500
    # 224 layers and as many tensors.
    assert Page(page_of("healthy")).tags.count("details") == 2


def test_layers_that_failed_are_marked() -> None:
    assert "failed a check" in page_of("sabotaged")
    assert "failed a check" not in page_of("healthy")


def test_a_page_of_a_large_model_is_small() -> None:
    """As one of 4000 experts: what is drawn many times is drawn as an image."""
    found = healthy(300)
    assert len(page_of("healthy")) < 400_000
    text = page(validation_document(found, 1))
    assert len(text) < 2_500_000
    assert text.count("data:image/png") == len(re.findall("<figure>", text)) == 4
    assert "data:image" not in page_of("healthy")


# The table


def shown(name: str, capsys: pytest.CaptureFixture[str], **options: bool) -> str:
    show_validation(Output(**options), document_of(name))
    return capsys.readouterr().out


@each
def test_the_last_line_says_how_it_ended(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(name, capsys)
    assert text.splitlines()[-1] == document_of(name)["headline"]
    assert not re.search("[\x00\x1b\u202e]", text)
    for line in text.splitlines():
        # GitHub would do what such a line says.
        assert not line.lstrip().startswith("::")


def test_the_table_has_a_row_for_each_kind_of_check(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("sabotaged", capsys).splitlines()
    rows = {line.split()[0]: line.split() for line in lines[:12] if line.strip()}
    assert rows["replay"] == ["replay", "8", "6", "wrong", "16,754,211", "<=", "0"]
    assert rows["scale"] == ["scale", "14", "1", "smallest", "scale", "0.93", ">=", "0.1"]
    assert rows["files"] == ["files", "1"]


def test_findings_are_told_with_their_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("sabotaged", capsys).splitlines()
    found = [line for line in lines if line.startswith(("failed", "warning", "inconclusive"))]
    assert [line.split(":")[0] for line in found] == ["failed"] * 10 + ["warning", "inconclusive"]
    assert found[0].startswith("failed: replay model.layers.0.self_attn.q_proj.weight: 16,704,211 of")
    assert found[0].endswith("(transposed-rotation)")
    assert lines.count("  Merge with W R^T: R turns the input features.") == 1


def test_many_findings_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    show_validation(Output(), validation_document(checks(53), 1))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("failed") for line in lines) == 20
    assert lines[-2:] == ["... and 33 more (all of them with --json)", "not valid: 53 of 53 checks failed"]


@pytest.mark.parametrize("name", ["healthy", "sabotaged", "no adapter"])
def test_the_table_fits_eighty_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = shown(name, capsys)
    colour = {"pass": "\x1b[1;32m", "fail": "\x1b[1;31m"}[document_of(name)["outcome"]]
    assert text.splitlines()[-1].startswith(colour)
    table = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in text.splitlines()]
    end = next(i for i in range(3, len(table)) if not table[i].strip())
    assert max(map(len, table[:end])) <= 80
    assert not any("…" in line for line in table)


def test_json_and_quiet_print_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    VALIDATOR.validate(json.loads(shown("sabotaged", capsys, as_json=True)))
    assert shown("sabotaged", capsys, quiet=True) == ""
