"""What the comparisons of a run show, in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.ga_eval import Difference, verdict
from core2_sampler.benchmarks.matching import is_plain
from core2_sampler.benchmarks.measured import Metric
from core2_sampler.benchmarks.runs import REFERENCE, Run, RunArm
from core2_sampler.benchmarks.stats import sign_flip_floor

_FEW = 10
"""A bootstrap over n prompts of a task takes its variance for (n - 1) / n of what it is."""


def findings(run: Run, compared: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Return GA-Eval's sentences: on wins that stronger guidance may explain, and the others."""
    hollow: list[str] = []
    other: list[str] = []
    for (metric, name), (entry, pair) in _pairs(run, compared).items():
        if len(pair) == 2:
            default, matched = pair[True], pair[False]
            only_default = default.is_win and not matched.is_win
            text = f"GA-Eval on {metric}: {verdict(name, default, matched)}"
            (hollow if only_default else other).append(text)
        elif True in pair and pair[True].is_win and not is_plain(entry.arm):
            hollow.append(
                f"{name} beats default CFG on {metric} ({pair[True].text}), but was not compared "
                "with CFG at its own effective scale: it may only guide harder. Generate it with "
                "--ga-eval above 0."
            )
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


def floor_note(compared: Sequence[Comparison]) -> list[str]:
    """Say how small a p-value of a run can be at all."""
    sizes = [len(set(each.metric.clusters)) for each in compared if each.p_holm is not None]
    if not sizes:
        return []
    floor = sign_flip_floor(max(sizes))
    return [
        f"with {max(sizes)} prompts no p is below {floor:.2g}, and with {len(sizes)} comparisons "
        f"the smallest p (Holm) is not below {min(1, len(sizes) * floor):.2g}"
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
