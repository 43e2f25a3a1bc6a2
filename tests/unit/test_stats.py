"""Clustered bootstrap: scipy's own in the unclustered case, and coverage of a known mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from core2_sampler.benchmarks.stats import mean_estimate, prompt_means, share_estimate


def clustered(
    rng: np.random.Generator, *, n_prompts: int, n_images: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Images of a prompt share most of their noise: mean 0.3 exactly, two tasks 0.2 and 0.4."""
    values, clusters, strata = [], [], []
    for k in range(n_prompts):
        task = k % 2
        shared = rng.normal()
        for _ in range(n_images):
            values.append(0.2 + 0.2 * task + shared + 0.2 * rng.normal())
            clusters.append(f"p{k}")
            strata.append(f"t{task}")
    return np.asarray(values), clusters, strata


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials, hits, naive_hits = 150, 0, 0
    for _ in range(trials):
        values, clusters, strata = clustered(rng, n_prompts=50, n_images=4)
        ours = mean_estimate(values, clusters, strata, n_resamples=600)
        naive = mean_estimate(values, [str(i) for i in range(len(values))], strata, n_resamples=600)
        hits += ours.low <= 0.3 <= ours.high
        naive_hits += naive.low <= 0.3 <= naive.high
    # 95 % nominal; binomial standard error 1.8 points. Images taken as independent: about 67 %.
    assert 0.89 <= hits / trials <= 0.99
    assert naive_hits / trials < 0.80


def test_unclustered_case_is_scipy_bootstrap_of_the_images():
    values = np.random.default_rng(1).exponential(size=40)
    ours = mean_estimate(values, [str(i) for i in range(40)], ["t"] * 40, seed=5)
    scipy = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    assert (ours.low, ours.high) == pytest.approx((scipy.low, scipy.high), rel=1e-9)


def test_interval_width_is_that_of_the_clustered_standard_error():
    """Independent formula: SE^2 = sum over tasks of var(prompt means) / n, over (tasks)^2."""
    values, clusters, strata = clustered(np.random.default_rng(2), n_prompts=200, n_images=2)
    groups = prompt_means(values, clusters, strata)
    variances = [g.var(ddof=1) / len(g) for g in groups.values()]
    half_width = 1.96 * math.sqrt(sum(variances)) / len(groups)
    ours = mean_estimate(values, clusters, strata)
    assert (ours.high - ours.low) / 2 == pytest.approx(half_width, rel=0.06)


def test_value_weighs_tasks_equally_whatever_their_size():
    clusters = ["a", "b", "c", "d", "e", "f"]
    strata = ["big"] * 4 + ["small"] * 2
    estimate = mean_estimate([1, 1, 1, 1, 0, 0], clusters, strata)
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (0.5, 0.5)  # every task agrees with itself


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(3)
    values, clusters, strata = clustered(rng, n_prompts=60, n_images=2)
    other = values + 0.1 + 0.05 * rng.normal(size=len(values))
    difference = mean_estimate(other - values, clusters, strata)
    single = mean_estimate(values, clusters, strata)
    assert difference.low <= 0.1 <= difference.high
    assert difference.high - difference.low < 0.2 * (single.high - single.low)


def test_all_correct_keeps_a_wilson_interval_over_prompts():
    clusters = [f"p{i // 2}" for i in range(80)]
    estimate = share_estimate([True] * 80, clusters, ["t"] * 80)
    z2 = 1.959963984540054**2
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(40 / (40 + z2), rel=1e-9)  # Wilson at k = n, closed form
    assert share_estimate([False] * 80, clusters, ["t"] * 80).high == pytest.approx(
        z2 / (40 + z2), rel=1e-9
    )


def test_one_prompt_a_task_has_no_interval():
    estimate = share_estimate([True, False], ["p", "p"], ["t", "t"])
    assert estimate.value == 0.5
    assert math.isnan(estimate.low) and math.isnan(estimate.high)


def test_same_seed_same_interval():
    values, clusters, strata = clustered(np.random.default_rng(4), n_prompts=20, n_images=2)
    first, second = (mean_estimate(values, clusters, strata, n_resamples=500) for _ in range(2))
    assert first == second
    assert first != mean_estimate(values, clusters, strata, n_resamples=500, seed=1)


@pytest.mark.parametrize(
    ("values", "clusters", "strata", "message"),
    [
        ([], [], [], "one length above 0"),
        ([1.0], ["a", "b"], ["t"], "one length above 0"),
        ([1.0, math.nan], ["a", "b"], ["t", "t"], "finite"),
        ([1.0, 0.0], ["a", "a"], ["t", "u"], "two tasks"),
        ([1.0, 0.0, 1.0], ["a", "a", "b"], ["t", "t", "t"], "equally many images"),
    ],
)
def test_bad_input_is_refused(values, clusters, strata, message):
    with pytest.raises(ValueError, match=message):
        mean_estimate(values, clusters, strata)
