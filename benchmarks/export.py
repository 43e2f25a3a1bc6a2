"""Copies of generated images under the file names that official evaluators read."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.geneval.aggregate import ResultRow, write_results
from core2_sampler.benchmarks.geneval.layout import place_of, write_folder
from core2_sampler.benchmarks.images import ImageRecord, ImageStore
from core2_sampler.benchmarks.judges import GENEVAL, TINY, geneval_prompt
from core2_sampler.benchmarks.runs import Run, RunArm, store_of
from core2_sampler.benchmarks.scores import read_scores

SUITE_OF = {"geneval": "geneval", "t2icompbench": "t2icompbench", "hpsv2": "hpdv2"}
"""The suite of each layout."""

IMAGES_FILE = "core2-images.json"
"""Beside images in GenEval's layout: their run, arm, and the sha256 of the kept file of each."""


def export(out: Path, runs: Iterable[Run], layout: str, to: Path) -> list[tuple[Path, int]]:
    """Copy the images of every arm of the runs that a layout is for.

    In GenEval's layout, verdicts of its port go beside them, in the rows of the official results.

    Args:
        out: folder of the results.
        runs: its runs.
        layout: a name of `SUITE_OF`.
        to: where the copies go, one folder for each arm.

    Returns:
        Each folder with its number of images.

    Raises:
        ValueError: if no run is of the layout's suite, an image is missing, or a prompt cannot be
            a file name.
    """
    own = [run for run in runs if run.suite == SUITE_OF[layout]]
    if not own:
        raise ValueError(
            f"the layout {layout} must have a run of the suite {SUITE_OF[layout]}, got none in "
            f"{out}: generate it first"
        )
    writer = _WRITERS[layout]
    done = []
    for run in own:
        for entry in run.arms:
            folder = to / run.name / folder_name(entry)
            store = store_of(out, entry)
            records = _records(run, entry, store)
            writer(folder, run, store, records)
            if layout == GENEVAL:
                _write_verdicts(out, folder, run, records)
            done.append((folder, len(records)))
    return done


def folder_name(entry: RunArm) -> str:
    """Return the name of an arm's folder; its end is that of the images alone."""
    arm = f"{entry.arm.name}-{entry.of_steps}-{entry.guidance_scale:g}"
    return f"{arm}-{Path(entry.folder).name[:6]}"


Records = dict[str, ImageRecord]


def _records(run: Run, entry: RunArm, store: ImageStore) -> Records:
    """Return all images of an arm by the key of their case."""
    kept = store.records()
    found = {case.key: kept[case.key] for case in run.cases if case.key in kept}
    if len(found) < len(run.cases):
        raise ValueError(
            f"all images of the arm {entry.label} must be there for an official evaluator, got "
            f"{len(found)} of {len(run.cases)}: run `{entry.command}` again"
        )
    return found


def _geneval(folder: Path, run: Run, store: ImageStore, records: Records) -> None:
    """Write ``00000/samples/00000.png`` beside the prompt's metadata, and what each image is."""
    images: dict[str, list[ImageRecord]] = {}
    for case in run.cases:
        images.setdefault(case.prompt.id, []).append(records[case.key])
    prompts = [(geneval_prompt(p), images[p.id]) for p in run.prompts]
    write_folder(folder, ((p, [store.read(r) for r in own]) for p, own in prompts))
    places = {place_of(p.id, k): r.sha256 for p, own in prompts for k, r in enumerate(own)}
    about = {"run": run.name, "arm": folder.name, "images": places}
    write_atomic(folder / IMAGES_FILE, json.dumps(about).encode())


def _write_verdicts(out: Path, folder: Path, run: Run, records: Records) -> None:
    """Write ``results-JUDGE.jsonl`` for each port of GenEval's judge that has seen all images.

    The boxes of its detector are not kept with scores, so the details of a row are empty.
    """
    for scores in read_scores(out):
        if scores.name not in (GENEVAL, f"{GENEVAL}-{TINY}"):
            continue
        rows: list[ResultRow] = []
        numbers: Counter[str] = Counter()
        for case in run.cases:
            record, prompt = records[case.key], geneval_prompt(case.prompt)  # type: ignore[arg-type]
            found = scores.get(record.sha256, case.prompt)  # type: ignore[arg-type]
            if found is None:
                break
            rows.append(
                ResultRow(
                    filename=f"{folder.name}/{place_of(prompt.id, numbers[prompt.id])}",
                    tag=prompt.task,
                    prompt=prompt.text,
                    correct=found.value > 0,
                    reason=found.reason,
                    metadata=prompt.metadata_line(),
                    details="{}",
                    judge=scores.key,
                    sha256=record.sha256,
                )
            )
            numbers[prompt.id] += 1
        else:
            write_results(folder / f"results-{scores.path.stem}.jsonl", rows)


def _t2icompbench(folder: Path, run: Run, store: ImageStore, records: Records) -> None:
    """Write ``<category>/samples/<prompt>_000000.png``, numbered through the category."""
    numbers: dict[str, int] = {}
    for case in run.cases:
        text, task = case.prompt.text, case.prompt.task
        if "/" in text or len(text.encode()) > 240:
            raise ValueError(
                f"a prompt must fit into a file name for this layout, got {text!r}: leave it out "
                "of the list"
            )
        number = numbers.setdefault(task, 0)
        numbers[task] += 1
        data = (store.folder / records[case.key].file).read_bytes()
        write_atomic(folder / task / "samples" / f"{text}_{number:06d}.png", data)


def _hpsv2(folder: Path, run: Run, store: ImageStore, records: Records) -> None:
    """Write ``<style>/00000.jpg``, one image a prompt, at the quality that loses least."""
    if len(run.seeds) != 1:
        raise ValueError(
            f"HPSv2's layout must have one image a prompt, got seeds {run.seeds}: generate with "
            "--seeds 0"
        )
    numbers: dict[str, int] = {}
    for case in run.cases:
        number = numbers.setdefault(case.prompt.task, 0)
        numbers[case.prompt.task] += 1
        buffer = io.BytesIO()
        store.read(records[case.key]).save(buffer, format="JPEG", quality=100, subsampling=0)
        write_atomic(folder / case.prompt.task / f"{number:05d}.jpg", buffer.getvalue())


_WRITERS: dict[str, Callable[[Path, Run, ImageStore, Records], None]] = {
    "geneval": _geneval,
    "t2icompbench": _t2icompbench,
    "hpsv2": _hpsv2,
}
