"""benchmarks/gpu_reference.py: its loop on the CPU, its clocks, and what it says without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu_clock import CpuClock, CudaClock, Turn
from benchmarks.gpu_networks import MODES, PRECISIONS, Prepared, build, prepare
from benchmarks.gpu_reference import Bench, Cell, figures, measure, ratios
from pipeline.convnext import seeded
from pipeline.records import Architecture

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_reference.py"
BENCH = Bench(
    device="cpu", clock=CpuClock(), input_size=32, layout="channels-last", rounds=10, turn_ms=1.0
)
NOTHING = torch.zeros(1)
EAGER = Cell(2, "float32", "eager")


def small(width: int) -> torch.nn.Module:
    return seeded(Architecture(depths=(1, 1), dims=(width, 2 * width), classes=10), 0)


class Scripted:
    """A clock on which a network takes what its call returns, in milliseconds."""

    def __init__(self) -> None:
        self.order: list[float] = []

    def synchronise(self) -> None:
        """Nothing to wait for."""

    def turn(self, call: Any, inferences: int) -> Turn:
        ms = float(call())
        self.order.append(ms)
        return Turn(inner_ms=(ms / 2,) * inferences, outer_ms=ms)


@pytest.mark.parametrize(
    ("name", "millions"), [("convnext-tiny", 28.589), ("swin-tiny", 28.288), ("resnet50", 25.557)]
)
def test_a_network_has_its_published_number_of_parameters(name: str, millions: float) -> None:
    network = build(name, 224)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert not network.training
    same = build(name, 224)
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), same.parameters(), strict=True)
    )


def test_networks_take_turns_and_are_compared_in_them() -> None:
    clock = Scripted()
    bench = replace(BENCH, clock=clock, turn_ms=8.0)
    ready = {
        name: Prepared(call=partial(torch.tensor, ms), logits=NOTHING, first_s=0.0, capture_s=None)
        for name, ms in (("a", 2.0), ("b", 4.0))
    }
    turns = bench.turns(ready)
    assert clock.order == [2, 2, 4, 4] + 10 * [2, 4]
    assert [len(turns[name][0].inner_ms) for name in ("a", "b")] == [4, 2]
    rows = [
        {"model": name, **EAGER._asdict(), "outcome": "measured", **figures(taken, batch=2)}
        for name, taken in turns.items()
    ]
    assert [row["images_per_s"] for row in rows] == [1000, 500]
    assert [row["inner_over_outer"] for row in rows] == [0.5, 0.5]
    assert [row["inferences"] for row in rows] == [40, 20]
    [held] = ratios(rows)
    assert (held["model"], held["against"]) == ("a", "b")
    assert (held["ratio"], held["lo"], held["hi"]) == (2, 2, 2)


def test_too_few_turns_give_no_interval() -> None:
    rows = [
        {"model": name, **EAGER._asdict(), "outcome": "measured", "outer_samples_ms": [1.0] * 9}
        for name in "ab"
    ]
    [held] = ratios(rows)
    assert (held["ratio"], held["lo"], held["hi"]) == (None, None, None)


def test_the_loop_runs_on_the_cpu() -> None:
    networks = {"one": small(8), "two": small(16)}
    cells = [EAGER, Cell(2, "bf16", "eager"), Cell(2, "tf32", "eager"), Cell(2, "bf16", "graph")]
    rows, compared = measure(BENCH, networks, cells, Console(quiet=True))
    assert [row["outcome"] for row in rows] == 4 * ["measured"] + 4 * ["not_run"]
    for row in rows[:4]:
        assert row["images_per_s"] == pytest.approx(2000 / row["outer_ms"])
        assert len(row["outer_samples_ms"]) == 10
        assert len(row["inner_samples_ms"]) == row["inferences"] >= 10
        assert row["inner_over_outer"] == pytest.approx(1, abs=0.01)
    assert [row["sqnr_db"] for row in rows[:2]] == [None, None]
    assert all(30 < row["sqnr_db"] < 60 for row in rows[2:4])  # bfloat16 keeps 8 bits
    assert all("GPU" in row["reason"] and row["images_per_s"] is None for row in rows[4:])
    assert [held["ratio"] is not None for held in compared] == [True, True, False, False]


def test_what_fails_is_a_row_and_the_others_go_on() -> None:
    class Broken(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("out of memory")

    broken, works = BENCH.rows(EAGER, {"broken": Broken(), "works": small(8)})
    assert (broken["outcome"], works["outcome"]) == ("failed", "measured")
    assert "out of memory" in broken["reason"]
    assert broken["images_per_s"] is None
    [held] = ratios([broken, works])
    assert held["ratio"] is None


def test_a_network_is_brought_to_its_precision_and_stays_as_it_is() -> None:
    network = small(8)
    images = BENCH.images(2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    done = {
        word: prepare(network, images, precision, MODES["eager"], lambda: None).logits
        for word, precision in PRECISIONS.items()
    }
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    assert all(logits.dtype == torch.float32 for logits in done.values())
    with torch.inference_mode():
        assert torch.equal(done["float32"], network(images))
    for word in ("bf16", "float16", "amp-bf16", "amp-float16"):
        assert not torch.equal(done[word], done["float32"])
        torch.testing.assert_close(done[word], done["float32"], rtol=0.1, atol=0.02)


def test_tf32_is_as_the_precision_says() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for word in ("tf32", "float32"):
            prepare(small(8), BENCH.images(1), PRECISIONS[word], MODES["eager"], lambda: None)
            now = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            assert now == (word == "tf32",) * 2
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Cuda:
    """Stands in for torch.cuda: notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802 - torch's name
        assert enable_timing
        asked = self.asked

        class Event:
            def record(self) -> None:
                asked.append("record")

            def elapsed_time(self, _other: object) -> float:
                asked.append("read")
                return 3.0

        return Event()


def test_events_are_read_when_all_is_done() -> None:
    cuda = Cuda()
    turn = CudaClock(cuda).turn(lambda: cuda.asked.append("call"), 2)
    inference = ["record", "call", "record"]
    assert cuda.asked == ["synchronize", *inference, *inference, "synchronize", "read", "read"]
    assert turn.inner_ms == (3, 3)
    assert turn.outer_ms > 0


def run(*arguments: str, json_to: Path) -> subprocess.CompletedProcess[str]:
    root = str(PROGRAM.parents[1])
    return subprocess.run(
        [sys.executable, "-P", str(PROGRAM), *arguments, "--json", str(json_to)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": root, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )


SHORT = (
    *("--models", "convnext-zepto", "--batch", "1", "--precision", "float32", "--mode", "eager"),
    *("--input-size", "32", "--rounds", "10", "--turn-ms", "1"),
)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_document_says_where_it_was_measured(where: str, tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    done = run(*SHORT, "--device", where, json_to=target)
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    [row] = document["rows"]
    assert document["settings"]["device"] == where
    assert document["command"].startswith("python benchmarks/gpu_reference.py --models convnext-z")
    assert document["torch"]["version"] == torch.__version__
    if where == "cpu" or torch.cuda.is_available():
        assert row["outcome"] == "measured"
        assert (document["gpu"] is not None) == torch.cuda.is_available()
        assert f"--device {where}" in done.stdout
    else:
        assert row["outcome"] == "not_run"
        assert row["images_per_s"] is None
        assert row["reason"] in done.stdout.replace("\n", "")
        assert document["gpu"] is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--models", "convnext-enormous"), "unknown model: convnext-enormous"),
        (("--batch", "0"), "--batch"),
        (("--device", "tpu"), "--device"),
        (("--checkpoint", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, words: tuple[str, ...], named: str
) -> None:
    target = tmp_path / "gpu.json"
    done = run(*SHORT, *words, json_to=target)
    assert done.returncode in {1, 2}
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert named in errors[0]
    assert "Traceback" not in done.stderr
    assert not target.exists()
