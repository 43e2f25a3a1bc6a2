"""Zigzag steps in a pipeline's run: exact, or as the released code makes them.

Exact is `core2_sampler.samplers.sample_zigzag`: a step is undone by a prediction at the noise level
that it ended at. The released code of Z-Sampling and Z-CoRe^2 departs from that, and
``Plan.upstream`` departs with it, so that results can be compared:

- SD3.5, ``zigzag``: the prediction is asked at timestep ``max(0, t - 1000 // N)``, which is not the
  next one of a shifted grid.
- SD3.5, ``zcore``: it is asked at the timestep that the step started at, and the step is made again
  at guidance scale 3.5, whatever the call's.
- SDXL, both: it is asked at the timestep that the step started at, and DDIM inversion is one
  interval off: latents at level i + 1 count as those of i + 2, are taken to i + 1, and count as
  those of i.
- ``zcore``: the guidance scale of the inversion comes from ``w2s_scale``, see `make_plan`; with a
  good head it is above that of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from core2_sampler.pipelines.adapters.base import Schedule
from core2_sampler.precision import wide
from core2_sampler.samplers import Invert, euler_inverse, sample_euler, zigzag
from core2_sampler.steps import Plan
from core2_sampler.types import Predict

_EULER = {
    "sd3": "FlowMatchEulerDiscreteScheduler",
    "sdxl": "EulerDiscreteScheduler, or DDIMScheduler with eta 0 and clip_sample False,",
    "flux": "FlowMatchEulerDiscreteScheduler",
}
"""The schedulers of each family whose update is an Euler step."""

_UPSTREAM_ZCORE_SCALE = 3.5


class Ask(Protocol):
    """Binds a run's network, head and prompts to a plan and its noise levels, [N] or [N + 1]."""

    def __call__(
        self,
        plan: Plan,
        sigmas: Tensor,
        *,
        ahead: int = 0,
        scale: Callable[[int], float] | None = None,
    ) -> Predict:
        """Return the closure; what it asks in step ``i`` belongs to timestep ``i + ahead``."""
        ...


def check_zigzag(pipe: Any, plan: Plan, schedule: Schedule) -> None:
    """Refuse zigzag steps where the scheduler's update is not an Euler step, which they undo.

    Args:
        pipe: the pipeline.
        plan: of the run to come.
        schedule: of the run to come.

    Raises:
        ValueError: see above; or the released code has nothing to follow for this pipeline.
    """
    if not plan.zigs:
        return
    family, scheduler = pipe.family.name, type(pipe.scheduler).__name__
    if schedule.solver is not sample_euler:
        raise ValueError(
            f"zigzag steps need a scheduler that makes Euler steps, got {scheduler}: use "
            f"{_EULER[family]} or another mode"
        )
    if plan.upstream is not None and family == "flux":
        raise ValueError("upstream must be False for FLUX, which the released code has not")
    if plan.upstream is not None and family == "sdxl" and schedule.latent_scale is None:
        raise ValueError(
            f"upstream must come with DDIMScheduler, as in the released code, got {scheduler}: "
            "set it, or leave upstream out"
        )


def zigzag_predict(
    plan: Plan,
    schedule: Schedule,
    forward: Predict,
    ask: Ask,
    zigs: Callable[[int], bool],
) -> Predict:
    """Return the derivative of a run's steps, that of its zigzag steps included.

    Args:
        plan: of the run; it has passed `check_zigzag`.
        schedule: of the run.
        forward: the prediction of the steps' own direction.
        ask: makes the predictions that undo steps.
        zigs: see `core2_sampler.samplers.zigzag`.
    """
    sigmas, undo = schedule.sigmas, plan.undo
    if plan.upstream is None:
        return zigzag(forward, euler_inverse(ask(undo, sigmas[1:], ahead=1), sigmas), sigmas, zigs)
    if schedule.latent_scale is not None:
        inverse = _ddim_inverse(ask(undo, sigmas), sigmas, schedule.latent_scale)
        return zigzag(forward, inverse, sigmas, zigs)
    if plan.upstream == "zcore":
        again = ask(plan, sigmas, scale=lambda _i: _UPSTREAM_ZCORE_SCALE)
        return zigzag(forward, euler_inverse(ask(undo, sigmas), sigmas), sigmas, zigs, again)
    early = (schedule.timesteps.double().cpu() - 1000 // schedule.num_steps).clamp(min=0) / 1000
    return zigzag(forward, euler_inverse(ask(undo, early), sigmas), sigmas, zigs)


def _ddim_inverse(predict: Predict, sigmas: Tensor, latent_scale: Tensor) -> Invert:
    """Return the inversion of the released SDXL code, one interval off.

    Args:
        predict: asked at ``sigmas[i]``, where step ``i`` started.
        sigmas: noise levels, [N + 1].
        latent_scale: from `x` to latents that preserve variance, which keep their value where
            their noise level is mistaken, [N + 1].
    """
    levels, scales = sigmas.tolist(), latent_scale.tolist()

    def invert(y: Tensor, i: int) -> Tensor:
        taken = scales[i + 1] / scales[i]  # latents at level i + 1 that count as those of level i
        d = wide(predict(y * taken, i))
        off = wide(y) * (scales[i + 1] / scales[i + 2])
        return ((off + (levels[i + 1] - levels[i + 2]) * d) * taken).to(y.dtype)

    return invert
