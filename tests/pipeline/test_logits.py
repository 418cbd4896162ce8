"""What follows from logits, by hand."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from pipeline.logits import agreement, compare, parity
from pipeline.records import Export
from pipeline.statistics import paired_difference_interval

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


def test_agreement_is_of_the_labels_and_of_the_largest_difference() -> None:
    found = agreement((_export("onnx"), FLOAT), (_export("tflite"), 3 * OTHER))
    assert (found.a, found.b, found.n) == ("onnx", "tflite", 5)
    assert found.top1_agreement == pytest.approx(2 / 5)
    assert found.max_abs_logit_diff == pytest.approx(3)


def test_a_device_s_logits_are_held_against_the_host_s() -> None:
    error = np.full_like(FLOAT, 0.25)
    # What all classes share is no lead.
    found = parity(_export("tflite"), OTHER + 1, FLOAT + 1, error=error, against="host")
    assert (found.n, found.against) == (5, "host")
    assert found.top1_agreement == pytest.approx(2 / 5)
    assert found.max_abs_logit_diff == 1
    # Six of fifteen values differ by 1.
    assert found.rms_logit_diff == pytest.approx((6 / 15) ** 0.5)
    assert found.diff_over_error == pytest.approx((6 / 15) ** 0.5 / 0.25)
    assert found.largest_flip_margin == 1


def test_logits_that_are_the_same_flip_nothing() -> None:
    nothing = np.zeros_like(FLOAT)
    found = parity(_export("tflite"), FLOAT, FLOAT, error=nothing, against="reference")
    assert (found.top1_agreement, found.max_abs_logit_diff) == (1, 0)
    assert found.largest_flip_margin is None
    assert found.diff_over_error is None
