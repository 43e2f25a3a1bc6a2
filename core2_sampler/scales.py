"""Scale rules that see the latents: a guidance scale for each step and each sample of the batch.

A sample rule is asked wherever a step has a gap to extrapolate. `OnlineScale` looks one step ahead
with several scales, which takes no further pass of the denoiser, and keeps the one whose latents
score best. Rules that are known before a run are in `core2_sampler.scale_rules`.

Reference:
    Papalampidi et al., arXiv 2509.16131: dynamic classifier-free guidance by online feedback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from core2_sampler.evaluators.base import Evaluator
from core2_sampler.evaluators.mixing import adaptive_weights, mixed
from core2_sampler.precision import wide
from core2_sampler.samplers import sample_euler
from core2_sampler.types import Conditioning, Denoiser

CANDIDATES = (1.0, 3.0, 7.5, 11.0, 15.0)
"""The scales that the paper chooses from for its latent diffusion model."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What a sample rule sees of a step.

    Attributes:
        i: number of the step.
        x: latents, [B, C, H, W].
        cond: derivative with the prompt, as `x`.
        gap: what the scale multiplies, as `x`: the true gap, a head's, or what a slow step makes of
            both.
        sigma: noise level of `x`.
        sigma_next: noise level that the step leads to.
        prompt: the prompts, B rows.
        guided: ``d`` [B, C, H, W] at a scale: a number, or one for each sample [B].
    """

    i: int
    x: Tensor
    cond: Tensor
    gap: Tensor
    sigma: float
    sigma_next: float
    prompt: Conditioning
    guided: Callable[[float | Tensor], Tensor]


class SampleRule(Protocol):
    """A rule that picks a scale for each sample while the run goes on."""

    def begin(self, denoiser: Denoiser, levels: Sequence[float]) -> None:
        """Forget the run before; refuse one that it cannot serve with ValueError.

        Args:
            denoiser: of the run to come.
            levels: its noise levels, [N + 1].
        """
        ...

    def __call__(self, pair: Pair) -> Tensor:
        """Return the scale of each sample, [B]."""
        ...

    @property
    def schedule(self) -> Tensor | None:
        """The scales of the run so far, [N, B]; nan in steps that did not ask, None if all."""
        ...


@dataclass(slots=True, eq=False)
class _Record:
    """The scales of a run by step."""

    num_steps: int = 0
    scales: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, i: int, scale: Tensor) -> Tensor:
        self.scales[i] = scale
        return scale

    def stacked(self) -> Tensor | None:
        if not self.scales:
            return None
        unasked = torch.full_like(next(iter(self.scales.values())), torch.nan)
        return torch.stack([self.scales.get(i, unasked) for i in range(self.num_steps)])


@dataclass(slots=True, eq=False)
class CallableScale:
    """The sample rule of a function, such as the replay of a schedule: ``lambda p: scales[p.i]``.

    Attributes:
        choose: returns the scale of each sample, [B].
    """

    choose: Callable[[Pair], Tensor]
    record: _Record = field(default_factory=_Record)

    def begin(self, denoiser: Denoiser, levels: Sequence[float]) -> None:
        """Forget the run before."""
        self.record = _Record(len(levels) - 1)

    def __call__(self, pair: Pair) -> Tensor:
        """Return the scale of each sample, [B].

        Raises:
            ValueError: the function returned another shape.
        """
        scale = self.choose(pair)
        if scale.shape != pair.x.shape[:1]:
            raise ValueError(
                f"a scale rule must return one scale a sample [{len(pair.x)}], got the shape "
                f"{tuple(scale.shape)}"
            )
        return self.record.keep(pair.i, scale.to(pair.x.device))

    @property
    def schedule(self) -> Tensor | None:
        """The scales of the run so far, [N, B]; see `SampleRule`."""
        return self.record.stacked()


@dataclass(slots=True, eq=False)
class OnlineScale:
    """The sample rule of the paper: try all candidates one step ahead, keep the best, greedily.

    All candidates of all samples are scored in one batch; a sample's pick depends on nothing but
    that sample. Where candidates score the same, the first of them is taken.

    Attributes:
        evaluators: by name.
        candidates: scales to choose from.
        weights: of the evaluators by name; ``adaptive`` is `adaptive_weights`.
        upstream: adaptive weights and scores as the paper prints them: signed and not normalised.
    """

    evaluators: Mapping[str, Evaluator]
    candidates: Sequence[float] = CANDIDATES
    weights: Mapping[str, float] | Literal["adaptive"] = "adaptive"
    upstream: bool = False
    record: _Record = field(default_factory=_Record)
    _before: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what no run could make right."""
        if not self.evaluators:
            raise ValueError("an online scale must have at least one evaluator, got none")
        if not self.candidates or not all(math.isfinite(s) and s >= 1 for s in self.candidates):
            raise ValueError(f"candidates must be scales of at least 1, got {self.candidates}")
        if self.weights != "adaptive" and set(self.weights) != set(self.evaluators):
            raise ValueError(
                f"weights must be 'adaptive' or one for each of {sorted(self.evaluators)}, got "
                f"{self.weights!r}"
            )

    def begin(self, denoiser: Denoiser, levels: Sequence[float]) -> None:
        """Forget the run before; refuse one that cannot be looked ahead in.

        Raises:
            ValueError: an evaluator was made for another model, or a noise level is not below the
                one before it.
        """
        for evaluator in self.evaluators.values():
            evaluator.check_family(denoiser.family)
            evaluator.check_latents(denoiser.latent_channels)
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if not sigma_next < sigma:
                raise ValueError(
                    f"an online scale must look ahead to a lower noise level, got {sigma_next:.4g} "
                    f"after {sigma:.4g} at step {i}: take a scheduler of first order, or another "
                    "scale rule"
                )
        self.record, self._before = _Record(len(levels) - 1), None

    @torch.no_grad()
    def __call__(self, pair: Pair) -> Tensor:
        """Return the best candidate of each sample, [B]."""
        scores = self.scores(pair)  # [E, K, B]
        if self.weights != "adaptive":
            fixed = scores.new_tensor([[self.weights[name]] for name in self.evaluators])
            total = mixed(scores, fixed)
        else:
            weights = adaptive_weights(scores, self._before, upstream=self.upstream)
            self._before = scores.mean(1)  # [E, B]
            total = mixed(scores, weights, raw=self.upstream)
        best = total.argmax(0)  # [B]
        return self.record.keep(pair.i, scores.new_tensor(self.candidates)[best])

    def scores(self, pair: Pair) -> Tensor:
        """Return what each evaluator says of each candidate of each sample, [E, K, B]."""
        count = len(self.candidates)
        ahead = torch.cat([next_latents(pair, scale) for scale in self.candidates])  # [K * B, ...]
        prompt = Conditioning(
            pair.prompt.prompt_embeds.repeat(count, 1, 1), pair.prompt.pooled.repeat(count, 1)
        )
        sigma = ahead.new_full((len(ahead),), pair.sigma_next)
        told = [evaluator(ahead, sigma, prompt) for evaluator in self.evaluators.values()]
        return torch.stack([wide(each).unflatten(0, (count, -1)) for each in told])

    @property
    def schedule(self) -> Tensor | None:
        """The scales of the run so far, [N, B]; see `SampleRule`."""
        return self.record.stacked()


def next_latents(pair: Pair, scale: float | Tensor) -> Tensor:
    """Return where an Euler step at a scale leads, [B, C, H, W], in float32 at least.

    Args:
        pair: of the step.
        scale: a number, or one for each sample [B].
    """
    d = wide(pair.guided(scale))
    levels = torch.tensor([pair.sigma, pair.sigma_next], dtype=torch.float64, device="cpu")
    return sample_euler(lambda x, i: d, wide(pair.x), levels)
