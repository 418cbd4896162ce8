"""What follows from logits, by hand."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline.compare import agreement, compare
from pipeline.records import Export, Kind
from pipeline.statistics import paired_difference_interval
from pipeline.verify import agreement_stage

LABELS = np.array([0, 1, 2, 0, 1])
FLOAT = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0]]  # right, right, right, wrong, wrong
OTHER = np.eye(3, dtype=np.float32)[[0, 2, 0, 0, 0]]  # right, lost, lost, gained, wrong


def _export(runtime: str) -> Export:
    return Export(
        runtime=runtime,
        scheme="w8a8",
        placement="pointwise",
        graph_form="one",
        gelu="erf",
        profile="full",
    )


def test_a_drop_is_what_was_lost_less_what_was_gained() -> None:
    found = compare(FLOAT, OTHER, LABELS)
    assert (found.n, found.lost, found.gained) == (5, 2, 1)
    assert found.top1 == pytest.approx(2 / 5)
    assert found.drop_pp == pytest.approx(100 * 1 / 5)
    low, high = paired_difference_interval(2, 1, 5)
    assert found.drop_ci95_pp == pytest.approx((100 * low, 100 * high))
    assert found.agreement_with_float == pytest.approx(2 / 5)
    # Three rows differ, each in two values by 1; the signal is five ones.
    assert found.sqnr_db == pytest.approx(10 * np.log10(5 / 6))
    bits = np.frombuffer(base64.b64decode(str(found.correct_bits)), np.uint8)
    assert np.unpackbits(bits, count=5).tolist() == [1, 0, 0, 1, 0]


def test_the_same_logits_lose_nothing_and_have_no_noise() -> None:
    found = compare(FLOAT, FLOAT, LABELS, "interpreted")
    assert found.kind == "interpreted"
    assert (found.lost, found.gained, found.drop_pp) == (0, 0, 0)
    assert found.agreement_with_float == 1
    assert found.sqnr_db is None


def test_a_difference_is_held_against_the_better_one_s_error() -> None:
    near, far = FLOAT + np.float32(0.5), FLOAT - np.float32(2)
    pair = (_export("onnx"), near), (_export("tflite"), far)
    found = agreement(*pair, {"onnx": FLOAT, "tflite": FLOAT})
    assert found.rms_logit_diff == pytest.approx(2.5)
    assert found.diff_over_error == pytest.approx(2.5 / 0.5)
    assert agreement(*pair, {"tflite": FLOAT}).diff_over_error == pytest.approx(2.5 / 2)
    assert agreement(*pair).diff_over_error is None
    # Where nothing is lost there is nothing to hold it against.
    assert agreement((_export("onnx"), FLOAT), pair[1], {"onnx": FLOAT}).diff_over_error is None


@pytest.mark.parametrize(("a", "b"), [("host", "interpreted"), ("emulated", "host")])
def test_an_agreement_is_of_the_kind_that_is_further_from_a_device(
    a: Kind, b: Kind, tmp_path: Path
) -> None:
    given = []
    for name, kind in (("onnx", a), ("coreml", b)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "logits.npy", FLOAT)
        folder = str(tmp_path / name)
        given.append({"export": asdict(_export(name)), "kind": kind, "folder": folder})
    (row,) = agreement_stage(given, str(tmp_path), lambda *_: None)
    assert (row["a"], row["b"]) == ("onnx", "coreml")
    assert row["kind"] == next(kind for kind in (a, b) if kind != "host")


def test_agreement_is_of_the_labels_and_of_the_largest_difference() -> None:
    found = agreement((_export("onnx"), FLOAT), (_export("tflite"), 3 * OTHER))
    assert (found.a, found.b, found.n) == ("onnx", "tflite", 5)
    assert found.top1_agreement == pytest.approx(2 / 5)
    assert found.max_abs_logit_diff == pytest.approx(3)
