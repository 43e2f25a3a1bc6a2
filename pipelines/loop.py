"""The denoising loop in place of the stock one, with all that its callers rely on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.utils import is_torch_xla_available
from torch import Tensor

from core2_sampler.guidance import OnPair, Prompts, make_predict, noise_levels
from core2_sampler.pipelines.adapters.base import Schedule
from core2_sampler.pipelines.fused_run import may_fuse, solve_fused
from core2_sampler.pipelines.run import Interrupted, NonFiniteError, Run
from core2_sampler.pipelines.zigzag import zigzag_predict
from core2_sampler.samplers import sample_scheduler
from core2_sampler.scales import SampleRule
from core2_sampler.steps import Plan
from core2_sampler.types import Denoiser, OnStep, Predict
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.z2 import LatestGap, z2_predict

Observer = Callable[[Run, Denoiser, Predict], Predict]
"""``predict = observer(run, denoiser, predict)``: sees all of a run, changes nothing."""


def check_head(head: WeakHead | None, plan: Plan, denoiser: Denoiser) -> None:
    """Refuse a missing head, a head of another model, and a scale that it was not made for.

    Args:
        head: the pipeline's weak head.
        plan: of the run to come.
        denoiser: the network.

    Raises:
        ValueError: see above; from the head itself where it is the one to know.
    """
    if not plan.needs_head:
        return
    if head is None:
        raise ValueError(
            "the plan asks the head and needs a weak head, got none: pass weak_head= "
            "to from_pretrained or from_pipe, or use core2=Core2Config(mode='cfg')"
        )
    head.check_family(denoiser.family)
    head.check_latents(denoiser.latent_channels)
    if head.in_model:
        with head.attached(denoiser.module):
            for scale in {s.guidance_scale for s in plan.steps if s.kind in ("fast", "slow")}:
                with head.active(scale):
                    pass
            for scale in {s.inversion_scale for s in plan.steps if s.inversion == "fast"}:
                _check_inversion(head, scale)


def _check_inversion(head: WeakHead, scale: float) -> None:
    try:
        with head.active(scale):
            pass
    except ValueError as error:
        raise ValueError(
            f"inversion_scale must be 0, 1 or a scale of the head, got {scale}: {error}"
        ) from None


def check_rule(rule: SampleRule | None, plan: Plan, schedule: Schedule, denoiser: Denoiser) -> None:
    """Refuse a scale rule that cannot serve a run.

    Args:
        rule: of the config, if it is one that sees the latents.
        plan: of the run to come.
        schedule: of the run to come.
        denoiser: the network.

    Raises:
        ValueError: from the rule.
    """
    if rule is not None:
        rule.begin(denoiser, noise_levels(schedule.sigmas, plan))


def reads_negative(pipe: Any, plan: Plan) -> bool:
    """Say whether a step of the run, the weak head or an observer reads the negative prompt.

    Args:
        pipe: the pipeline.
        plan: of the run to come.
    """
    head = pipe.weak_head
    read = plan.needs_head and head is not None and head.needs_negative == "call"
    return plan.needs_uncond or read or pipe._core2_observer is not None


def run_loop(pipe: Any, run: Run, denoiser: Denoiser) -> Tensor:
    """Sample: in closed form where the scheduler has one, else by its own ``step``.

    Args:
        pipe: the pipeline; its scale (``_guidance_scale``, FLUX: ``_true_cfg_scale``) and
            ``interrupt`` are read after every step.
        run: the call's state.
        denoiser: the network.

    Returns:
        The final latents, or those at the interrupt.

    Raises:
        NonFiniteError: the latents became nan or inf; found after the loop, so that no step waits.
    """
    head = pipe.weak_head if run.plan.needs_head else None
    schedule = run.schedule
    predict = _bind(pipe, run, denoiser, head)
    if pipe._core2_observer is not None:
        predict = pipe._core2_observer(run, denoiser, predict)
    if head is not None:
        head.begin(schedule.sigmas[: len(run.plan)].tolist(), run.empty or run.prompts()[1])
    fused = may_fuse(pipe, run)
    attached: Any = nullcontext()
    if head and head.in_model and not fused:
        attached = head.attached(denoiser.module)
    with attached, pipe.progress_bar(total=schedule.num_steps) as bar:

        def on_step(i: int, latents: Tensor) -> Tensor:
            return _after_step(pipe, run, bar, i, latents)

        try:
            if fused:
                latents = solve_fused(pipe, run, denoiser, head, on_step)
            else:
                latents = _solve(pipe, run, predict, on_step)
        except Interrupted as stopped:
            latents = stopped.latents
    pipe._current_timestep = None
    _check_finite(run)
    return latents


def _bind(pipe: Any, run: Run, denoiser: Denoiser, head: WeakHead | None) -> Predict:
    """Return ``predict`` of a run's steps; pipeline, callbacks and prompts are read in each."""
    plan, schedule, latest = run.plan, run.schedule, LatestGap()
    ask = _asker(pipe, run, denoiser, head, latest.see if run.plan.by_gap else None)

    def live_scale(_i: int) -> float:
        return 1.0 if run.cut else getattr(pipe, _scale_name(pipe))

    def zigs(i: int) -> bool:
        return plan.steps[i].inversion is not None and live_scale(i) > 1

    def push(i: int) -> Tensor | None:
        return latest.push(live_scale(i), plan.steps[i].inversion_scale) if zigs(i) else None

    forward = ask(plan, schedule.sigmas, scale=live_scale, rule=run.rule)
    if plan.by_gap:
        return z2_predict(forward, push, schedule.sigmas)
    return zigzag_predict(plan, schedule, forward, ask, zigs) if plan.zigs else forward


def _asker(
    pipe: Any, run: Run, denoiser: Denoiser, head: WeakHead | None, on_pair: OnPair | None
) -> Callable[..., Predict]:
    """Return what binds a run's network, head and prompts to a plan and its noise levels."""
    schedule, adjust = run.schedule, run.adjust

    def ask(
        plan: Plan,
        sigmas: Tensor,
        *,
        ahead: int = 0,
        scale: Callable[[int], float] | None = None,
        rule: SampleRule | None = None,
    ) -> Predict:
        def prompts(i: int) -> Prompts:
            pipe._current_timestep = schedule.timesteps[i + ahead]  # some caches ask for it
            return run.prompts()

        return make_predict(
            denoiser,
            sigmas,
            plan,
            *run.prompts(),
            head,
            scale=scale,
            conditioning=prompts,
            on_pair=on_pair,
            adjust=adjust and (lambda i, *tensors: adjust(i + ahead, *tensors)),
            rule=rule,
        )

    return ask


def _solve(pipe: Any, run: Run, predict: Predict, on_step: OnStep) -> Tensor:
    """Return the final latents; `on_step` sees them as the pipeline's callers do."""
    schedule = run.schedule
    if schedule.solver is None:
        return sample_scheduler(
            schedule.network_view(predict),
            run.latents,
            pipe.scheduler,
            timesteps=schedule.timesteps,
            generator=run.call.generator,
            eta=getattr(run.call, "eta", None),
            on_step=on_step,
        )
    x = schedule.from_pipeline(run.latents, 0)
    x = schedule.solver(predict, x, schedule.sigmas, on_step=schedule.around(on_step))
    return schedule.to_pipeline(x, len(run.plan))


def _after_step(pipe: Any, run: Run, bar: Any, i: int, x: Tensor) -> Tensor:
    """Do what the stock loop does after its update: callback, progress, interrupt."""
    call, plan = run.call, run.plan
    if call.callback_on_step_end is not None:
        tensors = {"latents": x, **run.embeds}
        wanted = {name: tensors[name] for name in call.callback_on_step_end_tensor_inputs}
        edited = call.callback_on_step_end(pipe, i, run.schedule.timesteps[i], wanted)
        x = edited.pop("latents", x)
        run.embeds = {name: edited.pop(name, old) for name, old in run.embeds.items()}
        if any(tensor.is_inference() for tensor in run.embeds.values()):
            # An edit in place leaves no trace there: new tensors are read anew.
            run.embeds = {name: tensor.clone() for name, tensor in run.embeds.items()}
    last = i + 1 == len(plan)
    # A scale that a callback has set is not the plan's, and stays.
    if not last and getattr(pipe, _scale_name(pipe)) == plan.steps[i].guidance_scale:
        setattr(pipe, _scale_name(pipe), plan.steps[i + 1].guidance_scale)
    run.finite[i] = torch.isfinite(x).all()
    order = pipe.scheduler.order
    warmup = max(len(plan) - run.schedule.num_steps * order, 0)
    if last or (i + 1 > warmup and (i + 1) % order == 0):
        bar.update()
    if is_torch_xla_available():
        import torch_xla.core.xla_model as xm  # type: ignore[import-not-found]

        xm.mark_step()
    if pipe.interrupt:
        raise Interrupted(x)
    return x


def _scale_name(pipe: Any) -> str:
    """Return the pipeline's attribute that holds the scale of classifier-free guidance."""
    return f"_{pipe.family.scale_argument}"


def _check_finite(run: Run) -> None:
    if bool(run.finite.all()):
        return
    i = int((~run.finite).nonzero()[0])
    raise NonFiniteError(
        f"latents must stay finite, got nan or inf after step {i} of {len(run.plan)} "
        f"(sigma {float(run.schedule.sigmas[i]):.4g}): try a lower guidance scale or a wider dtype"
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
