"""Zigzag steps at no extra pass, in the manner of Z^2-Sampling.

A zigzag step goes there, ``y = x + dt * d(x; s)``, comes back, ``x' = y - dt * d(y; b)``, and
starts again from x'. Guidance is linear, so where y sees the same cond and gap as x, cond cancels:
``x' = x + dt * (s - b) * gap(x)``, up to second order in dt. That gap would cost a pass of its own,
but the flow is smooth and the latest gap is close to it: with that one x' is free, and the whole
step is one CFG pair at x'.

What it comes to, exactly, in Euler steps whose predictions are not adjusted: the network sees the
latents of CFG at scales ``s_i + (s_j - b_j) * dt_j / dt_i``, where step ``j = i + 1`` is a zigzag
step. On an even grid that is 2 s - b. So judge it beside CFG at that scale.

That the way there and back can be collapsed, and that the step before can stand in for what is not
known, are the ideas of the paper; the equations are derived here, and may not be the paper's.

Reference:
    Z^2-Sampling, arXiv 2604.23536; Z-Sampling, arXiv 2412.10891, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core2_sampler.precision import wide
from core2_sampler.samplers import sample_euler
from core2_sampler.types import Predict


@dataclass(slots=True, eq=False)
class LatestGap:
    """The gap of the latest step that made both passes; its `see` is an ``on_pair``.

    Attributes:
        gap: in float32 at least, [B, C, H, W]; None before the first.
    """

    gap: Tensor | None = None

    def see(self, i: int, x: Tensor, cond: Tensor, gap: Tensor, features: Tensor | None) -> None:
        """Take note of a pair, see `core2_sampler.guidance.make_predict`."""
        self.gap = gap

    def push(self, guidance_scale: float, inversion_scale: float) -> Tensor | None:
        """Return what stands for the derivative there less that back.

        Args:
            guidance_scale: of the way there, s.
            inversion_scale: of the way back, b.

        Returns:
            ``(s - b) * gap``, [B, C, H, W]; None before the first gap.
        """
        return None if self.gap is None else (guidance_scale - inversion_scale) * self.gap


def z2_predict(predict: Predict, push: Callable[[int], Tensor | None], sigmas: Tensor) -> Predict:
    """Return the derivative of zigzag steps as wholes: one Euler step by it is a zigzag step.

    Args:
        predict: ``d = predict(x, i)`` at ``sigmas[i]``.
        push: of step ``i``, see `LatestGap.push`; None leaves the step as it is.
        sigmas: noise levels in the order of the steps, [N + 1].

    Returns:
        The closure; with a push of 0 its result is that of `predict`, to the bit.
    """

    def whole(x: Tensor, i: int) -> Tensor:
        pushed = push(i)
        if pushed is None:
            return predict(x, i)
        back = sample_euler(lambda _x, _i: pushed, x, sigmas[i : i + 2])
        return wide(predict(back, i)) + pushed

    return whole
