"""Clustered statistics. Truth: scipy's own in the unclustered case, known means, closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from core2_sampler.benchmarks.stats import (
    holm,
    mean_estimate,
    minimum_detectable_effect,
    prompt_means,
    share_estimate,
    sign_flip_floor,
    sign_flip_p,
    win_rate,
)


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
    assert math.isnan(estimate.low) and math.isnan(estimate.high)  # each task agrees with itself


def test_what_does_not_vary_has_no_interval_but_no_difference_at_all_has():
    same = mean_estimate([5.0] * 6, *names(6))
    assert same.value == 5 and math.isnan(same.low) and math.isnan(same.high)
    opposed = mean_estimate([1, 1, -1, -1], ["a", "b", "c", "d"], ["t", "t", "u", "u"])
    assert opposed.value == 0 and math.isnan(opposed.low)
    none = mean_estimate([0.0] * 6, *names(6))
    assert (none.value, none.low, none.high) == (0, 0, 0)


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


def names(n: int, task: str = "t") -> tuple[list[str], list[str]]:
    """One image a prompt, all of one task."""
    return [f"p{i}" for i in range(n)], [task] * n


def test_win_rate_counts_prompts_with_wilson_intervals_and_both_rules_for_ties():
    differences = [1.0] * 6 + [0.0] * 2 + [-1.0] * 2
    rate = win_rate(differences, *names(10))
    assert (rate.wins, rate.ties, rate.losses) == (6, 2, 2)
    for estimate, share in ((rate.strict, 0.6), (rate.half, 0.7)):
        # Wilson 1927 in closed form.
        n, z = 10, 1.959963984540054
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        assert estimate.value == pytest.approx(share)
        assert (estimate.low, estimate.high) == pytest.approx((middle - half, middle + half))


def test_win_rate_with_an_odd_number_of_ties_spans_both_counts():
    rate = win_rate([1.0, 1.0, 0.0, -1.0], *names(4))
    below, above = (win_rate(d, *names(4)).strict for d in ([1, 1, -1, -1], [1, 1, 1, -1]))
    assert rate.half.value == 0.625
    assert (rate.half.low, rate.half.high) == (below.low, above.high)
    assert rate.strict == below


def test_more_seeds_do_not_make_more_prompts():
    clusters, strata = ["a", "a", "a", "b", "b", "b"], ["t"] * 6
    rate = win_rate([3.0, -1.0, -1.0, 0.5, -1.0, -1.0], clusters, strata)  # means 1/3 and -1/2
    assert (rate.wins, rate.ties, rate.losses) == (1, 0, 1)
    assert rate.strict == win_rate([1.0, -1.0], ["a", "b"], ["t", "t"]).strict


def test_sign_flip_p_is_the_share_of_all_flips_that_are_as_extreme():
    """Every sign pattern by hand: two tasks of unequal size, two images a prompt."""
    means, tasks = np.array([0.3, 0.5, -0.2, 0.4, 0.1, 2, -1.5, 0.8]), ["big"] * 5 + ["small"] * 3
    values = np.repeat(means, 2) + np.tile([0.1, -0.1], 8)
    clusters = [f"p{i // 2}" for i in range(16)]
    ours = sign_flip_p(values, clusters, [tasks[i // 2] for i in range(16)])
    flipped = np.array([[1 if k >> i & 1 else -1 for i in range(8)] for k in range(256)]) * means
    null = (flipped[:, :5].mean(1) + flipped[:, 5:].mean(1)) / 2
    observed = (means[:5].mean() + means[5:].mean()) / 2
    assert ours == pytest.approx(2 * (null >= observed - 1e-12).mean())
    pooled = 2 * (flipped.mean(1) >= means.mean() - 1e-12).mean()
    assert ours != pytest.approx(pooled, abs=0.01)  # every task weighs the same


def test_sign_flip_p_at_its_ends():
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0], *names(5)) == pytest.approx(2 / 2**5)
    assert sign_flip_p([0.0] * 5, *names(5)) == 1
    p = sign_flip_p(np.ones(40), *names(40))
    assert p == pytest.approx(2 / 10_000)  # never 0: the data themselves are one of the flips


@pytest.mark.parametrize("n", [1, 5, 13, 14, 40])
def test_the_floor_of_p_is_what_equal_differences_give(n):
    assert sign_flip_floor(n) == pytest.approx(sign_flip_p(np.ones(n), *names(n)) if n > 1 else 1)
    assert sign_flip_floor(3200) == sign_flip_floor(14)


def test_sign_flip_p_agrees_with_students_t_on_normal_differences():
    values = np.random.default_rng(5).normal(size=60)
    values += 0.2 - values.mean()
    expected = stats.ttest_1samp(values, 0).pvalue
    assert sign_flip_p(values, *names(60)) == pytest.approx(expected, abs=0.015)
    assert 0.02 < expected < 0.2


def test_holm_gives_the_worked_examples():
    # R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm"); and by hand: 4 * .005, 3 * .01, ...
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm([0.2]) == pytest.approx([0.2])
    assert len(holm([])) == 0


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """The procedure as Holm words it: from the smallest p on, until one is above alpha / left."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        p = np.round(rng.uniform(size=rng.integers(1, 9)) ** 4, 3)  # with ties
        alpha = rng.uniform(0.001, 0.3)
        rejected = set()
        for tried, k in enumerate(np.argsort(p, kind="stable")):
            if p[k] * (len(p) - tried) > alpha:
                break
            rejected.add(int(k))
        assert set(np.flatnonzero(holm(p) <= alpha)) == rejected


@pytest.mark.parametrize("p_values", [[1.1], [-0.1, 0.5], [math.nan], [[0.1]]])
def test_holm_refuses_what_is_no_p_value(p_values):
    with pytest.raises(ValueError, match="within 0 to 1"):
        holm(p_values)


def test_a_study_shows_its_minimum_detectable_effect_four_times_out_of_five():
    """Simulated: the clustered z-test of studies whose true difference is the one computed."""
    rng = np.random.default_rng(1)
    values, clusters, strata = clustered(rng, n_prompts=400, n_images=3)
    effect = minimum_detectable_effect(values, clusters, strata)
    # Spread of a prompt's mean: shared noise 1 and a third of 0.2^2; two tasks of 200 prompts.
    error = math.sqrt((1 + 0.2**2 / 3) / 400)
    assert effect == pytest.approx((1.95996 + 0.84162) * error, rel=0.1)
    means = rng.normal(effect, error, size=20_000)
    assert (np.abs(means) > 1.95996 * error).mean() == pytest.approx(0.8, abs=0.1)


def test_more_power_needs_a_larger_effect_and_one_prompt_a_task_tells_nothing():
    values, clusters, strata = clustered(np.random.default_rng(2), n_prompts=40, n_images=2)
    effects = [
        minimum_detectable_effect(values, clusters, strata, power=power) for power in (0.5, 0.8)
    ]
    half_width = 1.95996 * effects[1] / (1.95996 + 0.84162)
    assert effects[0] == pytest.approx(half_width, rel=1e-4)  # at 50 % it is the half width
    assert math.isnan(minimum_detectable_effect([1.0, 2.0], ["p", "p"], ["t", "t"]))
