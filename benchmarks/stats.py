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
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]

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


def prompt_means(
    values: ArrayLike, clusters: Sequence[str], strata: Sequence[str]
) -> dict[str, Array]:
    """Reduce images to one mean per prompt, grouped by task.

    Args:
        values: one number per image, [n].
        clusters: prompt of each image, n names.
        strata: task of each image, n names.

    Returns:
        Per task, in order of first appearance, the means of its prompts [n_prompts of the task].

    Raises:
        ValueError: if the lengths differ, nothing is given, a value is not finite, a prompt is in
            two tasks, or prompts do not have equally many images.
    """
    data = np.asarray(values, dtype=np.float64)
    if not (data.ndim == 1 and len(data) == len(clusters) == len(strata) and len(data) > 0):
        raise ValueError(
            "values, clusters and strata must be of one length above 0, "
            f"got {data.shape}, {len(clusters)} and {len(strata)}"
        )
    if not np.isfinite(data).all():
        raise ValueError("values must be finite; count a failed image as wrong, do not drop it")
    images: dict[str, list[float]] = {}
    task_of: dict[str, str] = {}
    for value, cluster, stratum in zip(data, clusters, strata, strict=True):
        images.setdefault(cluster, []).append(float(value))
        if task_of.setdefault(cluster, stratum) != stratum:
            raise ValueError(
                f"prompt {cluster!r} is in two tasks: {task_of[cluster]!r}, {stratum!r}"
            )
    sizes = {len(group) for group in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"every prompt must have equally many images, got {sorted(sizes)}")
    means: dict[str, list[float]] = {}
    for cluster, group in images.items():
        means.setdefault(task_of[cluster], []).append(math.fsum(group) / len(group))
    return {task: np.asarray(group) for task, group in means.items()}


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
        Mean and BCa interval. The interval is the value itself where all prompts of each task
        agree, and nan where a task has fewer than two prompts.

    Raises:
        ValueError: see ``prompt_means``.

    Reference: Efron 1987, Better Bootstrap Confidence Intervals (BCa, as scipy implements it).
    """
    samples = tuple(prompt_means(values, clusters, strata).values())
    value = float(_mean_of_means(*samples))
    if min(len(sample) for sample in samples) < 2:
        return Estimate(value, math.nan, math.nan)
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, value, value)
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
    if math.isnan(estimate.low) or estimate.value not in (0.0, 1.0):
        return estimate
    n_prompts = len(set(clusters))
    test = stats.binomtest(round(estimate.value * n_prompts), n_prompts)
    wilson = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Estimate(estimate.value, float(wilson.low), float(wilson.high))


def _mean_of_means(*samples: Array, axis: int = -1) -> Array:
    """Average the means of the tasks, each task weighing the same."""
    total = sum(np.mean(sample, axis=axis) for sample in samples)
    return np.asarray(total / len(samples))
