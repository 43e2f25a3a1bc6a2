"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.geneval.aggregate import correct_prompts
from core2_sampler.benchmarks.measured import Measured, Metric
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.report_render import Table, without_empty_columns
from core2_sampler.benchmarks.runs import Run, RunArm
from core2_sampler.benchmarks.stats import Estimate

_SHARES = ["% correct images", "% correct prompts"]


def score_table(metric: Metric, rows: Sequence[Sequence[Row]]) -> Table:
    """Return the arms with what they cost and how they score."""
    head = ["arm", "steps", "scale", "NFE", "s/image", "images", "failed"]
    head += ["effective scale", "orthogonal", metric.label, *_SHARES * metric.is_geneval]
    lines = []
    for arm, (own, *_) in zip(metric.arms, rows, strict=True):
        entry = arm.entry
        lines.append(
            [
                own.arm,
                str(own.steps),
                _scale(entry, own),
                _known(own.nfe, "g"),
                _known(arm.seconds, ".2g"),
                str(own.n_images),
                str(arm.failed) if arm.failed else "",
                _known(entry.effective_scale, ".2f"),
                _known(entry.orthogonal_share, ".2f"),
                _cell(metric, _estimate(own)),
                *(_correct(metric, arm) if metric.is_geneval else ()),
            ]
        )
    return without_empty_columns(Table(_caption(metric), head, lines))


def task_table(metric: Metric, rows: Sequence[Sequence[Row]]) -> Table:
    """Return the arms' scores on each task."""
    tasks = [row.metric.partition("/")[2] for row in rows[0][1:]]
    lines = [
        [metric.run.short_name(arm.entry), *(_cell(metric, _estimate(row)) for row in own[1:])]
        for arm, own in zip(metric.arms, rows, strict=True)
    ]
    return Table(f"{_caption(metric)} by task", ["arm", *tasks], lines)


def comparison_table(run: Run, compared: Sequence[Comparison]) -> Table:
    """Return every arm against its references."""
    head = ["arm", "against", "metric", "difference", "p", "p (Holm)", "won-tied-lost"]
    head += ["win rate, strict", "win rate, half", "detectable"]
    lines = []
    for each in compared:
        wins = each.wins
        lines.append(
            [
                run.short_name(each.arm.entry),
                each.reference.entry.arm.name,
                each.metric.label,
                _cell(each.metric, each.difference, "+"),
                f"{each.p_value:.2g}",
                "" if each.p_holm is None else f"{each.p_holm:.2g}",
                f"{wins.wins}-{wins.ties}-{wins.losses}",
                _percent(wins.strict),
                _percent(wins.half),
                _number(each.metric, each.detectable) if each.detectable else "",
            ]
        )
    return without_empty_columns(Table("Paired comparisons", head, lines, texts=3))


def _scale(entry: RunArm, own: Row) -> str:
    """Return an arm's guidance scale, and what stands in for it."""
    if entry.arm.evaluators is not None:
        return "picked"
    if entry.arm.image_scales is not None:
        return "each its own"
    if entry.arm.embedded_guidance is not None:
        return f"{own.guidance_scale:.3g}, embeds {entry.arm.embedded_guidance:.3g}"
    return f"{own.guidance_scale:.3g}"


def _caption(metric: Metric) -> str:
    marks = ["decides"] * metric.is_primary + ["MEANINGLESS"] * metric.is_meaningless
    unit = " %" if metric.is_share else ""
    return f"{metric.label}{unit} ({', '.join(marks)})" if marks else f"{metric.label}{unit}"


def _correct(metric: Metric, arm: Measured) -> list[str]:
    """Return GenEval's two other scores: of all images alike, and of prompts with a right image."""
    right = [value > 0 for value in arm.values]
    prompts = correct_prompts(zip(metric.clusters, right, strict=True))
    return [_number(metric, sum(right) / len(right)), _number(metric, prompts)]


def _estimate(row: Row) -> Estimate:
    return Estimate(row.value, row.low, row.high)


def _known(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{form}}"


def _number(metric: Metric, value: float, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:{sign}.1f}" if metric.is_share else f"{value:{sign}.4g}"


def _cell(metric: Metric, estimate: Estimate, sign: str = "") -> str:
    """Return '43.2 [40.1, 46.3]'; the value alone where there is no interval."""
    value, low, high = (
        _number(metric, x, sign) for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]" if low else value


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
