"""Arms against their references, image by image, and all numbers as rows of a results table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core2_sampler.benchmarks.measured import Measured, Metric
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.stats import (
    Estimate,
    WinRate,
    mean_estimate,
    minimum_detectable_effect,
    sign_flip_p,
    win_rate,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm against the reference on one metric, image by image on the same latents.

    Attributes:
        metric: the metric.
        arm: the arm.
        reference: what it is compared with.
        difference: mean difference, in the metric's unit.
        p_value: of no difference, two-sided.
        wins: prompts won, lost and tied.
        detectable: the smallest true difference that this run would find 4 times in 5.
        p_holm: ``p_value`` after Holm's correction over the report; a random judge has none.
    """

    metric: Metric
    arm: Measured
    reference: Measured
    difference: Estimate
    p_value: float
    wins: WinRate
    detectable: float
    p_holm: float | None = None


def comparisons(metrics: Sequence[Metric]) -> list[Comparison]:
    """Compare every arm of a run with its references.

    Args:
        metrics: all metrics of one run.
    """
    return [
        _compare(metric, arm, reference)
        for metric in metrics
        for arm in metric.arms
        for reference in metric.arms
        if reference.entry in metric.run.references(arm.entry)
    ]


def _compare(metric: Metric, arm: Measured, reference: Measured) -> Comparison:
    change = arm.values - reference.values
    clusters, strata = metric.clusters, metric.strata
    return Comparison(
        metric,
        arm,
        reference,
        mean_estimate(change, clusters, strata),
        sign_flip_p(change, clusters, strata),
        win_rate(change, clusters, strata),
        minimum_detectable_effect(change, clusters, strata),
    )


def value_rows(metric: Metric) -> list[list[Row]]:
    """Return for each arm its score, and then its score on each task where there are several."""
    tasks = list(dict.fromkeys(case.prompt.task for case in metric.cases))
    rows = []
    for arm in metric.arms:
        own = [row_of(metric, arm, metric.name, metric.estimate(arm.values))]
        for task in tasks if len(tasks) > 1 else ():
            estimate = metric.estimate(arm.values, [task])
            count = sum(case.prompt.task == task for case in metric.cases)
            own.append(row_of(metric, arm, f"{metric.name}/{task}", estimate, count))
        rows.append(own)
    return rows


def comparison_rows(found: Comparison) -> list[Row]:
    """Return a comparison as rows: difference, p-values, win rates, detectable difference."""
    metric, arm = found.metric, found.arm
    against = found.reference.entry.arm.name
    plain = {"p": found.p_value, "p_holm": found.p_holm, "detectable": found.detectable}
    estimates = {
        "minus": found.difference,
        "win_rate_strict_over": found.wins.strict,
        "win_rate_over": found.wins.half,
    } | {
        kind: Estimate(value, np.nan, np.nan) for kind, value in plain.items() if value is not None
    }
    return [
        row_of(metric, arm, f"{metric.name}_{kind}_{against}", estimate)
        for kind, estimate in estimates.items()
    ]


def row_of(
    metric: Metric,
    arm: Measured,
    name: str,
    estimate: Estimate,
    n_images: int | None = None,
) -> Row:
    """Return one number of an arm as a row of a results table."""
    own = arm.entry.arm
    return Row(
        family=str(metric.run.settings["family"]),
        arm=own.name,
        steps=own.steps,
        guidance_scale=1.0 if own.mode == "cond" else own.guidance_scale,
        nfe=arm.nfe,
        n_images=len(arm.values) if n_images is None else n_images,
        metric=name,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        command=arm.entry.command,
    )
