"""The report of a folder of results: Markdown, JSON rows, LaTeX and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.calibration import agreements
from core2_sampler.benchmarks.compare import Comparison, comparison_rows, comparisons, value_rows
from core2_sampler.benchmarks.correction import correct
from core2_sampler.benchmarks.judges import without_judge
from core2_sampler.benchmarks.measured import Metric, declared, measure_run
from core2_sampler.benchmarks.notes import INTERVALS, PAIRED
from core2_sampler.benchmarks.report import Row, provenance_facts, write_rows
from core2_sampler.benchmarks.report_findings import (
    below_note,
    cost_note,
    findings,
    floor_note,
    imported_note,
    judge_notes,
    preset_note,
    same_note,
    small_note,
    tasks_note,
)
from core2_sampler.benchmarks.report_plots import (
    contact_sheets,
    quality_plot,
    scale_plot,
    task_bars,
)
from core2_sampler.benchmarks.report_render import (
    Picture,
    Section,
    html_page,
    latex,
    markdown,
    markdown_lines,
)
from core2_sampler.benchmarks.report_tables import comparison_table, score_table, task_table
from core2_sampler.benchmarks.runs import MATCHED, REFERENCE, Run, read_runs
from core2_sampler.benchmarks.scores import read_scores
from core2_sampler.benchmarks.suites import SUITES

TITLE = "Benchmark report"
MEANINGLESS = (
    "The scores of {names} come from random models: they show that the path works and mean nothing."
)
NOTES = (
    f"Scores are means with {INTERVALS} where tasks weigh the same; where all images are right, or "
    "all wrong, Wilson's over prompts. None is given where a task has fewer than two prompts, or "
    "nothing varies.",
    "Shares of right images are percent, their differences points; other scores are in their own "
    "unit.",
    f"{PAIRED}. p is of a sign-flip test over prompts, two-sided; p (Holm) is corrected for all "
    "comparisons of this report: arms, metrics, suites and models together.",
    "Win rates count prompts, with Wilson's intervals: strict has ties as lost, half as half a "
    "win.",
    "Detectable is the smallest true difference whose interval the run would place beside 0 four "
    "times in five, before any correction for several comparisons; none where nothing varies.",
    "An image that could not be generated has the lowest score of all, and is never left out.",
    "s/image is wall time with the VAE and without the text encoders, but with warm-up and "
    "whatever else ran: `core2 bench speed` is what measures time.",
    "Effective scale is the guidance scale that a method's runs really have, orthogonal the share "
    "of its guidance that no scale can imitate. NAME-matched is CFG at that scale with the "
    "method's NFE, rounded down to whole steps (GA-Eval, arXiv 2602.22570); where they are "
    "something else, the notes of the run say what.",
    "A metric that decides was declared by the suite before any run.",
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
    compared = correct([each for _, own, _ in measured for each in comparisons(own)])
    rows = {id(metric): value_rows(metric) for _, own, _ in measured for metric in own}
    sections: list[Section] = []
    for run, own, missing in measured:
        against = [each for each in compared if each.metric.run is run]
        pictures = _pictures(out, own, against, rows, sheet)
        notes = [*floor_note(against, sum(each.p_holm is not None for each in compared))]
        notes += _notes(out, run, own)
        sections.append(_section(run, own, against, rows, pictures, missing, notes))
    metrics = [metric for _, own, _ in measured for metric in own]
    metrics.sort(key=lambda metric: not metric.is_primary)
    sections.append(Section("How to read it", notes=NOTES))
    base = out / "report" / "report"
    write_rows(base.with_suffix(".json"), _flat(metrics, compared, rows))
    texts = {".md": markdown(TITLE, sections), ".tex": latex(sections)}
    texts[".html"] = html_page(TITLE, sections)
    for suffix, text in texts.items():
        write_atomic(base.with_suffix(suffix), text.encode())
    _write_pictures(base.parent, sections)
    return _summary(sections[:-1], base)


def _write_pictures(folder: Path, sections: Sequence[Section]) -> None:
    """Write what the Markdown shows, and remove what an earlier report has shown."""
    shown = [picture for section in sections for picture in section.pictures]
    pictures = {folder / each.file: each.data for each in shown}
    pictures |= {folder / each.printed: each.pdf for each in shown if each.pdf}
    for path in (folder / "pictures").glob("*"):
        if path not in pictures:
            path.unlink()
    for path, data in pictures.items():
        write_atomic(path, data)


def _flat(
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    rows: dict[int, list[list[Row]]],
) -> list[tuple[Row, dict[str, Any]]]:
    """Return all rows, each with where it came from."""
    found = []
    for metric in metrics:
        groups = list(zip(metric.arms, rows[id(metric)], strict=True))
        against = [each for each in compared if each.metric is metric]
        groups += [(each.arm, comparison_rows(each)) for each in against]
        for arm, own in groups:
            entry = arm.entry
            about = {"suite": metric.run.suite, "scorer": metric.key, "N": entry.of_steps}
            if entry.effective_scale is not None:
                about["effective_scale"] = entry.effective_scale
                about["orthogonal_share"] = entry.orthogonal_share
                about["measured_by"] = entry.measured_by
            found += [(row, {**entry.provenance, **about}) for row in own]
    return found


def _summary(sections: Sequence[Section], base: Path) -> str:
    """Return what is printed: no prompt, no origin, nothing that only the files need."""
    parts = []
    for section in sections:
        parts += [section.title, *(f"warning: {text}" for text in section.warnings)]
        parts += section.findings
        for table in section.tables:
            parts += [table.caption, markdown_lines(table)]
    others = ", ".join(base.with_suffix(suffix).name for suffix in (".md", ".tex", ".json"))
    return "\n\n".join([*parts, f"Wrote {base.with_suffix('.html')}; beside it {others}"])


def _section(
    run: Run,
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    rows: dict[int, list[list[Row]]],
    pictures: Sequence[Picture],
    missing: Sequence[str],
    notes: Sequence[str],
) -> Section:
    """Return a run's part: how its arms score and compare, and what it is."""
    images = f"{len(run.prompts)} prompts x {len(run.seeds)} seed{'s' * (len(run.seeds) > 1)}"
    title = f"{run.suite} with {run.settings['model']}: {images}"
    if not metrics:
        return Section(title, missing, notes=notes)
    hollow, other = findings(run, compared)
    tables = [score_table(metric, rows[id(metric)]) for metric in metrics]
    tables += [comparison_table(run, compared)] if compared else []
    tables += [task_table(m, rows[id(m)]) for m in metrics if len(rows[id(m)][0]) > 1]
    warnings = [*_warnings(run, metrics, compared, missing), *hollow]
    return Section(title, warnings, [*other, *same_note(metrics[0])], tables, pictures, notes)


def _notes(out: Path, run: Run, metrics: Sequence[Metric]) -> list[str]:
    """Return where a run and its scores come from."""
    suite = SUITES.get(run.suite)
    return [
        *cost_note(run),
        f"{suite.about}; licence: {suite.licence}",
        f"{len(run.prompts)} of {suite.size} prompts, seeds {', '.join(map(str, run.seeds))}",
        f"run {run.name}",
        *(f"key of {metric.label}: {metric.key}" for metric in metrics),
        *(text for metric in metrics for text in judge_notes(metric)),
        *preset_note(run, metrics),
        *(text for metric in metrics for text in agreements(out, metric.key)),
        *_origins(run),
    ]


def _warnings(
    run: Run,
    metrics: Sequence[Metric],
    compared: Sequence[Comparison],
    missing: Sequence[str],
) -> list[str]:
    """Return what must not be overlooked beside what the comparisons say."""
    random = [metric.label for metric in metrics if metric.is_meaningless]
    failed = {arm.entry.label: arm.failed for metric in metrics for arm in metric.arms}
    deciding = [m.plain_judge for m in metrics if m.is_primary and not m.is_meaningless]
    lacking = [name for name in declared(run) if name not in deciding]
    warnings = [*missing, *([MEANINGLESS.format(names=", ".join(random))] if random else [])]
    warnings += [
        f"{count} images of {label} could not be generated."
        for label, count in failed.items()
        if count
    ]
    if lacking and not (deciding and run.suite == "geneval"):
        names = " and ".join(lacking)
        several = len(lacking) > 1
        warnings.append(
            f"The metrics that decide, {names}, were not measured."
            if several
            else f"The metric that decides, {names}, was not measured."
        )
    if text := without_judge(run.suite, [prompt.task for prompt in run.prompts]):
        warnings.append(f"{text}.")
    warnings += [*tasks_note(run, metrics), *below_note(run)]
    warnings += [*imported_note(run), *small_note(metrics)]
    methods = [e for e in run.arms if e.arm.name != REFERENCE and not e.arm.name.endswith(MATCHED)]
    if methods and not compared:
        warnings.append(f"Without an arm {REFERENCE} at the same N and scale nothing is compared.")
    return warnings


def _origins(run: Run) -> list[str]:
    """Return what made the arms, each fact once with the arms that it holds for."""
    facts: dict[str, dict[str, list[str]]] = {}
    for entry in run.arms:
        own = {"made by": f"`{entry.command}`", **provenance_facts(entry.provenance)}
        for key, text in own.items():
            facts.setdefault(key, {}).setdefault(text, []).append(run.short_name(entry))
    return [
        f"{key}: {text}" if len(names) == len(run.arms) else f"{key}, {', '.join(names)}: {text}"
        for key, texts in facts.items()
        for text, names in texts.items()
    ]


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
