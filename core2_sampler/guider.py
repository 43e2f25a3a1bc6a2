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
from typing import Any, cast

from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from torch import Tensor, nn

from core2_sampler.attachment.answers import Answers, Forward, has_own_scales
from core2_sampler.attachment.networks import Call, Network
from core2_sampler.attachment.run import hook_network
from core2_sampler.modular.checks import check_guider, makes_zigzags
from core2_sampler.modular.network import GuidedNetwork, guided_network
from core2_sampler.plan import Core2Config, Plan, resolve_config
from core2_sampler.steps import Step
from core2_sampler.weak_heads.base import WeakHead


class CoRe2Guidance(ClassifierFreeGuidance):
    """Guides a modular pipeline by a weak head: ``pipe.update_components(guider=...)``.

    It knows the networks that `core2_sampler.attach` knows. One instance serves one network: where
    a pipeline has two guiders, as Wan 2.2 has, each is an instance of its own.

    A plan is one for ``num_inference_steps``. Schedulers of higher order make more passes than
    that; those beyond are as the last step.

    Attributes:
        leg: set by what makes zigzag steps, around each of a step's predictions: 0 there, 1 back
            (from the next timestep), 2 there again. None is a loop that makes plain steps.
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
            core2: a preset name or a config, as for `attach`; or the config's fields by name. Modes
                of zigzag steps too, in the blocks of `core2_sampler.core2_blocks`.
            head: as for `attach`: a weak head, its folder or hub id, or ``last_gap`` or ``cond``.
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
        check_guider(self._core2, guidance_scale, head)
        self._given_head = head
        self._scheduler_config = getattr(scheduler, "config", scheduler)
        self._known: GuidedNetwork | None = None
        self._plan: Plan | None = None
        self._latest: tuple[int, int, float] | None = None
        self._negative_alone = False
        self.leg: int | None = None
        own_scales = has_own_scales(self._core2) or makes_zigzags(self._core2)
        self._answers = Answers(None, self._scale, own_scales)
        self._stack = ExitStack()
        self._register(core2, head)

    def _register(self, core2: Any, head: Any) -> None:
        """Keep what JSON can hold in the config."""
        place = head.config.get("_name_or_path") if isinstance(head, WeakHead) else head
        noise = self._scheduler_config
        self.register_to_config(
            core2=asdict(core2) if isinstance(core2, Core2Config) else core2,
            head=str(place) if place else None,
            scheduler=None if noise is None else dict(noise),
            _use_default_values=[],  # diffusers counts what is given by position among them
        )

    @property
    def is_conditional(self) -> bool:
        """Whether a pass is the prompt's; a ControlNet in guess mode sits out the other one's."""
        return super().is_conditional and not self._negative_alone

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
            ValueError: as `check_head_is_saved`.
        """
        self.check_head_is_saved()
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_head_is_saved(self) -> None:
        """Raise ValueError if the head was given as itself and there is nowhere to load it from."""
        if self.config.head is None and self._given_head is not None:
            raise ValueError(
                "head must be in a folder, or on the hub, for a guider to be saved, got one that "
                "was loaded from nowhere: save it with head.save_pretrained(folder), and pass "
                "head=folder"
            )

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
        if not self.leg:
            latest, now = self._latest, (step, num_inference_steps, float(timestep))
            goes_on = (
                latest is not None
                and (step, num_inference_steps) == (latest[0] + 1, latest[1])
                and now[2] <= latest[2]
            )
            if not goes_on:
                self._begin(num_inference_steps)
            self._latest = now
        now_made = self._step_of(step)
        self._negative_alone = now_made.kind == "uncond"
        self._answers.step = Step("cond") if self._negative_alone else now_made

    def _step_of(self, step: int) -> Step:
        """Return the prediction to make."""
        plan = cast(Plan, self._plan)
        if plan.zigs and self.leg is None and self._is_cfg_enabled():
            raise ValueError(
                "zigzag steps must be made by the pipeline's blocks, got stock ones and mode "
                f"'{self._core2.mode}': build the pipeline from core2_sampler.core2_blocks"
            )
        if step >= len(plan) and self._answers.own_scales:
            raise ValueError(
                f"guidance_scales and scale_rule must have a scale for each pass, got {len(plan)} "
                "and a scheduler that makes more: use one of first order, or a single scale"
            )
        if self.leg == 1:
            return plan.undo.steps[step - 1]
        return plan.steps[min(step, len(plan) - 1)]

    def zigs(self, step: int) -> bool:
        """Say whether a step of the run is a zigzag step; known once the step was entered."""
        return self._is_cfg_enabled() and step in cast(Plan, self._plan).zigs

    def _begin(self, num_inference_steps: int) -> None:
        """Start a run: nothing of the one before is left."""
        head = self._known.head if self._known else None
        in_model = head is not None and head.in_model
        self._plan = self._core2.plan(num_inference_steps, self.guidance_scale, in_model)
        if head is not None and not in_model:
            head.reset()

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Return the inputs of both passes, as the stock guider.

        Args:
            data: (cond, uncond) by name.

        Raises:
            ValueError: a step needs the negative prompt's embeddings and there are none.
        """
        self._check_negative([v[1] for v in data.values() if isinstance(v, tuple)])
        return super().prepare_inputs({name: self._sides(v) for name, v in data.items()})

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
        fields = {name: self._sides(value) for name, value in input_fields.items()}
        return super().prepare_inputs_from_block_state(data, fields)

    def _sides(self, pair: Any) -> Any:
        """Put the negative prompt in the place of the prompt where it alone is asked."""
        return (pair[1], pair[1]) if self._negative_alone and isinstance(pair, tuple) else pair

    def _check_negative(self, found: list[Any]) -> None:
        """Refuse to make two passes of the same prompt, which would be no guidance."""
        needed = self._negative_alone or self._answers.step.kind in ("cfg", "slow")
        if needed and self._is_cfg_enabled() and all(value is None for value in found):
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
        known = self._meet(denoiser)
        network = known.network
        is_first = self._count_prepared == 1
        answer = self._answers.prompt if is_first else self._answers.negative

        def answer_pass(forward: Forward, call: Call) -> Any:
            try:
                if is_first:
                    self._enter(known, call)
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

    def _meet(self, denoiser: nn.Module) -> GuidedNetwork:
        """Return the network; where it is a new one, with the head that was given for it."""
        known = self._known
        if known is None or not known.is_of(denoiser):
            given, noise = self._given_head, self._scheduler_config
            known = self._known = guided_network(denoiser, given, self._core2, noise)
            self._answers.head = known.head
            self._begin(cast(int, self._num_inference_steps))
        return known

    def _enter(self, known: GuidedNetwork, call: Call) -> None:
        """Check what only the first pass of a step tells, and make the head ready for it."""
        known.check(cast(Plan, self._plan))
        if known.head is not None:
            known.head.to(known.network.sample(call).device)
            if known.head.in_model:
                self._stack.enter_context(cast(Any, known.head).attached(known.network.module))
        self._answers.sigma = known.sigma(cast(Tensor, self._timestep))

    def _scale(self, _network: Network) -> float:
        return self.guidance_scale

    def _is_cfg_enabled(self) -> bool:
        """Say whether there is guidance; the same at all times, so that prompts are encoded so."""
        return self._enabled and self.guidance_scale > 1
