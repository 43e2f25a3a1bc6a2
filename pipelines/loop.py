"""The denoising loop in place of the stock one, with all that its callers rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils import is_torch_xla_available
from torch import Tensor

from core2_sampler.guidance import Prompts, make_predict
from core2_sampler.pipelines.adapters import has_euler_form
from core2_sampler.plan import Plan
from core2_sampler.samplers import sample_euler, sample_scheduler
from core2_sampler.schedules import sigmas_from_scheduler
from core2_sampler.types import Denoiser
from core2_sampler.weak_heads.base import WeakHead


@dataclass(slots=True)
class Run:
    """One call's state: what callbacks may edit, and what the loop records.

    Attributes:
        call: the stock call's arguments by name.
        plan: one entry a timestep.
        timesteps: the scheduler's, [N].
        num_steps: inference steps; fewer than N for schedulers of higher order.
        latents: the initial latents, [B, C, H, W].
        embeds: the stock call's other tensors by the names that callbacks know; with the negative
            prompt's rows first where it is encoded.
        split: makes (cond, uncond) of `embeds`; uncond None where only the prompt's rows are left.
        finite: whether the latents were finite after each step, [N], on the latents' device.
    """

    call: SimpleNamespace
    plan: Plan
    timesteps: Tensor
    num_steps: int
    latents: Tensor
    embeds: dict[str, Tensor]
    split: Callable[[Mapping[str, Tensor]], Prompts]
    finite: Tensor = field(init=False)
    _paired: bool = field(init=False)
    _prompts: tuple[dict[str, Tensor], Prompts] | None = None

    def __post_init__(self) -> None:
        """Start with a clean record."""
        self.finite = torch.ones(len(self.plan), dtype=torch.bool, device=self.latents.device)
        self._paired = self.prompts()[1] is not None

    @property
    def cut(self) -> bool:
        """Whether a callback took the negative prompt's rows away."""
        return self._paired and self.prompts()[1] is None

    def prompts(self) -> Prompts:
        """Return (cond, uncond) as they are now."""
        before = self._prompts
        if before is None or any(before[0][name] is not self.embeds[name] for name in self.embeds):
            before = self._prompts = (dict(self.embeds), self.split(self.embeds))
        return before[1]


class _Interrupted(Exception):
    """A callback set ``pipe._interrupt``: the run ends with the latents as they are."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


def check_head(head: WeakHead | None, plan: Plan, module: Any, family: str) -> None:
    """Refuse a missing head, a head of another model, and a scale that it was not made for.

    Args:
        head: the pipeline's weak head.
        plan: of the run to come.
        module: the denoiser network.
        family: of the denoiser.

    Raises:
        ValueError: see above; from the head itself where it is the one to know.
    """
    if not plan.needs_head:
        return
    if head is None:
        raise ValueError(
            "the plan has fast or slow steps and needs a weak head, got none: pass weak_head= "
            "to from_pretrained or from_pipe, or use core2=Core2Config(mode='cfg')"
        )
    head.check_family(family)
    head.check_latents(module.config.in_channels)
    if head.in_model:
        with head.attached(module):
            for scale in {s.guidance_scale for s in plan.steps if s.kind in ("fast", "slow")}:
                with head.active(scale):
                    pass


def run_loop(pipe: Any, run: Run, denoiser: Denoiser) -> Tensor:
    """Sample: in closed form where the scheduler is flow-match Euler, else by its own ``step``.

    Args:
        pipe: the pipeline; ``_guidance_scale`` and ``interrupt`` are read after every step.
        run: the call's state.
        denoiser: the network.

    Returns:
        The final latents, or those at the interrupt.

    Raises:
        RuntimeError: the latents became nan or inf; found after the loop, so that no step waits.
    """
    head = pipe.weak_head if run.plan.needs_head else None
    euler = has_euler_form(pipe.scheduler)
    sigmas = (
        sigmas_from_scheduler(pipe.scheduler)
        if euler
        else run.timesteps.double().cpu() / pipe.scheduler.config.num_train_timesteps
    )
    predict = make_predict(
        denoiser,
        sigmas,
        run.plan,
        *run.prompts(),
        head,
        scale=lambda _i: 1.0 if run.cut else pipe._guidance_scale,
        conditioning=lambda _i: run.prompts(),
    )
    attached: Any = head.attached(denoiser.module) if head and head.in_model else nullcontext()
    with attached, pipe.progress_bar(total=run.num_steps) as bar:

        def on_step(i: int, x: Tensor) -> Tensor:
            return _after_step(pipe, run, bar, i, x)

        try:
            if euler:
                x = sample_euler(predict, run.latents, sigmas, on_step=on_step)
            else:
                generator = run.call.generator
                x = sample_scheduler(
                    predict, run.latents, pipe.scheduler, generator=generator, on_step=on_step
                )
        except _Interrupted as stopped:
            x = stopped.latents
    _check_finite(run, sigmas)
    return x


def _after_step(pipe: Any, run: Run, bar: Any, i: int, x: Tensor) -> Tensor:
    """Do what the stock loop does after its update: callback, progress, interrupt."""
    call, plan = run.call, run.plan
    if call.callback_on_step_end is not None:
        tensors = {"latents": x, **run.embeds}
        wanted = {name: tensors[name] for name in call.callback_on_step_end_tensor_inputs}
        edited = call.callback_on_step_end(pipe, i, run.timesteps[i], wanted)
        x = edited.pop("latents", x)
        run.embeds = {name: edited.pop(name, old) for name, old in run.embeds.items()}
    last = i + 1 == len(plan)
    # A scale that a callback has set is not the plan's, and stays.
    if not last and pipe._guidance_scale == plan.steps[i].guidance_scale:
        pipe._guidance_scale = plan.steps[i + 1].guidance_scale
    run.finite[i] = torch.isfinite(x).all()
    order = pipe.scheduler.order
    warmup = max(len(plan) - run.num_steps * order, 0)
    if last or (i + 1 > warmup and (i + 1) % order == 0):
        bar.update()
    if is_torch_xla_available():
        import torch_xla.core.xla_model as xm  # type: ignore[import-not-found]

        xm.mark_step()
    if pipe.interrupt:
        raise _Interrupted(x)
    return x


def _check_finite(run: Run, sigmas: Tensor) -> None:
    if bool(run.finite.all()):
        return
    i = int((~run.finite).nonzero()[0])
    raise RuntimeError(
        f"latents must stay finite, got nan or inf after step {i} of {len(run.plan)} "
        f"(sigma {float(sigmas[i]):.4g}): try a lower guidance scale or a wider dtype"
    )


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor inside nested dicts and lists.

    Args:
        function: tensor to tensor.
        value: a tensor, dict, list or tuple; anything else comes back as it is.

    Returns:
        The same structure.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(function, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, v) for v in value)
    return value
