"""The guidance scale that a run really has, measured step by step along its own trajectory.

Each prediction is compared with cond and the true gap at the same latents, by two passes of the
denoiser that the method itself does not see and that its NFE does not count.

Reference: Xie et al., Guidance Matters, arXiv 2602.22570.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core2_sampler.guidance import Prompts
from core2_sampler.nfe import count_nfe
from core2_sampler.precision import wide, wide_dtype
from core2_sampler.types import Denoiser, Predict


def project(d: Tensor, cond: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return the guidance scale that a prediction amounts to, and what no scale can imitate.

    Of a method whose step is no single prediction, ``(x_next - x) / (sigma_next - sigma)`` is
    ``d``, and cond and gap are those of ``x``.

    Args:
        d: the method's prediction, [B, C, H, W].
        cond: derivative with the prompt, same shape.
        gap: true ``cond - uncond``, same shape.

    Returns:
        ``(scale, share)``, [B] each. Scale is ``1 + <d - cond, gap> / <gap, gap>``, signed: s for
        CFG at s, 1 for cond; nan where the gap is zero. Share is the norm of the part of
        ``d - uncond`` across the gap over its own: 0 for CFG and cond, 1 if all of it is.

    Reference:
        arXiv 2602.22570, whose released code projects ``d - uncond``: the scale is the same.
    """
    gap, change = wide(gap).flatten(1), (wide(d) - wide(cond)).flatten(1)  # [B, C * H * W]
    power = gap.square().sum(1)
    along = (change * gap).sum(1) / power
    left = change - torch.where(power > 0, along, 0.0)[:, None] * gap
    length = (change + gap).norm(dim=1)  # of d - uncond
    share = torch.where(length > 0, left.norm(dim=1) / length, 0.0)
    return 1 + along, share


@dataclass(frozen=True, slots=True)
class EffectiveScale:
    """What a run measured; steps that have no scale (nan: a zero gap) are left out of means.

    Attributes:
        scales: effective guidance scale of each step and sample, [N, B], on the CPU.
        shares: orthogonal share of each step and sample, [N, B].
        nfe: denoiser evaluations of one sample that the method itself made.
    """

    scales: Tensor
    shares: Tensor
    nfe: int

    @classmethod
    def of_batches(cls, batches: Sequence[EffectiveScale]) -> EffectiveScale:
        """Put the batches of one arm together.

        Raises:
            ValueError: if there is none, or they differ in steps or NFE.
        """
        if len({(len(batch.scales), batch.nfe) for batch in batches}) != 1:
            raise ValueError(
                "batches must be of one arm, with equal steps and NFE, got "
                f"{[(len(batch.scales), batch.nfe) for batch in batches]}"
            )
        scales = torch.cat([batch.scales for batch in batches], 1)
        return cls(scales, torch.cat([batch.shares for batch in batches], 1), batches[0].nfe)

    @property
    def per_step(self) -> Tensor:
        """Mean over the samples, [N]."""
        return self.scales.nanmean(1)

    @property
    def per_sample(self) -> Tensor:
        """Mean over the steps, [B]: the scale at which GA-Eval runs CFG for each image."""
        return self.scales.nanmean(0)

    @property
    def mean(self) -> float:
        """Mean over the samples of their means."""
        return float(self.per_sample.nanmean())

    @property
    def orthogonal_share(self) -> float:
        """Mean orthogonal share."""
        return float(self.shares.mean())

    def official(self) -> EffectiveScale:
        """Return the scales as the released evaluation has them: norms, which lose the sign.

        It averages as we do, and measures its single-prediction methods at the same latents; what
        it does differently with Z-Sampling is for the `Meter`.
        """
        return replace(self, scales=self.scales.abs())


Compare = Callable[[Denoiser, Tensor, Tensor, Prompts, Tensor], tuple[Tensor, Tensor]]
"""``scale, share = compare(denoiser, x, sigma, prompts, d)``, [B] each: what ``d`` amounts to."""


def against_gap(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: Prompts, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `project` of a prediction at its latents, by two passes.

    Raises:
        ValueError: there is no negative prompt.
    """
    cond, gap = _sides(denoiser, x, sigma, prompts)
    return project(d, cond, gap)


def against_gap_as_released(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: Prompts, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as the released evaluation has it for Z-Sampling: of ``d``, uncond left in.

    Its scale is off by ``<uncond, gap> / <gap, gap>``.

    Raises:
        ValueError: there is no negative prompt.
    """
    _, gap = _sides(denoiser, x, sigma, prompts)
    return project(d, gap, gap)  # with 0 in the place of uncond


def _sides(denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Return cond and the true gap; one side at a time, as other batch sizes round differently."""
    prompt, negative = prompts
    if negative is None:
        raise ValueError(
            "the negative prompt must be there in every step to measure the gap, got none: use a "
            "guidance scale above 1, and no callback that takes it away"
        )
    cond = denoiser(x, sigma, prompt)
    return cond, wide(cond) - wide(denoiser(x, sigma, negative))


@dataclass(slots=True, eq=False)
class Meter:
    """Measures the predictions of one run; the run itself stays as it is, bit for bit.

    Attributes:
        denoiser: the network that the method runs; an in-model head attached to it must be off
            outside the method's own passes, as heads of this library are.
        sigmas: noise levels, [N + 1] or [N]; step ``i`` is evaluated at ``sigmas[i]``.
        prompts: ``(cond, uncond)`` of step ``i``.
        compare: what each prediction is measured by.
        steps: the steps that are measured; None is all.
    """

    denoiser: Denoiser
    sigmas: Tensor
    prompts: Callable[[int], Prompts]
    compare: Compare = against_gap
    steps: Container[int] | None = None
    _measured: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    _nfe: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Refuse a network whose passes change those that follow."""
        if getattr(self.denoiser.module, "_cache_config", None) is not None:
            raise ValueError(
                "the denoiser's cache must be off to measure a run, or its passes would end up in "
                f"it, got {type(self.denoiser.module).__name__} with one: call disable_cache()"
            )

    def watch(self, predict: Predict) -> Predict:
        """Return ``predict`` with every prediction measured."""

        def measured(x: Tensor, i: int) -> Tensor:
            with count_nfe(self.denoiser.module) as counter:
                d = predict(x, i)
            self._nfe += counter.per_sample(len(x))
            if self.steps is None or i in self.steps:
                self._measure(x, i, d)
            return d

        return measured

    def result(self) -> EffectiveScale:
        """Return what was measured so far.

        Raises:
            ValueError: if that is nothing.
        """
        if not self._measured:
            raise ValueError("a run must be made before its scale is read, got none")
        scales, shares = (torch.stack(each).cpu() for each in zip(*self._measured, strict=True))
        return EffectiveScale(scales, shares, self._nfe)

    @torch.no_grad()
    def _measure(self, x: Tensor, i: int, d: Tensor) -> None:
        sigma = torch.full((len(x),), float(self.sigmas[i]), device=x.device, dtype=wide_dtype(x))
        self._measured.append(self.compare(self.denoiser, x, sigma, self.prompts(i), d))
