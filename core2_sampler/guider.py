"""A weak head under modular diffusers: the guider that its pipelines take.

A guider sees predictions, not the loop. Here the loop goes through both passes of a step, as for
classifier-free guidance, and a hook answers the second one: the network itself runs only where the
step's kind asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from core2_sampler.attachment.answers import Answers, Forward, has_own_scales
from core2_sampler.attachment.checks import check_config, check_head, find_head
from core2_sampler.attachment.clock import noise_levels
from core2_sampler.attachment.networks import Call, Network, network_of
from core2_sampler.attachment.run import check_no_faster_cache, hook_network
from core2_sampler.pipelines.loop import check_head as check_scales
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.weak_heads.base import WeakHead

_SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Of Stable Diffusion 1.5 and XL alike."""


class CoRe2Guidance(ClassifierFreeGuidance):
    """Guides a modular pipeline by a weak head: ``pipe.update_components(guider=...)``.

    It knows the networks that `core2_sampler.attach` knows. One instance serves one network: where
    a pipeline has two guiders, as Wan 2.2 has, each is an instance of its own.

    A plan is one for ``num_inference_steps``. Schedulers of higher order make more passes than
    that; those beyond are as the last step.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        core2: str | Core2Config | Mapping[str, Any] = "fast",
        head: WeakHead | str | Path | None = None,
        scheduler: Any = None,
        enabled: bool = True,
    ) -> None:
        """Build the guider; the head is loaded at the first pass, when the network is known.

        Args:
            guidance_scale: classifier-free guidance, 1 is none.
            core2: a preset name or a config, as for `attach`; or the config's fields by name.
            head: as for `attach`: a weak head, its folder, or ``last_gap`` or ``cond``.
            scheduler: the pipeline's, or its config: tells a UNet's noise levels, and whether it
                predicts noise or v. None is that of Stable Diffusion XL; transformers need none.
            enabled: False is the prompt alone.

        Raises:
            ValueError: as `attach`, for the config.
            TypeError: `core2` is of another type.
        """
        BaseGuidance.__init__(self, enabled=enabled)  # no start and stop: they are the config's
        self.guidance_scale = guidance_scale
        self.guidance_rescale, self.use_original_formulation = 0.0, False
        given = Core2Config(**core2) if isinstance(core2, Mapping) else core2
        self._core2 = resolve_config(cast(Any, given))
        self._check_arguments(head)
        self._given_head = head
        self._scheduler_config = getattr(scheduler, "config", scheduler)
        self._scheduler: Any = None
        self._network: Network | None = None
        self._head: WeakHead | None = None
        self._plan: Plan | None = None
        self._latest: tuple[int, int, float] | None = None
        self._answers = Answers(None, self._scale, has_own_scales(self._core2))
        self._stack = ExitStack()
        self._register(core2, head)

    def _check_arguments(self, head: Any) -> None:
        config = self._core2
        check_config(config)
        if config.mode == "core" and head is None:
            raise ValueError(
                "head must be given for mode 'core', got none: pass head=, or use "
                "core2=Core2Config(mode='cfg')"
            )
        if callable(config.scale_rule):
            raise ValueError(
                "scale_rule must be a text in a guider, which has to be saved, got a callable: "
                "write it as list:5,3,1"
            )
        if has_own_scales(config) and not self.guidance_scale > 1:
            raise ValueError(
                "guidance_scale must be above 1 where the config has the scale of each step, got "
                f"{self.guidance_scale}: without guidance it is in vain"
            )

    def _register(self, core2: Any, head: Any) -> None:
        """Keep what JSON can hold in the config."""
        place = head.config.get("_name_or_path") if isinstance(head, WeakHead) else head
        noise = self._scheduler_config
        self.register_to_config(
            core2=asdict(core2) if isinstance(core2, Core2Config) else core2,
            head=str(place) if place else None,
            scheduler=None if noise is None else dict(noise),
        )

    @property
    def core2_plan(self) -> Plan | None:
        """The plan of the latest run; None before the first."""
        return self._plan

    def new(self, **kwargs: Any) -> CoRe2Guidance:
        """Return a copy with other arguments; a head that was given as itself goes along.

        Args:
            **kwargs: of the constructor.
        """
        return type(self)(**{**self._arguments(), **kwargs})

    def _arguments(self) -> dict[str, Any]:
        return {
            "guidance_scale": self.guidance_scale,
            "core2": self._core2,
            "head": self._given_head,
            "scheduler": self._scheduler_config,
            "enabled": self._enabled,
        }

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as the stock guiders do.

        Args:
            save_directory: the folder.
            push_to_hub: as the stock method.
            **kwargs: as the stock method.

        Raises:
            ValueError: the head was given as itself and is in no folder to load it from.
        """
        if self.config.head is None and self._given_head is not None:
            raise ValueError(
                "head must be in a folder for a guider to be saved, got one that was not loaded "
                "from any: save it with head.save_pretrained(folder), and pass head=folder"
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Enter a step of the loop.

        Args:
            step: number of the pass, from 0.
            num_inference_steps: of the run.
            timestep: the scheduler's.

        Raises:
            ValueError: the plan does not fit the run.
        """
        super().set_state(step, num_inference_steps, timestep)
        self._stack.close()  # of a pass that ended in an error
        self._answers.go_on()
        latest, now = self._latest, (step, num_inference_steps, float(timestep))
        goes_on = (
            latest is not None
            and step == latest[0] + 1
            and num_inference_steps == latest[1]
            and now[2] <= latest[2]
        )
        if not goes_on:
            self._begin(num_inference_steps)
        self._latest = now
        steps = cast(Plan, self._plan).steps
        if step >= len(steps) and self._answers.own_scales:
            raise ValueError(
                f"guidance_scales and scale_rule must have a scale for each pass, got {len(steps)} "
                "and a scheduler that makes more: use one of first order, or a single scale"
            )
        self._answers.step = steps[min(step, len(steps) - 1)]

    def _begin(self, num_inference_steps: int) -> None:
        """Start a run: nothing of the one before is left."""
        in_model = self._head is not None and self._head.in_model
        self._plan = self._core2.plan(num_inference_steps, self.guidance_scale, in_model)
        if self._head is not None and not in_model:
            self._head.reset()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Return the inputs of both passes, as the stock guider.

        Args:
            data: (cond, uncond) by name.

        Raises:
            ValueError: a step needs the negative prompt's embeddings and there are none.
        """
        self._check_negative([v[1] for v in data.values() if isinstance(v, tuple)])
        return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """Return the inputs of both passes, as the stock guider.

        Args:
            data: the state.
            input_fields: names of (cond, uncond) in it, by name.

        Raises:
            ValueError: a step needs the negative prompt's embeddings and there are none.
        """
        names = [value[1] for value in input_fields.values() if isinstance(value, tuple)]
        self._check_negative([getattr(data, name, None) for name in names])
        return super().prepare_inputs_from_block_state(data, input_fields)

    def _check_negative(self, found: list[Any]) -> None:
        """Refuse to make two passes of the same prompt, which would be no guidance."""
        needed = self._is_cfg_enabled() and self._answers.step.kind in ("cfg", "slow")
        if needed and all(value is None for value in found):
            raise ValueError(
                "embeddings of a negative prompt must be made for guidance, got none: pass "
                "negative_prompt='' to the call"
            )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Stand between the loop and the network for one pass.

        Args:
            denoiser: the network.

        Raises:
            ValueError: the network is not known, its cache is on, or the head does not fit it.
        """
        super().prepare_models(denoiser)
        if not self._is_cfg_enabled():
            return
        network = self._network_of(denoiser)
        answer = self._answers.prompt if self.is_conditional else self._answers.negative

        def answer_pass(forward: Forward, call: Call) -> Any:
            try:
                if self.is_conditional:
                    self._meet(network, call)
                return answer(network, forward, call)
            except BaseException:
                self._stack.close()  # the loop ends here, without cleanup_models
                raise

        self._stack.enter_context(hook_network(network.module, answer_pass))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the network as it was.

        Args:
            denoiser: the network.
        """
        self._stack.close()
        super().cleanup_models(denoiser)

    def _network_of(self, denoiser: nn.Module) -> Network:
        """Return the network; where it is a new one, with the head that was given for it."""
        known = self._network
        if known is None or known.module is not unwrap_module(denoiser):
            self._scheduler = self._make_scheduler(denoiser)
            parts = SimpleNamespace(
                unet=denoiser,
                transformer=denoiser,
                scheduler=self._scheduler,
                _execution_device="cpu",
                vae_scale_factor=8,
            )
            known = network_of(parts, denoiser)
            head = find_head(self._given_head, known)
            check_head(head, self._core2, known)
            if head is not None and type(head).begin is not WeakHead.begin:
                raise ValueError(
                    "a head must not need the noise levels ahead of the steps, which a guider is "
                    f"not told, got {type(head).__name__}: use core2_sampler.attach"
                )
            self._network, self._head, self._answers.head = known, head, head
            self._begin(cast(int, self._num_inference_steps))
        return known

    def _make_scheduler(self, denoiser: nn.Module) -> Any:
        """Return what tells noise levels from timesteps."""
        config = self._scheduler_config
        if isinstance(unwrap_module(denoiser), UNet2DConditionModel):
            return DDIMScheduler.from_config(_SDXL_NOISE if config is None else config)
        return FlowMatchEulerDiscreteScheduler()

    def _meet(self, network: Network, call: Call) -> None:
        """Learn the noise level of a step; at the first, check what only the network tells."""
        check_no_faster_cache(network.module)
        config: Any = getattr(network.module, "_cache_config", None)
        if config is not None:
            raise ValueError(
                "a cache must be off, because modular pipelines do not tell it which prompt a pass "
                f"is of, got {type(config).__name__}: call disable_cache()"
            )
        check_scales(self._head, cast(Plan, self._plan), network)  # type: ignore[arg-type]
        if self._head is not None:
            self._head.to(network.sample(call).device)
            if self._head.in_model:
                self._stack.enter_context(cast(Any, self._head).attached(network.module))
        self._answers.sigma = self._sigma()

    def _sigma(self) -> float:
        scheduler, timestep = self._scheduler, cast(Tensor, self._timestep)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return float(timestep) / scheduler.config.num_train_timesteps
        scheduler.timesteps = torch.as_tensor(timestep).reshape(1)
        return float(noise_levels(scheduler)[0])

    def _scale(self, _network: Network) -> float:
        return self.guidance_scale

    def _is_cfg_enabled(self) -> bool:
        """Say whether there is guidance; the same at all times, so that prompts are encoded so."""
        return self._enabled and self.guidance_scale > 1
