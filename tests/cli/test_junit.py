"""JUnit XML of results that no model has to give. No libllama is needed."""

from __future__ import annotations

from xml.etree import ElementTree

from llama_state.cli import checks, junit
from llama_state.testing.conformance import Report, Row

# The attributes that junit-10.xsd of Jenkins has, and what it lets be inside.
COUNTS = {"tests", "failures", "errors"}
OUTCOME = ({"type", "message"}, set[str]())
SCHEMA = {
    "testsuites": ({"name", "time", *COUNTS}, {"testsuite"}),
    "testsuite": (
        {"name", "skipped", "time", "timestamp", *COUNTS},
        {"properties", "testcase"},
    ),
    "properties": (set[str](), {"property"}),
    "property": ({"name", "value"}, set[str]()),
    "testcase": ({"classname", "name", "time"}, {"failure", "error", "skipped"}),
    "failure": OUTCOME,
    "error": OUTCOME,
    "skipped": OUTCOME,
}


def test_xml_of_any_text() -> None:
    """Control characters and undecodable file names do not break the XML, nor its schema."""
    rows = (
        Row("one", "f", 1, 0.5, outcome="differs", detail="a\x00b\x1b[1m <&> é\ud800"),
        Row("one", "g", outcome="error", detail="SaveError: no"),
        Row("two", outcome="not available", detail="refused"),
        Row("one", "h"),
    )
    report = Report("models/a\udcff.gguf", "lib", rows)
    xml = junit.document([checks.Checked(report), checks.Checked(report, "a\nb")])
    root = ElementTree.fromstring(xml)  # noqa: S314
    assert [root.get(name) for name in ("tests", "failures", "errors")] == ["9", "2", "3"]
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        assert set(element.keys()) <= attributes
        assert {child.tag for child in element} <= children
    first = root[0]
    assert first.get("skipped") == "1"
    assert (first.findtext("testcase/failure") or "").startswith("one: f\na\\x00b\\x1b[1m <&> é")
    assert [case.get("name") for case in first.findall("testcase")] == ["f", "g", "context", "h"]
    assert root[1].findtext("testcase[@name='model']/error") == "a\nb"
