"""Results of ``check`` as JUnit XML, in the schema of Jenkins (junit-10.xsd) and pytest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from ..testing.conformance import Row
    from .checks import Checked

# XML 1.0 cannot hold other characters, not even as references.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ELEMENTS = {"differs": "failure", "error": "error", "not available": "skipped"}


def document(results: Sequence[Checked]) -> bytes:
    """Return an XML document: a test suite for each model, a test case for each row."""
    root = ElementTree.Element("testsuites", name="llama-state check")
    root.extend(_suite(result) for result in results)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, 0)) for suite in root)))
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml


def _suite(result: Checked) -> ElementTree.Element:
    report = result.report
    group = _clean(Path(report.model).name.removesuffix(".gguf"))
    cases = [_case(group, row) for row in report.rows]
    if result.problem:
        cases.append(_problem(group, result.problem))
    suite = ElementTree.Element(
        "testsuite",
        name=_clean(report.model),
        tests=str(len(cases)),
        failures=_count(cases, "failure"),
        errors=_count(cases, "error"),
        skipped=_count(cases, "skipped"),
        time=f"{sum(row.seconds for row in report.rows):.6f}",
        timestamp=result.started.isoformat(timespec="seconds"),
    )
    properties = ElementTree.SubElement(suite, "properties")
    ElementTree.SubElement(properties, "property", name="library", value=_clean(report.library))
    suite.extend(cases)
    return suite


def _case(group: str, row: Row) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase",
        classname=f"{group}.{row.configuration}",
        name=row.function or "context",
        time=f"{row.seconds:.6f}",
    )
    if element := _ELEMENTS.get(row.outcome):
        measured = f"{row.nbytes} bytes, error of the next logits {row.nmse:.1e}"
        text = f"{row.configuration}: {row.function or 'context'}\n{row.detail}\n{measured}"
        _add_outcome(case, element, row.outcome, row.detail, text)
    return case


def _problem(group: str, problem: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=group, name="model", time="0")
    _add_outcome(case, "error", "not checked", problem.partition("\n")[0], problem)
    return case


def _add_outcome(
    case: ElementTree.Element, element: str, outcome: str, message: str, text: str
) -> None:
    child = ElementTree.SubElement(case, element, type=outcome, message=_clean(message))
    child.text = _clean(text)


def _count(cases: Sequence[ElementTree.Element], element: str) -> str:
    return str(sum(case.find(element) is not None for case in cases))


def _clean(text: str) -> str:
    """Return *text* with the characters that XML cannot hold as escapes."""
    return _NOT_XML.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
