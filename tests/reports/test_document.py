"""report.json is what its schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import reports.document
from pipeline.errors import ArtifactError
from reports.document import (
    REPORT,
    SCHEMA_FILE,
    Report,
    json_schema,
    read_report,
    write_report,
)

SHIPPED = Path(reports.document.__file__).with_name(SCHEMA_FILE)


@pytest.fixture
def schema() -> Any:
    return json.loads(SHIPPED.read_text())


@pytest.fixture(params=["full_report", "poor_report", "calibrated_report"])
def report(request: pytest.FixtureRequest) -> Report:
    found: Report = request.getfixturevalue(request.param)
    return found


def test_a_report_round_trips(tmp_path: Path, report: Report) -> None:
    write_report(tmp_path / REPORT, report)
    assert read_report(tmp_path / REPORT) == report
    assert read_report(tmp_path) == report


def test_the_shipped_schema_is_up_to_date() -> None:
    assert SHIPPED.read_text() == json_schema() + "\n"


def test_the_schema_is_one(schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


def test_a_report_follows_the_schema(tmp_path: Path, report: Report, schema: Any) -> None:
    write_report(tmp_path / REPORT, report)
    validator = jsonschema.Draft202012Validator(schema)
    assert list(validator.iter_errors(json.loads((tmp_path / REPORT).read_text()))) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("gate", "outcome"), "maybe"),
        (("artifacts", 0, "size_bytes"), "large"),
        (("artifacts", 0, "accuracy", "top1"), 1.5),
        (("model", "params"), None),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses(
    tmp_path: Path, full_report: Report, schema: Any, path: tuple[str | int, ...], value: Any
) -> None:
    content = json.loads(full_report.model_dump_json(by_alias=True))
    inner = content
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
    (tmp_path / REPORT).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="does not follow the report contract"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("strength", 1.5), ("range_method", "guess"), ("sqnr_db", None), ("zero_point", 0.5)],
)
def test_a_site_that_the_schema_refuses_the_reader_refuses(
    tmp_path: Path, calibrated_report: Report, schema: Any, key: str, value: Any
) -> None:
    content = json.loads(calibrated_report.model_dump_json(by_alias=True))
    content["calibration"]["sites"][3][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
    (tmp_path / REPORT).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"calibration\.sites\.3\.{key}"):
        read_report(tmp_path)


def test_an_older_report_has_no_calibration(
    tmp_path: Path, full_report: Report, schema: Any
) -> None:
    content = json.loads(full_report.model_dump_json(by_alias=True))
    assert content.pop("calibration", "absent") is None
    jsonschema.validate(content, schema)
    (tmp_path / REPORT).write_text(json.dumps(content))
    assert read_report(tmp_path) == full_report


@pytest.mark.parametrize("key", ["host", "model", "data", "float", "artifacts", "gate"])
def test_a_missing_part_is_refused(
    tmp_path: Path, full_report: Report, schema: Any, key: str
) -> None:
    content = json.loads(full_report.model_dump_json(by_alias=True))
    del content[key]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
    (tmp_path / REPORT).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=key):
        read_report(tmp_path)


def test_a_newer_reports_keys_are_taken(tmp_path: Path, full_report: Report, schema: Any) -> None:
    content = json.loads(full_report.model_dump_json(by_alias=True))
    content["colour"] = "blue"
    content["artifacts"][0]["weather"] = "fair"
    jsonschema.validate(content, schema)
    (tmp_path / REPORT).write_text(json.dumps(content))
    assert read_report(tmp_path).artifacts[1:] == full_report.artifacts[1:]


def test_missing_is_null_and_never_left_out(poor_report: Report) -> None:
    content = json.loads(poor_report.model_dump_json(by_alias=True))
    assert content["schema"] == 1
    assert content["float"] == {"top1": None, "n": None}
    assert content["data"]["evaluation"] is None
    assert content["artifacts"][0]["accuracy"]["top1"] is None


def test_no_report_and_no_json_are_artifact_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no report at"):
        read_report(tmp_path)
    (tmp_path / REPORT).write_text("{")
    with pytest.raises(ArtifactError, match="does not follow the report contract"):
        read_report(tmp_path)
