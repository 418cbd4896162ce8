"""Two reports built in code: one in which nearly everything was measured, and one that is poor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from pipeline.records import (
    Accuracy,
    Agreement,
    Breakdown,
    Candidate,
    CurvePoint,
    Finetuning,
    Latency,
    Layout,
    OpKind,
    Profile,
    Proof,
    Scheme,
    Training,
)
from reports.document import (
    ArtifactRow,
    Calibration,
    Check,
    Data,
    DataSource,
    FloatResult,
    Gate,
    Host,
    Model,
    Report,
    Site,
)

DEVICES = ("local", "edge box <arm64> | rack/3")
NO_APPLE = "coremltools runs models on macOS only; this host is Linux & has no <Core ML>"
CRASHED = "the worker died: 'Illegal instruction' | signal 4"
SUSPICIOUS = "artifacts/<script>alert('x')</script>/tflite.tflite"

WORST = "stages.1.blocks.1.res_out"
HELPED = "stages.0.blocks.1.dw_out"
ROLES = ("dw_in", "dw_out", "ln_out", "gelu_in", "gelu_out", "res_out")

# Runtime to its profile, float and quantized wall p50, sizes in bytes, drop in pp.
_RUNTIMES: dict[str, tuple[Profile, float, float, int, int, float]] = {
    "onnx": ("avx2", 61.3, 33.8, 114_400_000, 29_100_000, 0.12),
    "openvino": ("avx2", 54.9, 21.7, 114_900_000, 29_600_000, 0.16),
    "tflite": ("full", 148.2, 171.4, 114_300_000, 29_000_000, 0.24),
    "coreml": ("full", 0.0, 0.0, 114_500_000, 29_200_000, 0.0),
}


def _accuracy(runtime: str, scheme: Scheme, drop: float) -> Accuracy:
    if runtime == "coreml":
        return Accuracy(outcome="not_run", reason=NO_APPLE)
    if scheme == "float":
        return Accuracy(
            outcome="measured", kind="host", n=10_000, top1=0.8212, drop_pp=0.0,
            drop_ci95_pp=(-0.04, 0.04), agreement_with_float=1.0, lost=0, gained=0,
        )  # fmt: skip
    return Accuracy(
        outcome="measured", kind="host", n=10_000, top1=0.8212 - drop / 100, drop_pp=drop,
        drop_ci95_pp=(drop - 0.21, drop + 0.23), agreement_with_float=0.9731, sqnr_db=24.6,
        lost=121, gained=109,
    )  # fmt: skip


def _latency(runtime: str, scheme: Scheme, device: str, times: tuple[float, float]) -> Latency:
    if runtime == "coreml":
        return Latency(device=device, outcome="not_run", reason=NO_APPLE)
    if runtime == "tflite" and device != "local" and scheme == "w8a8":
        return Latency(device=device, outcome="failed", reason=CRASHED)
    slower = 1.0 if device == "local" else 3.7
    base, own = (slower * value for value in times)
    wall = base if scheme == "float" else own
    # One row waited for a processor: its wall time lies far above its CPU time.
    cpu = wall / (1.5 if runtime == "openvino" and scheme == "w8a8" else 1.02)
    quantized = scheme != "float"
    return Latency(
        device=device, outcome="measured", kind="host" if device == "local" else "emulated",
        threads=1, n=50 if runtime == "tflite" else 200, wall_p50_ms=wall,
        wall_p90_ms=None if runtime == "tflite" else wall * 1.08, cpu_p50_ms=cpu,
        float_wall_p50_ms=base if quantized else None,
        float_cpu_p50_ms=base / 1.02 if quantized else None,
        speedup=base / own if quantized else None,
        samples_file=f"samples/{device[:4]}-{runtime}-{scheme}.json", load_ms=212.0, first_ms=88.4,
        peak_memory_bytes=412_000_000, energy_mj=81.25,
        harness_wall_p50_ms=0.0021, harness_cpu_p50_ms=0.0020,
        versions={runtime: "1.2.3"},
    )  # fmt: skip


def _row(runtime: str, scheme: Scheme) -> ArtifactRow:
    profile, slow, fast, large, small, drop = _RUNTIMES[runtime]
    quantized = scheme != "float"
    path = f"artifacts/{runtime}-{scheme}"
    return ArtifactRow(
        runtime=runtime, scheme=scheme, placement="all" if quantized else "none",
        graph_form="channels-last", path=SUSPICIOUS if runtime == "tflite" and quantized else path,
        sha256=f"{runtime}{scheme}".encode().hex().ljust(64, "0"),
        size_bytes=small if quantized else large,
        accuracy=_accuracy(runtime, scheme, drop),
        latency=tuple(_latency(runtime, scheme, device, (slow, fast)) for device in DEVICES),
        profile=profile if quantized else None, gelu="tanh" if quantized else "erf",
        proof=None if runtime == "coreml" else Proof(
            method="the runtime's own profile of one inference",
            integer_layers=(58 if runtime == "onnx" else 59) * quantized,
            expected_integer_layers=59 * quantized, weighted_layers=59,
            transposes_per_block=0.0, quantize_ops_per_block=2.25 * quantized,
            op_counts={"Conv": 23, "MatMul": 36},
        ),
    )  # fmt: skip


def _agreement(scheme: Scheme) -> tuple[Agreement, ...]:
    known = {runtime: values[0] for runtime, values in _RUNTIMES.items() if runtime != "coreml"}
    quantized = scheme != "float"
    return tuple(
        Agreement(
            a=a, b=b, scheme=scheme, kind="host", n=10_000,
            profile_a=known[a] if quantized else None, profile_b=known[b] if quantized else None,
            top1_agreement=0.9874 if quantized and known[a] != known[b] else 0.9996,
            max_abs_logit_diff=0.214 if quantized else 0.0000231,
        )
        for a, b in itertools.combinations(known, 2)
    )  # fmt: skip


@pytest.fixture
def full_report() -> Report:
    """Four runtimes, float and w8a8, two devices; coreml was not run, and one worker died."""
    return Report(
        host=Host(
            cpu="Example CPU @ 2.40 GHz", isa=("avx2", "fma"), os="Linux 6.1", python="3.11.9",
            packages={"onnxruntime": "1.20.0", "openvino": "2025.0.0", "torch": "2.6.0"},
        ),
        model=Model(
            checkpoint_sha256="ab12" * 16, dialect="timm", variant="convnext_tiny",
            params=28_589_128, macs=4_456_000_000, input_size=224, classes=1000,
        ),
        data=Data(
            calibration=DataSource(source="photos/train", n=512, sha256="c1" * 32),
            evaluation=DataSource(source="photos/val & more", n=10_000, sha256="e2" * 32),
        ),
        float_result=FloatResult(top1=0.8212, n=10_000),
        artifacts=tuple(_row(r, s) for r in _RUNTIMES for s in ("float", "w8a8")),
        agreement=(*_agreement("float"), *_agreement("w8a8")),
        gate=Gate(
            outcome="inconclusive",
            checks=(
                Check(name="drop: onnx", outcome="pass", value=0.35, limit=0.5,
                      why="the interval's upper end lies below the limit"),
                Check(name="drop: tflite", outcome="inconclusive", value=0.47, limit=0.4,
                      why="the interval holds the limit; about 14 000 images would decide"),
                Check(name="speed-up: coreml", outcome="not_run", value=None, limit=1.5,
                      why=NO_APPLE),
            ),
        ),
    )  # fmt: skip


@pytest.fixture
def poor_report(full_report: Report) -> Report:
    """Two runtimes exported, nothing evaluated, nothing timed, no budget."""
    accuracy = Accuracy(outcome="not_run", reason="no labelled images: pass --eval <folder>")
    latency = Latency(device="local", outcome="not_run", reason="--no-bench was given")
    rows = tuple(
        row.model_copy(update={"accuracy": accuracy, "latency": (latency,), "proof": None})
        for row in full_report.artifacts
        if row.runtime in {"onnx", "openvino"}
    )
    return full_report.model_copy(
        update={
            "data": Data(calibration=full_report.data.calibration, evaluation=None),
            "float_result": FloatResult(top1=None, n=None),
            "artifacts": rows,
            "agreement": (),
            "gate": Gate(outcome="not_run", checks=()),
        }
    )


def site(name: str, sqnr_db: float, plain_sqnr_db: float, *, place: int = 0) -> Site:
    """Make up a site; `place` varies what is not said."""
    return Site(
        site=name, role=name.rpartition(".")[2], range_method="mse", strength=0.75,
        minimum=-3.25 - place / 64, maximum=5.5, clipped=0.00002, spread_before=42.5,
        spread_after=1.625, sqnr_db=sqnr_db, plain_sqnr_db=plain_sqnr_db, scale=0.03125,
        zero_point=-24, bits=8,
    )  # fmt: skip


def calibration(depths: tuple[int, ...], special: dict[str, tuple[float, float]]) -> Calibration:
    """Make up a calibration of a network: 38 to 41 dB everywhere but at special sites."""
    names = ["stem.image", "stem.stem_out"]
    for stage, depth in enumerate(depths):
        if stage:
            names += [f"stages.{stage}.downsample.downsample_{end}" for end in ("in", "out")]
        names += [f"stages.{stage}.blocks.{block}.{role}" for block in range(depth)
                  for role in ROLES]  # fmt: skip
    names.append("head.head_in")
    return Calibration(
        settings={"method": "search", "rounding": "auto", "rescale": True, "correct_bias": False},
        scheme="w8a8", placement="all", sample=96,
        sites=tuple(
            site(name, *special.get(name, (38.0 + place % 4, 36.0 + place % 4)), place=place)
            for place, name in enumerate(names)
        ),
    )  # fmt: skip


@pytest.fixture
def calibrated_report(full_report: Report) -> Report:
    """The full report with a calibration: one bad site, and one that would be without it."""
    special = {WORST: (21.5, 19.25), HELPED: (37.5, 8.5)}
    return full_report.model_copy(update={"calibration": calibration((2, 2), special)})


@pytest.fixture
def deep_report(full_report: Report) -> Report:
    """The largest network: a bad site beside others that stand out less, and one without noise."""
    special = {
        "stem.image": (300.0, 300.0), "stages.1.downsample.downsample_in": (29.0, 28.0),
        "stages.2.blocks.12.gelu_in": (9.5, -31.0), "stages.2.blocks.13.gelu_in": (30.0, 20.0),
        **{f"stages.2.blocks.{block}.res_out": (28.0, 12.0) for block in (24, 25, 26)},
    }  # fmt: skip
    return full_report.model_copy(update={"calibration": calibration((3, 3, 27, 3), special)})


def _judged(sqnr_db: float, upper: float) -> Accuracy:
    return Accuracy(
        outcome="measured",
        kind="host",
        n=5000,
        top1=0.7,
        drop_pp=0.1,
        drop_ci95_pp=(-0.2, upper),
        agreement_with_float=0.99,
        sqnr_db=sqnr_db,
    )


def _curve(count: int) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            step=index,
            epoch=index / 50,
            loss=0.001,
            kl=0.0002,
            sqnr_db=36 + index / 40,
            top1=0.81,
            rate=0.02 * (1 - index / count),
            oscillating=0.0123,
            frozen=0.004,
        )
        for index in range(1, count + 1)
    )


@pytest.fixture
def training() -> Training:
    return Training(
        settings=Finetuning(epochs=2),
        source="cifar <10>",
        n=50_000,
        sha256="0" * 64,
        updates=1562,
        seconds=904.0,
        images_per_second=110.6,
        device="CPU, 2 threads",
        before=_judged(36.5, 0.34),
        after=_judged(40.1, 0.21),
        curve=_curve(100),
    )


@pytest.fixture
def trained_report(full_report: Report, training: Training) -> Report:
    """The full one, of a model whose integers were trained."""
    return full_report.model_copy(update={"training": training})


def _candidate(scheme: Scheme, form: str, ratio: float, **more: Any) -> Candidate:
    return Candidate(
        scheme=scheme, placement="none" if scheme == "float" else "pointwise", graph_form=form,
        outcome="measured", samples=72, wall_p50_ms=90 * ratio, cpu_p50_ms=89 * ratio,
        cpu_ratio=ratio, cpu_ratio_ci95=(ratio - 0.02, ratio + 0.02), **more,
    )  # fmt: skip


@pytest.fixture
def tuned_report(full_report: Report) -> Report:
    """Layouts measured, given up and taken by default, and where the time goes."""
    linear, conv = "channels-last linear", "1x1 convolution"
    common: dict[str, Any] = {"isa": "vnni", "device": "local", "clock": "cpu"}
    layouts = (
        Layout(
            runtime="onnx", source="measured", reason="0.44 (0.42 to 0.46) of the best float one's",
            scheme="w8a8", placement="pointwise", graph_form=linear, float_form=conv,
            candidates=(
                _candidate("w8a8", linear, 0.44, heat=1, accuracy=_judged(44.0, 0.2)),
                _candidate("float", conv, 1.0, heat=1),
                _candidate("w8a8", conv, 0.7),
                Candidate(
                    scheme="float", placement="none", graph_form=linear, outcome="failed",
                    reason=CRASHED,
                ),
            ), **common,
        ),
        Layout(
            runtime="openvino", source="measured", reason="not shown to be faster",
            scheme="float", placement=None, graph_form=conv, float_form=conv,
            candidates=(_candidate("float", conv, 1.0), _candidate("w8a8", conv, 1.3)), **common,
        ),
        Layout(
            runtime="tflite", source="default", reason="its artifacts are for arm", isa="arm",
            scheme="w8a8", placement="pointwise-io", graph_form="NHWC", float_form="NHWC",
        ),
    )  # fmt: skip
    kinds: dict[OpKind, float] = {
        "pointwise": 15.9, "gelu": 6.6, "quantize": 3.6, "convolution": 3.0, "layernorm": 2.5,
        "depthwise": 2.5, "layout": 2.0, "add": 1.2, "other": 0.1,
    }  # fmt: skip
    breakdowns = (
        Breakdown(
            runtime="onnx", scheme="w8a8", device="local", outcome="measured", method="its own",
            inferences=15, ms=kinds, ops=dict.fromkeys(kinds, 18), floor_ms=13.5,
            macs_per_second=4e11, bytes_per_second=1.2e10, bound_ms=11.0,
        ),
        Breakdown(
            runtime="onnx", scheme="float", device="local", outcome="measured", method="its own",
            inferences=15, ms={"pointwise": 59.0, "other": 20.0}, ops={"pointwise": 36, "other": 2},
        ),
        Breakdown(
            runtime="coreml", scheme="w8a8", device="local", outcome="not_run", reason=NO_APPLE
        ),
    )  # fmt: skip
    return full_report.model_copy(update={"layouts": layouts, "breakdowns": breakdowns})
