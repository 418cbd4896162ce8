"""Intervals and decibels against what is known of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from pipeline.statistics import (
    FEASIBLE_IMAGES,
    MINIMUM_SAMPLES,
    images_to_decide,
    paired_difference_interval,
    percentile,
    proportion_interval,
    ratio_interval,
    sqnr_db,
)

Z = 1.959964
CASES = [(3, 1, 40), (1, 7, 21), (12, 0, 100), (0, 5, 540), (40, 35, 1000), (121, 109, 10_000)]


def _score(delta: float, lost: int, gained: int, n: int) -> float:
    """Return Tango's statistic, its nuisance parameter found by search, not by his formula."""

    def minus_likelihood(p21: float) -> float:
        cells = ((lost, p21 + delta), (gained, p21), (n - lost - gained, 1 - 2 * p21 - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    ends = (max(0.0, -delta), (1 - delta) / 2)
    found = optimize.minimize_scalar(
        minus_likelihood, bounds=ends, method="bounded", options={"xatol": 1e-12}
    )
    candidates = [float(found.x), *ends]
    p21 = min(candidates, key=minus_likelihood)
    return (lost - gained - n * delta) / math.sqrt(n * (2 * p21 + delta * (1 - delta)))


@pytest.mark.parametrize(("lost", "gained", "n"), CASES)
def test_the_score_at_each_bound_is_the_quantile(lost: int, gained: int, n: int) -> None:
    low, high = paired_difference_interval(lost, gained, n)
    assert low < (lost - gained) / n < high
    assert _score(low, lost, gained, n) == pytest.approx(Z, abs=2e-3)
    assert _score(high, lost, gained, n) == pytest.approx(-Z, abs=2e-3)


def test_the_published_example() -> None:
    # Airway data of Fagerland, Lydersen and Laake, Statistics in Medicine 33, 2014, table V.
    assert paired_difference_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("n", [1, 20, 540, 50_000])
def test_no_discordant_pair_still_leaves_an_interval(n: int) -> None:
    bound = Z**2 / (n + Z**2)  # the score equation solved by hand
    assert paired_difference_interval(0, 0, n) == pytest.approx((-bound, bound), rel=1e-4)


@pytest.mark.parametrize(("lost", "gained", "n"), [*CASES, (0, 0, 7), (7, 0, 7)])
def test_exchanging_the_classifiers_mirrors_the_interval(lost: int, gained: int, n: int) -> None:
    low, high = paired_difference_interval(lost, gained, n)
    mirrored = paired_difference_interval(gained, lost, n)
    assert mirrored == pytest.approx((-high, -low), abs=1e-8)


def test_more_confidence_is_wider_and_more_images_narrower() -> None:
    low, high = paired_difference_interval(5, 3, 100)
    wide_low, wide_high = paired_difference_interval(5, 3, 100, confidence=0.99)
    tight_low, tight_high = paired_difference_interval(50, 30, 1000)
    assert wide_low < low < tight_low < tight_high < high < wide_high


def test_bounds_stay_inside_one() -> None:
    assert paired_difference_interval(9, 0, 9)[1] == 1.0
    assert paired_difference_interval(0, 9, 9)[0] == -1.0
    assert -1 < paired_difference_interval(9, 0, 9)[0] < 1


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(lost: int, gained: int, n: int) -> None:
    with pytest.raises(ValueError, match="need n >= 1"):
        paired_difference_interval(lost, gained, n)


def test_wilson_at_the_ends_by_hand() -> None:
    low, high = proportion_interval(50, 50)
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(50 / (50 + Z**2), rel=1e-5)
    assert proportion_interval(0, 50)[1] == pytest.approx(Z**2 / (50 + Z**2), rel=1e-5)


@pytest.mark.parametrize("rank", sorted(MINIMUM_SAMPLES))
def test_a_percentile_needs_its_samples(rank: int) -> None:
    needed = MINIMUM_SAMPLES[rank]
    assert percentile([1.0] * (needed - 1), rank) is None
    assert percentile([float(i) for i in range(needed)], rank) == pytest.approx(
        rank / 100 * (needed - 1)
    )


def test_minimum_samples_follow_the_rules_they_cite() -> None:
    assert 2 * 0.5 ** MINIMUM_SAMPLES[50] < 0.002
    assert MINIMUM_SAMPLES[90] < MINIMUM_SAMPLES[95] < MINIMUM_SAMPLES[99]


def test_sqnr_by_hand() -> None:
    reference = np.array([[3.0, 4.0]], np.float32)  # power 25
    other = np.array([[3.0, 4.5]], np.float32)  # noise 0.25
    assert sqnr_db(reference, other) == pytest.approx(20.0)
    assert sqnr_db(reference, np.zeros_like(reference)) == pytest.approx(0.0)


def test_sqnr_of_equals_and_of_silence_is_missing() -> None:
    x = np.array([1.0, 2.0])
    assert sqnr_db(x, x) is None
    assert sqnr_db(np.zeros(2), x) is None


def test_images_to_decide_is_close_to_the_smallest() -> None:
    # Half the width is 1 / sqrt(m) around 0: at or below 0.01 from 10,000 on.
    def interval(m: int) -> tuple[float, float]:
        return -1 / math.sqrt(m), 1 / math.sqrt(m)

    needed = images_to_decide(interval, 100, 0.01)
    assert needed is not None
    assert 10_000 <= needed <= 10_101
    below = images_to_decide(lambda m: (0.5 - 1 / math.sqrt(m), 1.0), 3, 0.4)
    assert below is not None
    assert 100 <= below <= 102


@pytest.mark.parametrize(("lost", "gained", "n", "limit"), [(4, 2, 540, 0.01), (8, 1, 300, 0.01)])
def test_the_number_of_images_decides(lost: int, gained: int, n: int, limit: float) -> None:
    def at(m: int) -> tuple[float, float]:
        return paired_difference_interval(round(lost * m / n), round(gained * m / n), m)

    assert at(n)[0] < limit < at(n)[1]
    needed = images_to_decide(at, n, limit)
    assert needed is not None
    assert needed > n
    low, high = at(needed)
    assert high <= limit or low >= limit


def test_an_estimate_on_the_limit_is_never_decided() -> None:
    assert images_to_decide(lambda m: (0.1 - 1 / m, 0.1 + 1 / m), 50, 0.1) is None
    far = images_to_decide(lambda m: (0.0, 1 / m), 50, 0.9 / FEASIBLE_IMAGES)
    assert far is None


def test_the_ratio_of_medians_lies_in_its_interval() -> None:
    rng = np.random.default_rng(3)
    slow, fast = (2 + rng.random(100)).tolist(), (1 + rng.random(100) / 10).tolist()
    found = ratio_interval(slow, fast, per_round=5)
    assert found is not None
    ratio, low, high = found
    assert ratio == pytest.approx(float(np.median(slow) / np.median(fast)))
    assert low < ratio < high
    assert ratio_interval(slow, fast, per_round=5) == (ratio, low, high)


def test_the_ratio_of_constants_is_exact() -> None:
    assert ratio_interval([3.0] * 10, [2.0] * 10, per_round=5) == (1.5, 1.5, 1.5)


def test_a_ratio_needs_samples_and_something_to_divide_by() -> None:
    assert ratio_interval([3.0] * 4, [2.0] * 4, per_round=2) is None
    assert ratio_interval([3.0] * 10, [0.0] * 10, per_round=5) is None


def test_samples_of_one_turn_are_alike_and_widen_the_interval() -> None:
    # Eight turns of nine: noise that lasts a turn counts as eight observations, not as 72.
    noise = np.random.default_rng(1).normal(0, 0.1, 8)
    slow = np.repeat(2 + noise, 9).tolist()
    fast = [1.0] * 72
    together = ratio_interval(slow, fast, per_round=9)
    apart = ratio_interval(slow, fast, per_round=1)
    assert together is not None
    assert apart is not None
    assert together[2] - together[1] > 1.5 * (apart[2] - apart[1])
