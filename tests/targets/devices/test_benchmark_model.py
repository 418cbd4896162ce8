"""What LiteRT's benchmark_model is told and prints; the text is written after its format."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from targets.devices import _benchmark_model as tool
from targets.runtimes._litert_profiler import profile
from targets.runtimes.tflite import RUNTIME, kinds

OLD = """STARTING!
Loaded model 0.tflite
Initialized session in 38.467ms
Running benchmark for at least 4 iterations and at least 0 seconds
count=4 first=98450 curr=83010 min=82990 max=98450 avg=87012.5 std=6200

Running benchmark for at least 2 iterations and at least 0 seconds
count=2 first=79449 curr=81350 min=79449 max=81350 avg=80399.5 std=950

Average inference timings in us: Warmup: 87012.5, Init: 38467, Inference: 80399.5
"""
NEW = """INFO: STARTING!
INFO: Loaded model 0.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: The input model file size (MB): 13.5
INFO: Initialized session in 61.2ms.
INFO: Running benchmark for at least 4 iterations and at least 0 seconds
INFO: count=4 first=9845 curr=8301 min=8299 max=9845 avg=8701.25 std=620 p5=8299 median=8360 p95=9845

INFO: Running benchmark for at least 2 iterations and at least 0 seconds
INFO: count=2 first=7944 curr=8135 min=7944 max=8135 avg=8039.5 std=95 p5=7944 median=8135 p95=8135

INFO: Inference timings in us: Init: 61200, First inference: 9845, Warmup (avg): 8701.25, Inference (avg): 8039.5
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory footprint of the model at runtime. Take the information at your discretion.
INFO: Memory footprint delta from the start of the tool (MB): init=18.4 overall=22.1
"""  # noqa: E501
NOT_DELEGATED = (
    "INFO: Though NNAPI delegate is explicitly applied, the model graph will not be executed by the"
    " delegate."
)
PROFILE = """Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
ModifyGraphWithDelegate, 6.348, 6.348, 55.64%, 55.64%, 7148, 1, ModifyGraphWithDelegate/0
AllocateTensors, 5.061, 5.061, 44.36%, 100%, 10292, 1, AllocateTensors/0

Number of nodes executed: 2
============================== Summary by node type ==============================
node type, count, avg_ms, avg %, cdf %, mem KB, times called
ModifyGraphWithDelegate, 1, 6.348, 55.64%, 55.64%, 7148, 1

Timings (microseconds): count=1 curr=11409
Memory (bytes): count=0
2 nodes observed


Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
QUANTIZE, 0.199, 0.203, 1.328%, 1.328%, 0, 1, [image.q]:0
TfLiteXNNPackDelegate, 0.9, 0.85, 80%, 81.3%, 0, 1, [logits]:12
Fully Connected (NC, QS8, QC8W) GEMM, 0.398, 0.407, 2.658%, 3.986%, 0, 1, Delegate/Fully Connected (NC\t QS8\t QC8W) GEMM:0
Convolution (NHWC, F32) IGEMM, 0.428, 1.05e+01, 2.2%, 6.1%, 0, 1, Delegate/Convolution (NHWC\t F32) IGEMM:1

============================== Top by Computation Time ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
TfLiteXNNPackDelegate, 0.9, 0.85, 80%, 81.3%, 0, 1, [logits]:12

Timings (microseconds): count=50 first=79449 curr=81350 min=77385 max=88213 avg=79732 std=1929
Memory (bytes): count=0
31 nodes observed
"""  # noqa: E501


@pytest.mark.parametrize(
    ("text", "load_ms", "first_ms", "singles"),
    [(OLD, 38.467, 98.45, (79.449, 81.35)), (NEW, 61.2, 9.845, (7.944, 8.135))],
)
def test_a_process_tells_its_two_inferences(
    text: str, load_ms: float, first_ms: float, singles: tuple[float, float]
) -> None:
    run = tool.read_run(text)
    assert (run.load_ms, run.first_ms, run.singles) == (load_ms, first_ms, singles)


@pytest.mark.parametrize(
    ("line", "singles"),
    [
        ("count=1 curr=146161", (146.161,)),
        ("count=2 curr=54(all same)", (0.054, 0.054)),
        ("INFO: count=2 first=1234567 curr=1.3e+06 min=1 max=2 avg=1.26728e+06 std=9", None),
    ],
)
def test_single_inferences_of_a_line(line: str, singles: tuple[float, ...] | None) -> None:
    [found] = tool.read_statistics(line)
    assert found.singles == (singles or (1234.567, 1300.0))


def test_a_line_of_timings_says_all_it_has() -> None:
    text = (
        "Timings (microseconds): count=50 first=79449 curr=81350 min=77385 max=88213 avg=79732"
        " std=1929\nMemory (bytes): count=50 curr=19598656(all same)\n"
    )
    [found] = tool.read_statistics(text)
    assert found.count == 50
    assert found.values == {
        "first": 79449,
        "curr": 81350,
        "min": 77385,
        "max": 88213,
        "avg": 79732,
        "std": 1929,
    }
    assert tool.read_statistics("count=0\n") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no times"),
        ("count=2 first=1 curr=2 min=1 max=2 avg=1 std=0\n", "no times"),
        (f"{OLD}ERROR: Failed to apply GPU delegate.\nbye\nexit code 1\n", "exit code 1: ERROR"),
        ("Segmentation fault\nexit code 139\n", "exit code 139: Segmentation fault"),
        (f"{NOT_DELEGATED}\n{NEW}", "all would run on the CPU"),
    ],
)
def test_what_gives_no_times_says_why(text: str, why: str) -> None:
    with pytest.raises(tool.NoAnswerError, match=why) as said:
        tool.read_run(text)
    assert "\n" not in str(said.value)


def test_a_turn_is_as_many_inferences_as_asked() -> None:
    steps = tool.turns(["float", "int8"], rounds=2, per_round=9, warm_up=4)
    jobs = "".join(step.split()[1] for step in steps)
    assert jobs == "0" * 5 + "1" * 5 + "0" * 5 + "1" * 5
    assert sum(int(s.partition("--num_runs=")[2].split()[0]) for s in steps) == 2 * 2 * 9


def test_a_script_runs_in_a_plain_shell(tmp_path: Path) -> None:
    steps = ["run 0 echo hello", "run 1 false", "run 0 echo again", "run 1 echo never", "run 11 :"]
    text = tool.script(steps, before=":", cpu=0)
    done = subprocess.run(
        ["sh", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == '{"done": 5, "total": 5}'
    parts = tool.sections((tmp_path / tool.OUT).read_text())
    # What failed is not run again, and the others go on.
    ran = ["before", "job 0", "job 1", "job 0", "job 11", "after", tool.END]
    assert [title for title, _ in parts] == ran
    assert [parts[index][1].strip() for index in (1, 3)] == ["hello", "again"]
    with pytest.raises(tool.NoAnswerError, match="exit code 1"):
        tool.read_run(parts[2][1])


@pytest.mark.parametrize("out", ["", "== before\ngovernor x\n== job 0\ncount=2", "\0\xff"])
def test_a_script_that_broke_off_is_no_answer(out: str) -> None:
    with pytest.raises(tool.NoAnswerError, match="the last that it said"):
        tool.sections(out)


def test_a_state() -> None:
    state = tool.read_state(
        "governor schedutil\ncur_freq 2850000\nzone 41200 cpu-0-0\nzone  gpu\nzone x y\n"
        "battery   temperature: 287\nthrottled Thermal Status: 1\nload 3.42 3.1 2.9 1/2 3\n"
    )
    assert (state.governor, state.frequency_mhz, state.load) == ("schedutil", 2850.0, 3.42)
    assert state.temperatures_c == {"cpu-0-0": 41.2, "battery": 28.7}
    assert state.throttled == "Thermal Status: 1"
    nothing = tool.read_state("governor \ncur_freq \nbattery \nthrottled \nload \n")
    assert nothing == tool.read_state("")
    assert nothing.governor is None


def test_a_profile() -> None:
    rows = tool.read_profile(PROFILE)
    assert [(row.op, row.ms) for row in rows] == [
        ("QUANTIZE", 0.203),
        ("Fully Connected (NC, QS8, QC8W) GEMM", 0.407),
        ("Convolution (NHWC, F32) IGEMM", 10.5),
    ]
    alone = "\n".join(line for line in PROFILE.splitlines() if "Delegate/" not in line)
    assert [row.is_delegate for row in tool.read_profile(alone)] == [False, True]


@pytest.mark.parametrize("text", ["", PROFILE.partition("Operator-wise")[0]])
def test_what_is_no_profile(text: str) -> None:
    with pytest.raises(tool.NoAnswerError, match="no table"):
        tool.read_profile(text)


def test_a_row_that_was_cut_off_is_no_profile() -> None:
    with pytest.raises(tool.NoAnswerError, match="no row of a profile"):
        tool.read_profile(PROFILE.replace("0.428, 1.05e+01, 2.2%", "0.428, "))


def test_kernels_have_the_kinds_that_the_file_gives_them(artifacts: Mapping[str, Path]) -> None:
    """What LiteRT's kernels are called here, as benchmark_model writes it."""
    path = artifacts["tflite"]
    events = profile(path, 1, warm_up=1, inferences=1)
    head, columns = (
        "Operator-wise Profiling Info",
        "node type, first, avg_ms, %, times called, name",
    )
    lines = [
        f"{op}, 9, {ms}, 1%, 1, Delegate/{op.replace(',', chr(9))}:{index}"
        for index, (op, ms) in enumerate(events)
    ]
    text = "\n".join([head, "=== Run Order ===", columns, *lines, ""])
    rows = tool.read_profile(text)
    assert [(row.op, row.ms) for row in rows] == events
    known = kinds(path, [row.op for row in rows])
    assert known is not None
    expected = RUNTIME.op_times(path, None, threads=1, inferences=2)  # type: ignore[arg-type]
    assert isinstance(expected, list)
    assert known == [(one.kind, one.name) for one in expected]
    assert {"pointwise", "layernorm", "gelu", "depthwise"} <= {kind for kind, _ in known}
    assert kinds(path, [row.op for row in rows[1:]]) is None
