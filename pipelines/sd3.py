"""Stable Diffusion 3 and 3.5 with a weak head: the stock pipeline with another loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters import sd3_denoiser, sd3_timesteps
from core2_sampler.pipelines.loop import Run, check_head, map_tensors, run_loop
from core2_sampler.pipelines.stock import (
    bind,
    from_pipe_as_is,
    from_pretrained_with_head,
    rename_index,
    with_core2,
)
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead

logger = logging.getLogger(__name__)

_NEGATIVES = (
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
)
_PROMPTS = (
    "prompt",
    "prompt_2",
    "prompt_3",
    *_NEGATIVES,
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "max_sequence_length",
)
_CHECKED = (*_PROMPTS, "height", "width", "callback_on_step_end_tensor_inputs")
_ENCODED = (*_PROMPTS, "num_images_per_prompt", "clip_skip")
_HANDLED = {
    *_CHECKED,
    *_ENCODED,
    "num_inference_steps",
    "sigmas",
    "guidance_scale",
    "generator",
    "latents",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "output_type",
    "return_dict",
    "joint_attention_kwargs",
    "callback_on_step_end",
    "skip_guidance_layers",
    "skip_layer_guidance_scale",
    "skip_layer_guidance_stop",
    "skip_layer_guidance_start",
    "mu",
}


class CoRe2StableDiffusion3Pipeline(StableDiffusion3Pipeline):
    """``StableDiffusion3Pipeline`` with one more optional component and one more call argument.

    ``pipe(prompt, core2="fast")`` runs one denoiser pass a step where the stock class runs two;
    without ``core2`` it is the stock class, bit for bit.

    Args:
        transformer: as in the stock class, like all that follow.
        scheduler: flow-match Euler runs in closed form, any other through its own ``step``.
        vae: image decoder.
        text_encoder: first CLIP text encoder.
        tokenizer: its tokenizer.
        text_encoder_2: second CLIP text encoder.
        tokenizer_2: its tokenizer.
        text_encoder_3: T5 encoder, or None.
        tokenizer_3: its tokenizer, or None.
        image_encoder: for IP-Adapter.
        feature_extractor: for IP-Adapter.
        weak_head: predicts the gap of classifier-free guidance, see `core2_sampler.weak_heads`.
    """

    # The stock class calls without T5, but can only load a folder that has one.
    _optional_components = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
        "weak_head",
    ]
    # Small, and an in-model head is never called itself, so no offload hook would ever move it.
    _exclude_from_cpu_offload = ["weak_head"]

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
        image_encoder: SiglipVisionModel = None,
        feature_extractor: SiglipImageProcessor = None,
        weak_head: WeakHead | None = None,
    ) -> None:
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_modules(weak_head=weak_head)
        self._core2_plan: Plan | None = None

    @property
    def core2_plan(self) -> Plan | None:
        """The plan of the latest call; None before the first and after a call without `core2`."""
        return self._core2_plan

    @torch.no_grad()
    @with_core2(StableDiffusion3Pipeline.__call__)
    def __call__(
        self, *args: Any, core2: str | Core2Config | None = None, **kwargs: Any
    ) -> StableDiffusion3PipelineOutput | tuple[Any, ...]:
        """Generate images; every argument of the stock call means what it means there.

        Callbacks see the stock tensors. A guidance scale that a callback sets holds from the next
        step on, and 1 or less turns guidance off; so does leaving only the prompt's embeddings.

        Args:
            *args: the stock call's, in its order.
            core2: ``fast`` (one pass a step), ``balanced`` (CFG in the first quarter, then one
                pass a step), ``quality`` (weak-to-strong throughout), or a `Core2Config`;
                None runs the stock call.
            **kwargs: the stock call's.

        Returns:
            As the stock call.

        Raises:
            ValueError: the config does not fit the number of steps, the head is missing or of
                another model, or an argument has no meaning together with `core2`.
            RuntimeError: the latents became nan or inf.
        """
        self._core2_plan = None
        if core2 is None:
            return super().__call__(*args, **kwargs)
        call = bind(StableDiffusion3Pipeline.__call__, _HANDLED, (self, *args), kwargs)
        run = self._prepare(call, resolve_config(core2))
        self._core2_plan = run.plan
        latents = run_loop(self, run, sd3_denoiser(self))
        image = latents if call.output_type == "latent" else self._decode(latents, call.output_type)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=image) if call.return_dict else (image,)

    def _prepare(self, call: SimpleNamespace, config: Core2Config) -> Run:
        """Check everything, encode the prompts and set the grid: all that comes before the loop."""
        self._check_call(call)
        timesteps, num_steps = sd3_timesteps(
            self, call.num_inference_steps, self._latent_size(call), sigmas=call.sigmas, mu=call.mu
        )
        head = self.weak_head
        plan = config.plan(len(timesteps), call.guidance_scale, head is not None and head.in_model)
        check_head(head, plan, self.transformer, "sd3")
        self._begin(call, plan)
        embeds = self._encode(call, plan)
        latents = self.prepare_latents(
            call.batch,
            self.transformer.config.in_channels,
            call.height,
            call.width,
            embeds["prompt_embeds"].dtype,
            self._execution_device,
            call.generator,
            call.latents,
        )
        self._encode_image(call)
        extra = {"joint_attention_kwargs": self.joint_attention_kwargs}

        def split(embeds: Mapping[str, Tensor]) -> Prompts:
            return _split(embeds, extra, call.batch)

        return Run(call, plan, timesteps, num_steps, latents, embeds, split)

    def _check_call(self, call: SimpleNamespace) -> None:
        """Refuse bad arguments and fill in what the stock call fills in."""
        if call.skip_guidance_layers is not None:
            raise ValueError(
                f"skip_guidance_layers must be None with core2, got {call.skip_guidance_layers}: "
                "drop it, or call without core2"
            )
        steps = call.num_inference_steps if call.sigmas is None else len(call.sigmas)
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        default = self.default_sample_size * self.vae_scale_factor
        call.height, call.width = call.height or default, call.width or default
        if isinstance(call.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            call.callback_on_step_end_tensor_inputs = call.callback_on_step_end.tensor_inputs
        self.check_inputs(**{name: getattr(call, name) for name in _CHECKED})
        if isinstance(call.prompt, str):
            prompts = 1
        else:
            prompts = len(call.prompt) if call.prompt is not None else call.prompt_embeds.shape[0]
        call.batch = prompts * call.num_images_per_prompt

    def _begin(self, call: SimpleNamespace, plan: Plan) -> None:
        """Set what the stock properties and callbacks read."""
        self._guidance_scale = plan.steps[0].guidance_scale
        self._skip_layer_guidance_scale = call.skip_layer_guidance_scale
        self._clip_skip = call.clip_skip
        self._joint_attention_kwargs = call.joint_attention_kwargs
        self._interrupt = False
        self._num_timesteps = len(plan)

    def _latent_size(self, call: SimpleNamespace) -> tuple[int, int]:
        if call.latents is not None:
            return call.latents.shape[-2], call.latents.shape[-1]
        return call.height // self.vae_scale_factor, call.width // self.vae_scale_factor

    def _encode(self, call: SimpleNamespace, plan: Plan) -> dict[str, Tensor]:
        """Return the embeddings in the stock layout, by the names that callbacks know.

        The negative prompt is left out where nothing reads it: no step and no callback.
        """
        wanted = set(call.callback_on_step_end_tensor_inputs or ()) - {"latents"}
        watched = call.callback_on_step_end is not None and bool(wanted)
        guided = max(step.guidance_scale for step in plan.steps) > 1
        paired = guided and (plan.needs_uncond or watched)
        given = [name for name in _NEGATIVES if getattr(call, name)]
        if guided and given and not plan.needs_uncond:
            logger.warning("no step of the plan runs %s: it has no effect", given[0])
        scale = (call.joint_attention_kwargs or {}).get("scale")
        embeds, negative, pooled, negative_pooled = self.encode_prompt(
            **{name: getattr(call, name) for name in _ENCODED},
            do_classifier_free_guidance=paired,
            device=self._execution_device,
            lora_scale=scale,
        )
        if embeds.shape[0] != call.batch:
            raise ValueError(
                f"prompt_embeds must have one row for each of the {call.batch} images, "
                f"got {embeds.shape[0]}: repeat them for num_images_per_prompt"
            )
        if paired:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _encode_image(self, call: SimpleNamespace) -> None:
        """Put the IP-Adapter's image embeddings where the stock call puts them."""
        image, embeds = call.ip_adapter_image, call.ip_adapter_image_embeds
        if embeds is None and (image is None or not self.is_ip_adapter_active):
            return
        embeds = self.prepare_ip_adapter_image_embeds(
            image, embeds, self._execution_device, call.batch, self.do_classifier_free_guidance
        )
        given = call.joint_attention_kwargs or {}
        self._joint_attention_kwargs = {**given, "ip_adapter_image_embeds": embeds}

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        config = self.vae.config
        latents = (latents / config.scaling_factor) + config.shift_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(image, output_type=output_type)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Load a stock folder or hub repository, with the weak head that it may hold.

        Args:
            pretrained_model_name_or_path: as the stock method.
            **kwargs: as the stock method; ``weak_head`` among them.

        Returns:
            The pipeline.
        """
        return from_pretrained_with_head(
            cls, StableDiffusion3Pipeline, pretrained_model_name_or_path, kwargs
        )

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """Build on another pipeline's components; their dtypes stay unless one is asked for.

        Args:
            pipeline: a Stable Diffusion 3 pipeline.
            **kwargs: as the stock method; ``weak_head`` among them.

        Returns:
            The new pipeline; it shares the components.
        """
        return from_pipe_as_is(cls, StableDiffusion3Pipeline, pipeline, kwargs)

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save ``model_index.json`` under the stock class name: the folder loads for everyone.

        Args:
            save_directory: the folder.
            push_to_hub: as the stock method.
            **kwargs: as the stock method.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        rename_index(Path(save_directory) / self.config_name, StableDiffusion3Pipeline.__name__)


def _split(embeds: Mapping[str, Tensor], extra: Mapping[str, Any], batch: int) -> Prompts:
    """Return (cond, uncond) of the stock layout, 2B rows or, without a negative prompt, B."""

    def side(index: int) -> Conditioning:
        def half(x: Tensor) -> Tensor:
            return x.chunk(2)[index] if x.shape[0] == 2 * batch else x

        tokens, pooled = half(embeds["prompt_embeds"]), half(embeds["pooled_prompt_embeds"])
        return Conditioning(tokens, pooled, map_tensors(half, extra))

    paired = all(x.shape[0] == 2 * batch for x in embeds.values())
    return side(1), side(0) if paired else None
