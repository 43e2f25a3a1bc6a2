"""Load what the checks have found: the step after which weights are in memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from core2_sampler.config import ConfigError, user_input
from core2_sampler.fitting import HeadFiles
from core2_sampler.model_files import EMBEDDED, ModelFiles

if TYPE_CHECKING:
    from core2_sampler.weak_heads.base import WeakHead

Dtype = Literal["auto", "fp32", "fp16", "bf16"]
DTYPE_HELP = "Precision of the weights: fp32, fp16, bf16; auto is bf16 on CUDA and fp32 elsewhere."
LENGTH_HELP = "T5 tokens of a prompt; by default the stock call's, or the model's if fewer."
MODEL_HELP = f"An embedded model ({', '.join(EMBEDDED)}), a folder or a hub id owner/name."
DEVICE_HELP = "A torch device such as cuda:0; auto takes the best one here."


def load_model(model: ModelFiles, device: str, dtype: Dtype = "auto") -> Any:
    """Load a pipeline onto a device, without bars and chatter.

    Args:
        model: from ``find_model``.
        device: from ``pick_device``.
        dtype: of the weights.
    """
    from core2_sampler.pipelines.auto import load_pipeline
    from core2_sampler.precision import DTYPES, pick_dtype
    from core2_sampler.progress import hide_loading

    hide_loading()
    pipe = load_pipeline(model.source, dtype=DTYPES[pick_dtype(dtype, device)])
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_weak_head(files: HeadFiles, pipe: Any) -> WeakHead:
    """Return a head for a loaded pipeline, once it is known to fit the denoiser's layers.

    The model's own is that of the pipeline, in its dtype; any other is loaded, in its own dtype.

    Raises:
        ConfigError: if it was made for another model of the family.
    """
    from core2_sampler.weak_heads import HEADS, load_head

    denoiser = pipe.family.denoiser(pipe)
    with user_input():
        if files.own:
            head = pipe.weak_head
        elif files.folder is None:
            head = HEADS.get(files.name).for_denoiser(denoiser)
        else:
            head = load_head(files.hub_id or files.folder)
        head = head.to(denoiser.module.device)
        if files.in_model:
            with head.attached(denoiser.module):
                pass
    return head


def sampling_setup(
    pipe: Any, steps: int, max_sequence_length: int | None, weak_guidance: float | None = None
) -> dict[str, Any]:
    """Return what Collect needs of a loaded pipeline, under the names of its arguments.

    Args:
        pipe: one of our pipelines.
        steps: number of sampling steps.
        max_sequence_length: T5 tokens of a prompt, where the family has T5.
        weak_guidance: FLUX: the embedded guidance that stands for uncond.

    Raises:
        ConfigError: if the model's scheduler has no Euler form, or it embeds no guidance.
    """
    from core2_sampler.samplers import sample_euler

    family = pipe.family
    shape = family.latent_shape(pipe)
    schedule = family.schedule(pipe, steps, shape[1:])
    if schedule.solver is not sample_euler:
        raise ConfigError(
            "Collect samples with Euler steps, so the model's scheduler must be flow-match Euler, "
            f"EulerDiscreteScheduler or DDIM, got {type(pipe.scheduler).__name__}: change it in "
            "the model's scheduler/scheduler_config.json"
        )
    denoiser = family.denoiser(pipe)
    if weak_guidance is not None and not denoiser.module.config.get("guidance_embeds"):
        raise ConfigError(
            f"weak_guidance is for models that embed a guidance, got a {type(pipe).__name__} that "
            "does not: leave it out"
        )
    given = {"max_sequence_length": max_sequence_length, "weak_guidance": weak_guidance}
    asked = {name: value for name, value in given.items() if value is not None}
    return {
        "denoiser": denoiser,
        "encode": partial(family.encode, pipe, **asked),
        "sigmas": schedule.sigmas,
        "noise_scale": schedule.noise_scale,
        "latent_shape": shape,
    }
