"""What ``core2 bench dynamic-cfg`` says of its runs in words, and what online scales cost."""

from __future__ import annotations

from collections.abc import Sequence

from core2_sampler.benchmarks.dynamic_runs import ADAPTIVE, Runs, named_tasks
from core2_sampler.benchmarks.full_size import OF_FAMILY, build_denoiser, denoiser_cost
from core2_sampler.benchmarks.ga_eval import Difference
from core2_sampler.benchmarks.study import Study
from core2_sampler.benchmarks.study_table import corrected_differences, score_change
from core2_sampler.evaluators.cost import online_share
from core2_sampler.full_size import FULL_SIZE, example_call

COST_BAR = 0.03
"""Share of the FLOPs of a CFG run at full size that online scales may add."""

_BAR = "the best constant scale"


def verdicts(study: Study, runs: Runs) -> str:
    """Say whether the bar is met, then what every other arm is against a constant scale.

    The bar: `ADAPTIVE` above the best constant scale by an interval that excludes 0.

    Returns:
        Markdown: a sentence, and a list with all differences that the p-values are corrected over.
    """
    told = differences(study, runs)
    bar = told[ADAPTIVE, _BAR]
    is_met = bar.estimate.low > 0
    text = (
        f"The bar, {ADAPTIVE} above {_BAR} ({runs.best_scale:g}) by an interval that excludes 0, "
        f"is {'met' if is_met else 'not met'}: {_outcome(bar)}"
    )
    if is_met and not bar.is_win:
        text += "; the corrected p-value does not show it"
    for task in named_tasks(study):
        text += f". {task}: {_outcome(told[f'{ADAPTIVE}, {task}', _BAR])}"
    lines = [f"- {name} against {other}: {_outcome(each)}" for (name, other), each in told.items()]
    return f"{text}.\n\n" + "\n".join(lines)


def differences(study: Study, runs: Runs) -> dict[tuple[str, str], Difference]:
    """Return the paired differences that are tested together, by what is compared with what."""
    compared = {
        (result.arm.name, _BAR): (score_change(result, runs.best), None)
        for result in runs.results
        if result.arm.name != "cfg"
    }
    by_name = {result.arm.name: result for result in runs.results}
    change = score_change(by_name[ADAPTIVE], runs.best)
    tasks = {(f"{ADAPTIVE}, {task}", _BAR): (change, task) for task in named_tasks(study)}
    fast = {
        (name, constant.arm.name): (score_change(by_name[name], constant), None)
        for name, constant in runs.fast.items()
    }
    pairs = {**compared, **tasks, **fast}
    changes, of_task = zip(*pairs.values(), strict=True)
    return dict(zip(pairs, corrected_differences(study, changes, of_task), strict=True))


def _outcome(found: Difference) -> str:
    """Return better, worse or neither, with the numbers."""
    word = "better" if found.is_win else "worse" if found.is_loss else "no difference shown"
    return f"{word}, {found.text}"


def cost_note(family: str, kinds: Sequence[str], candidates: int) -> str:
    """Say what online scales add to a run of CFG at full size.

    Args:
        family: of the model.
        kinds: of the evaluators, all of which score every candidate.
        candidates: how many scales are tried in each step.
    """
    name = OF_FAMILY[family]
    model = FULL_SIZE.get(name)
    cost = denoiser_cost(build_denoiser(model), example_call(model))
    share = online_share(model, cost.flops, kinds, candidates)
    verdict = "within" if share <= COST_BAR else "above"
    return (
        f"Cost at full size: {candidates} candidates scored by evaluators of these kinds "
        f"({', '.join(kinds)}) at their default size add {share:.2%} to the FLOPs of a run of CFG "
        f"with the published network of the family ({name}, 1024 x 1024 px), {verdict} the bar of "
        f"{COST_BAR:.0%}; with all steps fast, at half the passes, the share is {2 * share:.2%}."
    )
