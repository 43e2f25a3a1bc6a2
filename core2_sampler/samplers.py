"""Solvers of the sampling ODE ``dx/dsigma = d(x, sigma)``; they know no prompt and no pipeline.

Every solver takes ``d = predict(x, i)`` and the noise levels ``sigmas`` [N + 1]. ``on_step(i, x)``
is called with the latents after each step, and a tensor that it returns takes their place. Latents
keep their dtype from step to step; the updates are computed in float32 at least.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container
from typing import Any, Literal

import torch
from torch import Tensor

from core2_sampler.precision import wide
from core2_sampler.types import OnStep, Predict

Path = Literal["flow", "ve"]

Invert = Callable[[Tensor, int], Tensor]
"""``x = invert(y, i)``: latents at ``sigmas[i]`` that step ``i`` would have taken to `y`."""


@torch.no_grad()
def sample_euler(
    predict: Predict, x: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
) -> Tensor:
    """Solve with Euler steps: DDIM (eta 0) for eps models, flow-match Euler for velocity models.

    Args:
        predict: ``d = predict(x, i)`` at ``sigmas[i]``.
        x: latents at ``sigmas[0]``, [B, C, H, W].
        sigmas: noise levels in the order of the steps, [N + 1].
        on_step: see the module.

    Returns:
        Latents at ``sigmas[N]``.
    """
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
        x = _after(on_step, i, _euler(x, predict(x, i), sigma_next - sigma))
    return x


@torch.no_grad()
def sample_zigzag(
    predict: Predict,
    x: Tensor,
    sigmas: Tensor,
    *,
    undo: Predict,
    zigs: Container[int],
    on_step: OnStep | None = None,
) -> Tensor:
    """Solve with Euler steps, some of which are made, undone with less guidance and made again.

    Args:
        predict: ``d = predict(x, i)`` at ``sigmas[i]``.
        x: latents at ``sigmas[0]``, [B, C, H, W].
        sigmas: noise levels in the order of the steps, [N + 1].
        undo: ``d = undo(y, i)`` at ``sigmas[i + 1]``, which takes `y` from there to ``sigmas[i]``.
        zigs: the steps that are zigzag steps; not one that ends at noise level 0.
        on_step: see the module; called once for a zigzag step.

    Returns:
        Latents at ``sigmas[N]``.

    Reference:
        Z-Sampling, arXiv 2412.10891, algorithm 1.
    """
    steps = zigzag(predict, euler_inverse(undo, sigmas), sigmas, zigs.__contains__)
    return sample_euler(steps, x, sigmas, on_step=on_step)


def zigzag(
    predict: Predict,
    invert: Invert,
    sigmas: Tensor,
    zigs: Callable[[int], bool],
    again: Predict | None = None,
) -> Predict:
    """Return the derivative of zigzag steps as wholes: one Euler step by it is a zigzag step.

    So all that drives or watches a sampler sees a step of three predictions as it sees any other.

    Args:
        predict: ``d = predict(x, i)`` at ``sigmas[i]``.
        invert: takes latents from ``sigmas[i + 1]`` back to ``sigmas[i]``.
        sigmas: noise levels in the order of the steps, [N + 1].
        zigs: whether a step is a zigzag step, asked after its first prediction; the others are
            `predict`, untouched.
        again: the prediction from the latents that came back; None is `predict`.

    Returns:
        The closure.
    """
    levels = sigmas.tolist()
    again = again or predict

    def whole(x: Tensor, i: int) -> Tensor:
        d = predict(x, i)
        if not zigs(i):
            return d
        dt = levels[i + 1] - levels[i]
        back = invert(_euler(x, d, dt), i)
        return wide(again(back, i)) + (wide(back) - wide(x)) / dt

    return whole


def euler_inverse(predict: Predict, sigmas: Tensor) -> Invert:
    """Return Euler steps back: the same line with the noise levels swapped.

    Args:
        predict: ``d = predict(y, i)`` at ``sigmas[i + 1]``, where step ``i`` back starts.
        sigmas: noise levels in the order of the steps, [N + 1].

    Returns:
        ``x = invert(y, i)``: undoes step ``i`` up to its second order.
    """
    levels = sigmas.tolist()
    return lambda y, i: _euler(y, predict(y, i), levels[i] - levels[i + 1])


@torch.no_grad()
def sample_dpmpp_2m(
    predict: Predict,
    x: Tensor,
    sigmas: Tensor,
    *,
    path: Path = "flow",
    on_step: OnStep | None = None,
) -> Tensor:
    """Solve with DPM-Solver++(2M): second order at one evaluation a step.

    Args:
        predict: ``d = predict(x, i)`` at ``sigmas[i]``.
        x: latents at ``sigmas[0]``, [B, C, H, W].
        sigmas: noise levels, descending, [N + 1].
        path: the signal's factor: ``flow`` is 1 - sigma (SD3.5, FLUX), ``ve`` is 1 (SDXL).
        on_step: see the module.

    Returns:
        Latents at ``sigmas[N]``.

    Reference:
        Lu et al., arXiv 2211.01095, algorithm 2.
    """
    levels = sigmas.tolist()
    x0_before, h_before = None, 0.0
    for i, (sigma, sigma_next) in enumerate(zip(levels, levels[1:], strict=False)):
        x0 = wide(x) - sigma * wide(predict(x, i))
        h = _half_log_snr(sigma_next, path) - _half_log_snr(sigma, path)
        guess = x0
        # The first step has no past, and the last is infinitely long in log SNR: first order.
        if x0_before is not None and sigma_next > 0 and math.isfinite(h_before):
            guess = x0 + h / (2 * h_before) * (x0 - x0_before)
        ratio = sigma_next / sigma
        weight = _signal(sigma_next, path) - _signal(sigma, path) * ratio
        x = _after(on_step, i, (ratio * wide(x) + weight * guess).to(x.dtype))
        x0_before, h_before = x0, h
    return x


@torch.no_grad()
def sample_scheduler(
    predict: Predict,
    x: Tensor,
    scheduler: Any,
    *,
    timesteps: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Let a diffusers scheduler make the update, for those whose update has no closed form here.

    Args:
        predict: the model output at ``timesteps[i]``, as the scheduler expects it.
        x: initial latents, [B, C, H, W].
        scheduler: set by ``set_timesteps``; its ``step`` is called once for each timestep.
        timesteps: where to stop early: the first of the scheduler's own; None is all of them.
        generator: for schedulers that draw noise; not for those whose step takes none.
        eta: for schedulers whose step takes it; None leaves them theirs.
        on_step: see the module.

    Returns:
        Latents after the last timestep.
    """
    taken = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generator} if "generator" in taken else {}
    if eta is not None and "eta" in taken:
        extra["eta"] = eta
    for i, t in enumerate(scheduler.timesteps if timesteps is None else timesteps):
        d = predict(x, i).to(x.dtype)
        x_next = scheduler.step(d, t, x, return_dict=False, **extra)[0]
        x = _after(on_step, i, x_next.to(x.dtype))
    return x


def _euler(x: Tensor, d: Tensor, dt: float) -> Tensor:
    return torch.add(wide(x), d, alpha=dt).to(x.dtype)


def _after(on_step: OnStep | None, i: int, x: Tensor) -> Tensor:
    replaced = None if on_step is None else on_step(i, x)
    return x if replaced is None else replaced


def _signal(sigma: float, path: Path) -> float:
    return 1 - sigma if path == "flow" else 1.0


def _half_log_snr(sigma: float, path: Path) -> float:
    signal = _signal(sigma, path)
    if sigma <= 0:
        return math.inf
    return math.log(signal / sigma) if signal > 0 else -math.inf
