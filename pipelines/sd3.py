"""Stable Diffusion 3 and 3.5 with a weak head: the stock pipeline with another loop."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
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
from core2_sampler.pipelines.adapters.sd3 import SD3Family
from core2_sampler.pipelines.calls import (
    check_rows,
    check_steps,
    count_images,
    make_run_plan,
    name_callback_tensors,
    split_rows,
    wants_uncond,
)
from core2_sampler.pipelines.loop import Run, check_head, check_rule
from core2_sampler.pipelines.negatives import encode_sides
from core2_sampler.pipelines.stock import CoRe2Mixin, bind, with_core2
from core2_sampler.pipelines.zigzag import check_zigzag
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead

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


class CoRe2StableDiffusion3Pipeline(CoRe2Mixin, StableDiffusion3Pipeline):
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

    family = SD3Family()
    stock_class = StableDiffusion3Pipeline
    # The stock class calls without T5, but can only load a folder that has one.
    _optional_components = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
        "weak_head",
    ]

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

    @torch.no_grad()
    @with_core2(StableDiffusion3Pipeline.__call__)
    def __call__(
        self, *args: Any, core2: str | Core2Config | None = None, **kwargs: Any
    ) -> StableDiffusion3PipelineOutput | tuple[Any, ...]:
        """Generate images; every argument of the stock call means what it means there.

        Callbacks see the stock tensors. A guidance scale that a callback sets holds from the next
        step on, and 1 or less turns guidance off; so does leaving only the prompt's embeddings.
        A scale that the head was not made for stops the run.

        Args:
            *args: the stock call's, in its order.
            core2: ``fast`` (one pass a step), ``balanced`` (CFG in the first quarter, then one
                pass a step), ``quality`` (weak-to-strong throughout), or a `Core2Config`;
                None runs the stock call.
            **kwargs: the stock call's.

        Returns:
            As the stock call.

        Raises:
            ValueError: the config does not fit the steps or the scheduler, the head is missing, of
                another model or not made for the scale, or an argument has no meaning together
                with `core2`.
            RuntimeError: the latents became nan or inf.
        """
        self._forget()
        if core2 is None:
            return super().__call__(*args, **kwargs)
        call = bind(StableDiffusion3Pipeline.__call__, _HANDLED, (self, *args), kwargs)
        image = self._sample(call, resolve_config(core2))
        return StableDiffusion3PipelineOutput(images=image) if call.return_dict else (image,)

    def _prepare(self, call: SimpleNamespace, config: Core2Config) -> Run:
        """Check everything, encode the prompts and set the grid: all that comes before the loop."""
        self._check_call(call)
        schedule = self.family.schedule(
            self, call.num_inference_steps, self._latent_size(call), sigmas=call.sigmas, mu=call.mu
        )
        head, scale = self.weak_head, call.guidance_scale
        plan = make_run_plan(config, head, schedule, scale)
        check_head(head, plan, self.family.denoiser(self))
        check_zigzag(self, plan, schedule)
        check_rule(config.sample_rule, plan, schedule, self.family.denoiser(self))
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
        self._encode_image(call, plan)
        extra = {"joint_attention_kwargs": self.joint_attention_kwargs}

        def split(embeds: Mapping[str, Tensor]) -> Prompts:
            return split_rows(_side, embeds, extra, call.batch)

        return Run(call, plan, schedule, latents, embeds, split, rule=config.sample_rule)

    def _check_call(self, call: SimpleNamespace) -> None:
        """Refuse bad arguments and fill in what the stock call fills in."""
        if call.skip_guidance_layers is not None:
            raise ValueError(
                f"skip_guidance_layers must be None with core2, got {call.skip_guidance_layers}: "
                "drop it, or call without core2"
            )
        check_steps(call.num_inference_steps if call.sigmas is None else len(call.sigmas))
        default = self.default_sample_size * self.vae_scale_factor
        call.height, call.width = call.height or default, call.width or default
        name_callback_tensors(call)
        self.check_inputs(**{name: getattr(call, name) for name in _CHECKED})
        call.batch = count_images(call)

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
        """Return the embeddings in the stock layout, by the names that callbacks know."""
        paired = wants_uncond(self, call, plan, _NEGATIVES)
        scale = (call.joint_attention_kwargs or {}).get("scale")

        def encode(both: bool) -> tuple[Tensor, ...]:
            return self.encode_prompt(
                **{name: getattr(call, name) for name in _ENCODED},
                do_classifier_free_guidance=both,
                device=self._execution_device,
                lora_scale=scale,
            )

        kept = self._core2_negatives
        embeds, negative, pooled, negative_pooled = encode_sides(kept, self, call, encode, paired)
        check_rows(embeds, call.batch)
        if paired:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _encode_image(self, call: SimpleNamespace, plan: Plan) -> None:
        """Put the IP-Adapter's image embeddings where the stock call puts them."""
        image, embeds = call.ip_adapter_image, call.ip_adapter_image_embeds
        if embeds is None and (image is None or not self.is_ip_adapter_active):
            return
        guided = any(step.guidance_scale > 1 for step in plan.steps)
        embeds = self.prepare_ip_adapter_image_embeds(
            image, embeds, self._execution_device, call.batch, guided
        )
        given = call.joint_attention_kwargs or {}
        self._joint_attention_kwargs = {**given, "ip_adapter_image_embeds": embeds}

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        image = self.family.decode(self, latents)
        return self.image_processor.postprocess(image, output_type=output_type)


def _side(embeds: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Conditioning:
    return Conditioning(embeds["prompt_embeds"], embeds["pooled_prompt_embeds"], extra)
