"""The arguments of the FLUX call: which there are, what they must be, what stands in for none."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

from core2_sampler.pipelines.adapters.flux import square_size
from core2_sampler.pipelines.calls import check_steps, count_images
from core2_sampler.pipelines.loop import reads_negative
from core2_sampler.plan import Core2Config, Plan

logger = logging.getLogger(__name__)

_NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2")
_NEGATIVE_EMBEDS = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
_NEGATIVE_IMAGES = ("negative_ip_adapter_image", "negative_ip_adapter_image_embeds")
_NEGATIVES = (*_NEGATIVE_PROMPTS, *_NEGATIVE_EMBEDS, *_NEGATIVE_IMAGES)
_CHECKED = (
    "prompt",
    "prompt_2",
    "prompt_embeds",
    "pooled_prompt_embeds",
    *_NEGATIVE_PROMPTS,
    *_NEGATIVE_EMBEDS,
    "max_sequence_length",
    "height",
    "width",
    "callback_on_step_end_tensor_inputs",
)
IMAGES = ("ip_adapter_image", "ip_adapter_image_embeds", *_NEGATIVE_IMAGES)
"""The arguments that need an IP-Adapter."""

HANDLED = {
    *_CHECKED,
    *IMAGES,
    "true_cfg_scale",
    "num_inference_steps",
    "sigmas",
    "guidance_scale",
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "joint_attention_kwargs",
    "callback_on_step_end",
}
"""The stock call's arguments that our loop knows."""


def check_call(pipe: Any, call: SimpleNamespace) -> None:
    """Refuse bad arguments; fill in the size, and count prompts and images.

    Args:
        pipe: a ``CoRe2FluxPipeline``.
        call: the call's arguments; gets ``prompts`` and ``batch``.

    Raises:
        ValueError: as the stock call, or for what it would fail on later.
    """
    check_steps(call.num_inference_steps if call.sigmas is None else len(call.sigmas))
    _fill_size(pipe, call)
    pipe.check_inputs(**{name: getattr(call, name) for name in _CHECKED})
    _check_size(pipe, call)
    _check_weak_guidance(pipe, call)
    call.batch = count_images(call)
    call.prompts = call.batch // call.num_images_per_prompt


def latent_size(pipe: Any, call: SimpleNamespace) -> tuple[int, int]:
    """Return (H, W) of ``x``, rounded down to whole tokens as the stock call does."""
    factor = 2 * pipe.vae_scale_factor
    return 2 * (int(call.height) // factor), 2 * (int(call.width) // factor)


def fill_negatives(pipe: Any, call: SimpleNamespace, plan: Plan) -> None:
    """Make the negative prompt one text for each prompt: the empty one where none is given.

    Args:
        pipe: a ``CoRe2FluxPipeline``.
        call: the call's arguments, checked.
        plan: of the run to come.

    Raises:
        ValueError: there are not as many as prompts, nothing could encode the empty one, or the
            weak head learned another gap.
    """
    if plan.needs_head:
        pipe.weak_head.check_gap(call.weak_guidance)
    given = [name for name in _NEGATIVE_PROMPTS if getattr(call, name)]
    if call.weak_guidance is not None and not plan.needs_head:  # a head stands for it
        given.append("weak_guidance")
    if not reads_negative(pipe, plan):
        if given:
            logger.warning("no step of the plan runs %s: it has no effect", given[0])
        return
    if call.weak_guidance is not None or call.negative_prompt_embeds is not None:
        return
    if pipe.text_encoder is None or pipe.text_encoder_2 is None:
        raise ValueError(
            "a true_cfg_scale above 1 must come with negative_prompt_embeds where there is no "
            "text encoder, got none: pass them and negative_pooled_prompt_embeds"
        )
    call.negative_prompt = call.negative_prompt or ""
    for name in _NEGATIVE_PROMPTS:
        texts = getattr(call, name)
        if isinstance(texts, str):
            setattr(call, name, [texts] * call.prompts)
        elif texts is not None and len(texts) != call.prompts:
            raise ValueError(
                f"{name} must be one text or one for each of the {call.prompts} prompts, "
                f"got {len(texts)}"
            )


def warn_unguided(config: Core2Config, plan: Plan) -> None:
    """Log a warning if a config asks for guidance that the scale, 1 by default, turns off."""
    if config.mode != "cond" and all(step.guidance_scale <= 1 for step in plan.steps):
        logger.warning(
            "true_cfg_scale must be above 1 for guidance, got %g: every step runs the prompt alone",
            plan.steps[0].guidance_scale,
        )


def _fill_size(pipe: Any, call: SimpleNamespace) -> None:
    """Set the stock call's default size, or that of square latents that are given."""
    default = (pipe.default_sample_size, pipe.default_sample_size)
    if call.latents is not None and not (call.height or call.width):
        default = square_size(call.latents.shape[1])
    call.height = call.height or default[0] * pipe.vae_scale_factor
    call.width = call.width or default[1] * pipe.vae_scale_factor


def _check_size(pipe: Any, call: SimpleNamespace) -> None:
    height, width = latent_size(pipe, call)
    tokens = height * width // 4
    if not tokens:
        raise ValueError(
            f"height and width must be at least {2 * pipe.vae_scale_factor}, got "
            f"{call.height} and {call.width}"
        )
    if call.latents is not None and call.latents.shape[1] != tokens:
        raise ValueError(
            f"latents must be packed into {tokens} tokens for {call.height} x {call.width} px, "
            f"got {call.latents.shape[1]}: give the latents' own height and width"
        )


def _check_weak_guidance(pipe: Any, call: SimpleNamespace) -> None:
    weak = call.weak_guidance
    if weak is None:
        return
    if not pipe.transformer.config.guidance_embeds:
        raise ValueError(
            "weak_guidance must go to a transformer that embeds a guidance, got one that does "
            "not: give a negative prompt instead"
        )
    if not (math.isfinite(weak) and weak < call.guidance_scale):
        raise ValueError(
            f"weak_guidance must be below guidance_scale ({call.guidance_scale}), got {weak}"
        )
    if given := [name for name in _NEGATIVES if getattr(call, name) is not None]:
        raise ValueError(
            f"weak_guidance must stand in place of a negative prompt, got {given[0]} too: "
            "drop one of them"
        )
