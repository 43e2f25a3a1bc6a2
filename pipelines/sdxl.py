"""Stable Diffusion XL with a weak head: the stock pipeline with another loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from core2_sampler.guidance import Adjust, Prompts, rescale
from core2_sampler.pipelines.adapters.base import Schedule
from core2_sampler.pipelines.adapters.discrete import eps_from_v, v_from_eps
from core2_sampler.pipelines.adapters.sdxl import SDXLDenoiser, SDXLFamily
from core2_sampler.pipelines.calls import make_run_plan, split_rows, wants_uncond
from core2_sampler.pipelines.loop import Run, check_head, check_rule
from core2_sampler.pipelines.negatives import encode_sides
from core2_sampler.pipelines.sdxl_call import ENCODED, GRID, HANDLED, NEGATIVES, check_call
from core2_sampler.pipelines.stock import CoRe2Mixin, bind, with_core2
from core2_sampler.pipelines.zigzag import check_zigzag
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead


class CoRe2StableDiffusionXLPipeline(CoRe2Mixin, StableDiffusionXLPipeline):
    """``StableDiffusionXLPipeline`` with one more optional component and one more call argument.

    ``pipe(prompt, core2="fast")`` runs one denoiser pass a step where the stock class runs two;
    without ``core2`` it is the stock class, bit for bit.

    Args:
        vae: as in the stock class, like all that follow.
        text_encoder: first CLIP text encoder.
        text_encoder_2: second CLIP text encoder.
        tokenizer: tokenizer of the first.
        tokenizer_2: tokenizer of the second.
        unet: predicts noise or v.
        scheduler: Euler, DDIM and DPM-Solver++(2M) run in closed form where that is exactly what
            they do, any other through its own ``step``.
        image_encoder: for IP-Adapter.
        feature_extractor: for IP-Adapter.
        force_zeros_for_empty_prompt: no negative prompt means zeros, not the empty prompt.
        add_watermarker: whether to mark images; None is yes if ``invisible-watermark`` is there.
        weak_head: predicts the gap of classifier-free guidance, see `core2_sampler.weak_heads`.
    """

    family = SDXLFamily()
    stock_class = StableDiffusionXLPipeline
    _optional_components = [*StableDiffusionXLPipeline._optional_components, "weak_head"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        weak_head: WeakHead | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(weak_head=weak_head)

    @torch.no_grad()
    @with_core2(StableDiffusionXLPipeline.__call__)
    def __call__(
        self, *args: Any, core2: str | Core2Config | None = None, **kwargs: Any
    ) -> StableDiffusionXLPipelineOutput | tuple[Any, ...]:
        """Generate images; every argument of the stock call means what it means there.

        Callbacks see the stock tensors. A guidance scale that a callback sets holds from the next
        step on, and 1 or less turns guidance off; so does leaving only the prompt's embeddings.
        A scale that the head was not made for stops the run.
        A network with an embedded guidance scale takes it there, and every step is one pass.

        Where sizes of the negative prompt are given, every image gets them for its negative pass
        and its own for the other; the stock call mixes the two up for more than one image.

        Args:
            *args: the stock call's, in its order.
            core2: ``fast`` (one pass a step), ``balanced`` (CFG in the first quarter, then one
                pass a step), ``quality`` (weak-to-strong throughout), or a `Core2Config`;
                None runs the stock call.
            **kwargs: the stock call's, without its deprecated ``callback``.

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
        call = bind(StableDiffusionXLPipeline.__call__, HANDLED, (self, *args), kwargs)
        image = self._sample(call, resolve_config(core2))
        return StableDiffusionXLPipelineOutput(images=image) if call.return_dict else (image,)

    def _prepare(self, call: SimpleNamespace, config: Core2Config) -> Run:
        """Check everything, encode the prompts and set the grid: all that comes before the loop."""
        check_call(self, call)
        schedule = self.family.schedule(
            self,
            call.num_inference_steps,
            self._latent_size(call),
            **{name: getattr(call, name) for name in GRID},
        )
        plan = self._plan(call, config, schedule)
        check_zigzag(self, plan, schedule)
        rule = config.sample_rule
        check_rule(rule, plan, schedule, self.family.denoiser(self))
        self._begin(call, plan)
        embeds = self._encode(call, plan)
        latents = self.prepare_latents(
            call.batch,
            self.unet.config.in_channels,
            call.height,
            call.width,
            embeds["prompt_embeds"].dtype,
            self._execution_device,
            call.generator,
            call.latents,
        )
        extra = {**self._encode_image(call), **self._embed_scale(call, latents)}

        def split(embeds: Mapping[str, Tensor]) -> Prompts:
            return split_rows(_side, embeds, extra, call.batch)

        watched = call.guidance_rescale > 0 or call.callback_on_step_end is not None
        adjust = self._rescale(schedule) if watched else None
        return Run(call, plan, schedule, latents, embeds, split, adjust, rule)

    def _plan(self, call: SimpleNamespace, config: Core2Config, schedule: Schedule) -> Plan:
        """Return the plan, once its head is known to fit."""
        head, scale = self.weak_head, call.guidance_scale
        in_model = head is not None and head.in_model
        embedded = self.unet.config.time_cond_proj_dim is not None
        if embedded and config.scale_rule is not None:
            raise ValueError(
                "scale_rule must be left out for a network that takes the scale as its input, got "
                f"{config.scale_rule!r}: give guidance_scale"
            )
        if embedded:
            config = Core2Config(mode="cond", guidance_scales=config.guidance_scales)
        plan = make_run_plan(config, head, schedule, scale)
        call.guided = not embedded and max(step.guidance_scale for step in plan.steps) > 1
        check_head(head, plan, self.family.denoiser(self))
        if call.guidance_rescale > 0 and in_model and "fast" in plan.kinds:
            raise ValueError(
                "guidance_rescale must be 0 in fast steps of a head inside the denoiser, which "
                f"know no prediction to rescale to, got {call.guidance_rescale}: use another head, "
                "or only slow steps"
            )
        return plan

    def _begin(self, call: SimpleNamespace, plan: Plan) -> None:
        """Set what the stock properties and callbacks read."""
        self._guidance_scale = plan.steps[0].guidance_scale
        self._guidance_rescale = call.guidance_rescale
        self._clip_skip = call.clip_skip
        self._cross_attention_kwargs = call.cross_attention_kwargs
        self._denoising_end = call.denoising_end
        self._interrupt = False
        self._num_timesteps = len(plan)

    def _latent_size(self, call: SimpleNamespace) -> tuple[int, int]:
        return call.height // self.vae_scale_factor, call.width // self.vae_scale_factor

    def _denoiser(self) -> SDXLDenoiser:
        denoiser = self.family.denoiser(self)
        return replace(denoiser, cross_attention_kwargs=self.cross_attention_kwargs)

    def _encode(self, call: SimpleNamespace, plan: Plan) -> dict[str, Tensor]:
        """Return the embeddings in the stock layout, by the names that callbacks know."""
        paired = call.guided and wants_uncond(self, call, plan, NEGATIVES)

        def encode(both: bool) -> tuple[Tensor, ...]:
            return self.encode_prompt(
                **{name: getattr(call, name) for name in ENCODED},
                do_classifier_free_guidance=both,
                device=self._execution_device,
                lora_scale=(call.cross_attention_kwargs or {}).get("scale"),
            )

        kept = self._core2_negatives
        embeds, negative, pooled, negative_pooled = encode_sides(kept, self, call, encode, paired)
        time_ids, negative_time_ids = self._time_ids(call, embeds.dtype, pooled.shape[-1])
        if paired:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
            time_ids = torch.cat([negative_time_ids, time_ids])
        named = {"prompt_embeds": embeds, "add_text_embeds": pooled, "add_time_ids": time_ids}
        return {name: tensor.to(self._execution_device) for name, tensor in named.items()}

    def _time_ids(
        self, call: SimpleNamespace, dtype: torch.dtype, pooled_width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the micro-conditioning of the prompt and of the negative prompt, [B, 6] each."""
        if self.text_encoder_2 is not None:
            pooled_width = self.text_encoder_2.config.projection_dim

        def ids(prefix: str) -> Tensor:
            names = ("original_size", "crops_coords_top_left", "target_size")
            sizes = (tuple(getattr(call, prefix + name)) for name in names)
            row = self._get_add_time_ids(
                *sizes, dtype=dtype, text_encoder_projection_dim=pooled_width
            )
            return row.repeat(call.batch, 1)

        if call.negative_original_size is None or call.negative_target_size is None:
            return ids(""), ids("")
        return ids(""), ids("negative_")

    def _encode_image(self, call: SimpleNamespace) -> dict[str, list[Tensor]]:
        """Return the IP-Adapter's image embeddings, the negative rows first."""
        image, embeds = call.ip_adapter_image, call.ip_adapter_image_embeds
        if image is None and embeds is None:
            return {}
        embeds = self.prepare_ip_adapter_image_embeds(
            image, embeds, self._execution_device, call.batch, call.guided
        )
        return {"image_embeds": embeds}

    def _embed_scale(self, call: SimpleNamespace, latents: Tensor) -> dict[str, Tensor]:
        """Return the guidance scale as the input of a network that was distilled to take it."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        scales = torch.full((call.batch,), call.guidance_scale - 1.0)
        embedded = self.get_guidance_scale_embedding(scales, embedding_dim=width)
        return {"timestep_cond": embedded.to(latents)}

    def _rescale(self, schedule: Schedule) -> Adjust:
        """Return the guidance rescale of the stock loop; a callback may change its strength."""
        is_v = self.scheduler.config.prediction_type == "v_prediction"

        def adjust(i: int, x: Tensor, cond: Tensor, guided: Tensor) -> Tensor:
            share = self.guidance_rescale
            if not share > 0:
                return guided
            if not is_v:
                return rescale(guided, cond, share)
            sigma = schedule.sigmas[i].to(x.device, torch.float32)
            v = rescale(v_from_eps(guided, x, sigma), v_from_eps(cond, x, sigma), share)
            return eps_from_v(v, x, sigma)

        return adjust

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        image = self.family.decode(self, latents)
        if self.watermark is not None:
            image = self.watermark.apply_watermark(image)
        return self.image_processor.postprocess(image, output_type=output_type)


def _side(embeds: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Conditioning:
    time_ids = {"time_ids": embeds["add_time_ids"]}
    return Conditioning(embeds["prompt_embeds"], embeds["add_text_embeds"], {**time_ids, **extra})
