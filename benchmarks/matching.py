"""The CFG arms that GA-Eval compares a method with, made from what its runs measure.

The effective guidance scale is measured on some of the method's own images and then fixed for all;
in the mode ``official``, as in the released evaluation, on all of them, each its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.effective_scale import EffectiveScale
from core2_sampler.benchmarks.ga_eval import (
    embedded_arm,
    is_z_sampling,
    matched_arms,
    measure_effective_scale,
    officially_matched_arm,
)
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

_MEASURED = {  # results of other measures are not taken
    "signed": "signed scale; orthogonal share of d - uncond",
    "official": "norms; Z-Sampling of d, its zigzag steps alone; image by image",
    "embedded": "nearest embedded guidance; share of the change that is left",
}
_Z_SAMPLING_NFE = 6
"""Evaluations of a step of Z-Sampling as the released evaluation takes them: three CFG pairs."""


@dataclass(frozen=True, slots=True)
class Matched:
    """What a method measured.

    Attributes:
        effective_scale: the guidance scale that its runs really have, or the embedded guidance that
            they come nearest to.
        orthogonal_share: share of its guidance that no scale of CFG can imitate, in 0..1; or of its
            change that no embedded guidance can.
        measured_on: images.
        nfe: denoiser evaluations of one of them.
        mode: of `GA_EVAL_MODES`.
        image_scales: in the mode ``official``, the scale of each image, by case.
        file: that `image_scales` was read from.
    """

    effective_scale: float
    orthogonal_share: float
    measured_on: int
    nfe: int
    mode: str = "signed"
    image_scales: Mapping[str, float] = field(default_factory=dict)
    file: str = ""

    def arm(self, method: Arm) -> Arm:
        """Return what the method is compared with: the same guidance, at its NFE."""
        if self.mode == "official":
            return officially_matched_arm(method, self.file, self.nfe)
        if self.mode == "embedded":
            return embedded_arm(method, self.effective_scale, self.nfe)
        return matched_arms(method, self.effective_scale, self.nfe)[1]


def is_plain(arm: Arm) -> bool:
    """Tell whether an arm is cond, or CFG at one scale in every step: nothing to be matched."""
    steps = set(arm.plan(in_model=False).steps)
    (step, *others) = steps
    plain = not others and step.kind in ("cond", "cfg") and step.inversion is None
    plain = plain and arm.evaluators is None
    return plain and beside_plan(arm.config()) == beside_plan(Core2Config())


def match(
    study: Study, method: Arm, images: Path, count: int, writer: int = 0, mode: str = "signed"
) -> Matched:
    """Measure a method on evenly spaced cases, or read what was measured before.

    Args:
        study: what the arms share.
        method: an arm that ``is_plain`` does not hold for.
        images: folder of its images, whose name stands for all that decides them.
        count: how many cases, of all that there are at most; ``official`` takes all.
        writer: number of the process.
        mode: what is measured, see ``measuring``.

    Raises:
        ValueError: as ``measuring``, or an image has no scale in the mode ``official``.
    """
    every = study.cases
    count = len(every) if mode == "official" else min(count, len(every))
    cases = [every[k * len(every) // count] for k in range(count)]
    name = digest(_MEASURED[mode], images.name, [case.key for case in cases])
    path = images.parent.parent / "effective_scales" / f"{name}.json"
    if path.exists():
        return _read(path)
    head = resolve_head(study, method.head)
    with using_head(study.pipe, head):
        batches = [
            _measure(study, method, cases[start : start + study.batch_size], mode)
            for start in range(0, len(cases), study.batch_size)
        ]
    found = EffectiveScale.of_batches(batches)
    matched = Matched(found.mean, found.orthogonal_share, len(cases), found.nfe, mode)
    if mode == "official":
        z_sampling = is_z_sampling(method.plan(head is not None and head.in_model))
        nfe = _Z_SAMPLING_NFE * method.steps if z_sampling else found.nfe
        matched = replace(matched, nfe=nfe, image_scales=_by_image(method, cases, found))
    with locked(path):  # the first process's numbers are everyone's: the matched arm is one
        if not path.exists():
            write_atomic(path, json.dumps(asdict(matched)).encode(), writer)
    return _read(path)


def _by_image(method: Arm, cases: list[Case], found: EffectiveScale) -> dict[str, float]:
    scales = found.per_sample.tolist()
    if not all(map(math.isfinite, scales)):
        raise ValueError(
            f"every image must have a scale to be matched, got none for some of {method.name!r}: "
            "with a negative prompt equal to the prompt there is no guidance"
        )
    return {case.key: scale for case, scale in zip(cases, scales, strict=True)}


def match_arm(study: Study, method: Arm, count: int) -> Matched:
    """Measure a method whose images are in the folder that `arm_folder` names, see `match`."""
    images = arm_folder(study, method, resolve_head(study, method.head))
    return match(study, method, images, count)


def _read(path: Path) -> Matched:
    found = Matched(**json.loads(path.read_text(encoding="utf-8")))
    return replace(found, file=str(path)) if found.image_scales else found


@torch.no_grad()
def _measure(study: Study, method: Arm, cases: list[Case], mode: str) -> EffectiveScale:
    call = call_of(study, method, cases, with_negative=True)
    with autocast(study):
        return measure_effective_scale(study.pipe, mode, **call)
