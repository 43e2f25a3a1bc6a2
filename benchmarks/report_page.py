"""The report of a folder of results: Markdown, JSON rows, LaTeX and one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core2_sampler.benchmarks.compare import (
    Comparison,
    Metric,
    comparison_rows,
    comparisons,
    measure_run,
    value_rows,
)
from core2_sampler.benchmarks.ga_eval import Difference, verdict
from core2_sampler.benchmarks.report import Row, provenance_notes, write_rows
from core2_sampler.benchmarks.report_plots import (
    contact_sheets,
    quality_plot,
    scale_plot,
    task_bars,
)
from core2_sampler.benchmarks.report_render import (
    Picture,
    Section,
    Table,
    html_page,
    latex,
    markdown,
    markdown_lines,
)
from core2_sampler.benchmarks.runs import REFERENCE, Run, read_runs
from core2_sampler.benchmarks.scores import read_scores
from core2_sampler.benchmarks.stats import Estimate, sign_flip_floor
from core2_sampler.benchmarks.suites import SUITES
from core2_sampler.trajectory import write_atomic

TITLE = "Benchmark report"
MEANINGLESS = (
    "The scores of {names} come from random models: they show that the path works and mean nothing."
)
NOTES = (
    "Intervals are 95 %, by BCa bootstrap over whole prompts, stratified by task where tasks weigh "
    "the same. Shares are percent, their differences points; other scores are in their own unit.",
    "Differences are paired image by image on the same initial latents. p is of a sign-flip test "
    "over prompts, two-sided; p (Holm) is corrected for all comparisons of one suite and model.",
    "Win rates count prompts, with Wilson intervals: strict has ties as lost, half as half a win.",
    "Detectable is the smallest true difference that the run would show 4 times in 5; "
    "without any spread there is none.",
    "An image that could not be generated has the lowest score of all; none is left out.",
    "s/image is wall time with the VAE and without the text encoders.",
    "w_e is the guidance scale that a method's runs really have, orthogonal the share of its "
    "guidance that no scale can imitate; NAME-matched is CFG at that scale and the same NFE.",
    "The first metric of each suite is the one that the suite declares to decide.",
)


def write_report(out: Path, sheet: int) -> str:
    """Write ``report/report.md``, ``.json``, ``.tex`` and ``.html`` below a folder of results.

    Args:
        out: the folder.
        sheet: pairs in a contact sheet.

    Returns:
        The tables as Markdown and the names of the files, to be printed.

    Raises:
        ValueError: if no run is complete; where some are, what others lack is a warning.
    """
    scores = read_scores(out)
    measured = [(run, *measure_run(out, run, scores)) for run in read_runs(out)]
    if not any(own for _, own, _ in measured):
        lacks = "; ".join(text for _, _, missing in measured for text in missing)
        raise ValueError(f"a run must have all its images and scores, got none such: {lacks}")
    compared: list[Comparison] = []
    rows: dict[int, list[list[Row]]] = {}
    sections = [Section("How to read it", notes=NOTES)]
    for run, own, missing in measured:
        against = comparisons(own)
        compared += against
        rows |= {id(metric): value_rows(metric) for metric in own}
        pictures = _pictures(out, own, against, rows, sheet)
        sections.append(_section(run, own, against, rows, pictures, missing))
    metrics = [metric for _, own, _ in measured for metric in own]
    metrics.sort(key=lambda metric: not metric.is_primary)
    base = out / "report" / "report"
    write_rows(base.with_suffix(".json"), _flat(metrics, compared, rows))
    texts = {".md": markdown(TITLE, sections), ".tex": latex(sections)}
    texts[".html"] = html_page(TITLE, sections)
    for suffix, text in texts.items():
        write_atomic(base.with_suffix(suffix), text.encode())
    return _summary(sections, [base.with_suffix(suffix) for suffix in (*texts, ".json")])


def _flat(
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    rows: dict[int, list[list[Row]]],
) -> list[tuple[Row, dict[str, Any]]]:
    """Return all rows, each with where it came from."""
    found = []
    for metric in metrics:
        groups = list(zip(metric.arms, rows[id(metric)], strict=True))
        own = [each for each in compared if each.metric is metric]
        groups += [(each.arm, comparison_rows(each)) for each in own]
        about = {"suite": metric.run.suite, "scorer": metric.key}
        found += [(row, {**arm.entry.provenance, **about}) for arm, own in groups for row in own]
    return found


def _summary(sections: Sequence[Section], files: Sequence[Path]) -> str:
    parts = []
    for section in sections[1:]:
        parts += [section.title, *section.warnings]
        for table in section.tables:
            parts += [table.caption, markdown_lines(table)]
    return "\n\n".join([*parts, f"Wrote {', '.join(map(str, files))}"])


def _section(
    run: Run,
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    rows: dict[int, list[list[Row]]],
    pictures: Sequence[Picture],
    missing: Sequence[str],
) -> Section:
    """Return a run's part: what it is, how its arms score, and how they compare."""
    suite = SUITES.get(run.suite)
    title = f"{run.suite} with {run.settings['model']}"
    if not metrics:
        return Section(title, missing, _origins(run))
    failed = {arm.entry.label: arm.failed for arm in metrics[0].arms if arm.failed}
    random = [metric.name for metric in metrics if metric.is_meaningless]
    warnings = [*missing, *([MEANINGLESS.format(names=", ".join(random))] if random else [])]
    warnings += [
        f"{count} images of {label} could not be generated." for label, count in failed.items()
    ]
    if not any(metric.is_primary and not metric.is_meaningless for metric in metrics):
        warnings.append(f"The metric that decides, {suite.primary}, was not measured.")
    if not compared:
        warnings.append(f"Without an arm {REFERENCE} at the same N and scale nothing is compared.")
    hollow, other = _verdicts(compared)
    warnings += hollow
    notes = [
        *other,
        *_floor(run, compared),
        *_measured_on(run),
        f"{suite.about}; licence: {suite.licence}",
        f"{len(run.prompts)} of {suite.size} prompts, seeds {', '.join(map(str, run.seeds))}",
        *(f"{metric.name} is {metric.key}" for metric in metrics),
        *_origins(run),
    ]
    tables = [_value_table(metric, rows[id(metric)]) for metric in metrics]
    tables += [_comparison_table(compared)] if compared else []
    return Section(title, warnings, notes, tables, pictures)


def _verdicts(compared: Sequence[Comparison]) -> tuple[list[str], list[str]]:
    """Return GA-Eval's sentences: on wins that are nothing but stronger guidance, and others."""
    differences: dict[tuple[str, str], dict[bool, Difference]] = {}
    for each in compared:
        if each.p_holm is not None:
            pair = differences.setdefault((each.metric.name, each.arm.entry.label), {})
            is_default = each.reference.entry.arm.name == REFERENCE
            pair[is_default] = Difference(each.difference, each.p_holm)
    hollow: list[str] = []
    other: list[str] = []
    for (metric, label), pair in differences.items():
        if len(pair) == 2:
            default, matched = pair[True], pair[False]
            only_default = default.is_win and not matched.is_win
            text = f"GA-Eval on {metric}: {verdict(label, default, matched)}"
            (hollow if only_default else other).append(text)
    return hollow, other


def _floor(run: Run, compared: Sequence[Comparison]) -> list[str]:
    """Say how small a p-value of a run can be at all."""
    count = sum(each.p_holm is not None for each in compared)
    floor = sign_flip_floor(len(run.prompts))
    text = (
        f"with {len(run.prompts)} prompts no p is below {floor:.2g}, and with {count} comparisons "
        f"the smallest p (Holm) is not below {min(1, count * floor):.2g}"
    )
    return [text] if count else []


def _measured_on(run: Run) -> list[str]:
    """Say on how many images the effective scales of a run were measured."""
    labels: dict[int, list[str]] = {}
    for entry in run.arms:
        if entry.measured_on is not None:
            labels.setdefault(entry.measured_on, []).append(entry.label)
    return [
        f"{'; '.join(names)}: w_e and orthogonal measured on {count} evenly spaced images"
        for count, names in labels.items()
    ]


def _origins(run: Run) -> list[str]:
    """Return what made the arms, once for all arms that have it in common."""
    arms: dict[str, list[str]] = {}
    for entry in run.arms:
        notes = f"made by `{entry.command}`\n{provenance_notes(entry.provenance)}"
        arms.setdefault(notes.replace("\n- ", "; "), []).append(entry.label)
    return [f"{', '.join(labels)}: {notes}" for notes, labels in arms.items()]


def _value_table(metric: Metric, rows: Sequence[Sequence[Row]]) -> Table:
    tasks = [row.metric.partition("/")[2] for row in rows[0][1:]]
    marks = ["decides"] * metric.is_primary + ["MEANINGLESS"] * metric.is_meaningless
    caption = f"{metric.name} ({', '.join(marks)})" if marks else metric.name
    head = ["arm", "steps", "scale", "NFE", "s/image", "images", "failed", "w_e", "orthogonal"]
    head += ["all", *tasks]
    lines = []
    for arm, own in zip(metric.arms, rows, strict=True):
        fixed = [own[0].arm, str(own[0].steps), f"{own[0].guidance_scale:g}", f"{own[0].nfe:g}"]
        fixed += [f"{arm.seconds:.3g}", str(own[0].n_images), str(arm.failed)]
        entry = arm.entry
        fixed += [
            "" if value is None else f"{value:.3g}"
            for value in (entry.effective_scale, entry.orthogonal_share)
        ]
        cells = [_cell(metric, Estimate(row.value, row.low, row.high)) for row in own]
        lines.append(fixed + cells)
    return Table(caption, head, lines)


def _comparison_table(compared: Sequence[Comparison]) -> Table:
    head = ["arm", "N", "scale", "against", "metric", "difference", "p", "p (Holm)"]
    head += ["won-tied-lost", "win rate, strict", "win rate, half", "detectable"]
    lines = []
    for each in compared:
        entry, wins = each.arm.entry, each.wins
        lines.append(
            [
                entry.arm.name,
                str(entry.of_steps),
                f"{entry.guidance_scale:g}",
                each.reference.entry.arm.name,
                each.metric.name,
                _cell(each.metric, each.difference, "+"),
                f"{each.p_value:.2g}",
                "" if each.p_holm is None else f"{each.p_holm:.2g}",
                f"{wins.wins}-{wins.ties}-{wins.losses}",
                _percent(wins.strict),
                _percent(wins.half),
                _number(each.metric, each.detectable) if each.detectable else "",
            ]
        )
    return Table("Paired comparisons", head, lines)


def _pictures(
    out: Path,
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    rows: dict[int, list[list[Row]]],
    sheet: int,
) -> list[Picture]:
    """Return the plots of all metrics, and the contact sheets of the first."""
    pictures = []
    for metric in metrics:
        plots = [draw(metric, rows[id(metric)]) for draw in (quality_plot, scale_plot, task_bars)]
        pictures += [plot for plot in plots if plot is not None]
    for each in compared:
        if each.metric is metrics[0] and sheet:
            pictures += contact_sheets(out, each, sheet)
    return pictures


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
