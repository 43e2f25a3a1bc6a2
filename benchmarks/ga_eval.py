"""GA-Eval: is a method better than CFG, or does it only guide harder?

Judges reward strong guidance, and with a head that predicts nothing, weak-to-strong 1.5 at scale
3.5 is CFG at 4.75. So a win has to hold against CFG at the method's own effective guidance scale
and NFE. On FLUX there are two: the scale of the pipeline's true CFG, and the embedded guidance that
comes nearest.

Reference: Xie et al., Guidance Matters, arXiv 2602.22570.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.effective_scale import (
    EffectiveScale,
    Meter,
    against_gap_as_released,
)
from core2_sampler.benchmarks.embedded_guidance import nearest_guidance
from core2_sampler.benchmarks.options import GA_EVAL_MODES
from core2_sampler.benchmarks.runs import MATCHED
from core2_sampler.benchmarks.stats import Estimate
from core2_sampler.pipelines.loop import Run
from core2_sampler.plan import Plan
from core2_sampler.registry import unknown_name
from core2_sampler.types import Denoiser, Predict

_SCALE_DIGITS = 4
"""Decimals of a matched scale: what cond measures differs from 1 by rounding errors alone."""

_ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """What a paired comparison with CFG gave; above 0 is better.

    Attributes:
        estimate: mean difference with its interval.
        p_holm: p-value, corrected for all comparisons that are made together.
        is_share: whether it is one of shares, which are told in points.
    """

    estimate: Estimate
    p_holm: float
    is_share: bool = False

    @property
    def is_win(self) -> bool:
        """Whether interval and test both say better."""
        return self.estimate.low > 0 and self.p_holm < _ALPHA

    @property
    def is_loss(self) -> bool:
        """Whether interval and test both say worse."""
        return self.estimate.high < 0 and self.p_holm < _ALPHA

    @property
    def text(self) -> str:
        """Its numbers: ``+5.1 [+2, +8.3], p (Holm) 0.01``, the value alone without an interval."""
        numbers = (self.estimate.value, self.estimate.low, self.estimate.high)
        value, low, high = (
            f"{100 * number:+.1f}" if self.is_share else f"{number:+.3g}" for number in numbers
        )
        unit = " points" if self.is_share else ""
        if math.isnan(self.estimate.low):
            return value + unit
        return f"{value} [{low}, {high}]{unit}, p (Holm) {self.p_holm:.2g}"


@contextmanager
def measuring(pipe: Any, mode: str = "signed") -> Iterator[Callable[[], EffectiveScale]]:
    """Measure the calls with ``core2`` that a pipeline gets inside the context.

    The calls return what they always return. The negative prompt is encoded even where no step of
    the method runs it. A counter around the call sees the passes of the measurement too.

    Args:
        pipe: a CoRe2 pipeline.
        mode: ``signed`` is the effective guidance scale; ``official`` the same as the released
            evaluation has it: norms, and Z-Sampling's with uncond left in, of its zigzag steps
            alone; ``embedded`` the nearest embedded guidance, see `nearest_guidance`.

    Yields:
        A callable that returns the latest call's measurement.

    Raises:
        ValueError: if there is no such mode; from the call, if it has a guidance scale of at most
            1, the denoiser caches, or it embeds no guidance that could be measured; from the
            callable, if no call was measured.
    """
    if mode not in GA_EVAL_MODES:
        raise unknown_name("mode of GA-Eval", mode, GA_EVAL_MODES)
    latest: list[Meter] = []

    def observe(run: Run, denoiser: Denoiser, predict: Predict) -> Predict:
        meter = Meter(denoiser, run.schedule.sigmas, lambda _i: run.prompts())
        if mode == "embedded":
            meter.compare = nearest_guidance
        elif mode == "official" and is_z_sampling(run.plan):
            meter.compare, meter.steps = against_gap_as_released, run.plan.zigs
        latest[:] = [meter]
        return meter.watch(predict)

    def read() -> EffectiveScale:
        if not latest:
            raise ValueError(
                "a call with core2= must be made before its scale is read, got none: plain CFG is "
                "core2=Core2Config(mode='cfg')"
            )
        found = latest[0].result()
        return found.official() if mode == "official" else found

    pipe._core2_observer = observe
    try:
        yield read
    finally:
        del pipe._core2_observer


def is_z_sampling(plan: Plan) -> bool:
    """Tell whether a plan has zigzag steps that are made and undone by CFG or a part of it."""
    return bool(plan.zigs) and not plan.by_gap and not plan.needs_head


def measure_effective_scale(pipe: Any, mode: str = "signed", **call: Any) -> EffectiveScale:
    """Run a pipeline's call for the sake of its effective guidance scale alone.

    Args:
        pipe: a CoRe2 pipeline.
        mode: see ``measuring``.
        **call: its arguments, ``core2`` among them.

    Returns:
        The measurement.

    Raises:
        ValueError: see ``measuring``.
    """
    with measuring(pipe, mode) as read:
        pipe(**{"output_type": "latent", **call})
    return read()


def matched_arms(arm: Arm, scale: float, nfe: float) -> tuple[Arm, Arm]:
    """Return the CFG runs that an arm is to be compared with, on the same initial latents.

    Args:
        arm: the method.
        scale: its effective guidance scale, ``EffectiveScale.mean``; GA-Eval itself runs every
            image at its own, ``per_sample``.
        nfe: denoiser evaluations of one of its samples, counted.

    Returns:
        CFG with the arm's steps and guidance scale; and at the effective scale, with
        ``int(steps * ratio)`` steps, where the ratio is the arm's NFE over that of CFG. A scale
        of at most 1 is cond there, which costs one pass a step.

    Raises:
        ValueError: if the scale is not finite, or the NFE does not pay for one step.

    Reference:
        arXiv 2602.22570, the protocol of its released code.
    """
    if not math.isfinite(scale):
        raise ValueError(
            f"scale must be finite, got {scale} for arm {arm.name!r}: with a negative prompt equal "
            "to the prompt there is no guidance to match"
        )
    scale = round(scale, _SCALE_DIGITS)
    name = f"{arm.name}{MATCHED}"
    if scale > 1:
        matched = Arm(name, "cfg", _affordable(arm, nfe / 2), scale)
    else:
        matched = Arm(name, "cond", _affordable(arm, nfe), 1.0)
    return Arm("cfg", "cfg", arm.steps, arm.guidance_scale), matched


def officially_matched_arm(arm: Arm, image_scales: str, nfe: float) -> Arm:
    """Return the CFG run of the released evaluation: every image at the scale of its own.

    Args:
        arm: the method.
        image_scales: file of the scales, see `Arm`.
        nfe: as in ``matched_arms``.

    Raises:
        ValueError: if the NFE does not pay for one step.
    """
    steps = _affordable(arm, nfe / 2)
    return Arm(f"{arm.name}{MATCHED}", "cfg", steps, arm.guidance_scale, image_scales=image_scales)


def embedded_arm(arm: Arm, guidance: float, nfe: float) -> Arm:
    """Return the run of FLUX without true CFG at an embedded guidance and a method's NFE.

    Args:
        arm: the method.
        guidance: the embedded guidance that its runs come nearest to.
        nfe: as in ``matched_arms``.
    """
    guidance = round(guidance, _SCALE_DIGITS)
    steps = _affordable(arm, nfe)
    return Arm(f"{arm.name}{MATCHED}", "cond", steps, 1.0, embedded_guidance=guidance)


def _affordable(arm: Arm, steps: float) -> int:
    if steps < 1:
        raise ValueError(f"nfe must pay for a step of CFG, got {steps:g} steps for {arm.name!r}")
    return int(steps)


def is_below_cfg(scale: float) -> bool:
    """Tell whether a measured scale is below 1, so that `matched_arms` has but cond at 1 for it."""
    return round(scale, _SCALE_DIGITS) < 1


AGAINST = {
    "signed": "CFG at its own effective scale and NFE",
    "official": "CFG at the effective scale of each of its images and its NFE",
    "embedded": "the network alone at the embedded guidance nearest to it and its NFE",
}
"""What a method is matched with, by mode."""


def verdict(name: str, default: Difference, matched: Difference, mode: str = "signed") -> str:
    """Say in plain words what a method's two comparisons with CFG show.

    Args:
        name: of the method.
        default: difference to CFG at its default scale and steps.
        matched: difference to what it is matched with, see `AGAINST`.
        mode: what it is matched by.

    Returns:
        One sentence.
    """
    against = AGAINST[mode]
    if math.isnan(default.estimate.low) and math.isnan(matched.estimate.low):
        return (
            f"{name}: too few prompts, or no spread, for an interval against default CFG "
            f"({default.text}) or {against} ({matched.text}): nothing is shown."
        )
    facts = f"{name} {_outcome(default, 'default CFG')} and {_outcome(matched, against)}"
    if matched.is_win:
        if default.is_win:
            return f"{facts}: the gain is more than a change of guidance scale."
        return f"{facts}: better for the same cost, but no win over default CFG."
    if default.is_win:
        return f"{facts}: it wins only against default CFG, and its scale may be all of that."
    return f"{facts}: no gain over CFG is shown."


def _outcome(difference: Difference, reference: str) -> str:
    if math.isnan(difference.estimate.low):
        return (
            f"has too few prompts, or no spread, for an interval against {reference} "
            f"({difference.text})"
        )
    if difference.is_win:
        return f"beats {reference} ({difference.text})"
    if difference.is_loss:
        return f"loses to {reference} ({difference.text})"
    return f"cannot be told from {reference} ({difference.text})"
