"""FLUX.1 with a weak head: the stock pipeline with another loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.flux import FluxFamily, check_cache, with_guidance
from core2_sampler.pipelines.calls import check_rows, make_run_plan
from core2_sampler.pipelines.flux_call import (
    HANDLED,
    IMAGES,
    check_call,
    fill_negatives,
    latent_size,
    warn_unguided,
)
from core2_sampler.pipelines.loop import Run, check_head, check_rule, reads_negative
from core2_sampler.pipelines.negatives import encode_negative
from core2_sampler.pipelines.stock import CoRe2Mixin, bind, with_core2
from core2_sampler.pipelines.zigzag import check_zigzag
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead


class CoRe2FluxPipeline(CoRe2Mixin, FluxPipeline):
    """``FluxPipeline`` with one more optional component and two more call arguments.

    FLUX.1-dev already embeds a guidance (``guidance_scale``) in its single pass. What costs a
    second pass, and what a weak head takes the place of, is a gap on top of it:

    - **true CFG**: ``d(prompt) - d(negative prompt)``, both at ``guidance_scale``. FLUX.1-schnell,
      which embeds no guidance, has this one only.
    - **two guidances** (``weak_guidance=``): ``d(prompt, guidance_scale) - d(prompt,
      weak_guidance)``. Were the network linear in what it embeds, the result would be one pass at
      ``weak_guidance + true_cfg_scale * (guidance_scale - weak_guidance)``: that is the baseline
      that it has to beat.

    Either way ``true_cfg_scale`` is the scale of the gap and ``w2s_scale`` acts on it. A head
    serves the gap, and about the guidance, that it was trained with.

    Args:
        scheduler: flow-match Euler runs in closed form, any other through its own ``step``.
        vae: as in the stock class, like all that follow.
        text_encoder: CLIP; only its pooled output is used.
        tokenizer: its tokenizer.
        text_encoder_2: T5 encoder.
        tokenizer_2: its tokenizer.
        transformer: denoiser.
        image_encoder: for IP-Adapter.
        feature_extractor: for IP-Adapter.
        weak_head: predicts the gap, see `core2_sampler.weak_heads`.
    """

    family = FluxFamily()
    stock_class = FluxPipeline
    _optional_components = [*FluxPipeline._optional_components, "weak_head"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        weak_head: WeakHead | None = None,
    ) -> None:
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_modules(weak_head=weak_head)

    @torch.no_grad()
    @with_core2(FluxPipeline.__call__)
    def __call__(
        self,
        *args: Any,
        core2: str | Core2Config | None = None,
        weak_guidance: float | None = None,
        **kwargs: Any,
    ) -> FluxPipelineOutput | tuple[Any, ...]:
        """Generate images; every argument of the stock call means what it means there.

        With `core2`, a ``true_cfg_scale`` above 1 asks for guidance: where no negative prompt is
        given it is the empty one (the stock call would run without CFG). At 1 or less every step
        is one pass with the prompt. Callbacks see the stock tensors, latents packed; a
        ``pipe._true_cfg_scale`` that one sets holds from the next step on, and stops the run where
        the head was not made for it.

        Args:
            *args: the stock call's, in its order.
            core2: ``fast`` (one pass a step), ``balanced`` (CFG in the first quarter, then one
                pass a step), ``quality`` (weak-to-strong throughout), or a `Core2Config`;
                None runs the stock call.
            weak_guidance: makes the second pass the prompt itself at this embedded guidance,
                below ``guidance_scale``, in place of the negative prompt.
            **kwargs: the stock call's.

        Returns:
            As the stock call.

        Raises:
            ValueError: the config does not fit the steps or the scheduler, the head is missing, of
                another model or not made for the scale, the transformer's cache does not fit the
                steps, or an argument has no meaning together with another.
            RuntimeError: the latents became nan or inf.
        """
        self._forget()
        if core2 is None:
            if weak_guidance is not None:
                raise ValueError(
                    f"weak_guidance must come with core2, got {weak_guidance} alone: pass "
                    "core2='fast' or another preset, or drop it"
                )
            return super().__call__(*args, **kwargs)
        call = bind(FluxPipeline.__call__, HANDLED, (self, *args), kwargs)
        call.weak_guidance = weak_guidance
        image = self._sample(call, resolve_config(core2))
        return FluxPipelineOutput(images=image) if call.return_dict else (image,)

    def _prepare(self, call: SimpleNamespace, config: Core2Config) -> Run:
        """Check everything, encode the prompts and set the grid: all that comes before the loop."""
        check_call(self, call)
        schedule = self.family.schedule(
            self, call.num_inference_steps, latent_size(self, call), sigmas=call.sigmas
        )
        head, scale = self.weak_head, call.true_cfg_scale
        plan = make_run_plan(config, head, schedule, scale)
        check_head(head, plan, self.family.denoiser(self))
        check_zigzag(self, plan, schedule)
        check_rule(config.sample_rule, plan, schedule, self.family.denoiser(self))
        check_cache(self.transformer, plan)
        warn_unguided(config, plan)
        fill_negatives(self, call, plan)
        self._begin(call, plan)
        embeds, split = self._encode(call, plan)
        latents, _ = self.prepare_latents(
            call.batch,
            self.transformer.config.in_channels // 4,
            call.height,
            call.width,
            embeds.dtype,
            self._execution_device,
            call.generator,
            call.latents,
        )
        rule = config.sample_rule
        return Run(call, plan, schedule, latents, {"prompt_embeds": embeds}, split, rule=rule)

    def _begin(self, call: SimpleNamespace, plan: Plan) -> None:
        """Set what the stock properties and callbacks read."""
        self._guidance_scale = call.guidance_scale
        self._true_cfg_scale = plan.steps[0].guidance_scale
        self._joint_attention_kwargs = call.joint_attention_kwargs or {}
        self._current_timestep = None
        self._interrupt = False
        self._num_timesteps = len(plan)
        self._latent_size = latent_size(self, call)

    def _encode(
        self, call: SimpleNamespace, plan: Plan
    ) -> tuple[Tensor, Callable[[Mapping[str, Tensor]], Prompts]]:
        """Return the prompt's embeddings, and what makes both sides of them once they are edited.

        The second side is left out where no step and no head reads it; no callback ever sees it.
        """
        embeds, pooled = self._encode_prompt(call, "")
        paired, second = reads_negative(self, plan), call.weak_guidance
        negative = self._encode_negative(call) if paired and second is None else None
        if negative is not None and negative[0].shape != embeds.shape:
            raise ValueError(
                "the negative prompt's embeddings must have the shape of the prompt's "
                f"{tuple(embeds.shape)}, got {tuple(negative[0].shape)}: give both, or "
                f"max_sequence_length={embeds.shape[1]}"
            )
        extra = self._attention_arguments(call, "")
        negative_extra = None if negative is None else self._attention_arguments(call, "negative_")
        self._joint_attention_kwargs = extra

        def split(tensors: Mapping[str, Tensor]) -> Prompts:
            prompt, scale = tensors["prompt_embeds"], call.guidance_scale
            cond = self._side(prompt, pooled, scale, extra)
            if negative is not None:
                return cond, self._side(*negative, scale, negative_extra)
            return cond, self._side(prompt, pooled, second, extra) if paired else None

        return embeds, split

    def _side(
        self, embeds: Tensor, pooled: Tensor, guidance_scale: float, arguments: Any
    ) -> Conditioning:
        extra = {"joint_attention_kwargs": arguments}
        return with_guidance(self.transformer, embeds, pooled, guidance_scale, extra)

    def _encode_prompt(self, call: SimpleNamespace, prefix: str) -> tuple[Tensor, Tensor]:
        """Return (token embeddings, pooled) of one side, a row for each image."""
        embeds, pooled, _ = self.encode_prompt(
            prompt=getattr(call, f"{prefix}prompt"),
            prompt_2=getattr(call, f"{prefix}prompt_2"),
            prompt_embeds=getattr(call, f"{prefix}prompt_embeds"),
            pooled_prompt_embeds=getattr(call, f"{prefix}pooled_prompt_embeds"),
            device=self._execution_device,
            num_images_per_prompt=call.num_images_per_prompt,
            max_sequence_length=call.max_sequence_length,
            lora_scale=(call.joint_attention_kwargs or {}).get("scale"),
        )
        check_rows(embeds, call.batch)
        check_rows(pooled, call.batch)
        return embeds, pooled

    def _encode_negative(self, call: SimpleNamespace) -> tuple[Tensor, Tensor]:
        kept = self._core2_negatives
        return encode_negative(kept, self, call, lambda: self._encode_prompt(call, "negative_"))

    def _attention_arguments(self, call: SimpleNamespace, prefix: str) -> dict[str, Any]:
        """Return ``joint_attention_kwargs`` of one side: with its IP-Adapter images, if any."""
        given = dict(call.joint_attention_kwargs or {})
        if all(getattr(call, name) is None for name in IMAGES):
            return given
        image = getattr(call, f"{prefix}ip_adapter_image")
        embeds = getattr(call, f"{prefix}ip_adapter_image_embeds")
        if image is None and embeds is None:
            blank = np.zeros((call.width, call.height, 3), dtype=np.uint8)
            image = [blank] * self.transformer.encoder_hid_proj.num_ip_adapters
        embeds = self.prepare_ip_adapter_image_embeds(
            image, embeds, self._execution_device, call.batch
        )
        return {**given, "ip_adapter_image_embeds": embeds}

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        image = self.family.decode(self, latents, self._latent_size)
        return self.image_processor.postprocess(image, output_type=output_type)
