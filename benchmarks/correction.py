"""Holm's correction over all that a report compares: arms, metrics and suites together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.stats import CONFIDENCE, N_RESAMPLES, holm, sign_flip_p

_LEVEL = 1 - CONFIDENCE
_MARGIN = 5
"""So many times below the level is the smallest p after the correction, given enough prompts."""


def flips_for(count: int) -> int:
    """Return how many sign flips a test needs that is one of ``count``.

    With n flips no p is below 2 / (n + 1), and Holm's correction multiplies the smallest by
    ``count``: with too few flips nothing could ever be shown.
    """
    return max(N_RESAMPLES, math.ceil(2 * _MARGIN * count / _LEVEL)) - 1


def correct(compared: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p-values of comparisons for being several.

    Where many are made, those that could pass are tested again with more flips. The second test is
    of other flips, so choosing them by the first adds no false alarms.

    Args:
        compared: the comparisons of all runs of a report.

    Returns:
        The same in the same order, with ``p_holm``; those by a random judge have none and do not
        count.
    """
    counted = [each for each in compared if not each.metric.is_meaningless]
    flips = flips_for(len(counted))
    tested = [_sharpened(each, flips) for each in counted]
    corrected = iter(
        dataclasses.replace(each, p_holm=p)
        for each, p in zip(tested, holm([each.p_value for each in tested]), strict=True)
    )
    return [each if each.metric.is_meaningless else next(corrected) for each in compared]


def _sharpened(found: Comparison, flips: int) -> Comparison:
    """Return a comparison with the p-value of so many flips, where that could decide."""
    if flips < N_RESAMPLES or found.p_value >= _LEVEL:
        return found
    change, metric = found.arm.values - found.reference.values, found.metric
    p = sign_flip_p(change, metric.clusters, metric.strata, n_resamples=flips, seed=1)
    return dataclasses.replace(found, p_value=p)
