"""`convnext-edge explain`: the calibration page's words in a terminal, one line for a mistake."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.errors import ArtifactError, UsageError
from pipeline.explain import NOTHING, UNMEASURED, _environment, explain, show
from pipeline.quantize import PARAMS
from pipeline.records import (
    Accuracy,
    Architecture,
    Calibration,
    Preprocessing,
    Quantization,
    QuantizedModel,
    SiteCalibration,
    to_json,
)
from pipeline.run import MODEL
from reports import assemble
from reports.document import (
    ArtifactRow,
    Data,
    FloatResult,
    Gate,
    Host,
    Model,
    Report,
    write_report,
)
from targets import base

CLI = (sys.executable, "-P", "-m", "pipeline.cli")
BAD = "stages.0.blocks.0.dw_out"
DECIBELS = {
    "stem.image": (41.0, 41.0), "stages.0.blocks.0.dw_in": (38.0, 35.0), BAD: (12.25, 4.0),
    "stages.0.blocks.0.ln_out": (39.0, 37.0), "head.head_in": (51.0, 42.0),
}  # fmt: skip


def _model() -> QuantizedModel:
    return QuantizedModel(
        architecture=Architecture(depths=(1,), dims=(4,), classes=2),
        preprocessing=Preprocessing(input_size=32),
        labels=None,
        scheme="w8a8",
        placement="all",
        calibration=Calibration(),
        sites={name: Quantization(scale=0.125, zero_point=7) for name in DECIBELS},
        chosen={
            name: SiteCalibration(
                range_method="percentile", strength=0.875, minimum=-2.5, maximum=6.5,
                clipped=0.001, spread_before=62.75, spread_after=1.5, sqnr_db=chosen,
                plain_sqnr_db=plain,
            )
            for name, (chosen, plain) in DECIBELS.items()
        },
        parents={},
    )  # fmt: skip


def _row(runtime: str, accuracy: Accuracy) -> ArtifactRow:
    return ArtifactRow(
        runtime=runtime, scheme="w8a8", placement="all", graph_form="channels-last",
        path=f"artifacts/{runtime}", sha256="0" * 64, size_bytes=1, accuracy=accuracy, latency=(),
    )  # fmt: skip


def _report(model: QuantizedModel | None) -> Report:
    measured = Accuracy(
        outcome="measured", n=500, top1=0.9, drop_pp=0.25, drop_ci95_pp=(-0.5, 1.0), sqnr_db=32.75
    )
    return Report(
        host=Host(cpu="x", isa=(), os="x", python="3.11", packages={}),
        model=Model(checkpoint_sha256="0" * 64, dialect="own", variant="tiny", params=1, macs=1,
                    input_size=32, classes=2),
        data=Data(calibration=None, evaluation=None),
        float_result=FloatResult(top1=0.9, n=500),
        artifacts=(_row("onnx", measured),
                   _row("coreml", Accuracy(outcome="not_run", reason="not a Mac"))),
        agreement=(),
        gate=Gate(outcome="not_run", checks=()),
        calibration=assemble.calibration(model) if model is not None else None,
    )  # fmt: skip


def _write_model(out: Path, model: QuantizedModel) -> None:
    (out / MODEL).mkdir(parents=True)
    (out / MODEL / PARAMS).write_bytes(to_json(model))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder as `run` leaves it."""
    _write_model(tmp_path, _model())
    write_report(tmp_path / "report.json", _report(_model()))
    return tmp_path


def _shown(facts: dict[str, Any], width: int = 80) -> list[str]:
    text = io.StringIO()
    show(facts, Console(file=text, width=width))
    return text.getvalue().splitlines()


def _cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "explain", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_the_command_names_the_worst_site_and_lists_it_first(run_dir: Path) -> None:
    done = _cli(run_dir)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"The worst of 5 sites is {BAD} with 12.2 dB; the median site has 39.0 dB."
    assert "percentile range from -2.5 to 6.5, strength 0.88" in lines[1]
    assert "would have 4.0 dB, 8.2 dB less" in lines[1]
    head = next(index for index, line in enumerate(lines) if line.startswith("site "))
    assert lines[head + 1].split() == [
        BAD, "12.2", "4.0", "percentile", "0.88", "-2.5", "6.5", "0.10", "%", "62.8", "1.5",
        "0.125", "7", "8",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[head + 2 :]] == [
        "stages.0.blocks.0.dw_in", "stages.0.blocks.0.ln_out", "stem.image", "head.head_in"
    ]  # fmt: skip


def test_measured_artifacts_alone_have_a_row(run_dir: Path) -> None:
    lines = _shown(explain(run_dir))
    rows = [line.split() for line in lines if line.startswith(("onnx", "coreml"))]
    assert rows == [
        ["onnx", "w8a8", "all", "500", "32.8", "+0.25", "(-0.50", "to", "+1.00)"]
    ]  # fmt: skip
    assert UNMEASURED not in lines


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_number_is_cut_on_a_narrow_terminal(run_dir: Path, width: int) -> None:
    lines = _shown(explain(run_dir), width)
    assert not [line for line in lines if "…" in line]
    assert next(line for line in lines if line.startswith(BAD)).split()[-2:] == ["7", "8"]


def test_the_report_goes_before_the_model(run_dir: Path) -> None:
    model = _model()
    other = replace(model.chosen[BAD], sqnr_db=45.0)
    changed = replace(model, chosen={**model.chosen, BAD: other})
    (run_dir / MODEL / PARAMS).write_bytes(to_json(changed))
    assert explain(run_dir)["worst"] == [BAD]
    write_report(run_dir / "report.json", _report(None))
    # A run of float artifacts: the model beside it is in none of them.
    assert explain(run_dir)["calibration"] is None
    older = json.loads((run_dir / "report.json").read_text())
    del older["calibration"]
    (run_dir / "report.json").write_text(json.dumps(older))
    facts = explain(run_dir)
    assert facts["worst"] == ["stages.0.blocks.0.dw_in"]
    assert [row["artifact"] for row in facts["accuracy"]] == ["onnx w8a8"]


def test_a_quantized_model_alone_is_enough(tmp_path: Path) -> None:
    _write_model(tmp_path, _model())
    done = _cli(tmp_path)
    assert done.returncode == 0, done.stderr
    assert BAD in done.stdout
    assert UNMEASURED in done.stdout


def test_json_holds_what_the_report_holds(run_dir: Path) -> None:
    done = _cli(run_dir, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    stored = json.loads((run_dir / "report.json").read_text())
    assert facts["calibration"] == stored["calibration"]
    assert [site["site"] for site in facts["calibration"]["sites"]] == list(DECIBELS)
    assert facts["worst"] == [BAD]
    assert facts["median_db"] == 39.0
    assert facts["accuracy"][0]["drop_pp"] == 0.25


def test_a_scheme_without_sites_is_said(tmp_path: Path) -> None:
    _write_model(tmp_path, replace(_model(), scheme="w8", chosen={}))
    facts = explain(tmp_path)
    assert facts["calibration"] is None
    assert _shown(facts) == [NOTHING, UNMEASURED]


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    model, odd = _model(), "stem.\x1b[2J[red]x"
    _write_model(
        tmp_path,
        replace(
            model,
            sites={odd: model.sites[BAD]},
            chosen={odd: model.chosen[BAD]},
        ),
    )
    text = "\n".join(_shown(explain(tmp_path)))
    assert "\x1b" not in text
    assert text.count(r"stem.\x1b[2J[red]x") == 2


def _nothing(out: Path) -> None:
    out.mkdir()


def _no_folder(_out: Path) -> None:
    pass


def _a_file(out: Path) -> None:
    out.write_text("{}")


def _cut_report(out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text('{"schema": 1')


def _wrong_calibration(out: Path) -> None:
    out.mkdir()
    write_report(out / "report.json", _report(_model()))
    content = json.loads((out / "report.json").read_text())
    content["calibration"]["sites"] = []
    (out / "report.json").write_text(json.dumps(content))


def _cut_model(out: Path) -> None:
    _write_model(out, _model())
    (out / MODEL / PARAMS).write_bytes(to_json(_model())[:-40])


def _older_model(out: Path) -> None:
    content = json.loads(to_json(_model()))
    del content["chosen"]
    (out / MODEL).mkdir(parents=True)
    (out / MODEL / PARAMS).write_text(json.dumps(content))


def _site_without_grid(out: Path) -> None:
    _write_model(out, replace(_model(), sites={}))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_nothing, "report.json"),
        (_no_folder, "report.json"),
        (_a_file, "--latency"),
        (_cut_report, "report contract"),
        (_wrong_calibration, "calibration.sites"),
        (_cut_model, "params.json"),
        (_older_model, "chosen"),
        (_site_without_grid, "stem.image"),
    ],
)
def test_a_bad_folder_is_one_line(make: Any, named: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ArtifactError) as caught:
        explain(tmp_path / "run")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_fails_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = _cli(tmp_path / "absent")
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_on_a_mac_the_time_is_taken_apart_on_chosen_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    device = base.device("coreml:cpu-ne")
    assert isinstance(device, base.InProcesses)
    assert _environment(device.name, base.runtime("coreml")) == device.environment()


@pytest.mark.parametrize(
    "name", ["ssh:nobody@127.0.0.1", "emulated-arm64:pi5", "cuda", "coreml:cpu"]
)
def test_the_time_is_taken_apart_on_a_cpu_of_this_machine_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = base.device(name)
    if not isinstance(device, base.InProcesses):
        # It may be far away: it is not asked.
        monkeypatch.setattr(type(device), "probe", lambda _: pytest.fail("it was asked"))
    with pytest.raises(UsageError, match=f"{name} cannot take onnx's time apart") as caught:
        _environment(name, base.runtime("onnx"))
    assert str(caught.value).count("Allowed: ") == 1
