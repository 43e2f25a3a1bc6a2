"""What the calls of all families check and lay out alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.base import Schedule
from core2_sampler.pipelines.loop import map_tensors, reads_negative
from core2_sampler.plan import Core2Config, Plan
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.card import step_errors

logger = logging.getLogger(__name__)

Side = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Conditioning]
"""``side(embeds, extra)``: the conditioning of one side's rows of the stock tensors."""


def make_run_plan(
    config: Core2Config, head: WeakHead | None, schedule: Schedule, guidance_scale: float
) -> Plan:
    """Return the plan of a run, whose noise levels are known.

    Args:
        config: what the call asks for.
        head: the pipeline's weak head; its card is read where it places the slow steps.
        schedule: of the run.
        guidance_scale: of the call.
    """
    in_model = head is not None and head.in_model
    errors = partial(step_errors, head, schedule.sigmas)
    return config.plan(len(schedule.timesteps), guidance_scale, in_model, errors)


def check_steps(steps: int) -> None:
    """Raise ValueError for a run of no steps."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")


def name_callback_tensors(call: SimpleNamespace) -> None:
    """Let a callback object say itself which tensors it takes, as the stock calls do."""
    if isinstance(call.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
        call.callback_on_step_end_tensor_inputs = call.callback_on_step_end.tensor_inputs


def count_images(call: SimpleNamespace) -> int:
    """Return B: prompts times images per prompt."""
    if isinstance(call.prompt, str):
        prompts = 1
    else:
        prompts = len(call.prompt) if call.prompt is not None else call.prompt_embeds.shape[0]
    return prompts * call.num_images_per_prompt


def wants_uncond(pipe: Any, call: SimpleNamespace, plan: Plan, negatives: Sequence[str]) -> bool:
    """Say whether the negative prompt is to be encoded: not where nothing reads it.

    What may read it are the steps, a callback, the head and an observer.

    Args:
        pipe: the pipeline.
        call: the call's arguments; a warning is logged if a negative prompt has no effect.
        plan: of the run to come.
        negatives: names of the arguments that are negative prompts.
    """
    wanted = set(call.callback_on_step_end_tensor_inputs or ()) - {"latents"}
    watched = call.callback_on_step_end is not None and bool(wanted)
    guided = max(step.guidance_scale for step in plan.steps) > 1
    given = [name for name in negatives if getattr(call, name)]
    needed = reads_negative(pipe, plan)
    if guided and given and not needed:
        logger.warning("no step of the plan runs %s: it has no effect", given[0])
    return guided and (needed or watched)


def check_rows(prompt_embeds: Tensor, batch: int) -> None:
    """Raise ValueError unless there is one row of embeddings for each of B images."""
    if prompt_embeds.shape[0] != batch:
        raise ValueError(
            f"prompt_embeds must have one row for each of the {batch} images, "
            f"got {prompt_embeds.shape[0]}: repeat them for num_images_per_prompt"
        )


def split_rows(
    side: Side, embeds: Mapping[str, Tensor], extra: Mapping[str, Any], batch: int
) -> Prompts:
    """Return (cond, uncond) of the stock layout, 2B rows or, without a negative prompt, B.

    Args:
        side: makes one side's conditioning.
        embeds: the tensors that callbacks know, the negative prompt's rows first.
        extra: other arguments of the network; tensors of 2B rows in it are split too.
        batch: B.
    """

    def one(index: int) -> Conditioning:
        def half(x: Tensor) -> Tensor:
            return x.chunk(2)[index] if x.shape[0] == 2 * batch else x

        return side(map_tensors(half, embeds), map_tensors(half, extra))

    paired = all(x.shape[0] == 2 * batch for x in embeds.values())
    return one(1), one(0) if paired else None
