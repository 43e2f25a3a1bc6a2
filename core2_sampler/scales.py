"""Which guidance scale a step takes: rules known before a run, and rules that see its latents.

A static rule, ``scale = rule(i, num_steps)``, holds for all samples and is part of the plan, so a
step at scale 1 costs one pass. A sample rule is asked wherever a step has a gap to extrapolate, and
answers for each sample of the batch. `OnlineScale` is one: it looks one step ahead with several
scales, which takes no further pass of the denoiser, and keeps the one whose latents score best.

Reference:
    Papalampidi et al., arXiv 2509.16131: dynamic classifier-free guidance by online feedback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from core2_sampler.evaluators.base import Evaluator
from core2_sampler.evaluators.mixing import adaptive_weights, normalised
from core2_sampler.precision import wide
from core2_sampler.registry import Registry
from core2_sampler.samplers import sample_euler
from core2_sampler.types import Conditioning, Denoiser

StaticRule = Callable[[int, int], float]
"""``scale = rule(i, num_steps)`` of step ``i``; 1 is cond."""

CANDIDATES = (1.0, 3.0, 7.5, 11.0, 15.0)
"""The scales that the paper chooses from for its latent diffusion model."""

RULES: Registry[Callable[..., StaticRule]] = Registry("scale rule")
"""Makers of static rules by name; each takes numbers."""


@RULES.register("constant")
def constant(scale: float) -> StaticRule:
    """Return the rule of one scale throughout."""
    return lambda i, num_steps: scale


@RULES.register("interval")
def interval(scale: float, start: float, stop: float) -> StaticRule:
    """Return the rule that guides in a part of the run only; the rest is cond.

    Args:
        scale: inside the interval.
        start: share of the steps, 0 to 1, before which there is no guidance.
        stop: share of the steps from which on there is none.

    Raises:
        ValueError: not ``0 <= start < stop <= 1``.

    Reference:
        Kynkaanniemi et al., arXiv 2404.07724, with shares of the steps for noise levels.
    """
    if not 0 <= start < stop <= 1:
        raise ValueError(f"an interval must be 0 <= start < stop <= 1, got {start} and {stop}")
    return lambda i, num_steps: scale if start * num_steps <= i < stop * num_steps else 1.0


@RULES.register("linear")
def linear(first: float, last: float) -> StaticRule:
    """Return the rule that goes from the first to the last step's scale in equal steps."""
    return lambda i, num_steps: first + (last - first) * i / max(num_steps - 1, 1)


@RULES.register("cosine")
def cosine(first: float, last: float) -> StaticRule:
    """Return the rule that goes from the first to the last step's scale on half a cosine wave."""

    def rule(i: int, num_steps: int) -> float:
        return last + (first - last) * (1 + math.cos(math.pi * i / max(num_steps - 1, 1))) / 2

    return rule


@RULES.register("list")
def listed(*scales: float) -> StaticRule:
    """Return the rule of one scale for each step; a run of another length is refused."""

    def rule(i: int, num_steps: int) -> float:
        if len(scales) != num_steps:
            raise ValueError(f"scales must be one a step ({num_steps}), got {len(scales)}")
        return scales[i]

    return rule


def parse_rule(text: str) -> StaticRule:
    """Return the static rule that a text names, such as ``constant:4.5`` or ``cosine:9,1``.

    Args:
        text: a name of `RULES`, a colon, numbers.

    Raises:
        ValueError: unknown name, or other numbers than the rule takes.
    """
    name, _, numbers = text.partition(":")
    make = RULES.get(name)
    try:
        return make(*(float(number) for number in numbers.split(",")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a scale rule must read NAME:NUMBER,NUMBER as in cosine:9,1, got {text!r} ({error})"
        ) from None


def static_scales(rule: StaticRule, num_steps: int) -> tuple[float, ...]:
    """Return a static rule's scales, [N], as `core2_sampler.plan.make_plan` takes them.

    Args:
        rule: any callable of the step and the number of steps.
        num_steps: N.

    Raises:
        ValueError: a scale is not finite, or the rule does not know N steps.
    """
    scales = tuple(float(rule(i, num_steps)) for i in range(num_steps))
    if not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"a scale rule must give finite scales, got {scales}")
    return scales


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

    def begin(self, denoiser: Denoiser, num_steps: int) -> None:
        """Forget the run before; refuse a denoiser that it cannot serve with ValueError."""
        ...

    def __call__(self, pair: Pair) -> Tensor:
        """Return the scale of each sample, [B]."""
        ...

    @property
    def schedule(self) -> Tensor:
        """The scales of the run so far, [N, B]; nan in steps that did not ask."""
        ...


@dataclass(slots=True, eq=False)
class _Record:
    """The scales of a run by step."""

    num_steps: int = 0
    scales: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, i: int, scale: Tensor) -> Tensor:
        self.scales[i] = scale
        return scale

    def stacked(self) -> Tensor:
        if not self.scales:
            raise ValueError("a schedule must be read after a run that asked the rule, got none")
        unasked = torch.full_like(next(iter(self.scales.values())), torch.nan)
        return torch.stack([self.scales.get(i, unasked) for i in range(self.num_steps)])


@dataclass(slots=True, eq=False)
class CallableScale:
    """The sample rule of a function, such as the replay of a schedule: ``lambda p: scales[p.i]``.

    Attributes:
        choose: returns the scale of each sample, [B].
    """

    choose: Callable[[Pair], Tensor]
    _record: _Record = field(default_factory=_Record)

    def begin(self, denoiser: Denoiser, num_steps: int) -> None:
        """Forget the run before."""
        self._record = _Record(num_steps)

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
        return self._record.keep(pair.i, scale.to(pair.x.device))

    @property
    def schedule(self) -> Tensor:
        """The scales of the run so far, [N, B]."""
        return self._record.stacked()


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
    _record: _Record = field(default_factory=_Record)
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

    def begin(self, denoiser: Denoiser, num_steps: int) -> None:
        """Forget the run before; refuse a denoiser that an evaluator was not made for."""
        for evaluator in self.evaluators.values():
            evaluator.check_family(denoiser.family)
            evaluator.check_latents(denoiser.latent_channels)
        self._record, self._before = _Record(num_steps), None

    @torch.no_grad()
    def __call__(self, pair: Pair) -> Tensor:
        """Return the best candidate of each sample, [B].

        Raises:
            ValueError: the next noise level is not lower, so there is no step to look ahead.
        """
        scores = self.scores(pair)  # [E, K, B]
        if self.weights != "adaptive":
            fixed = scores.new_tensor([self.weights[name] for name in self.evaluators])
            total = torch.einsum("e,ekb->kb", fixed, normalised(scores))
        else:
            now = scores.mean(1)  # [E, B]
            weights = adaptive_weights(now, self._before, upstream=self.upstream)
            self._before = now
            mixed = scores if self.upstream else normalised(scores)
            total = torch.einsum("eb,ekb->kb", weights, mixed)
        best = total.argmax(0)  # [B]
        return self._record.keep(pair.i, scores.new_tensor(self.candidates)[best])

    def scores(self, pair: Pair) -> Tensor:
        """Return what each evaluator says of each candidate of each sample, [E, K, B]."""
        if not pair.sigma_next < pair.sigma:
            raise ValueError(
                "an online scale must look ahead to a lower noise level, got "
                f"{pair.sigma_next:.4g} after {pair.sigma:.4g} at step {pair.i}: take a scheduler "
                "of first order, or another scale rule"
            )
        count = len(self.candidates)
        ahead = torch.cat([next_latents(pair, scale) for scale in self.candidates])  # [K * B, ...]
        prompt = Conditioning(
            pair.prompt.prompt_embeds.repeat(count, 1, 1), pair.prompt.pooled.repeat(count, 1)
        )
        sigma = ahead.new_full((len(ahead),), pair.sigma_next)
        told = [evaluator(ahead, sigma, prompt) for evaluator in self.evaluators.values()]
        return torch.stack([wide(each).unflatten(0, (count, -1)) for each in told])

    @property
    def schedule(self) -> Tensor:
        """The scales of the run so far, [N, B]."""
        return self._record.stacked()


def next_latents(pair: Pair, scale: float | Tensor) -> Tensor:
    """Return where an Euler step at a scale leads, [B, C, H, W], in float32 at least.

    Args:
        pair: of the step.
        scale: a number, or one for each sample [B].
    """
    d = wide(pair.guided(scale))
    levels = torch.tensor([pair.sigma, pair.sigma_next], dtype=torch.float64, device="cpu")
    return sample_euler(lambda x, i: d, wide(pair.x), levels)
