"""What the comparisons of a run show, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.correction import flips_for
from core2_sampler.benchmarks.ga_eval import Difference, is_below_cfg, verdict
from core2_sampler.benchmarks.importing import is_imported, is_known_plain
from core2_sampler.benchmarks.judges import GENEVAL, OFFICIAL
from core2_sampler.benchmarks.measured import Metric
from core2_sampler.benchmarks.presets import PRESETS
from core2_sampler.benchmarks.report import provenance_facts
from core2_sampler.benchmarks.runs import MATCHED, REFERENCE, Run, RunArm
from core2_sampler.benchmarks.scorers import ABOUT
from core2_sampler.benchmarks.stats import sign_flip_floor
from core2_sampler.benchmarks.suites import SUITES

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
            text = f"GA-Eval on {metric}: {verdict(name, default, matched, entry.measured_by)}"
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
            _, pair = pairs.setdefault((each.metric.label, run.short_name(entry)), (entry, {}))
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


def tasks_note(run: Run, metrics: Sequence[Metric]) -> list[str]:
    """Say which tasks of the suite a run lacks, or has no image of."""
    there = {prompt.task for prompt in run.prompts}
    notes = []
    if absent := [task for task in SUITES.get(run.suite).tasks if task not in there]:
        notes.append(
            f"These are not scores of the whole suite {run.suite}: it has no prompt of "
            f"{', '.join(absent)} here."
        )
    failed: dict[str, dict[str, None]] = {}  # tasks of each arm
    for metric in metrics:
        for arm in metric.arms:
            both = zip(metric.cases, arm.records, strict=True)
            made = {case.prompt.task for case, record in both if record}
            lacking = [case.prompt.task for case in metric.cases if case.prompt.task not in made]
            if lacking:
                failed.setdefault(arm.entry.label, {}).update(dict.fromkeys(lacking))
    return notes + [
        f"{label} has no image of {', '.join(tasks)}: all of them count as failed."
        for label, tasks in failed.items()
    ]


def below_note(run: Run) -> list[str]:
    """Say which effective scales CFG cannot be run at."""
    return [
        f"The effective scale of {run.short_name(entry)} is {entry.effective_scale:.2f}, and CFG "
        f"has none below 1: {entry.arm.name}{MATCHED} is the model without guidance."
        for entry in run.arms
        if entry.effective_scale is not None
        and entry.measured_by == "signed"
        and is_below_cfg(entry.effective_scale)
    ]


def preset_note(run: Run, metrics: Sequence[Metric]) -> list[str]:
    """Say where the judges of a run are not those of the presets that it was generated with."""
    there = list(dict.fromkeys(GENEVAL if m.judge == OFFICIAL else m.judge for m in metrics))
    notes = []
    for name in dict.fromkeys(entry.provenance.get("preset") for entry in run.arms):
        if name is None:
            continue
        wanted = PRESETS.get(name).scorers
        lacking = [scorer for scorer in wanted if scorer not in there]
        more = [judge for judge in there if judge not in wanted]
        notes += [f"not as in {name}: no scores by {', '.join(lacking)}"] if lacking else []
        notes += [f"not as in {name}: also scores by {', '.join(more)}"] if more else []
    return notes


def judge_notes(metric: Metric) -> list[str]:
    """Say what a judge may be used for, and what it ran on."""
    about = [] if metric.is_meaningless else [ABOUT.get(metric.judge, "")]
    made = [", ".join(provenance_facts(each).values()) for each in metric.environments]
    return [
        *(f"{metric.label}: {text}" for text in about if text),
        *(f"{metric.label} judged on {text}" for text in made),
    ]


_MEASURED = {
    "signed": "effective scale and orthogonal share of {names}: measured on {count} evenly spaced "
    "images",
    "official": "effective scale and orthogonal share of {names}: of all {count} images, as the "
    "released evaluation of GA-Eval measures them: norms, and Z-Sampling's with uncond left in. "
    "What each is matched with is CFG at another scale for each image, and for Z-Sampling with "
    "three times its steps",
    "embedded": "effective scale of {names}: the embedded guidance at which the network's own "
    "predictions come nearest to the method's, on {count} evenly spaced images; orthogonal: the "
    "share of the method's change that no embedded guidance makes. What each is matched with is "
    "the network alone at that guidance, without true CFG. GA-Eval has no such measure: it is ours",
}


def cost_note(run: Run) -> list[str]:
    """Say on how many images the effective scales of a run were measured, and what they are."""
    names: dict[tuple[str, int], list[str]] = {}
    for entry in run.arms:
        if entry.measured_on is not None:
            key = (entry.measured_by, entry.measured_on)
            names.setdefault(key, []).append(run.short_name(entry))
    return [
        _MEASURED[mode].format(names=", ".join(own), count=count)
        for (mode, count), own in names.items()
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
