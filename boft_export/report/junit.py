"""A validation as JUnit XML, which CI systems show as test results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from boft_export.plots.validation_data import figures
from boft_export.report.validation_report import validation_document
from boft_export.validation.model import Validation

_SUITE = "boft-export validate"
# What XML 1.0 has no place for, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(validation: Validation, seconds: float) -> bytes:
    """Return a validation as JUnit XML: a test case for each check, its class the check's name.

    What fails the whole is a failure, what else could not be told is skipped, and a warning passes with its message as
    output.
    """
    document = validation_document(validation, seconds)
    suite = ET.Element("testsuite")
    _properties(suite, document)
    taken: Counter[tuple[str, str]] = Counter()
    failures = skipped = 0
    for check in document["checks"]:
        case = ET.SubElement(suite, "testcase", _names(check, taken))
        if check["fails"]:
            failures += 1
            kind = check["finding"] or check["outcome"]
            ET.SubElement(case, "failure", _texts(type=kind, message=check["message"])).text = _text(_details(check))
        elif check["outcome"] == "inconclusive":
            skipped += 1
            ET.SubElement(case, "skipped", _texts(message=check["message"]))
        if told := _output(check):
            ET.SubElement(case, "system-out").text = _text(told)
    return _whole(suite, seconds, tests=len(document["checks"]), failures=failures, skipped=skipped)


def junit_error(error: BaseException, seconds: float) -> bytes:
    """Return a validation that ended before it had a result as JUnit XML: one test case with an error."""
    suite = ET.Element("testsuite")
    case = ET.SubElement(suite, "testcase", {"classname": "run", "name": "validate"})
    message = str(error) or type(error).__name__
    hint = getattr(error, "hint", None)
    notices = [str(n) for n in getattr(error, "notices", ())]
    element = ET.SubElement(case, "error", _texts(type=type(error).__name__, message=message.splitlines()[0]))
    element.text = _text("\n".join([message, *([hint] if hint else []), *notices]))
    return _whole(suite, seconds, tests=1, errors=1)


def _whole(suite: ET.Element, seconds: float, **counts: int) -> bytes:
    numbers = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0) | counts
    attributes = {"name": _SUITE, **{k: str(v) for k, v in numbers.items()}, "time": f"{seconds:.3f}"}
    suite.attrib.update(attributes)
    root = ET.Element("testsuites", attributes)
    root.append(suite)
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _properties(suite: ET.Element, document: Mapping[str, Any]) -> None:
    properties = ET.SubElement(suite, "properties")
    told = {"version": document["tool"]["version"], **{name: document[name] for name in ("base", "merged", "onnx")}}
    values = [*told.items(), *(("adapter", name) for name in document["adapters"]), ("outcome", document["outcome"])]
    for name, value in values:
        if value is not None:
            ET.SubElement(properties, "property", _texts(name=name, value=value))


def _names(check: Mapping[str, Any], taken: Counter[tuple[str, str]]) -> dict[str, str]:
    """Return a test case's class and name, with a number where both are taken: some systems show one of each."""
    # What is about the whole is called by what was checked: a test without a name is shown nowhere.
    key = (check["check"], check["subject"] or check["check"])
    taken[key] += 1
    number = f" ({taken[key]})" if taken[key] > 1 else ""
    return _texts(classname=key[0], name=key[1] + number)


def _details(check: Mapping[str, Any]) -> str:
    """Return what a failure tells: where it is, what was found, the next step."""
    parts = [check["subject"], check["message"], check["hint"], *figures(check)]
    return "\n".join(p for p in parts if p)


def _output(check: Mapping[str, Any]) -> str:
    """Return a test case's output: what was measured, and what a warning that is let pass says."""
    lines = figures(check)
    if not check["fails"] and check["outcome"] == "fail":
        lines.insert(0, ": ".join(p for p in ("warning", check["finding"], check["message"], check["hint"]) if p))
    return "\n".join(lines)


def _texts(**values: str) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: str) -> str:
    return _FORBIDDEN.sub("\ufffd", value)
