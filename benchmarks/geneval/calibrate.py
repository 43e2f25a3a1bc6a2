"""How far a judge agrees with the human labels that GenEval published.

The labels are ``annotations/annotations_*.csv`` of djghosh13/geneval: a row for each rater and
image, with what the rater counted, which colors and which relative position they saw. GenEval
publishes no rule that makes verdicts of them; ``vote`` is ours.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from core2_sampler.benchmarks.geneval.aggregate import ResultRow
from core2_sampler.benchmarks.geneval.prompts import GenEvalPrompt, parse_prompt

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_COLUMNS = (
    "Input.prompt_id",
    "Input.image_id",
    "Input.caption",
    *(f"Input.object_{k}_name" for k in (0, 1)),
    *(f"Answer.task-{what}-{k}" for what in ("count", "color") for k in (0, 1)),
    "Answer.task-position-x",
    "Answer.task-position-y",
)

Answer = Mapping[str, str]
"""One row of the file: columns and their texts; a text is empty where nothing was answered."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The answers of all raters on one image.

    Attributes:
        prompt_id: number of its prompt in the metadata file.
        index: number of the image among those of the prompt.
        caption: the prompt's text.
        url: where the image is published; empty where the file does not say.
        answers: one a rater.
    """

    prompt_id: int
    index: int
    caption: str
    url: str = ""
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of a judge with the majority of the raters, shares in 0 to 1.

    Attributes:
        images: number of images.
        agreement: share on which both say the same.
        kappa: Cohen's kappa; NaN where one verdict is all that both ever give.
        judge_correct: share that the judge calls correct.
        human_correct: share that the majority calls correct.
        unanimous: number of images on which all raters agree.
        unanimous_agreement: agreement on those; NaN without any.
    """

    images: int
    agreement: float
    kappa: float
    judge_correct: float
    human_correct: float
    unanimous: int
    unanimous_agreement: float


def read_labels(path: Path) -> list[Labels]:
    """Read a file of human labels.

    Raises:
        ValueError: if there is no such file, or it lacks a column or rows.
    """
    if not path.is_file():
        raise ValueError(
            f"human labels must be a CSV file, got {path} which is none: take one of "
            "annotations/annotations_*.csv from github.com/djghosh13/geneval"
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in _COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path} must have rows with {', '.join(missing)}, got none of these")
    images: dict[tuple[int, int], Labels] = {}
    for row in rows:
        key = int(row["Input.prompt_id"]), int(row["Input.image_id"])
        label = Labels(*key, row["Input.caption"], row.get("Input.image_url", ""))
        images.setdefault(key, label).answers.append(row)
    return list(images.values())


def vote(answer: Answer, prompt: GenEvalPrompt) -> bool:
    """Say whether an image is right for a rater, by the rules that the judge follows.

    Counts as the clauses demand; the color is among those named; the relation is the one chosen.
    A question that was left blank affirms nothing.

    Raises:
        ValueError: if the rater was not asked about an object of the prompt.
    """
    counts = {c.name: _count(answer, _slot(answer, c.name)) for c in prompt.include}
    if any(counts[clause.name] < clause.count for clause in prompt.include):
        return False
    if any(counts.get(clause.name, 0) >= clause.count for clause in prompt.exclude):
        return False
    for clause in prompt.include:
        slot = _slot(answer, clause.name)
        if clause.color not in (None, *answer[f"Answer.task-color-{slot}"].split("|")):
            return False
        if clause.position is not None:
            relation = clause.position[0].removesuffix(" of")
            # The question is where object 1 lies relative to object 0.
            wanted = relation if slot == 1 else _OPPOSITE[relation]
            if wanted not in (answer["Answer.task-position-x"], answer["Answer.task-position-y"]):
                return False
    return True


def calibrate(rows: Sequence[ResultRow], labels: Sequence[Labels]) -> dict[str, Agreement]:
    """Return the agreement of judged images with their labels, per task and under ``all``.

    Args:
        rows: results on the labelled images; further ones are left out.
        labels: human labels.

    Raises:
        ValueError: if there are no labels, a labelled image was not judged, or its caption is
            another.
    """
    if not labels:
        raise ValueError("agreement needs labelled images, got none")
    by_place = {place(row.filename): row for row in rows}
    pairs: dict[str, list[tuple[bool, list[bool]]]] = {"all": []}
    for label in labels:
        row = by_place.get((label.prompt_id, label.index))
        if row is None or row.prompt != label.caption:
            got = "no result" if row is None else repr(row.prompt)
            raise ValueError(
                f"every labelled image must be judged, got {got} for image {label.index} of prompt "
                f"{label.prompt_id}, {label.caption!r}: judge the images that were labelled"
            )
        prompt = parse_prompt(row.metadata, f"{label.prompt_id:05d}", row.filename)
        pair = (row.correct, [vote(answer, prompt) for answer in label.answers])
        pairs.setdefault(row.tag, []).append(pair)
        pairs["all"].append(pair)
    return {task: _agreement(found) for task, found in pairs.items()}


def _agreement(pairs: Sequence[tuple[bool, list[bool]]]) -> Agreement:
    judge = [correct for correct, _ in pairs]
    human = [2 * sum(votes) > len(votes) for _, votes in pairs]
    same = [a == b for a, b in zip(judge, human, strict=True)]
    clear = [k for k, (_, votes) in enumerate(pairs) if len(set(votes)) == 1]
    return Agreement(
        images=len(pairs),
        agreement=sum(same) / len(same),
        kappa=cohen_kappa(judge, human),
        judge_correct=sum(judge) / len(judge),
        human_correct=sum(human) / len(human),
        unanimous=len(clear),
        unanimous_agreement=sum(same[k] for k in clear) / len(clear) if clear else float("nan"),
    )


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Return the agreement of two judges beyond that of chance, NaN if chance explains all.

    Reference:
        Cohen, "A coefficient of agreement for nominal scales" (1960), equation 1.
    """
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    p, q = sum(a) / len(a), sum(b) / len(b)
    chance = p * q + (1 - p) * (1 - q)
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def place(filename: str) -> tuple[int, int]:
    """Return the numbers of prompt and image in the path of an image in GenEval's layout.

    Raises:
        ValueError: if it is no such path.
    """
    path = PurePosixPath(filename)
    if len(path.parts) < 3 or not (path.parts[-3].isdecimal() and path.stem.isdecimal()):
        raise ValueError(f"an image's path must end in 00000/samples/00000.png, got {filename!r}")
    return int(path.parts[-3]), int(path.stem)


def _slot(answer: Answer, name: str) -> int:
    names = [answer[f"Input.object_{k}_name"] for k in (0, 1)]
    if name not in names:
        raise ValueError(f"raters must have been asked about {name!r}, got {names}")
    return names.index(name)


def _count(answer: Answer, slot: int) -> int:
    return int(float(answer[f"Answer.task-count-{slot}"] or 0))
