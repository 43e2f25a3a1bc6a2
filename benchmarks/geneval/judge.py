"""GenEval's judge: a detector, a color classifier and the rules; and a folder judged by it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from core2_sampler.benchmarks.geneval.aggregate import (
    ResultRow,
    append_result,
    read_results,
)
from core2_sampler.benchmarks.geneval.layout import Sample
from core2_sampler.benchmarks.geneval.prompts import GenEvalPrompt
from core2_sampler.benchmarks.geneval.rules import (
    Detection,
    Thresholds,
    Verdict,
    judge_objects,
    keep_detections,
)
from core2_sampler.benchmarks.lines import digest_bytes, drop_torn_line

PORT = "GenEval (HF port)"
"""What results of this judge are called: never a column with results of the official one."""


class Detector(Protocol):
    """Finds objects."""

    @property
    def name(self) -> str:
        """Which weights."""
        ...

    def __call__(self, image: Image.Image) -> Mapping[str, Sequence[Detection]]:
        """Return all candidates by object name, with masks of the image's size."""
        ...


class Colors(Protocol):
    """Names colors."""

    @property
    def name(self) -> str:
        """Which weights."""
        ...

    def __call__(
        self, image: Image.Image, detections: Sequence[Detection], object_name: str
    ) -> list[str]:
        """Return the color of each detection, one of ``COLORS``."""
        ...


@dataclass(frozen=True, slots=True)
class GenEvalJudge:
    """Decides whether an image shows what a GenEval prompt demands."""

    detect: Detector
    colors: Colors
    thresholds: Thresholds = Thresholds()

    @property
    def name(self) -> str:
        """All that decides its verdicts; goes into every row of results."""
        numbers = ", ".join(f"{k} {v:g}" for k, v in asdict(self.thresholds).items())
        return f"{PORT}: detector {self.detect.name}; colors {self.colors.name}; {numbers}"

    def look(
        self, image: Image.Image, prompt: GenEvalPrompt
    ) -> tuple[Verdict, dict[str, list[Detection]]]:
        """Return the verdict and the detections that it rests on."""
        image = ImageOps.exif_transpose(image).convert("RGB")
        objects = keep_detections(self.detect(image), prompt.task, self.thresholds)
        verdict = judge_objects(
            objects,
            prompt,
            lambda detections, name: self.colors(image, detections, name),
            self.thresholds.position_margin,
        )
        return verdict, objects

    def __call__(self, image: Image.Image, prompt: GenEvalPrompt) -> Verdict:
        """Return the verdict."""
        return self.look(image, prompt)[0]


def judge_samples(
    samples: Sequence[Sample],
    judge: GenEvalJudge,
    results: Path,
    *,
    on_image: Callable[[int], None] | None = None,
) -> list[ResultRow]:
    """Judge what is not yet judged of some images.

    Every verdict is in the results file before the next image is looked at; a run that was killed
    goes on where it stopped. One process at a time may write a file.

    Args:
        samples: the images.
        judge: the judge.
        results: the results file, made if need be.
        on_image: told how many images are judged, before the first and after each.

    Returns:
        A row for each image, in order.

    Raises:
        ValueError: if the file holds verdicts of another judge or on other images.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(results)
    done = {row.filename: row for row in read_results(results)} if results.exists() else {}
    hashes = {sample.filename: digest_bytes(sample.path.read_bytes()) for sample in samples}
    _check_done(results, done, judge, samples, hashes)
    on_image = on_image or (lambda count: None)
    on_image(len(done))
    for sample in samples:
        if sample.filename not in done:
            row = done[sample.filename] = _judge_sample(sample, judge)
            append_result(results, row)
            on_image(len(done))
    return [done[sample.filename] for sample in samples]


def _check_done(
    path: Path,
    done: Mapping[str, ResultRow],
    judge: GenEvalJudge,
    samples: Sequence[Sample],
    hashes: Mapping[str, str],
) -> None:
    wanted = {s.filename: (s.prompt.metadata_line(), hashes[s.filename]) for s in samples}
    for name, row in done.items():
        if row.judge != judge.name:
            raise ValueError(
                f"{path} must hold verdicts of the judge {judge.name!r}, got one of "
                f"{row.judge or 'the official judge'!r}: give another file"
            )
        if wanted.get(name) != (row.metadata, row.sha256):
            raise ValueError(
                f"{path} must hold verdicts on the images of this folder, got one on another or a "
                f"changed {name}: give another file or remove this one"
            )


def _judge_sample(sample: Sample, judge: GenEvalJudge) -> ResultRow:
    data = sample.path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        verdict, objects = judge.look(image, sample.prompt)
    boxes = {name: [[*d.box, d.score] for d in found] for name, found in objects.items()}
    return ResultRow(
        filename=sample.filename,
        tag=sample.prompt.task,
        prompt=sample.prompt.text,
        correct=verdict.correct,
        reason=verdict.reason,
        metadata=sample.prompt.metadata_line(),
        details=json.dumps(boxes),
        judge=judge.name,
        sha256=digest_bytes(data),
    )
