"""GenEval's results file and the scores drawn from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.lines import append_text

_OFFICIAL = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
_OURS = ("judge", "sha256")


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One judged image; the official columns, and two of ours that official files lack.

    Attributes:
        filename: path of the image.
        tag: task of its prompt.
        prompt: the caption.
        correct: the verdict.
        reason: why not, empty if correct.
        metadata: JSON of the prompt's record; images of one prompt have the same.
        details: JSON of the boxes that counted, ``{name: [[x1, y1, x2, y2, score], ...]}``.
        judge: who judged; empty for the official judge.
        sha256: of the image file.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str
    judge: str = ""
    sha256: str = ""

    def line(self) -> str:
        """Return the row as JSON; columns of ours are left out where they are empty."""
        values = asdict(self)
        return json.dumps({k: v for k, v in values.items() if k in _OFFICIAL or v})


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Score of one task: the share of correct images, and their numbers."""

    score: float
    correct: int
    images: int


@dataclass(frozen=True, slots=True)
class Summary:
    """GenEval's scores, shares in 0 to 1.

    Attributes:
        images: number of images.
        prompts: number of distinct prompts, told apart by their metadata.
        correct_images: share of correct images.
        correct_prompts: share of prompts with at least one correct image.
        tasks: score of each task, in the order of first appearance.
        overall: unweighted mean of the tasks' scores, the score that papers quote.
    """

    images: int
    prompts: int
    correct_images: float
    correct_prompts: float
    tasks: dict[str, TaskScore]
    overall: float


def summarize(rows: Sequence[ResultRow]) -> Summary:
    """Return the scores of judged images.

    Raises:
        ValueError: if there are none, or they come from different judges: another detector is
            another scale.

    Reference:
        summary_scores.py of djghosh13/geneval.
    """
    if not rows:
        raise ValueError("scores need judged images, got none")
    if len(judges := sorted({row.judge for row in rows})) > 1:
        raise ValueError(f"all images must have one judge, got {judges}: summarize each apart")
    tasks: dict[str, list[bool]] = {}
    for row in rows:
        tasks.setdefault(row.tag, []).append(row.correct)
    scores = {
        tag: TaskScore(sum(right) / len(right), sum(right), len(right))
        for tag, right in tasks.items()
    }
    return Summary(
        images=len(rows),
        prompts=len({row.metadata for row in rows}),
        correct_images=sum(row.correct for row in rows) / len(rows),
        correct_prompts=correct_prompts((row.metadata, row.correct) for row in rows),
        tasks=scores,
        overall=sum(task.score for task in scores.values()) / len(scores),
    )


def correct_prompts(verdicts: Iterable[tuple[str, bool]]) -> float:
    """Return the share of prompts with at least one correct image.

    Args:
        verdicts: of each image what names its prompt, and whether it is correct.
    """
    prompts: dict[str, bool] = {}
    for prompt, correct in verdicts:
        prompts[prompt] = prompts.get(prompt, False) or correct
    return sum(prompts.values()) / len(prompts)


def read_results(path: Path) -> list[ResultRow]:
    """Read a results file, an official one or ours.

    Raises:
        ValueError: if there is no such file, or a line is no such row.
    """
    if not path.is_file():
        raise ValueError(f"a results file must exist, got {path}: judge a folder of images first")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse(line, f"{path} line {k}") for k, line in enumerate(lines, start=1) if line]


def write_results(path: Path, rows: Iterable[ResultRow]) -> None:
    """Write a results file, whole or not at all."""
    write_atomic(path, "".join(row.line() + "\n" for row in rows).encode())


def append_result(path: Path, row: ResultRow) -> None:
    """Add one row to a results file; a kill leaves at most a line without its end."""
    append_text(path, row.line() + "\n")


def _parse(line: str, where: str) -> ResultRow:
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: a row must be JSON, got {line[:60]!r}") from error
    if not isinstance(values, dict) or not set(_OFFICIAL) <= set(values):
        raise ValueError(f"{where}: a row must have {', '.join(_OFFICIAL)}, got {line[:60]!r}")
    if not isinstance(values["correct"], bool):
        raise ValueError(f"{where}: correct must be true or false, got {values['correct']!r}")
    return ResultRow(**{name: values[name] for name in (*_OFFICIAL, *_OURS) if name in values})
