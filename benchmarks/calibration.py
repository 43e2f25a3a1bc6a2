"""GenEval's judge against the human labels that GenEval published: ``bench calibrate-geneval``.

What is found is kept under the judge's name, so that reports can say next to its scores how far it
agrees with people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.geneval.calibrate import Agreement, Labels, calibrate
from core2_sampler.benchmarks.geneval.judge import GenEvalJudge, judge_samples
from core2_sampler.benchmarks.geneval.layout import Sample, place_of
from core2_sampler.benchmarks.judges import geneval_prompt
from core2_sampler.benchmarks.report_render import Table
from core2_sampler.benchmarks.suites import SuitePrompt


def calibrate_judge(
    judge: GenEvalJudge,
    samples: Sequence[Sample],
    labels: Sequence[Labels],
    name: str,
    out: Path,
    *,
    on_image: Callable[[int], None] = lambda count: None,
) -> dict[str, Agreement]:
    """Judge the labelled images, compare with the labels and keep what was found.

    Args:
        judge: the judge.
        samples: the labelled images.
        labels: their labels.
        name: of the labels.
        out: folder of the results; verdicts are kept there, so that a killed run goes on.
        on_image: told how many images are judged.

    Returns:
        Agreement of each task and under ``all``.

    Raises:
        ValueError: as `judge_samples` and `calibrate`.
    """
    base = out / "calibration" / f"{name}-{digest(judge.name)[:8]}"
    rows = judge_samples(samples, judge, base.with_suffix(".jsonl"), on_image=on_image)
    found = calibrate(rows, labels)
    values = {"judge": judge.name, "labels": name, "all": asdict(found["all"])}
    write_atomic(base.with_suffix(".json"), json.dumps(values).encode())
    return found


def labelled_samples(
    labels: Sequence[Labels], prompts: Sequence[SuitePrompt], folder: Path
) -> list[Sample]:
    """Return the labelled images, fetched where they are missing.

    Raises:
        ValueError: if the labels are of other prompts, or an image cannot be had.
    """
    by_number = {int(p.id): p for p in map(geneval_prompt, prompts)}
    samples = []
    for label in labels:
        prompt = by_number.get(label.prompt_id)
        if prompt is None or prompt.text != label.caption:
            got = "none" if prompt is None else repr(prompt.text)
            raise ValueError(
                f"prompt {label.prompt_id} must be {label.caption!r}, as labelled, got {got}: "
                "give GenEval's whole evaluation_metadata.jsonl as the source"
            )
        path = folder / place_of(prompt.id, label.index)
        if not path.is_file():
            if not label.url:
                raise ValueError(f"every labelled image must be there, got no {path}")
            try:
                write_atomic(path, fetch(label.url).read_bytes())
            except ValueError as error:
                raise ValueError(f"{error}; or put it at {path}") from error
        samples.append(Sample(path, prompt, label.index))
    return samples


def agreement_table(found: Mapping[str, Agreement]) -> Table:
    """Return agreement as a table, one line a task, shares in percent."""
    head = ["task", "images", "agreement %", "kappa", "judge right %", "people right %"]
    head += ["unanimous", "agreement there %"]
    lines = [
        [
            task,
            str(each.images),
            f"{100 * each.agreement:.1f}",
            f"{each.kappa:.2f}",
            f"{100 * each.judge_correct:.1f}",
            f"{100 * each.human_correct:.1f}",
            str(each.unanimous),
            f"{100 * each.unanimous_agreement:.1f}",
        ]
        for task, each in sorted(found.items(), key=lambda item: item[0] != "all")
    ]
    return Table("Agreement with human labels", head, lines)


def agreements(out: Path, judge: str) -> list[str]:
    """Say how far a judge agrees with people, a sentence for each file of labels it was shown."""
    texts = []
    for path in sorted((out / "calibration").glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["judge"] == judge:
            every = values["all"]
            texts.append(
                f"the judge agrees with the majority of the raters of {values['labels']} on "
                f"{100 * every['agreement']:.1f} % of {every['images']} images (kappa "
                f"{every['kappa']:.2f})"
            )
    return texts
