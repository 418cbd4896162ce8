"""Statistics of paired outcomes, of logits and of samples.

In: arrays and counts. Out: intervals, decibels, percentiles. Derived from raw results every time;
nothing here is stored in place of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

FEASIBLE_IMAGES = 10_000_000
MINIMUM_SAMPLES = {50: 10, 90: 64, 95: 130, 99: 662}
"""Samples below which a percentile says nothing: MLPerf Inference's early-stopping rule for 90 and
above; for the median, 10 bound it from both sides at 99.8 % (2 * 0.5**10)."""


def paired_difference_interval(
    lost: int, gained: int, n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Tango's score interval for a difference of paired proportions.

    The difference is (lost - gained) / n: `lost` counts images only the first of two classifiers
    gets right, `gained` those only the second does. The interval does not collapse when no pair is
    discordant.

    Args:
        lost: Discordant pairs in the first's favour.
        gained: Discordant pairs in the second's favour.
        n: All pairs.
        confidence: Coverage.

    Returns:
        Lower and upper bound, in [-1, 1].

    Raises:
        ValueError: The counts do not fit.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for
        the paired-sample design", Statistics in Medicine 17, 1998, 891-908.
    """
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        msg = f"lost {lost} and gained {gained} of n {n}: need n >= 1 and lost + gained <= n"
        raise ValueError(msg)
    from scipy import optimize, stats  # half a second that a run without new results need not wait

    z = float(stats.norm.ppf(0.5 + confidence / 2))
    estimate = (lost - gained) / n

    def score(delta: float) -> float:
        a = 2.0 * n
        b = (2 * n - lost + gained) * delta - lost - gained
        c = -gained * delta * (1 - delta)
        nuisance = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * nuisance + delta * (1 - delta))
        distance = lost - gained - n * delta
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def solve(target: float, low: float, high: float) -> float:
        # Bounded: at the ends the score is infinite, and brentq needs finite values.
        def bounded(delta: float) -> float:
            return float(np.clip(score(delta), -1e9, 1e9)) - target

        if bounded(low) * bounded(high) > 0:
            return low if abs(bounded(low)) < abs(bounded(high)) else high
        return float(optimize.brentq(bounded, low, high, xtol=1e-12))

    tiny = 1e-12
    lower = -1.0 if estimate <= -1 else solve(z, -1 + tiny, estimate - tiny * (estimate > -1))
    upper = 1.0 if estimate >= 1 else solve(-z, estimate + tiny, 1 - tiny)
    return lower, upper


def proportion_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for one proportion, hits / n."""
    from scipy import stats

    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def images_to_decide(
    interval: Callable[[int], tuple[float, float]], n: int, limit: float
) -> int | None:
    """Estimate how many images would bring an interval to one side of a limit.

    Args:
        interval: Number of images to interval, at the rates seen so far.
        n: Images so far, at least 1.
        limit: The bound.

    Returns:
        A number close to the smallest that decides (within 1 %), or None where the estimate lies
        so close to the limit that no feasible number does.
    """

    def decided(count: int) -> bool:
        low, high = interval(count)
        return high <= limit or low >= limit

    high = n
    while not decided(high):
        high *= 2
        if high > FEASIBLE_IMAGES:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def sqnr_db(reference: Floats, other: Floats) -> float | None:
    """Return 10 log10(sum reference^2 / sum (reference - other)^2) over all values.

    Args:
        reference: Float logits, any shape.
        other: The same shape.

    Returns:
        Decibels, or None where the two are equal (no noise) or the reference is all zero.
    """
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - other).sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def divergence(reference: Floats, other: Floats) -> float:
    """Return the mean Kullback-Leibler divergence of the classes' probabilities, in nats.

    Args:
        reference: Float logits (n, classes), whose softmax is the distribution that is departed
            from.
        other: The same shape.
    """
    from scipy.special import log_softmax  # half a second that most runs need not wait

    p, q = (log_softmax(x.astype(np.float64), axis=1) for x in (reference, other))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def percentile(samples: Sequence[float], rank: int) -> float | None:
    """Return a percentile, or None with fewer samples than `MINIMUM_SAMPLES` asks for."""
    if len(samples) < MINIMUM_SAMPLES[rank]:
        return None
    return float(np.percentile(samples, rank))


def ratio_interval(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    per_round: int,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float, float] | None:
    """Return the ratio of two medians with a 95 % interval.

    The two took turns, `per_round` samples at a time, so samples of one round are alike and the two
    rounds of one turn saw the same noise: whole turns are resampled, both sides together.

    Args:
        numerator: Raw samples in the order taken.
        denominator: As many, of the same turns.
        per_round: Samples per turn.
        seed: Of the resampling.
        draws: How many resamples.

    Returns:
        The ratio, its lower and its upper bound; None with too few samples for a median or where
        the denominator is 0.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 8 (blocks).
    """
    a, b = (np.asarray(x, np.float64).reshape(-1, per_round) for x in (numerator, denominator))
    if min(a.size, b.size) < MINIMUM_SAMPLES[50] or len(a) != len(b) or np.median(b) <= 0:
        return None
    turns = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    below = np.median(b[turns].reshape(draws, -1), axis=1)
    if below.min() <= 0:
        return None
    ratios = np.median(a[turns].reshape(draws, -1), axis=1) / below
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def change(
    before: Sequence[float], after: Sequence[float], *, per_round: int, seed: int = 0
) -> tuple[float, tuple[float, float], float] | None:
    """Compare the samples of two runs that did not take turns with each other.

    Samples of one round are alike, so rounds count, not samples: they are resampled for the
    interval, each run's on their own, and their medians are what the test ranks.

    Args:
        before: Raw samples in the order taken.
        after: The other run's.
        per_round: Samples per round, of both.
        seed: Of the resampling.

    Returns:
        The ratio of the medians, after over before; its 95 % interval; and the two-sided p-value of
        both being drawn from one distribution. None with too few samples for a median, or where a
        median is 0.

    Source: Mann and Whitney, "On a test of whether one of two random variables is stochastically
    larger than the other", 1947; Efron and Tibshirani, 1993, chapter 8.
    """
    from scipy.stats import mannwhitneyu  # half a second that most runs need not wait

    whole = [x[: len(x) // per_round * per_round] for x in (before, after)]
    a, b = (np.asarray(x, np.float64).reshape(-1, per_round) for x in whole)
    if min(a.size, b.size) < MINIMUM_SAMPLES[50] or min(np.median(a), np.median(b)) <= 0:
        return None
    generator, draws = np.random.default_rng(seed), 2000

    def medians(x: NDArray[np.float64]) -> NDArray[np.float64]:
        turns = generator.integers(0, len(x), (draws, len(x)))
        found: NDArray[np.float64] = np.median(x[turns].reshape(draws, -1), axis=1)
        return found

    below = medians(a)
    if below.min() <= 0:
        return None
    low, high = np.percentile(medians(b) / below, [2.5, 97.5])
    test = mannwhitneyu(np.median(b, axis=1), np.median(a, axis=1), alternative="two-sided")
    return float(np.median(b) / np.median(a)), (float(low), float(high)), float(test.pvalue)
