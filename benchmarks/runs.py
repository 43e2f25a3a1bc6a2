"""What a folder of results holds: which prompts, seeds and arms, and where the images are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.shard import locked
from core2_sampler.benchmarks.study import Case, cases_of
from core2_sampler.benchmarks.suites import SuitePrompt

REFERENCE = "cfg"
"""The arm that others at the same N and scale are compared with."""

MATCHED = "-matched"
"""End of the name of the arm with the same guidance and NFE as the arm named before it."""


@dataclass(frozen=True, slots=True)
class RunArm:
    """One arm of a run.

    Attributes:
        arm: how it samples.
        of_steps: the N that it was made for; arms are compared at the same N.
        guidance_scale: the scale that it was made for.
        folder: of its images, below that of the results.
        command: what generated the last of them.
        provenance: commit, versions, device and options of that.
        effective_scale: guidance scale that its runs really have, where it was measured.
        orthogonal_share: share of its guidance that CFG cannot imitate, where it was measured.
        measured_on: how many of its images both were measured on.
        measured_by: the mode of GA-Eval, which says what both are.
    """

    arm: Arm
    of_steps: int
    guidance_scale: float
    folder: str
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    effective_scale: float | None = None
    orthogonal_share: float | None = None
    measured_on: int | None = None
    measured_by: str = "signed"

    @property
    def group(self) -> tuple[int, float]:
        """What arms that are compared with each other have in common."""
        return self.of_steps, self.guidance_scale

    @property
    def label(self) -> str:
        """Its name in plots and captions."""
        return f"{self.arm.name}, N = {self.of_steps}, scale {self.guidance_scale:g}"


@dataclass(frozen=True, slots=True)
class Run:
    """Arms on the same prompts, seeds and model.

    Attributes:
        suite: name of the suite.
        prompts: its prompts.
        seeds: seeds of each prompt.
        settings: model, family, dtype and whatever else all arms share; JSON.
        arms: the arms, in the order of their first generation.
    """

    suite: str
    prompts: tuple[SuitePrompt, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    arms: tuple[RunArm, ...] = ()

    @property
    def name(self) -> str:
        """Name of its file: runs that share all but the arms are one."""
        prompts = [[p.id, p.text, p.task] for p in self.prompts]
        shared = digest(self.suite, prompts, list(self.seeds), dict(self.settings))
        return f"{self.suite}-{self.settings['family']}-{shared[:8]}"

    @property
    def cases(self) -> list[Case]:
        """All images of an arm, in order."""
        return cases_of(self.prompts, self.seeds)

    def short_name(self, entry: RunArm) -> str:
        """Return what tells an arm from the others of the run."""
        return entry.arm.name if len({e.group for e in self.arms}) == 1 else entry.label

    def references(self, entry: RunArm) -> list[RunArm]:
        """Return what an arm is compared with: CFG, and CFG at its own effective scale and NFE."""
        name = entry.arm.name
        if name == REFERENCE or name.endswith(MATCHED):
            return []
        wanted = (REFERENCE, name + MATCHED)
        return [e for e in self.arms if e.group == entry.group and e.arm.name in wanted]


def write_run(out: Path, run: Run, made: Sequence[int], writer: int = 0) -> Run:
    """Write a run's file, with the arms that it has already.

    Args:
        out: folder of the results.
        run: the run.
        made: how many images of each of its arms are new; without any, what the file says of the
            origin of the arm's images stays.
        writer: number of the process.

    Returns:
        The run with all its arms.
    """
    path = _folder(out) / f"{run.name}.json"
    with locked(path):
        merged = _merge(_read(path).arms if path.exists() else (), run, made)
        write_atomic(path, json.dumps(asdict(merged), indent=1).encode(), writer)
    return merged


def _merge(old: Sequence[RunArm], run: Run, made: Sequence[int]) -> Run:
    """Return a run with the arms that its file has already."""
    arms = {(entry.arm.name, entry.group): entry for entry in old}
    for entry in run.arms:
        before = arms.get((entry.arm.name, entry.group))
        if before is not None and before.folder != entry.folder:
            arms.pop((entry.arm.name + MATCHED, entry.group), None)  # to other images
    for entry, count in zip(run.arms, made, strict=True):
        before = arms.get((entry.arm.name, entry.group))
        arms[entry.arm.name, entry.group] = _update(before, entry, count)
    return dataclasses.replace(run, arms=tuple(arms.values()))


def read_runs(out: Path) -> list[Run]:
    """Return the runs in a folder of results.

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(_folder(out).glob("*.json"))
    if not paths:
        raise ValueError(
            f"{out} must be a folder of results, got none there: start with `core2 bench generate`"
        )
    return [_read(path) for path in paths]


def store_of(out: Path, entry: RunArm) -> ImageStore:
    """Return the images of an arm."""
    return ImageStore(out / entry.folder)


def _update(before: RunArm | None, entry: RunArm, made: int) -> RunArm:
    """Return an arm's new entry with what its old one knows of the same images."""
    if before is None or before.folder != entry.folder:
        return entry
    origin = entry if made else before
    measured = before if entry.effective_scale is None else entry
    return dataclasses.replace(
        entry,
        command=origin.command,
        provenance=origin.provenance,
        effective_scale=measured.effective_scale,
        orthogonal_share=measured.orthogonal_share,
        measured_on=measured.measured_on,
        measured_by=measured.measured_by,
    )


def _folder(out: Path) -> Path:
    return out / "runs"


def _read(path: Path) -> Run:
    values = json.loads(path.read_text(encoding="utf-8"))
    arms = tuple(RunArm(**entry | {"arm": Arm(**entry["arm"])}) for entry in values.pop("arms"))
    prompts = tuple(SuitePrompt(**prompt) for prompt in values.pop("prompts"))
    return Run(prompts=prompts, seeds=tuple(values.pop("seeds")), arms=arms, **values)
