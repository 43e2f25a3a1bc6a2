"""A pipeline's run by hot steps, where nothing edits, guides or watches it in between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from core2_sampler.fused.run import can_run
from core2_sampler.fused.sampler import Model
from core2_sampler.pipelines.run import Interrupted, Run
from core2_sampler.scales import OnlineScale
from core2_sampler.types import Denoiser, OnStep
from core2_sampler.weak_heads.base import WeakHead

logger = logging.getLogger(__name__)


def may_fuse(pipe: Any, run: Run) -> bool:
    """Say whether hot steps can make a run; one log line says why not.

    Args:
        pipe: the pipeline.
        run: the call's state.
    """
    if pipe._core2_fused is None:
        return False
    reason = _obstacle(pipe, run)
    if reason is not None:
        _tell_once(f"core2_compile has no effect on steps: {reason}")
    return reason is None


def _obstacle(pipe: Any, run: Run) -> str | None:
    if pipe._core2_observer is not None:
        return "each step is watched"
    if run.call.callback_on_step_end is not None:
        return "a callback may edit tensors between them"
    if run.adjust is not None:
        return "guidance_rescale changes what they predict"
    if run.rule is not None and type(run.rule) is not OnlineScale:
        return f"the scale rule {type(run.rule).__name__} may do anything"
    if not can_run(run.plan, run.schedule.solver):
        return "the scheduler, or zigzag steps under it, have no table of coefficients"
    return None


_tell_once: Callable[[str], None] = cache(logger.warning)


def solve_fused(
    pipe: Any, run: Run, denoiser: Denoiser, head: WeakHead | None, on_step: OnStep
) -> Tensor:
    """Return the final latents of a run of hot steps.

    Args:
        pipe: the pipeline; it is told the timestep of each pass, as some caches ask for it.
        run: the call's state; its rule has begun.
        denoiser: the network.
        head: the weak head, if the plan asks it.
        on_step: sees the latents after each step; the latents of an interrupt become the
            pipeline's.
    """
    schedule, (cond, uncond) = run.schedule, run.prompts()
    scaled = denoiser.family == "sdxl"  # it scales x before it casts
    model = Model(
        denoiser,
        head,
        input_dtype=torch.float32 if scaled else cond.prompt_embeds.dtype,
        observes=head is not None and head.observes,
        static_head=head is None or head.static_state,
        rule=run.rule if isinstance(run.rule, OnlineScale) else None,
    )

    def tell_time(level: int) -> None:
        pipe._current_timestep = schedule.timesteps[level]

    def after(i: int, x: Tensor) -> None:
        try:
            on_step(i, x)
        except Interrupted:
            latents = schedule.to_pipeline(x, i + 1).to(run.latents.dtype, copy=True)
            raise Interrupted(latents) from None

    x = pipe._core2_fused(
        model,
        schedule.from_pipeline(run.latents, 0),
        schedule.sigmas,
        run.plan,
        cond,
        uncond if run.plan.needs_uncond else None,
        solver=schedule.solver,
        on_level=tell_time,
        on_step=after,
    )
    return schedule.to_pipeline(x, len(run.plan))
