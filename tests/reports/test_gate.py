"""The gate's answers, and what it never answers."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import pytest

from pipeline.recipe import BaselineBudget, Budget
from pipeline.records import (
    Accuracy,
    Agreement,
    Candidate,
    Kind,
    Latency,
    Layout,
    Parity,
    Profile,
    Proof,
    Scheme,
)
from reports.document import (
    ArtifactRow,
    Check,
    Data,
    DataSource,
    FloatResult,
    Host,
    Model,
    Report,
)
from reports.document import Gate as GateRecord
from reports.gate import judge, paired_check
from reports.layouts import without_integers
from reports.summary import junit, markdown

N = 1000
NOT_RUN = Accuracy(outcome="not_run", reason="no macOS here")


def _bits(right: int, shift: int = 0) -> str:
    truth = np.zeros(N, bool)
    truth[shift : shift + right] = True
    return base64.b64encode(np.packbits(truth).tobytes()).decode()


def _accuracy(lost: int = 0, gained: int = 0, n: int = N, bits: str | None = None) -> Accuracy:
    return Accuracy(outcome="measured", n=n, lost=lost, gained=gained, top1=0.9, correct_bits=bits)


def _latency(ratio: float, spread: float = 0.02, device: str = "local") -> Latency:
    interval = (ratio - spread, ratio + spread)
    return Latency(
        device=device, outcome="measured", n=100, wall_ratio=ratio, wall_ratio_ci95=interval,
        cpu_ratio=2 * ratio, cpu_ratio_ci95=(2 * interval[0], 2 * interval[1]),
    )  # fmt: skip


def _row(runtime: str = "onnx", scheme: Scheme = "w8a8", **changes: Any) -> ArtifactRow:
    stated: dict[str, Any] = {
        "runtime": runtime, "scheme": scheme, "placement": "all", "graph_form": "nchw",
        "path": f"{runtime}-{scheme}", "sha256": "0" * 64,
        "size_bytes": 4000 if scheme == "float" else 1100,
        "accuracy": _accuracy(), "latency": (_latency(0.5),),
    }  # fmt: skip
    return ArtifactRow(**(stated | changes))


def _report(
    *rows: ArtifactRow, agreement: tuple[Agreement, ...] = (), evaluation: str = "e"
) -> Report:
    return Report(
        host=Host(cpu="cpu", isa=(), os="os", python="3", packages={}),
        model=Model(
            checkpoint_sha256="c", dialect="own", variant="custom", params=1, macs=1,
            input_size=32, classes=10,
        ),
        data=Data(
            calibration=None, evaluation=DataSource(source="digits", n=N, sha256=evaluation)
        ),
        float_result=FloatResult(top1=0.9, n=N), artifacts=rows, agreement=agreement,
        gate=GateRecord(outcome="not_run", checks=()),
    )  # fmt: skip


def _only(report: Report, budget: Budget, baseline: Report | None = None) -> Check:
    (check,) = judge(report, budget, baseline).checks
    return check


def _agreement(share: float, profile_b: Profile = "full", n: int = N) -> Agreement:
    return Agreement(
        a="onnx", b="tflite", scheme="w8a8", kind="host", n=n, profile_a="full",
        profile_b=profile_b, top1_agreement=share, max_abs_logit_diff=0.1,
    )  # fmt: skip


def test_no_limits_is_not_run() -> None:
    gate = judge(_report(_row()), Budget())
    assert (gate.outcome, gate.checks) == ("not_run", ())


@pytest.mark.parametrize(
    ("lost", "gained", "limit", "outcome"),
    [
        (0, 0, 1.0, "pass"),  # the bound is 100 * 3.84 / 1003.84 = 0.383 points
        (0, 0, 0.38, "inconclusive"),
        (0, 0, 0.39, "pass"),
        (5, 5, 2.0, "pass"),
        (60, 10, 1.0, "fail"),
        (12, 4, 1.0, "inconclusive"),
        (0, 40, 0.5, "pass"),
    ],
)
def test_a_drop_is_judged_by_its_interval(
    lost: int, gained: int, limit: float, outcome: str
) -> None:
    check = _only(_report(_row(accuracy=_accuracy(lost, gained))), Budget(max_drop_pp=limit))
    assert check.outcome == outcome
    assert check.value == pytest.approx((lost - gained) / 10)
    assert check.limit == limit
    assert "against the float model" in check.why


def test_inconclusive_says_how_many_images_would_decide() -> None:
    check = paired_check("drop", 12, 4, N, 1.0, "the float model")
    assert check.outcome == "inconclusive"
    match = re.search(r"about (\d+) images would decide", check.why)
    assert match is not None
    needed = int(match[1])
    assert needed > N
    scaled = round(12 * needed / N), round(4 * needed / N)
    assert paired_check("drop", *scaled, needed, 1.0, "x").outcome == "pass"
    fewer = needed // 2
    scaled = round(12 * fewer / N), round(4 * fewer / N)
    assert paired_check("drop", *scaled, fewer, 1.0, "x").outcome == "inconclusive"


def _layout(scheme: Scheme, *tried: Scheme) -> Layout:
    return Layout(
        runtime="onnx", source="measured", reason="why", isa="vnni", device="local",
        candidates=tuple(
            Candidate(scheme=one, placement="all", graph_form="nchw", outcome="measured")
            for one in tried
        ),
        scheme=scheme, placement=None if scheme == "float" else "all", graph_form="nchw",
        float_form="nchw",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(0.9, "pass"), (1.0, "inconclusive"), (1.1, "fail")]
)
def test_integers_that_are_slower_than_float_fail(ratio: float, outcome: str) -> None:
    check = _only(_report(_row(latency=(_latency(ratio),))), Budget(faster_than_float=True))
    assert check.name == "onnx w8a8 is no slower than float on local"
    assert (check.outcome, check.value, check.limit) == (outcome, ratio, 1.0)


def _proof(fallbacks: float | None) -> Proof:
    return Proof(
        method="the runtime said so", integer_layers=12, expected_integer_layers=12,
        weighted_layers=24, transposes_per_block=0, quantize_ops_per_block=0, op_counts={},
        fallback_ops_per_block=fallbacks,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fallbacks", "outcome"), [(0.0, "pass"), (1.0, "pass"), (1.25, "fail"), (None, "inconclusive")]
)
def test_fallbacks_are_counted_per_block(fallbacks: float | None, outcome: str) -> None:
    report = _report(_row(proof=_proof(fallbacks)))
    gate = judge(report, Budget(max_fallback_ops_per_block=1))
    assert gate.checks[0].name == "onnx w8a8 fallback ops per block"
    assert gate.outcome == outcome
    if fallbacks is None:
        assert gate.checks[0].outcome == "not_run"
        assert "onnx does not tell" in gate.checks[0].why


@pytest.mark.parametrize("budget", [{"faster_than_float": True}, {"max_latency_ratio": 0.8}])
def test_what_was_only_counted_is_not_taken_for_timed(budget: dict[str, Any]) -> None:
    counted = Latency(
        device="emulated-arm64:pi5", outcome="measured", kind="emulated", n=3,
        instructions=1400, float_instructions=1000, instruction_ratio=1.4,
    )  # fmt: skip
    rows = _row(), _row("tflite", latency=(counted,))
    timed, open_ = judge(_report(*rows), Budget.model_validate(budget)).checks
    assert (timed.outcome, open_.outcome) == ("pass", "not_run")
    assert open_.name.startswith("tflite w8a8 ")
    assert "max_instruction_ratio asks for them" in open_.why


@pytest.mark.parametrize(
    ("lost", "outcome"),
    [({"outcome": "failed"}, "fail"), ({"outcome": "not_run"}, "inconclusive")],
)
def test_integers_beside_a_float_artifact_that_failed_are_not_passed(
    lost: dict[str, Any], outcome: str
) -> None:
    alone = Latency(device="local", outcome="measured", n=100, wall_p50_ms=9.0)
    rows = (
        _row(scheme="float", latency=(Latency(device="local", reason="it broke", **lost),)),
        _row(latency=(alone,)),
    )
    gate = judge(_report(*rows), Budget(faster_than_float=True))
    assert gate.outcome == outcome
    assert outcome == "inconclusive" or "its float artifact, it broke" in gate.checks[0].why


def test_float_that_is_shipped_because_it_is_faster_passes_and_counts_as_measured() -> None:
    budget = Budget(faster_than_float=True, require=("onnx",))
    shipped = _report(_row(scheme="float"))
    shipped = shipped.model_copy(update={"layouts": (_layout("float", "float", "w8a8"),)})
    assert {c.name: c.outcome for c in judge(shipped, budget).checks} == {
        "onnx measured": "pass",
        "onnx is no slower than float": "pass",
    }
    # It is as large and as slow as float is, and its own operations are counted.
    for key, limit, outcome in (
        ("max_size_ratio", 0.6, "fail"),
        ("max_latency_ratio", 1.0, "pass"),
        ("max_drop_pp", 0.0, "pass"),
    ):
        check = _only(shipped, Budget.model_validate({key: limit}))
        assert (check.outcome, check.why) == (outcome, "float is shipped: why")
    assert judge(shipped, Budget(min_agreement=0.9)).outcome == "not_run"
    half = shipped.model_copy(update={"layouts": (_layout("float16", "float", "w8a8"),)})
    (open_question,) = judge(half, Budget(min_agreement=0.9)).checks
    assert (open_question.outcome, open_question.why) == ("not_run", "onnx ships float16")
    # float16 that was tried is no integer.
    assert not without_integers(_layout("float", "float", "float16"))
    # Where integers were not even tried, nothing excuses that they are missing.
    untried = shipped.model_copy(update={"layouts": (_layout("float", "float"),)})
    outcomes = {c.name: c.outcome for c in judge(untried, budget).checks}
    assert outcomes["onnx measured"] == "fail"


@pytest.mark.parametrize(("kind", "word"), [("host", "run"), ("interpreted", "interpreted")])
def test_what_was_interpreted_counts_and_is_said(kind: Kind, word: str) -> None:
    accuracy = Accuracy(outcome="measured", kind=kind, n=N, lost=0, gained=0, top1=0.9)
    report = _report(_row("coreml", accuracy=accuracy, latency=()))
    check = _only(report, Budget(require=("coreml",)))
    assert (check.outcome, f"was {word}," in check.why) == ("pass", True)
    assert ("coreml w8a8, interpreted |" in markdown(report)) == (kind == "interpreted")
    timed = judge(report, Budget(require=("coreml",), max_latency_ratio=1.0)).checks[0]
    assert (timed.name, timed.outcome) == ("coreml measured", "fail")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_transposes_per_block", 1.5),
        ("max_quantize_ops_per_block", 2.0),
        ("max_float_layers", 3),
    ],
)
def test_what_a_proof_counts_is_limited(key: str, value: float) -> None:
    proof = Proof(
        method="counted", integer_layers=7, expected_integer_layers=7, weighted_layers=10,
        transposes_per_block=1.5, quantize_ops_per_block=2.0, op_counts={},
    )  # fmt: skip
    report = _report(_row(proof=proof))
    for limit, outcome in ((value, "pass"), (value - 0.5, "fail")):
        check = _only(report, Budget.model_validate({key: limit}))
        assert (check.outcome, check.value, check.limit) == (outcome, value, limit)
        assert f"{value:g} counted, {limit:g} allowed" in check.why
    unproven = judge(_report(_row()), Budget.model_validate({key: 0}))
    assert [check.outcome for check in unproven.checks] == ["not_run", "inconclusive"]


def test_a_drop_on_the_limit_is_never_decided() -> None:
    check = paired_check("drop", 15, 5, N, 1.0, "the float model")
    assert check.outcome == "inconclusive"
    assert "no feasible number decides" in check.why


def test_not_run_never_passes() -> None:
    latency = Latency(device="local", outcome="not_run", reason="--no-bench")
    report = _report(_row(accuracy=NOT_RUN, latency=(latency,)))
    gate = judge(report, Budget(max_drop_pp=100, max_latency_ratio=100))
    outcomes = [check.outcome for check in gate.checks]
    assert outcomes == ["not_run", "inconclusive", "not_run", "inconclusive"]
    assert gate.outcome == "inconclusive"
    assert [check.why for check in gate.checks[::2]] == ["no macOS here", "--no-bench"]


def test_failed_measurements_never_pass() -> None:
    crashed = Accuracy(outcome="failed", reason="signal 4")
    rows = (_row("tflite", accuracy=crashed), _row("onnx"))
    gate = judge(_report(*rows), Budget(max_drop_pp=100))
    assert gate.outcome == "fail"
    assert "signal 4" in gate.checks[0].why


def test_a_required_runtime_that_is_missing_fails() -> None:
    check = _only(_report(_row("onnx")), Budget(require=("tflite",)))
    assert check.outcome == "fail"
    assert "no quantized artifact" in check.why
    only_float = _report(_row("tflite", "float"))
    assert _only(only_float, Budget(require=("tflite",))).outcome == "fail"


def test_a_required_runtime_that_was_not_run_fails() -> None:
    report = _report(_row(accuracy=NOT_RUN))
    check = _only(report, Budget(require=("onnx",)))
    assert check.outcome == "fail"
    assert "not_run, no macOS here" in check.why
    assert _only(_report(_row()), Budget(require=("onnx",))).outcome == "pass"


def test_a_required_runtime_needs_its_latency_only_where_it_is_asked() -> None:
    report = _report(_row(latency=()))
    assert judge(report, Budget(require=("onnx",))).outcome == "pass"
    assert judge(report, Budget(require=("onnx",), max_latency_ratio=2)).outcome == "fail"
    timed = Budget(require=("onnx",), baseline=BaselineBudget(max_latency_ratio=2))
    assert judge(report, timed).checks[0].outcome == "fail"


@pytest.mark.parametrize(
    ("limit", "clock", "outcome"),
    [
        (0.6, "wall", "pass"),
        (0.4, "wall", "fail"),
        (0.51, "wall", "inconclusive"),
        (0.6, "cpu", "fail"),
        (1.1, "cpu", "pass"),
    ],
)
def test_latency_is_judged_by_its_interval_and_clock(
    limit: float, clock: Any, outcome: str
) -> None:
    check = _only(_report(_row()), Budget(max_latency_ratio=limit, clock=clock))
    assert check.outcome == outcome


@pytest.mark.parametrize(("limit", "outcome"), [(0.28, "pass"), (0.27, "fail")])
def test_size_is_against_the_same_runtimes_float(limit: float, outcome: str) -> None:
    rows = (_row("onnx", "float"), _row("onnx"), _row("tflite", "float", size_bytes=10))
    check = _only(_report(*rows), Budget(max_size_ratio=limit))
    assert check.outcome == outcome
    assert check.value == pytest.approx(1100 / 4000)


def test_size_without_a_float_artifact_is_not_run() -> None:
    gate = judge(_report(_row("onnx")), Budget(max_size_ratio=9))
    assert [check.outcome for check in gate.checks] == ["not_run", "inconclusive"]
    assert gate.outcome == "inconclusive"


@pytest.mark.parametrize(
    ("share", "limit", "outcome"),
    [(1.0, 0.99, "pass"), (0.9, 0.99, "fail"), (0.995, 0.99, "inconclusive")],
)
def test_agreement_is_judged_by_its_interval(share: float, limit: float, outcome: str) -> None:
    report = _report(agreement=(_agreement(share),))
    check = _only(report, Budget(min_agreement=limit))
    assert check.outcome == outcome
    assert ("images would decide" in check.why) == (outcome == "inconclusive")


def test_agreement_across_profiles_has_its_own_limit() -> None:
    report = _report(agreement=(_agreement(0.9, "avx2"),))
    unasked = judge(report, Budget(min_agreement=0.99))
    assert [check.outcome for check in unasked.checks] == ["not_run"]
    assert "min_agreement_across_profiles" in unasked.checks[0].why
    assert unasked.outcome == "not_run"
    assert judge(report, Budget(min_agreement_across_profiles=0.5)).outcome == "pass"


def test_the_worst_answer_is_the_gates_word() -> None:
    rows = (_row("a"), _row("b", accuracy=_accuracy(60, 10)), _row("c", accuracy=_accuracy(12, 4)))
    budget = Budget(max_drop_pp=1.0)
    assert judge(_report(*rows), budget).outcome == "fail"
    assert judge(_report(rows[0], rows[2]), budget).outcome == "inconclusive"
    assert judge(_report(rows[0], _row("d", accuracy=NOT_RUN)), budget).outcome == "pass"


DROP = Budget(baseline=BaselineBudget(max_drop_pp=1.0))


def test_without_a_baseline_its_checks_are_open() -> None:
    check = _only(_report(_row()), DROP)
    assert check.outcome == "inconclusive"
    assert "--accept" in check.why


def test_a_baseline_that_is_not_asked_is_not_read() -> None:
    assert judge(_report(_row()), Budget(), _report()).checks == ()


@pytest.mark.parametrize(
    ("right", "shift", "outcome", "value"),
    [
        (900, 0, "pass", 0.0),
        (840, 0, "fail", 6.0),
        (892, 0, "inconclusive", 0.8),
        (900, 5, "pass", 0.0),  # five lost and five gained
    ],
)
def test_the_drop_against_a_baseline_is_paired(
    right: int, shift: int, outcome: str, value: float
) -> None:
    before = _report(_row(accuracy=_accuracy(bits=_bits(900))))
    now = _report(_row(accuracy=_accuracy(bits=_bits(right, shift))))
    check = _only(now, DROP, before)
    assert check.outcome == outcome
    assert check.value == pytest.approx(value)
    assert "against the baseline" in check.why


def test_other_images_cannot_be_compared() -> None:
    row = _row(accuracy=_accuracy(bits=_bits(900)))
    check = _only(_report(row), DROP, _report(row, evaluation="others"))
    assert check.outcome == "inconclusive"
    assert "other images" in check.why


def test_an_artifact_the_baseline_lacks_is_open() -> None:
    row = _row(accuracy=_accuracy(bits=_bits(900)))
    assert _only(_report(row), DROP, _report()).outcome == "inconclusive"
    unmeasured = _report(_row(accuracy=NOT_RUN))
    assert _only(_report(row), DROP, unmeasured).outcome == "inconclusive"


def test_what_was_not_run_does_not_pass_against_a_baseline() -> None:
    before = _report(_row(accuracy=_accuracy(bits=_bits(900))))
    assert _only(_report(_row(accuracy=NOT_RUN)), DROP, before).outcome == "not_run"


@pytest.mark.parametrize(("size", "outcome"), [(1100, "pass"), (1300, "fail")])
def test_size_against_a_baseline(size: int, outcome: str) -> None:
    budget = Budget(baseline=BaselineBudget(max_size_ratio=1.1))
    check = _only(_report(_row(size_bytes=size)), budget, _report(_row()))
    assert check.outcome == outcome
    assert check.value == pytest.approx(size / 1100)


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(0.5, "pass"), (0.9, "fail"), (0.6, "inconclusive")]
)
def test_latency_against_a_baseline_compares_ratios(ratio: float, outcome: str) -> None:
    budget = Budget(baseline=BaselineBudget(max_latency_ratio=1.2))
    check = _only(_report(_row(latency=(_latency(ratio),))), budget, _report(_row()))
    assert check.outcome == outcome
    assert check.value == pytest.approx(ratio / 0.5)


def test_every_device_is_held_against_the_baseline() -> None:
    budget = Budget(baseline=BaselineBudget(max_latency_ratio=1.1))
    before = _report(_row(latency=(_latency(0.5), _latency(0.3, device="ssh:pi"))))
    now = _report(_row(latency=(_latency(0.5, 0.01), _latency(0.9, device="ssh:pi"))))
    checks = judge(now, budget, before).checks
    assert [check.outcome for check in checks] == ["pass", "fail"]
    assert checks[1].name.endswith("latency on ssh:pi")


def test_a_device_that_cannot_run_it_does_not_undo_what_another_measured() -> None:
    cannot = Latency(device="cuda", outcome="not_run", reason="no way to a GPU", threads=1)
    row = _row(latency=(_latency(0.5), cannot))
    gate = judge(_report(row), Budget(require=("onnx",), max_latency_ratio=0.9))
    assert gate.outcome == "pass"
    alone = judge(
        _report(_row(latency=(cannot,))), Budget(require=("onnx",), max_latency_ratio=0.9)
    )
    assert alone.outcome == "fail"


def test_latency_of_another_device_is_open() -> None:
    budget = Budget(baseline=BaselineBudget(max_latency_ratio=1.2))
    before = _report(_row(latency=(_latency(0.5, device="phone"),)))
    assert _only(_report(_row()), budget, before).outcome == "inconclusive"


# --- devices that count, and what artifacts compute there -----------------------------------------


def _counted(count: int, ratio: float = 0.4, device: str = "emulated-arm64:pi5") -> Latency:
    return Latency(
        device=device, outcome="measured", kind="emulated", n=3, instructions=count,
        float_instructions=round(count / ratio), instruction_ratio=ratio,
    )  # fmt: skip


@pytest.mark.parametrize(("limit", "outcome"), [(0.45, "pass"), (0.4, "pass"), (0.39, "fail")])
def test_counted_instructions_need_no_interval(limit: float, outcome: str) -> None:
    row = _row(latency=(_latency(0.5), _counted(400)))
    check = _only(_report(row), Budget(max_instruction_ratio=limit))
    assert (check.outcome, check.value) == (outcome, 0.4)
    assert "400 instructions, float 1000" in check.why


@pytest.mark.parametrize(("count", "outcome"), [(990, "pass"), (1010, "pass"), (1011, "fail")])
def test_instructions_may_grow_by_one_per_cent(count: int, outcome: str) -> None:
    budget = Budget(baseline=BaselineBudget(max_instruction_ratio=1.01))
    before = _report(_row(latency=(_counted(1000),)))
    check = _only(_report(_row(latency=(_counted(count),))), budget, before)
    assert (check.outcome, check.value) == (outcome, count / 1000)


def test_counts_of_another_device_are_open() -> None:
    budget = Budget(baseline=BaselineBudget(max_instruction_ratio=1.01))
    before = _report(_row(latency=(_counted(1000, device="emulated-arm64:pi4"),)))
    now = _report(_row(latency=(_counted(1000),)))
    assert _only(now, budget, before).outcome == "inconclusive"


def test_a_count_that_failed_fails_and_counts_are_no_times() -> None:
    failed = Latency(device="emulated-arm64:pi5", outcome="failed", kind="emulated", reason="crash")
    budget = Budget(max_instruction_ratio=0.5)
    assert _only(_report(_row(latency=(failed,))), budget).outcome == "fail"
    times = judge(
        _report(_row(latency=(_latency(0.5), _counted(400)))), Budget(max_latency_ratio=1)
    )
    assert [check.name for check in times.checks] == ["onnx w8a8 latency on local"]
    nothing = _only(_report(_row()), Budget(max_instruction_ratio=0.5))
    assert nothing.outcome == "inconclusive"


@pytest.mark.parametrize(
    ("share", "limit", "outcome"),
    [(1.0, 0.96, "pass"), (1.0, 0.99, "inconclusive"), (0.9, 0.99, "fail")],
)
def test_a_device_gives_the_classes_of_the_host(share: float, limit: float, outcome: str) -> None:
    found = Parity(
        device="emulated-arm64:pi5", runtime="tflite", scheme="w8a8", outcome="measured",
        kind="emulated", against="host", n=100, top1_agreement=share, max_abs_logit_diff=0.02,
        largest_flip_margin=None if share == 1 else 0.01,
    )  # fmt: skip
    report = _report(_row()).model_copy(update={"parity": (found,)})
    check = _only(report, Budget(min_device_agreement=limit))
    assert (check.outcome, check.value) == (outcome, share)


def test_junit_and_markdown_carry_every_check() -> None:
    rows = (_row("a"), _row("b", accuracy=_accuracy(60, 10)), _row("c", accuracy=_accuracy(12, 4)),
            _row("d", accuracy=NOT_RUN))  # fmt: skip
    report = _report(*rows)
    gate = judge(report, Budget(max_drop_pp=1.0))
    xml = junit(gate).decode()
    assert (xml.count("<testcase"), xml.count("<failure"), xml.count("<error")) == (4, 1, 1)
    assert xml.count("<skipped") == 1
    text = markdown(report.model_copy(update={"gate": gate}))
    assert text.startswith("## convnext-edge gate: ❌ fail")
    for check in gate.checks:
        assert f"| {check.name} |" in text
