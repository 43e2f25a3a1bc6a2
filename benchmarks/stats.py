"""Means of clustered results with 95 % intervals.

Images of one prompt are not independent, so the prompt is what gets resampled.
``scipy.stats.bootstrap`` cannot cluster, but it does not have to: each prompt is first reduced to
the mean of its own images (every prompt has equally many, so this loses nothing), and each task is
one of scipy's independent samples, which stratifies the resampling by task. The score is the
unweighted mean of the task means, as in GenEval (arXiv 2310.11513).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from core2_sampler.benchmarks.clusters import Array, prompt_means

try:
    from scipy import stats
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the statistics need scipy: pip install 'core2-sampler[bench]'"
    ) from error

N_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval; ``low`` and ``high`` are nan where none can be given.

    Attributes:
        value: the estimate, in the unit of the data.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often one arm beats another.

    Attributes:
        wins: prompts won.
        ties: prompts with no difference at all.
        losses: prompts lost.
        strict: share of prompts won, ties counting as lost, as published win rates have it.
        half: the same with a tie as half a win.
    """

    wins: int
    ties: int
    losses: int
    strict: Estimate
    half: Estimate


def mean_estimate(
    values: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str],
    *,
    n_resamples: int = N_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Estimate the unweighted mean of the task means, with a prompt-clustered bootstrap interval.

    Paired differences go through here as well: pass ``values = arm - reference``, image by image.

    Args:
        values: one number per image, [n].
        clusters: prompt of each image, n names; prompts are resampled whole.
        strata: task of each image, n names; prompts are resampled within their task.
        n_resamples: bootstrap resamples.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the resampling.

    Returns:
        Mean and BCa interval. It is nan where a task has fewer than two prompts, and where the
        prompts of each task agree: resampling what does not vary would claim certainty. Values
        that are all 0, as between equal images, have the interval 0.

    Raises:
        ValueError: see ``prompt_means``.

    Reference: Efron 1987, Better Bootstrap Confidence Intervals (BCa, as scipy implements it).
    """
    samples = tuple(prompt_means(values, clusters, strata).values())
    value = float(_mean_of_means(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, math.nan, math.nan)
    if all(np.ptp(sample) == 0 for sample in samples):
        bound = math.nan if any(sample[0] for sample in samples) else 0.0
        return Estimate(value, bound, bound)
    interval = stats.bootstrap(
        samples,
        _mean_of_means,
        n_resamples=n_resamples,
        confidence_level=confidence,
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def share_estimate(
    correct: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str],
    *,
    n_resamples: int = N_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Estimate a share of correct images: ``mean_estimate``, but honest at 0 and 1.

    A bootstrap of results that are all right (or all wrong) has no width, which claims certainty.
    There the Wilson interval of as many trials as there are prompts is given: images of one prompt
    count once, the cautious reading.

    Args:
        correct: one verdict per image, true or false, [n].
        clusters: prompt of each image.
        strata: task of each image.
        n_resamples: bootstrap resamples.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the resampling.

    Returns:
        Share in [0, 1] with its interval.

    Raises:
        ValueError: see ``prompt_means``.
    """
    verdicts = np.asarray(correct, dtype=np.float64)
    estimate = mean_estimate(
        verdicts, clusters, strata, n_resamples=n_resamples, confidence=confidence, seed=seed
    )
    groups = prompt_means(verdicts, clusters, strata).values()
    if min(len(group) for group in groups) < 2 or estimate.value not in (0.0, 1.0):
        return estimate
    n_prompts = len(set(clusters))
    return _wilson(round(estimate.value * n_prompts), n_prompts, confidence)


def win_rate(
    differences: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str],
    *,
    confidence: float = CONFIDENCE,
) -> WinRate:
    """Count the prompts that an arm wins, with Wilson intervals.

    The mean difference of a prompt's images decides it, so that the trials are independent however
    many seeds there are; with one image a prompt these are the published win rates.

    Args:
        differences: arm minus reference, image by image, [n].
        clusters: prompt of each image.
        strata: task of each image; all prompts weigh the same here.
        confidence: coverage of the intervals, in (0, 1).

    Returns:
        Counts and both rates. Half a win is no count of a binomial: with an odd number of ties the
        interval of ``half`` reaches from that of the count below to that of the count above.

    Raises:
        ValueError: see ``prompt_means``.
    """
    means = np.concatenate(list(prompt_means(differences, clusters, strata).values()))
    wins, losses, n = int((means > 0).sum()), int((means < 0).sum()), len(means)
    ties = n - wins - losses
    below = _wilson(wins + ties // 2, n, confidence)
    above = _wilson(wins + ties - ties // 2, n, confidence)
    half = Estimate((wins + ties / 2) / n, below.low, above.high)
    return WinRate(wins, ties, losses, _wilson(wins, n, confidence), half)


def sign_flip_p(
    differences: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str],
    *,
    n_resamples: int = N_RESAMPLES - 1,
    seed: int = 0,
) -> float:
    """Test whether paired differences have mean 0, by flipping the signs of whole prompts.

    Args:
        differences: arm minus reference, image by image, [n].
        clusters: prompt of each image.
        strata: task of each image; the statistic is that of ``mean_estimate``.
        n_resamples: random flips; all of them are made where there are no more than that.
        seed: seed of the flips.

    Returns:
        Two-sided p-value.

    Raises:
        ValueError: see ``prompt_means``.

    Reference: Fisher 1935, The Design of Experiments, section 21.
    """
    groups = list(prompt_means(differences, clusters, strata).values())
    weights = np.concatenate([np.full(len(g), 1 / (len(g) * len(groups))) for g in groups])
    return float(
        stats.permutation_test(
            (np.concatenate(groups),),
            lambda x, axis: (x * weights).sum(axis=axis),
            permutation_type="samples",
            n_resamples=n_resamples,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def sign_flip_floor(n_prompts: int, n_resamples: int = N_RESAMPLES - 1) -> float:
    """Return the smallest p-value that ``sign_flip_p`` can give for so many prompts."""
    flips = 2**n_prompts
    return min(1.0, 2 / (flips if flips <= n_resamples else n_resamples + 1))


def holm(p_values: ArrayLike) -> Array:
    """Adjust p-values for being several, so that one false alarm among all stays as rare as said.

    Args:
        p_values: of all metrics and suites that are tested together, [m].

    Returns:
        Adjusted p-values in the same order, [m].

    Raises:
        ValueError: if one is not within 0 to 1.

    Reference: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must be a list of numbers within 0 to 1, got {p.tolist()}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def minimum_detectable_effect(
    differences: ArrayLike,
    clusters: Sequence[str],
    strata: Sequence[str],
    *,
    power: float = 0.8,
    confidence: float = CONFIDENCE,
) -> float:
    """Return how large a true difference must be for a study like this one to show it.

    Args:
        differences: arm minus reference, image by image, [n]; only their spread matters.
        clusters: prompt of each image.
        strata: task of each image.
        power: how often the study would show it, in (0, 1).
        confidence: coverage of the two-sided interval that must exclude 0, in (0, 1).

    Returns:
        ``(z_confidence + z_power)`` standard errors of the mean of the task means, clustered by
        prompt; nan where a task has fewer than two prompts.

    Raises:
        ValueError: see ``prompt_means``.

    Reference: Miller, arXiv 2411.00640, section 5.
    """
    groups = list(prompt_means(differences, clusters, strata).values())
    if min(len(group) for group in groups) < 2:
        return math.nan
    variance = sum(group.var(ddof=1) / len(group) for group in groups)
    z = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
    return float(z * math.sqrt(variance) / len(groups))


def _wilson(successes: int, trials: int, confidence: float) -> Estimate:
    test = stats.binomtest(successes, trials)
    interval = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def _mean_of_means(*samples: Array, axis: int = -1) -> Array:
    """Average the means of the tasks, each task weighing the same."""
    total = sum(np.mean(sample, axis=axis) for sample in samples)
    return np.asarray(total / len(samples))
