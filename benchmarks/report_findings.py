"""What the comparisons of a run show, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.correction import flips_for
from core2_sampler.benchmarks.ga_eval import Difference, verdict
from core2_sampler.benchmarks.importing import is_imported, is_known_plain
from core2_sampler.benchmarks.measured import Metric
from core2_sampler.benchmarks.runs import REFERENCE, Run, RunArm
from core2_sampler.benchmarks.stats import sign_flip_floor

_FEW = 10
"""A bootstrap over n prompts of a task takes its variance for (n - 1) / n of what it is."""


def findings(run: Run, compared: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Return GA-Eval's sentences: on wins that stronger guidance may explain, and the others."""
    hollow: list[str] = []
    other: list[str] = []
    unsure: dict[str, list[str]] = {}
    for (metric, name), (entry, pair) in _pairs(run, compared).items():
        if len(pair) == 2:
            default, matched = pair[True], pair[False]
            if math.isnan(default.estimate.low) and math.isnan(matched.estimate.low):
                unsure.setdefault(metric, []).append(name)
                continue
            only_default = default.is_win and not matched.is_win
            text = f"GA-Eval on {metric}: {verdict(name, default, matched)}"
            (hollow if only_default else other).append(text)
        elif True in pair and pair[True].is_win and not is_known_plain(entry):
            hollow.append(
                f"{name} beats default CFG on {metric} ({pair[True].text}), but was not compared "
                "with CFG at its own effective scale: it may only guide harder."
                + ("" if is_imported(entry) else " Generate it with --ga-eval above 0.")
            )
    other += [
        f"GA-Eval on {metric}: nothing is shown for {', '.join(names)}: too few prompts, or no "
        "spread, for an interval."
        for metric, names in unsure.items()
    ]
    return hollow, other


def _pairs(
    run: Run, compared: Sequence[Comparison]
) -> dict[tuple[str, str], tuple[RunArm, dict[bool, Difference]]]:
    """Return the differences to default CFG (True) and matched CFG, by metric and arm."""
    pairs: dict[tuple[str, str], tuple[RunArm, dict[bool, Difference]]] = {}
    for each in compared:
        if each.p_holm is not None:
            entry = each.arm.entry
            _, pair = pairs.setdefault((each.metric.name, run.short_name(entry)), (entry, {}))
            is_default = each.reference.entry.arm.name == REFERENCE
            pair[is_default] = Difference(each.difference, each.p_holm, each.metric.is_share)
    return pairs


def floor_note(compared: Sequence[Comparison], total: int) -> list[str]:
    """Say how small a p-value can be at all.

    Args:
        compared: the comparisons of a run.
        total: how many comparisons Holm's correction is over.
    """
    sizes = [len(set(each.metric.clusters)) for each in compared if each.p_holm is not None]
    if not sizes:
        return []
    floor = sign_flip_floor(max(sizes), flips_for(total))
    return [
        f"with {max(sizes)} prompts no p is below {floor:.2g}, and with the {total} comparisons of "
        f"this report the smallest p (Holm) is not below {min(1, total * floor):.2g}"
    ]


def small_note(metrics: Sequence[Metric]) -> list[str]:
    """Say that intervals over very few prompts are narrower than they should be."""
    tasks = [dict(zip(m.clusters, m.strata, strict=True)) for m in metrics]  # of each prompt
    smallest = min(count for task_of in tasks for count in Counter(task_of.values()).values())
    if smallest >= _FEW:
        return []
    return [
        f"A task has only {smallest} prompt{'s' * (smallest > 1)}: below {_FEW}, bootstrap "
        "intervals are narrower than they should be. This is a try-out, not a measurement."
    ]


def cost_note(run: Run) -> list[str]:
    """Say on how many images the effective scales of a run were measured."""
    names: dict[int, list[str]] = {}
    for entry in run.arms:
        if entry.measured_on is not None:
            names.setdefault(entry.measured_on, []).append(run.short_name(entry))
    return [
        f"effective scale and orthogonal share of {', '.join(own)}: measured on {count} evenly "
        "spaced images"
        for count, own in names.items()
    ]


def same_note(metric: Metric) -> list[str]:
    """Say which arms made the same images, as two names for the same steps do."""
    names: dict[tuple[str, ...], list[str]] = {}
    for arm in metric.arms:
        files = tuple(record.sha256 if record else "" for record in arm.records)
        names.setdefault(files, []).append(metric.run.short_name(arm.entry))
    return [f"{' and '.join(own)} made the same images" for own in names.values() if len(own) > 1]


def imported_note(run: Run) -> list[str]:
    """Say what is not known of arms that were made elsewhere."""
    names = [run.short_name(entry) for entry in run.arms if is_imported(entry)]
    if not names:
        return []
    return [
        f"The images of {', '.join(names)} were made elsewhere: differences to others are paired "
        "by prompt and number, not by initial latents, and N, scale and NFE are as told."
    ]
