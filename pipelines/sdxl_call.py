"""The arguments of the SDXL call: which there are, and what they must be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from core2_sampler.pipelines.calls import check_steps, count_images, name_callback_tensors

NEGATIVES = ("negative_prompt", "negative_prompt_2")
"""The arguments that are negative prompts."""

_PROMPTS = (
    "prompt",
    "prompt_2",
    *NEGATIVES,
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)
_IMAGES = ("ip_adapter_image", "ip_adapter_image_embeds")
_CHECKED = (*_PROMPTS, *_IMAGES, "height", "width", "callback_on_step_end_tensor_inputs")
ENCODED = (*_PROMPTS, "num_images_per_prompt", "clip_skip")
"""The arguments that the prompts are encoded with."""

GRID = ("timesteps", "sigmas", "denoising_end", "eta")
"""The arguments that change the noise schedule or its steps."""

HANDLED = {
    *_CHECKED,
    *ENCODED,
    *GRID,
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "cross_attention_kwargs",
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
    "callback_on_step_end",
    "kwargs",
}
"""The stock call's arguments that our loop knows."""


def check_call(pipe: Any, call: SimpleNamespace) -> None:
    """Refuse bad arguments, fill in what the stock call fills in, and count the images.

    Args:
        pipe: a ``CoRe2StableDiffusionXLPipeline``.
        call: the call's arguments; gets ``batch``.

    Raises:
        TypeError: an argument that the stock call does not know.
        ValueError: as the stock call, or for an argument that it deprecates.
    """
    if unknown := call.kwargs.keys() - {"callback", "callback_steps"}:
        raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
    if call.kwargs:
        raise ValueError(
            f"{' and '.join(call.kwargs)} must be left out with core2, got what the stock class "
            "deprecates: use callback_on_step_end"
        )
    if call.timesteps is not None:
        check_steps(len(call.timesteps))
    elif call.sigmas is not None:
        check_steps(len(call.sigmas) - 1)
    else:
        check_steps(call.num_inference_steps)
    default = pipe.default_sample_size * pipe.vae_scale_factor
    call.height, call.width = call.height or default, call.width or default
    call.original_size = call.original_size or (call.height, call.width)
    call.target_size = call.target_size or (call.height, call.width)
    name_callback_tensors(call)
    checked = {name: getattr(call, name) for name in _CHECKED}
    pipe.check_inputs(**checked, callback_steps=None)
    call.batch = count_images(call)
