"""The prompt suites: where each list comes from, what it measures, and how it is read.

No list but that of the Shapes world is shipped. The others are read from a local file in the
upstream format, or fetched from where they are published.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.geneval.prompts import TASKS as GENEVAL_TASKS
from core2_sampler.benchmarks.prompt_files import Row, read_rows
from core2_sampler.registry import Registry
from core2_sampler.shapes.world import TASKS as SHAPES_TASKS
from core2_sampler.shapes.world import held_out_prompts

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
T2I_CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "3d_spatial",
    "non_spatial",
    "numeracy",
    "complex",
)
_TEXT_COLUMNS = ("prompt", "prompts", "caption")
_TASK_COLUMNS = ("category", "tag")
_HPD = "hf:datasets/ymhao/HPDv2@fd163b223b6faf112eccafeabe2e31a0e950f177/benchmark"
_T2I = (
    "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/"
    "1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset"
)
_NSFW = re.compile(
    r"\b(?:nsfw|nudes?|nudity|nudists?|naked|nakedness|topless|undress(?:ed|ing)?|lingerie|"
    r"bikinis?|porno?|porn(?:ographic|ography|stars?)|hentai|erotic|erotica|eroticism|"
    r"sex|sexy|sexier|sexiest|sexual|sexually|sexuali[sz]ed|sexuality|fetish(?:es|ist|istic)?|bdsm|"
    r"breasts?|boobs?|tits|nipples?|cleavage|busty|genitals?|genitalia|penis(?:es)?|vaginas?|"
    r"vaginal|butts?|ass|asses|horny|orgasms?|orgasmic|sluts?|slutty|whores?|(?<!\bal )gore|gory|"
    r"behead(?:s|ed|ing)?|dismember(?:s|ed|ing|ment)?|mutilat(?:e|es|ed|ing|ion|ions)|"
    r"rape[ds]?|raping|rapists?|suicides?|suicidal)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: unique in the suite; a text that stands twice in a list is two prompts.
        text: the prompt, exactly as upstream has it.
        task: its task, category or style; the suite's name where the list has none.
        meta: whatever else the list says of it, such as GenEval's ``include``.
    """

    id: str
    text: str
    task: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Suite:
    """A registered prompt list.

    Attributes:
        name: what users type.
        about: one line for reports.
        licence: of the list, as far as it is stated.
        size: number of prompts of the complete list.
        primary: the scorer that decides, declared before any run.
        upstream: address of each file, as ``fetch`` takes it; empty for what is embedded.
        tasks: all tasks of the complete list, where they are known.
        suffix: what follows the task in the names of upstream files; None where files have no task.
        required: columns that every row must have beside its text.
        subset: size of the known selection of the list that names no tasks, but has as many
            prompts of each, task by task.
    """

    name: str
    about: str
    licence: str
    size: int
    primary: str
    upstream: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    suffix: str | None = None
    required: tuple[str, ...] = ()
    subset: int = 0


SUITES: Registry[Suite] = Registry("suite")

for _suite in (
    Suite(
        "shapes",
        "held-out captions of the Shapes world, six tasks after GenEval",
        "Apache-2.0 (part of this package)",
        240,
        "shapes",
        tasks=SHAPES_TASKS,
    ),
    Suite(
        "drawbench",
        "DrawBench (arXiv 2205.11487); the published JSON has no categories, the CSV has eleven",
        "not stated upstream (prompts of the Imagen paper)",
        200,
        "imagereward",
        (f"{_HPD}/drawbench.json",),
    ),
    Suite(
        "geneval",
        "GenEval (arXiv 2310.11513), six tasks judged by detection",
        "MIT (djghosh13/geneval)",
        553,
        "geneval",
        (
            "https://raw.githubusercontent.com/djghosh13/geneval/"
            "af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
        ),
        tasks=GENEVAL_TASKS,
        required=("tag", "include"),
    ),
    Suite(
        "hpdv2",
        "HPDv2 benchmark (arXiv 2306.09341), four styles of 800; 400 in one file are 100 of each",
        "Apache-2.0 (ymhao/HPDv2)",
        3200,
        "hpsv21",
        tuple(f"{_HPD}/{style}.json" for style in HPD_STYLES),
        HPD_STYLES,
        "",
        subset=400,
    ),
    Suite(
        "pickapic",
        "Pick-a-Pic v1 test_unique (arXiv 2305.01569), by users, partly not safe for work",
        "not stated by yuvalkirstain/pickapic_v1; the copy that is fetched says MIT",
        500,
        "pickscore",
        ("hf:datasets/Jialuo21/pickapic-test/test.jsonl",),
    ),
    Suite(
        "t2icompbench",
        "T2I-CompBench validation lists (arXiv 2307.06350), eight categories of 300",
        "MIT (Karine-Huang/T2I-CompBench)",
        2400,
        "blipvqa",
        tuple(f"{_T2I}/{category}_val.txt" for category in T2I_CATEGORIES),
        T2I_CATEGORIES,
        "_val",
    ),
):
    SUITES.register(_suite.name)(_suite)


def load(
    suite: str = "shapes",
    source: str | Path | None = None,
    *,
    limit: int | None = None,
    evenly: bool = True,
    skip_nsfw: bool = False,
) -> list[SuitePrompt]:
    """Return the prompts of a suite in upstream order.

    Args:
        suite: a name of ``SUITES``.
        source: the list's file in the upstream format, its address as `fetch` takes it, or the
            folder of its files; None fetches the published ones, or takes the embedded ones.
        limit: only so many of those that are not left out, at least 1.
        evenly: whether these are the first of each task, as many of each as of the others where it
            has them; else the first of the list.
        skip_nsfw: leave out prompts with a word that is not safe for work; ids do not move, so
            what was left out can be told.

    Raises:
        ValueError: if the suite is unknown, a list cannot be had or read or is empty, or
            ``limit`` is not between 1 and the number of its prompts.
    """
    row = SUITES.get(suite)
    if source is None and not row.upstream:
        found = [
            SuitePrompt(prompt.id, prompt.text, prompt.task, prompt.metadata())
            for prompt in held_out_prompts(row.size if limit is None else limit)
        ]
    else:
        found = _read_suite(row, source)
    if skip_nsfw:
        found = [prompt for prompt in found if not _NSFW.search(prompt.text)]
    if limit is not None and not 1 <= limit <= len(found):
        raise ValueError(f"limit must be 1 to {len(found)} for suite {suite}, got {limit}")
    return spread(found, limit) if limit is not None and evenly else found[:limit]


def spread(prompts: Sequence[SuitePrompt], count: int) -> list[SuitePrompt]:
    """Return so many prompts, taken in turns from the tasks, in the order of the list."""
    taken: Counter[str] = Counter()
    turns = []
    for index, prompt in enumerate(prompts):
        turns.append((taken[prompt.task], index))
        taken[prompt.task] += 1
    return [prompts[index] for index in sorted(index for _, index in sorted(turns)[:count])]


def _read_suite(suite: Suite, source: str | Path | None) -> list[SuitePrompt]:
    """Read all files of a suite and check that a fetched list is complete."""
    if source is None:
        paths = [fetch(address) for address in suite.upstream]
    elif suite.suffix is not None and Path(source).expanduser().is_dir():
        paths = _files_in(suite, Path(source).expanduser())
    else:
        paths = [fetch(source)]
    found = [prompt for path in paths for prompt in _read_file(suite, path)]
    if source is None and len(found) != suite.size:
        raise ValueError(
            f"the published list of {suite.name} must have {suite.size} prompts, got {len(found)}: "
            "it has changed, so give the file that you mean as the source"
        )
    return found


def _files_in(suite: Suite, folder: Path) -> list[Path]:
    """Return the folder's file of each task, in the suite's order."""
    by_task: dict[str, list[Path]] = {task: [] for task in suite.tasks}
    for path in sorted(folder.iterdir()):
        if (task := _task_of_file(suite, path)) is not None:
            by_task[task].append(path)
    if wrong := [task for task, files in by_task.items() if len(files) != 1]:
        raise ValueError(
            f"{folder} must hold one file for each of {', '.join(suite.tasks)}, got "
            f"{', '.join(f'{len(by_task[task])} for {task}' for task in wrong)}: give a file "
            "instead to read one list"
        )
    return [by_task[task][0] for task in suite.tasks]


def _task_of_file(suite: Suite, path: Path) -> str | None:
    """Return the longest task that ends the file's name, as `3d_spatial` ends in `spatial`."""
    if suite.suffix is None:
        return None
    fit = [t for t in suite.tasks if re.fullmatch(f"(.*_)?{t}{suite.suffix}", path.stem)]
    return max(fit, key=len, default=None)


def _read_file(suite: Suite, path: Path) -> list[SuitePrompt]:
    """Read one file; the ids number its rows."""
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} must hold at least one prompt, got none")
    lacking = [name for name in suite.required if name not in rows[0]]
    if lacking:
        raise ValueError(f"{path} must have {', '.join(lacking)}, got {', '.join(rows[0])}")
    text_column = _column(rows[0], _TEXT_COLUMNS)
    if text_column is None:
        raise ValueError(
            f"{path} must have a column {' or '.join(_TEXT_COLUMNS)}, got {', '.join(rows[0])}"
        )
    task_column, file_task = _column(rows[0], _TASK_COLUMNS), _task_of_file(suite, path)
    prefix = suite.name if file_task is None else f"{suite.name}/{file_task}"
    is_subset = len(rows) == suite.subset and task_column is None and file_task is None
    prompts = []
    for index, row in enumerate(rows):
        text = row.get(text_column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path} must have a prompt in every row, got {text!r} in row {index}")
        given = row.get(task_column) if task_column else None
        if is_subset:
            given = suite.tasks[index * len(suite.tasks) // len(rows)]
        task = file_task or str(given or suite.name).strip()
        prompts.append(SuitePrompt(f"{prefix}/{index:05d}", text, task, row))
    return prompts


def _column(row: Row, names: Sequence[str]) -> str | None:
    return next((column for column in row if column.lower() in names), None)
