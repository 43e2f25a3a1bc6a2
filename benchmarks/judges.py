"""Judges by name, loaded one at a time: scorers, GenEval, and tiny random models of either."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.geneval.prompts import GenEvalPrompt, prompt_from_record
from core2_sampler.benchmarks.presets import PRESETS
from core2_sampler.benchmarks.scorers import SCORERS, T2ICOMPBENCH, t2icompbench_scorer
from core2_sampler.benchmarks.scorers.base import loading, need
from core2_sampler.benchmarks.scorers.blipvqa import check_chunks
from core2_sampler.benchmarks.scorers.hpsv21 import OPEN_CLIP
from core2_sampler.benchmarks.suites import SUITES, SuitePrompt
from core2_sampler.registry import unknown_name

if TYPE_CHECKING:
    from core2_sampler.benchmarks.geneval.judge import GenEvalJudge

GENEVAL = "geneval"
OFFICIAL = f"{GENEVAL}-official"
"""Verdicts that GenEval's own evaluator gave, imported."""

PLUGIN = "plugin"
T2I = "t2icompbench"
TINY = "tiny"
"""Source of a random model, for machines without weights; its scores mean nothing."""

SHARES = ("shapes", GENEVAL, OFFICIAL)
"""Judges that say right or wrong: 1 or 0."""

Score = Callable[[Sequence[Image.Image], Sequence[SuitePrompt]], list[tuple[float, str]]]
"""Returns a score and a reason, perhaps empty, for each image with its prompt."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A loaded judge.

    Attributes:
        name: as users call it, with the mark of a tiny one; a plugin's has its own key.
        key: names everything that changes a score.
        score: the judge itself.
        by_meta: whether it reads what the suite says of a prompt, and not only its text.
    """

    name: str
    key: str
    score: Score
    by_meta: bool = False

    def asked(self, prompt: SuitePrompt) -> str:
        """Return a hash of all that it reads of a prompt."""
        return asked(prompt, self.by_meta)


def asked(prompt: SuitePrompt, by_meta: bool) -> str:
    """Return a hash of a prompt's text, and of what its suite says of it where that is read."""
    return digest(prompt.text, dict(prompt.meta) if by_meta else None)


def split_spec(text: str) -> tuple[str, str | None]:
    """Read ``name`` or ``name=SOURCE``.

    Raises:
        ValueError: if there is no such scorer, or the source is empty.
    """
    name, equals, source = text.partition("=")
    names = [*SCORERS.names(), GENEVAL]
    if name not in names:
        raise unknown_name("scorer", name, names)
    if equals and not source:
        raise ValueError(f"a scorer must be name or name=SOURCE, got {text!r}")
    return name, source or None


def check_judge(name: str, source: str | None) -> None:
    """Check that a judge's packages are here, without loading anything.

    Args:
        name: of the judge.
        source: as in its spec.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: if spaCy's English model is.
    """
    if name == GENEVAL:
        need("GenEval's detector", "scipy")
        if source != TINY:
            need("GenEval's classifier of colors", *OPEN_CLIP)
    elif name == "hpsv21":
        need("HPSv2.1", *OPEN_CLIP)
    elif name == "blipvqa" and source != TINY:
        check_chunks(source)


def judge_name(text: str) -> str:
    """Return what reports call the judge of a spec."""
    name, source = split_spec(text)
    return f"{name}-{TINY}" if source == TINY else name


def is_meaningless(name: str) -> bool:
    """Tell whether a judge of this name is a random model."""
    return name.endswith(f"-{TINY}")


def judges_task(name: str, suite: str, task: str) -> bool:
    """Tell whether a judge is the one for a task; T2I-CompBench has one for each category."""
    plain = name.removesuffix(f"-{TINY}")
    if suite != T2I or plain not in T2ICOMPBENCH.values():
        return True
    return T2ICOMPBENCH.get(task) == plain


def suite_judges(suite: str, tasks: Sequence[str]) -> list[str]:
    """Return the judges that a suite declares for some of its tasks; none if none is supported."""
    if suite != T2I:
        return [SUITES.get(suite).primary]
    return list(dict.fromkeys(T2ICOMPBENCH[task] for task in tasks if task in T2ICOMPBENCH))


def default_judges(suite: str, tasks: Sequence[str], presets: Sequence[str]) -> list[str]:
    """Return the judges of some presets, or without any those that a suite declares.

    Raises:
        ValueError: if there is no such preset, or none of the declared judges is supported for
            any of the tasks.
    """
    scorers = [scorer for name in presets for scorer in PRESETS.get(name).scorers]
    declared = list(dict.fromkeys(scorers)) or suite_judges(suite, tasks)
    if not declared:
        t2icompbench_scorer(tasks[0])
    return declared


def without_judge(suite: str, tasks: Sequence[str]) -> str:
    """Say which prompts no supported judge of their suite is for, empty if there are none.

    Args:
        suite: name of the suite.
        tasks: task of each prompt.
    """
    lacking = [task for task in tasks if suite == T2I and task not in T2ICOMPBENCH]
    if not lacking:
        return ""
    return (
        f"{len(lacking)} of {len(tasks)} prompts get no score of their own: T2I-CompBench judges "
        f"{', '.join(dict.fromkeys(lacking))} with the UniDet detector, which is not supported"
    )


def load_judge(
    spec: str, prompts: Sequence[str], folder: Path, *, device: str, dtype: Any
) -> Judge:
    """Load a judge.

    Args:
        spec: ``name`` or ``name=SOURCE``; the source ``tiny`` makes a random model.
        prompts: all that it will be asked, which one tiny model has to know beforehand.
        folder: where tiny models are written.
        device: of its model.
        dtype: of its model's weights.

    Raises:
        ValueError: if there is no such scorer, or its weights are not to be had.
        ModuleNotFoundError: if a package of the extra ``bench`` is missing.
    """
    name, source = split_spec(spec)
    if name == GENEVAL:
        return _load_geneval(judge_name(spec), source, device)
    if source == TINY:
        from core2_sampler.benchmarks.scorers.tiny import write_tiny

        source = write_tiny(name, folder / name, sorted(set(prompts)))
    scorer = SCORERS.get(name).load(source, device=device, dtype=dtype)

    def score(images: Sequence[Image.Image], asked: Sequence[SuitePrompt]) -> Any:
        values = scorer.score(images, [prompt.text for prompt in asked])
        return [(float(value), "") for value in values]

    called = judge_name(spec)
    if called == PLUGIN:
        own = scorer.key.partition("=")[2]
        called = f"{PLUGIN}({re.sub(r'[^A-Za-z0-9_.@-]+', '-', own)[:60]})"
    return Judge(called, scorer.key, score)


def _load_geneval(name: str, source: str | None, device: str) -> Judge:
    """Load GenEval's judge; ``source`` is another detector's folder or hub id."""
    judge = load_geneval(source, device)

    def score(images: Sequence[Image.Image], asked: Sequence[SuitePrompt]) -> Any:
        wanted = [geneval_prompt(prompt) for prompt in asked]
        verdicts = [judge(image, prompt) for image, prompt in zip(images, wanted, strict=True)]
        return [(float(verdict.correct), verdict.reason) for verdict in verdicts]

    return Judge(name, judge.name, score, by_meta=True)


def load_geneval(source: str | None, device: str) -> GenEvalJudge:
    """Return GenEval's judge.

    Args:
        source: another detector's folder or hub id, or ``tiny``.
        device: of its models.

    Raises:
        ValueError: if the detector does not know COCO's classes, or weights cannot be reached.
        ModuleNotFoundError: if a package of the extra ``bench`` is missing.
    """
    if source == TINY:
        from core2_sampler.benchmarks.geneval.tiny import tiny_judge

        return tiny_judge()
    from core2_sampler.benchmarks.geneval.color import load_colors
    from core2_sampler.benchmarks.geneval.detect import DETECTOR, load_detector
    from core2_sampler.benchmarks.geneval.judge import GenEvalJudge

    colors = load_colors(device=device)
    with loading(source or DETECTOR):
        detector = load_detector(source or DETECTOR, device=device)
    return GenEvalJudge(detector, colors)


def geneval_prompt(prompt: SuitePrompt) -> GenEvalPrompt:
    """Return what a prompt of the suite ``geneval`` demands.

    Raises:
        ValueError: if its record is none of GenEval's.
    """
    return prompt_from_record(dict(prompt.meta), prompt.id.rsplit("/", 1)[-1], prompt.id)
