"""Zigzag steps in the denoise loop of a modular pipeline.

A loop is made of blocks: those that ask the network, then one that updates the latents. In the
place of the former stands one that asks them as often as a step wants: there, back, there again.
It hands the update the derivative of the whole step, so that the update stays the scheduler's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam
from torch import Tensor

from core2_sampler.attachment.clock import first_step
from core2_sampler.attachment.networks import Call
from core2_sampler.guider import CoRe2Guidance
from core2_sampler.pipelines.adapters.base import Schedule, Solver
from core2_sampler.pipelines.adapters.discrete import closed_form, eps_from_v, v_from_eps
from core2_sampler.pipelines.adapters.flow import has_euler_form
from core2_sampler.pipelines.zigzag import check_zigzag
from core2_sampler.samplers import euler_inverse, sample_euler, zigzag
from core2_sampler.schedules import sigmas_from_scheduler


class ZigZagDenoiser(ModularPipelineBlocks):
    """The blocks that ask the network, as often as a step of the guider's plan wants.

    A step that is no zigzag step, and any step under another guider, is theirs alone.
    """

    def __init__(self, family: str, asked: Sequence[ModularPipelineBlocks]) -> None:
        """Stand in for blocks of a loop.

        Args:
            family: ``sdxl``, ``sd3`` or ``flux``.
            asked: the blocks of the loop before its update, in their order.
        """
        super().__init__()
        self.family, self.asked = family, list(asked)

    @property
    def description(self) -> str:
        """What the block does, as modular pipelines print it."""
        return "asks the network once for a step, or three times for a zigzag step of the guider"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The components of the blocks that it stands for."""
        found = [spec for block in self.asked for spec in block.expected_components]
        return [spec for i, spec in enumerate(found) if spec not in found[:i]]

    @property
    def inputs(self) -> list[InputParam]:
        """The inputs of the blocks that it stands for."""
        found = [each for block in self.asked for each in block.inputs]
        return [each for i, each in enumerate(found) if each not in found[:i]]

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Leave the step's prediction in ``block_state.noise_pred``.

        Args:
            components: the pipeline.
            block_state: the loop's state.
            i: number of the step.
            t: its timestep.

        Raises:
            ValueError: a zigzag step is to be made and the scheduler makes no Euler steps.
        """
        guider = components.guider
        if not isinstance(guider, CoRe2Guidance):
            return self._ask(components, block_state, i, t)
        latents = block_state.latents
        try:
            guider.leg = 0
            self._ask(components, block_state, i, t)
            if guider.zigs(i):
                block_state.noise_pred = self._whole_step(components, block_state, i)
        finally:
            guider.leg, block_state.latents = None, latents
        return components, block_state

    def _ask(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        for block in self.asked:
            components, block_state = block(components, block_state, i=i, t=t)
        return components, block_state

    def _whole_step(self, components: Any, block_state: Any, i: int) -> Tensor:
        """Return what the network would have to say for one update to be the whole zigzag step."""
        guider, scheduler = components.guider, components.scheduler
        schedule, start = _schedule(scheduler, block_state)
        pipe = SimpleNamespace(family=SimpleNamespace(name=self.family), scheduler=scheduler)
        check_zigzag(pipe, guider.core2_plan, schedule)
        is_v = scheduler.config.get("prediction_type") == "v_prediction"

        def derivative(x: Tensor, at: int) -> Tensor:
            said = block_state.noise_pred
            return eps_from_v(said, x, schedule.sigmas[at].to(x.device)) if is_v else said

        def ask(x: Tensor, at: int, leg: int) -> Tensor:
            guider.leg, block_state.latents = leg, schedule.to_pipeline(x, at)
            there = _At(components, scheduler, start + at) if leg == 1 else components
            self._ask(there, block_state, at, block_state.timesteps[at])
            return derivative(x, at)

        said, x = block_state.noise_pred, schedule.from_pipeline(block_state.latents, i)
        first = derivative(x, i)
        back = euler_inverse(lambda y, j: ask(y, j + 1, 1), schedule.sigmas)
        step = zigzag(
            lambda _x, _i: first,
            back,
            schedule.sigmas,
            lambda _i: True,
            lambda y, j: ask(y, j, 2),
        )
        d = step(x, i)
        whole = v_from_eps(d, x, schedule.sigmas[i].to(x.device)) if is_v else d
        return whole.to(said.dtype)


class _At:
    """A pipeline's components, its scheduler at another of its noise levels."""

    def __init__(self, components: Any, scheduler: Any, index: int) -> None:
        self._components, self.scheduler = components, scheduler
        if hasattr(scheduler, "set_begin_index"):  # the others scale by the timestep, or not at all
            self.scheduler = copy.copy(scheduler)
            self.scheduler._step_index = None
            self.scheduler.set_begin_index(index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._components, name)


def _schedule(scheduler: Any, block_state: Any) -> tuple[Schedule, int]:
    """Return the loop's noise levels, and which of the scheduler's timesteps is its first."""
    times = block_state.timesteps
    start = first_step(scheduler, Call((), {"timestep": times[:1]}), len(times))
    solver: Solver | None = sample_euler
    if has_euler_form(scheduler):
        levels, preserving = sigmas_from_scheduler(scheduler), False
    else:
        form = closed_form(scheduler, getattr(block_state, "eta", 0.0))
        solver, levels, preserving = form or (None, times.double().cpu(), False)
    levels = levels[start : start + len(times) + 1]
    scale = (1 + levels**2).rsqrt() if preserving else None
    return Schedule(times, len(times), levels, solver, latent_scale=scale), start
