"""Scores of images, kept by image, prompt and scorer, so that nothing is scored twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.images import ImageRecord, ImageStore
from core2_sampler.benchmarks.judges import Judge, asked, judges_task
from core2_sampler.benchmarks.lines import append_lines, read_lines
from core2_sampler.benchmarks.runs import Run, store_of
from core2_sampler.benchmarks.suites import SuitePrompt

_ABOUT = ("name", "key", "by_meta", "environments")


class Scored(NamedTuple):
    """A score, and the judge's reason where it has one."""

    value: float
    reason: str


class Task(NamedTuple):
    """An image to be scored, and where it is."""

    store: ImageStore
    record: ImageRecord
    prompt: SuitePrompt


class Scores:
    """The scores of one judge.

    Attributes:
        name: of the judge.
        key: of the judge.
        environments: device and versions that the scores were given with, each once.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        key: str,
        by_meta: bool,
        environments: Sequence[Mapping[str, Any]] = (),
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.name, self.key, self.by_meta = path, name, key, by_meta
        self.environments, self._environment = list(environments), environment
        lines = read_lines(path)
        self._kept = {
            (line["image"], line["asked"]): Scored(line["score"], line["reason"]) for line in lines
        }

    def get(self, sha256: str, prompt: SuitePrompt) -> Scored | None:
        """Return the score of an image, by the sha256 of its file; None if it has none."""
        return self._kept.get((sha256, asked(prompt, self.by_meta)))

    def add(self, tasks: Sequence[Task], scores: Sequence[tuple[float, str]]) -> None:
        """Keep the scores of a batch, all or some of them if the process is killed."""
        lines = []
        for task, (value, reason) in zip(tasks, scores, strict=True):
            key = (task.record.sha256, asked(task.prompt, self.by_meta))
            self._kept[key] = Scored(value, reason)
            lines.append({"image": key[0], "asked": key[1], "score": value, "reason": reason})
        if lines and self._environment and self._environment not in self.environments:
            self.environments.append(self._environment)
            self.write_about()
        append_lines(self.path, lines)

    def write_about(self) -> None:
        """Write down whose scores these are, beside them."""
        about = {name: getattr(self, name) for name in _ABOUT}
        write_atomic(self.path.with_suffix(".json"), json.dumps(about, indent=1).encode())


def open_scores(out: Path, judge: Judge, environment: Mapping[str, Any] | None = None) -> Scores:
    """Return the scores that a folder of results has from a judge, and a place for more.

    Args:
        out: the folder.
        judge: the judge.
        environment: what it runs in, see `core2_sampler.info.environment`; kept with its scores.
    """
    path = out / "scores" / f"{judge.name}-{digest(judge.key)[:8]}.jsonl"
    about = path.with_suffix(".json")
    before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    environments = before.get("environments", [])
    scores = Scores(path, judge.name, judge.key, judge.by_meta, environments, environment)
    scores.write_about()
    return scores


def read_scores(out: Path) -> list[Scores]:
    """Return the scores of every judge that a folder of results was shown to, by name and key.

    Judges of one name, such as one scorer in two precisions, are several judges.
    """
    paths = (out / "scores").glob("*.json")
    abouts = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    ordered = sorted(abouts, key=lambda path: (abouts[path]["name"], abouts[path]["key"]))
    return [Scores(path.with_suffix(".jsonl"), **abouts[path]) for path in ordered]


def tasks_of(out: Path, runs: Iterable[Run], judge_name: str) -> list[Task]:
    """Return the images of runs that a judge is for; failed ones are not among them."""
    tasks = []
    for run in runs:
        cases = [c for c in run.cases if judges_task(judge_name, run.suite, c.prompt.task)]
        for entry in run.arms:
            store = store_of(out, entry)
            records = store.records()
            tasks += [
                Task(store, records[case.key], case.prompt)  # type: ignore[arg-type]
                for case in cases
                if case.key in records
            ]
    return tasks


def score_tasks(
    tasks: Sequence[Task],
    judge: Judge,
    scores: Scores,
    *,
    batch_size: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> int:
    """Score what has no score yet; every batch is kept before the next one is looked at.

    Args:
        tasks: the images.
        judge: the judge.
        scores: its scores.
        batch_size: images judged at once.
        on_images: told how many more images have a score.

    Returns:
        How many were scored now. The same image with the same prompt counts once.

    Raises:
        ValueError: if a file is not what its manifest says, a prompt cannot be judged, or a score
            is not finite; nothing of that batch is kept.
    """
    todo: dict[tuple[str, str], Task] = {}
    for task in tasks:
        if scores.get(task.record.sha256, task.prompt) is None:
            todo.setdefault((task.record.sha256, judge.asked(task.prompt)), task)
    pending = list(todo.values())
    on_images(len(tasks) - len(pending))
    for start in range(0, len(pending), batch_size):
        batch = pending[start : start + batch_size]
        images = [task.store.read(task.record) for task in batch]
        found = judge.score(images, [task.prompt for task in batch])
        for task, (value, _) in zip(batch, found, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"a score must be finite, got {value} by {judge.name} ({judge.key}) for "
                    f"{task.store.folder / task.record.file}: use another --judge-dtype"
                )
        scores.add(batch, found)
        on_images(len(batch))
    return len(pending)
