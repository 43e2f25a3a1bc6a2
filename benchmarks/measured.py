"""What the judges say of a run: each arm's scores, case by case, nothing dropped."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.images import ImageRecord
from core2_sampler.benchmarks.judges import (
    GENEVAL,
    OFFICIAL,
    SHARES,
    TINY,
    is_meaningless,
    judges_task,
    suite_judges,
)
from core2_sampler.benchmarks.runs import Run, RunArm, store_of
from core2_sampler.benchmarks.scores import Scores
from core2_sampler.benchmarks.stats import Array, Estimate, mean_estimate, share_estimate
from core2_sampler.benchmarks.study import Case

TASK_MEANS = ("shapes", "geneval", "t2icompbench")
"""Suites whose score is the unweighted mean of their tasks; in others every prompt counts alike."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An arm's scores.

    Attributes:
        entry: the arm.
        values: one score a case, [n]; a failed image has the floor.
        reasons: the judge's reasons, n.
        records: the images, None where one failed, n.
    """

    entry: RunArm
    values: Array
    reasons: list[str]
    records: list[ImageRecord | None]

    @property
    def failed(self) -> int:
        """How many images could not be generated."""
        return self.records.count(None)

    @property
    def nfe(self) -> float:
        """Denoiser evaluations of an image, counted."""
        return _mean([record.nfe for record in self.records if record])

    @property
    def seconds(self) -> float:
        """Wall time of an image, with the VAE and without the text encoders."""
        return _mean([record.seconds for record in self.records if record])


def _mean(numbers: Sequence[float]) -> float:
    """Return the mean, nan of nothing."""
    return sum(numbers) / len(numbers) if numbers else math.nan


@dataclass(frozen=True, slots=True)
class Metric:
    """One judge's scores of all arms of a run.

    Attributes:
        run: the run.
        judge: the judge's name.
        key: the judge's key.
        cases: the cases that it judges, in the run's order.
        arms: the arms.
        is_shared: whether several judges of the run have this name.
        environments: device and versions that the judge ran with, each once.
    """

    run: Run
    judge: str
    key: str
    cases: list[Case]
    arms: list[Measured]
    is_shared: bool = False
    environments: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """Its name in rows: the judge's, with a mark of its key where that is needed."""
        return f"{self.judge}@{digest(self.key)[:6]}" if self.is_shared else self.judge

    @property
    def label(self) -> str:
        """Its name in tables, plots and texts, where GenEval's port is called one."""
        return f"{self.name} (HF port)" if self.plain_judge == GENEVAL else self.name

    @property
    def plain_judge(self) -> str:
        """The judge's name, without the mark of a tiny one."""
        return self.judge.removesuffix(f"-{TINY}")

    @property
    def is_share(self) -> bool:
        """Whether scores are 1 (right) or 0."""
        return self.plain_judge in SHARES

    @property
    def is_geneval(self) -> bool:
        """Whether it is GenEval's score, by whatever detector."""
        return self.plain_judge in (GENEVAL, OFFICIAL)

    @property
    def is_primary(self) -> bool:
        """Whether the suite has declared that this metric decides; GenEval's own judge does too."""
        return self.plain_judge in (*declared(self.run), OFFICIAL)

    @property
    def is_meaningless(self) -> bool:
        """Whether the judge is a random model."""
        return is_meaningless(self.judge)

    @property
    def clusters(self) -> list[str]:
        """Prompt of each case."""
        return [case.prompt.id for case in self.cases]

    @property
    def strata(self) -> list[str]:
        """What is resampled apart, and averaged with equal weight: tasks, or the whole suite."""
        tasks = self.run.suite in TASK_MEANS
        return [case.prompt.task if tasks else self.run.suite for case in self.cases]

    def estimate(self, values: Array, tasks: Sequence[str] = ()) -> Estimate:
        """Estimate the mean of ``values`` [n], of some tasks only where they are named."""
        chosen = [i for i, c in enumerate(self.cases) if not tasks or c.prompt.task in tasks]
        clusters, strata = self.clusters, self.strata
        estimator = share_estimate if self.is_share else mean_estimate
        return estimator(values[chosen], [clusters[i] for i in chosen], [strata[i] for i in chosen])


def declared(run: Run) -> list[str]:
    """Return the judges that decide, as the run's suite has declared."""
    return suite_judges(run.suite, [prompt.task for prompt in run.prompts])


class IncompleteRun(ValueError):
    """A run lacks images or scores; the text says what to do."""


def measure_run(out: Path, run: Run, scores: Sequence[Scores]) -> tuple[list[Metric], list[str]]:
    """Collect what the judges say of a run, those first that the suite declares to decide.

    Returns:
        The metrics for which nothing is missing, and what is missing for others.
    """
    found: list[Metric] = []
    missing: list[str] = []
    for each in scores:
        try:
            metric = measure(out, run, each)
        except IncompleteRun as error:
            missing.append(str(error))
        else:
            found += [] if metric is None else [metric]
    if not found and not missing:
        missing.append(f"{run.name} has no scores: run `core2 bench score --out {out}`")
    names = Counter(metric.judge for metric in found)
    named = [dataclasses.replace(each, is_shared=names[each.judge] > 1) for each in found]
    return sorted(named, key=lambda each: not each.is_primary), list(dict.fromkeys(missing))


def measure(out: Path, run: Run, scores: Scores) -> Metric | None:
    """Collect one judge's scores of a run, None if it was shown none of its images.

    A failed image has the lowest score that the judge gave to any image of the run, and 0 where it
    says right or wrong: it is counted against its arm and never dropped.

    Raises:
        IncompleteRun: if images or scores are missing.
    """
    cases = [case for case in run.cases if judges_task(scores.name, run.suite, case.prompt.task)]
    found = [_collect(out, run, entry, scores, cases) for entry in run.arms]
    known = [value for each in found for value in each.values if not np.isnan(value)]
    if not known:
        return None
    metric = Metric(run, scores.name, scores.key, cases, found, environments=scores.environments)
    without = sum(int(np.isnan(each.values).sum()) for each in found)
    unscored = without - sum(each.failed for each in found)
    if unscored:
        rest = f"run `core2 bench score --out {out}` with it"
        if scores.name == OFFICIAL:
            rest = "export and judge the other arms too, and `core2 bench import` their results"
        raise IncompleteRun(
            f"all images of {run.suite} must have a score by {scores.name}, got {unscored} "
            f"without ({scores.key}): {rest}"
        )
    floor = 0.0 if metric.is_share else min(known)
    arms = [dataclasses.replace(e, values=np.nan_to_num(e.values, nan=floor)) for e in found]
    return dataclasses.replace(metric, arms=arms)


def _collect(out: Path, run: Run, entry: RunArm, scores: Scores, cases: Sequence[Case]) -> Measured:
    """Return an arm's scores, nan where there is none."""
    store = store_of(out, entry)
    records, failures = store.records(), store.failures()
    absent = sum(case.key not in records and case.key not in failures for case in cases)
    if absent:
        raise IncompleteRun(
            f"all images of the arm {entry.label} must be there, got {absent} of {len(cases)} "
            f"missing: run `{entry.command}` again"
        )
    kept = [records.get(case.key) for case in cases]
    found = [
        scores.get(record.sha256, case.prompt) if record else None  # type: ignore[arg-type]
        for record, case in zip(kept, cases, strict=True)
    ]
    values = np.array([one.value if one else np.nan for one in found])
    return Measured(entry, values, [one.reason if one else "" for one in found], kept)
