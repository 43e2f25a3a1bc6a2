"""The CFG arms that GA-Eval compares a method with, made from what its runs measure.

The effective guidance scale is measured on some of the method's own images and then fixed for all,
where the released evaluation takes another scale for each image.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.effective_scale import EffectiveScale
from core2_sampler.benchmarks.ga_eval import matched_arms, measure_effective_scale
from core2_sampler.benchmarks.runner import (
    arm_folder,
    autocast,
    beside_plan,
    call_of,
    resolve_head,
    using_head,
)
from core2_sampler.benchmarks.shard import locked
from core2_sampler.benchmarks.study import Case, Study
from core2_sampler.plan import Core2Config

_MEASURED = (
    "signed scale; orthogonal share of d - uncond"  # results of other measures are not taken
)


@dataclass(frozen=True, slots=True)
class Matched:
    """What a method measured.

    Attributes:
        effective_scale: the guidance scale that its runs really have.
        orthogonal_share: share of its guidance that no scale of CFG can imitate, in 0..1.
        measured_on: images.
        nfe: denoiser evaluations of one of them.
    """

    effective_scale: float
    orthogonal_share: float
    measured_on: int
    nfe: int

    def arm(self, method: Arm) -> Arm:
        """Return CFG at the method's effective scale and NFE."""
        return matched_arms(method, self.effective_scale, self.nfe)[1]


def is_plain(arm: Arm) -> bool:
    """Tell whether an arm is cond, or CFG at one scale in every step: nothing to be matched."""
    steps = set(arm.plan(in_model=False).steps)
    (step, *others) = steps
    plain = not others and step.kind in ("cond", "cfg") and step.inversion is None
    plain = plain and arm.evaluators is None
    return plain and beside_plan(arm.config()) == beside_plan(Core2Config())


def match(study: Study, method: Arm, images: Path, count: int, writer: int = 0) -> Matched:
    """Measure a method on evenly spaced cases, or read what was measured before.

    Args:
        study: what the arms share.
        method: an arm that ``is_plain`` does not hold for.
        images: folder of its images, whose name stands for all that decides them.
        count: how many cases, of all that there are at most.
        writer: number of the process.

    Raises:
        ValueError: as ``measuring``.
    """
    every = study.cases
    count = min(count, len(every))
    cases = [every[k * len(every) // count] for k in range(count)]
    name = digest(_MEASURED, images.name, [case.key for case in cases])
    path = images.parent.parent / "effective_scales" / f"{name}.json"
    if path.exists():
        return _read(path)
    with using_head(study.pipe, resolve_head(study, method.head)):
        batches = [
            _measure(study, method, cases[start : start + study.batch_size])
            for start in range(0, len(cases), study.batch_size)
        ]
    found = EffectiveScale.of_batches(batches)
    matched = Matched(found.mean, found.orthogonal_share, len(cases), found.nfe)
    with locked(path):  # the first process's numbers are everyone's: the matched arm is one
        if not path.exists():
            write_atomic(path, json.dumps(asdict(matched)).encode(), writer)
    return _read(path)


def match_arm(study: Study, method: Arm, count: int) -> Matched:
    """Measure a method whose images are in the folder that `arm_folder` names, see `match`."""
    images = arm_folder(study, method, resolve_head(study, method.head))
    return match(study, method, images, count)


def _read(path: Path) -> Matched:
    return Matched(**json.loads(path.read_text(encoding="utf-8")))


@torch.no_grad()
def _measure(study: Study, method: Arm, cases: list[Case]) -> EffectiveScale:
    call = call_of(study, method, cases, with_negative=True)
    with autocast(study):
        return measure_effective_scale(study.pipe, **call)
