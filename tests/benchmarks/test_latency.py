"""What benchmarks/latency.py concludes from its samples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import accuracy_runs
from benchmarks.accuracy import Ours
from benchmarks.accuracy_peers import Job, Peer
from benchmarks.accuracy_runs import PER_ROUND
from benchmarks.latency import HOSTS, MEASURES, held_to, measure, pairs, print_table, ways
from pipeline.errors import UsageError
from targets.devices.cpu import cpuid

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "latency.py"


def row(method: str, milliseconds: float | None, **more: Any) -> dict[str, Any]:
    stated = {"runtime": "onnx", "method": method, "ours": method == "ours", "scheme": "w8a8"}
    stated |= {"placement": "all" if method == "ours" else None, "sqnr_db": 30.0, **more}
    if milliseconds is None:
        return stated | {"outcome": "failed", "reason": "it does not load"}
    turns = [milliseconds * (1 + 0.1 * (turn % 2)) for turn in range(10) for _ in range(PER_ROUND)]
    return stated | {"outcome": "measured", "cpu_ms": turns}


def test_ours_is_held_against_every_peer_of_its_runtime() -> None:
    rows = [
        row("ours", 2.0, profile="avx2", sqnr_db=40.0),
        row("float", 4.0, scheme="float", sqnr_db=None),
        row("tool", 1.0),
        row("tool", 9.0, runtime="tflite"),
    ]
    found = list(pairs(rows))
    assert [(r["ours"], r["peer"], r["profile"]) for r in found] == [
        ("w8a8 all", "float", "avx2"),
        ("w8a8 all", "tool", "avx2"),
    ]
    assert [r["ratio_cpu"] for r in found] == pytest.approx([0.5, 2.0])
    for r in found:
        # Both saw the same noise, turn by turn.
        assert r["ratio_lo"] == pytest.approx(r["ratio_cpu"])
        assert r["ratio_hi"] == pytest.approx(r["ratio_cpu"])
    assert [(r["sqnr_ours_db"], r["sqnr_peer_db"]) for r in found] == [(40.0, None), (40.0, 30.0)]


def test_times_stand_beside_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    [found] = pairs([row("ours", 2.0), row("tool", 7.0)])
    # Half of the turns took a tenth longer.
    assert found["cpu_ours_ms"] == pytest.approx(2.1)
    assert found["cpu_peer_ms"] == pytest.approx(7.35)
    assert found["ratio_cpu"] == pytest.approx(found["cpu_ours_ms"] / found["cpu_peer_ms"])
    print_table([{"model": "tiny", "threads": 1, **found}], Console(width=180), "here")
    printed = capsys.readouterr().out
    assert re.search(r"tool\W+2\.10\W+7\.35\W+0\.29\W+0\.29 to 0\.29\W+30\.0\W+30\.0", printed)


@pytest.mark.parametrize(("ours", "peer", "whose"), [(None, 1.0, "ours"), (1.0, None, "the peer")])
def test_what_was_not_timed_has_its_reason(
    ours: float | None, peer: float | None, whose: str
) -> None:
    [found] = pairs([row("ours", ours), row("tool", peer)])
    assert found["outcome"] == "not_run"
    assert {found[name] for name in MEASURES} == {None}
    assert found["reason"].startswith(whose)
    assert "does not load" in found["reason"]


def test_ways_keep_to_the_runtimes() -> None:
    assert {name for way in ways(HOSTS, "vnni") for name in way.runtimes} == set(HOSTS)
    found = ways(["openvino"], "vnni")
    assert {way.runtimes for way in found} == {("openvino",)}
    assert not any(way.scheme == "w8a8-dynamic" for way in found)


def test_where_weights_leave_headroom_its_price_is_measured_too() -> None:
    beside = set(ways(HOSTS, "avx2")) - set(ways(HOSTS, "vnni"))
    assert {way.isa for way in beside} == {"vnni"}


@pytest.mark.parametrize(
    ("name", "runtimes", "named"),
    [
        ("emulated-arm64:pi5", HOSTS, "emulated-arm64:pi5 is no CPU of this machine"),
        ("cpu:avx2", HOSTS, "onnx chooses its kernels by CPUID, and nothing is hidden here"),
    ],
)
def test_what_is_no_cpu_or_cannot_be_held_is_refused(
    name: str, runtimes: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpuid, "why_not", lambda: "nothing is hidden here")
    with pytest.raises(UsageError, match=named):
        held_to(name, runtimes)


def test_it_starts_again_where_that_takes_another_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = list[dict[str, str]]()
    monkeypatch.setattr(cpuid, "why_not", lambda: "nothing is hidden here")
    monkeypatch.setattr(os, "execve", lambda _, __, given: started.append(given))
    info, isa = held_to("cpu:avx2", ["openvino"])
    assert (info.name, isa) == ("cpu:avx2", "avx2")
    assert [given["ONEDNN_MAX_CPU_ISA"] for given in started] == ["AVX2"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    held_to("cpu:avx2", ["openvino"])
    assert len(started) == 1


def test_a_network_and_images_come_to_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(_: Job, path: Path) -> None:
        """Ours in a tool's place: it normalises once more what it is given."""
        shutil.copyfile(tmp_path / "zepto" / "ours-0-0" / "onnx-float" / "model.onnx", path)

    # Another process could not import this.
    monkeypatch.setattr(accuracy_runs, "apart", lambda _, function, *given: function(*given))
    options = {"data": "digits", "input_size": 32, "images": 6, "calibration_images": 5}
    ours = [Ours("w8a8", "pointwise", ("onnx",))]
    peers = [Peer("onnx", "tool", "float", False, make)]
    found = measure(["zepto"], [1], {**options, "isa": "auto"}, tmp_path, ours, peers)
    assert [(r["model"], r["threads"], r["ours"], r["peer"]) for r in found] == [
        ("zepto", 1, "float none", "tool"),
        ("zepto", 1, "w8a8 pointwise", "tool"),
    ]
    for r in found:
        assert r["outcome"] == "measured", r
        assert r["cpu_ours_ms"] > 0
        assert r["cpu_peer_ms"] > 0
        assert r["ratio_lo"] <= r["ratio_cpu"] <= r["ratio_hi"]
        assert r["sqnr_peer_db"] < 20  # a tool is given pixels that are normalised already
    assert found[0]["sqnr_ours_db"] > 100 > found[1]["sqnr_ours_db"] > 20
    assert np.load(tmp_path / "zepto" / "evaluation.npy").shape == (6, 3, 32, 32)
    assert (tmp_path / "zepto" / "ours-0-0" / "onnx-w8a8" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--models", "enormous"), "unknown model: enormous"),
        (("--models", "isotropic-small"), "unknown model: isotropic-small"),
        (("--models", ","), "none is named"),
        (("--threads", "0"), "--threads"),
        (("--threads", "two"), "--threads"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, words: tuple[str, ...], named: str
) -> None:
    target = tmp_path / "latency.json"
    command = [
        sys.executable,
        "-P",
        str(PROGRAM),
        "--models",
        "atto",
        "--json",
        str(target),
        *words,
    ]
    environment = {"PYTHONPATH": str(PROGRAM.parents[1]), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in {1, 2}
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert named in errors[0]
    assert "Traceback" not in done.stderr
    assert not target.exists()
