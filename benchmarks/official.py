"""Verdicts of GenEval's own evaluator on images that were exported for it.

Its environment needs old packages, so it runs elsewhere; what it wrote comes back as the scores of
a judge of its own, and reports treat it as any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from core2_sampler.benchmarks.export import IMAGES_FILE
from core2_sampler.benchmarks.geneval.aggregate import ResultRow, read_results
from core2_sampler.benchmarks.geneval.calibrate import place
from core2_sampler.benchmarks.geneval.prompts import parse_prompt
from core2_sampler.benchmarks.images import ImageRecord
from core2_sampler.benchmarks.judges import OFFICIAL, Judge, geneval_prompt
from core2_sampler.benchmarks.runs import Run, store_of
from core2_sampler.benchmarks.scores import Scored, Task, open_scores
from core2_sampler.benchmarks.suites import SuitePrompt

KEY = f"{OFFICIAL};judge=djghosh13/geneval evaluate_images.py"


def import_results(
    out: Path, runs: Iterable[Run], results: Path, images: Path
) -> tuple[list[ResultRow], int]:
    """Keep the official verdicts on an exported folder as scores.

    Args:
        out: folder of the results.
        runs: its runs.
        results: the evaluator's ``results.jsonl``.
        images: the folder that it judged, as `export` wrote it.

    Returns:
        The rows, and how many of them replace other verdicts on the same images.

    Raises:
        ValueError: if the folder is no export of these runs, the file is not of the official
            evaluator, or it does not have one verdict for each image of the folder.
    """
    run, arm, files = _exported(runs, images)
    rows = read_results(results)
    _check_folder(rows, arm, results)
    by_place = {place(row.filename): row for row in rows}
    wanted = {place(name): sha256 for name, sha256 in files.items()}
    if len(by_place) < len(rows) or by_place.keys() != wanted.keys():
        raise ValueError(
            f"{results} must have one verdict for each of the {len(wanted)} images of {images}, "
            f"got {len(rows)} rows, {len(wanted.keys() - by_place.keys())} images without and "
            f"{len(by_place.keys() - wanted.keys())} verdicts on others: judge that folder whole"
        )
    prompts = {int(p.id.rsplit("/", 1)[-1]): p for p in run.prompts}
    records = _records(out, run)
    scores = open_scores(out, Judge(OFFICIAL, KEY, _judged_elsewhere, by_meta=True))
    tasks, verdicts, replaced = [], [], 0
    for where, row in by_place.items():
        prompt = prompts[where[0]]
        _check_row(row, prompt, results)
        if wanted[where] not in records:
            raise ValueError(
                f"every image of {images} must still be among the results, got none for "
                f"{row.filename}: export and judge again"
            )
        store, record = records[wanted[where]]
        verdict = (float(row.correct), row.reason)
        before = scores.get(record.sha256, prompt)
        replaced += before is not None and before.value != verdict[0]
        if before != Scored(*verdict):
            tasks.append(Task(store, record, prompt))
            verdicts.append(verdict)
    scores.add(tasks, verdicts)
    return rows, replaced


def _exported(runs: Iterable[Run], images: Path) -> tuple[Run, str, Mapping[str, str]]:
    """Return the run and arm of an exported folder, and the sha256 of the file of each image."""
    file = images / IMAGES_FILE
    if not file.is_file():
        raise ValueError(
            f"images must be one arm's folder with {IMAGES_FILE}, got {images} without: make it "
            "with `core2 bench export --layout geneval`"
        )
    values = json.loads(file.read_text(encoding="utf-8"))
    run = next((run for run in runs if run.name == values["run"]), None)
    if run is None:
        raise ValueError(
            f"{images} must be exported from this folder of results, got one of the run "
            f"{values['run']}: give its --out"
        )
    return run, values["arm"], values["images"]


def _check_folder(rows: Sequence[ResultRow], arm: str, results: Path) -> None:
    """Refuse verdicts on another arm: its images have the same names."""
    for row in rows:
        folders = PurePosixPath(row.filename).parts[:-3]
        if folders[-1:] != (arm,):
            raise ValueError(
                f"{results} must be about the images in {arm}, got {row.filename!r}: import the "
                "results of that folder, and let the evaluator read it under its exported name"
            )


def _records(out: Path, run: Run) -> dict[str, tuple[Any, ImageRecord]]:
    """Return every image of a run, with its store, by the sha256 of its file."""
    stores = [store_of(out, entry) for entry in run.arms]
    return {r.sha256: (store, r) for store in stores for r in store.records().values()}


def _check_row(row: ResultRow, prompt: SuitePrompt, results: Path) -> None:
    if row.judge:
        raise ValueError(
            f"{results} must be of GenEval's own evaluator, got verdicts by {row.judge}: score "
            "with `core2 bench score --scorers geneval` instead"
        )
    demand = parse_prompt(row.metadata, prompt.id, str(results))
    if demand.metadata() != geneval_prompt(prompt).metadata():
        raise ValueError(
            f"{results} must be about the exported prompts, got {row.prompt!r} for {prompt.id}, "
            f"which is {prompt.text!r}: judge the exported folder"
        )


def _judged_elsewhere(images: Sequence[Any], prompts: Sequence[SuitePrompt]) -> Any:
    raise ValueError("the official evaluator must be run in its own environment, and imported")
