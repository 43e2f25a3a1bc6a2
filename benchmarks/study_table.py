"""What the studies of Shapes add to the rows of a result, and their page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core2_sampler.benchmarks.cli import about_study
from core2_sampler.benchmarks.correction import flips_for
from core2_sampler.benchmarks.ga_eval import Difference, verdict
from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.benchmarks.report import (
    PLAIN,
    Row,
    markdown_table,
    numbers_table,
    write_rows,
    write_table,
)
from core2_sampler.benchmarks.stats import Array, Estimate, holm, mean_estimate, sign_flip_p
from core2_sampler.benchmarks.study import ArmResult, Study


class Config(Protocol):
    """What the options of a study have in common."""

    @property
    def study(self) -> StudyConfig:
        """The study's options."""
        ...

    @property
    def out(self) -> Path:
        """The table."""
        ...


def score_change(result: ArmResult, reference: ArmResult) -> Array:
    """Return the difference of two arms' verdicts image by image, [n]."""
    return np.asarray(result.correct, dtype=np.float64) - np.asarray(reference.correct)


def estimate(study: Study, values: Any, task: str | None = None) -> Estimate:
    """Estimate the mean of one number an image [n], of one task or as the mean of all tasks."""
    return mean_estimate(*_of_task(study, values, task))


def _of_task(study: Study, values: Any, task: str | None) -> tuple[Array, list[str], list[str]]:
    """Return the numbers of one task or of all, with the prompt and the task of each."""
    cases = study.cases
    chosen = [i for i, case in enumerate(cases) if task in (None, case.prompt.task)]
    clusters = [cases[i].prompt.id for i in chosen]
    strata = [cases[i].prompt.task for i in chosen]
    return np.asarray(values, dtype=np.float64)[chosen], clusters, strata


def corrected_differences(
    study: Study, changes: Sequence[Array], tasks: Sequence[str | None] | None = None
) -> list[Difference]:
    """Estimate the means of changes, and test them with a correction for being several.

    Args:
        study: what the arms share.
        changes: differences of two arms' verdicts image by image, each [n].
        tasks: the task that each is of, None for the mean of all; by default all are that.

    Returns:
        One difference for each change, with enough flips behind its p-value to pass Holm's
        correction.
    """
    flips = flips_for(len(changes))
    tested = [
        _of_task(study, change, task)
        for change, task in zip(changes, tasks or [None] * len(changes), strict=True)
    ]
    p_values = holm(
        [
            sign_flip_p(values, prompts, strata, n_resamples=flips) if len(set(prompts)) > 1 else 1
            for values, prompts, strata in tested  # one prompt shows nothing
        ]
    )
    return [
        Difference(mean_estimate(*each), float(p), is_share=True)
        for each, p in zip(tested, p_values, strict=True)
    ]


def method_verdicts(
    study: Study, compared: Sequence[tuple[str, ArmResult, ArmResult, ArmResult]]
) -> list[str]:
    """Say of each method what its comparisons with CFG and with matched CFG show.

    Args:
        study: what the arms share.
        compared: what each method is called, its result, that of CFG and that of CFG at its
            effective scale and NFE.
    """
    changes = [score_change(own, other) for _, own, *others in compared for other in others]
    told = iter(corrected_differences(study, changes))
    return [verdict(name, next(told), next(told)) for name, *_ in compared]


def choice_note(study: StudyConfig) -> str:
    """Say whether what a study chooses is chosen on the prompts that are reported."""
    if study.split == "val":
        return "What is chosen here is chosen on prompts that no other table reports (split val)."
    return (
        "What is chosen here is chosen on the very prompts that are reported (split test); "
        "`--split val` chooses on others."
    )


def with_metric(row: Row, metric: str, found: Estimate) -> Row:
    """Return a row of the same arm with another number of it."""
    return dataclasses.replace(
        row, metric=metric, value=found.value, low=found.low, high=found.high
    )


def write_study(config: Config, study: Study, rows: Sequence[Row], title: str, text: str) -> None:
    """Write a study's table as Markdown and JSON, and print it.

    Args:
        config: of the command.
        study: what was run.
        rows: the numbers; those in `PLAIN` get a table of their own.
        title: heading.
        text: Markdown that follows the tables.
    """
    about = about_study(config.study, study)
    shares = [row for row in rows if row.metric not in PLAIN]
    page = f"{_plain_table([row for row in rows if row.metric in PLAIN])}\n\n{text}"
    files = write_table(config.out, shares, title=title, provenance=about, text=page)
    write_rows(files[1], [(row, about) for row in rows])
    print(markdown_table(shares), page, f"Wrote {files[0]} and {files[1]}", sep="\n\n")


def _plain_table(rows: Sequence[Row]) -> str:
    """Return one line for each arm, with three digits of each number."""
    arms: dict[tuple[str, int, float], dict[str, str]] = {}
    for row in rows:
        own = arms.setdefault((row.arm, row.steps, row.guidance_scale), {})
        own[row.metric] = f"{row.value:.3g}"
    told = [
        ((name, f"{n}", "" if math.isnan(scale) else f"{scale:g}"), cells)
        for (name, n, scale), cells in arms.items()
    ]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    return numbers_table(("arm", "steps", "scale"), told, metrics)
