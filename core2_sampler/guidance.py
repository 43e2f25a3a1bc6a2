"""How cond, uncond and a weak head become one derivative: formulas, and the closure of a plan.

Guidance is linear in ``d``, so these lines hold for every model family. All of it is computed in
float32 at least, whatever the network's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from core2_sampler.conditioning import Stamp, join, stamp
from core2_sampler.precision import wide, wide_dtype
from core2_sampler.scales import Pair, SampleRule
from core2_sampler.steps import Kind, Plan
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead, Predict

OnPair = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], None]
"""``on_pair(i, x, cond, gap, features)``: called where a step computed cond and uncond both."""

Adjust = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``adjust(i, x, cond, guided)``: returns what takes the place of a guided ``d`` made from cond."""

Prompts = tuple[Conditioning, Conditioning | None]

_ANY_SCALE = 2.0
"""At which a gap is ``guided - cond``, where a rule picks the scale and the plan's has no part."""


def weak(cond: Tensor, gap: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Return the head's guided derivative, ``cond + (guidance_scale - 1) * gap``.

    Args:
        cond: derivative with the prompt, [B, C, H, W].
        gap: predicted ``cond - uncond``, same shape.
        guidance_scale: 1 is exactly cond; with the true gap this is `strong`, bit for bit. One
            for each sample, [B], or one for all.

    Returns:
        ``d``, shape and dtype of `cond`.
    """
    if isinstance(guidance_scale, Tensor):
        return (wide(cond) + (guidance_scale - 1)[:, None, None, None] * wide(gap)).to(cond.dtype)
    return torch.add(wide(cond), wide(gap), alpha=guidance_scale - 1).to(cond.dtype)


def strong(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Return classifier-free guidance, ``uncond + guidance_scale * (cond - uncond)``.

    Args:
        cond: derivative with the prompt, [B, C, H, W].
        uncond: derivative with the negative prompt, same shape.
        guidance_scale: 1 is exactly cond.

    Returns:
        ``d``, shape and dtype of `cond`.

    Reference:
        Ho & Salimans, arXiv 2207.12598, eq. 6, in the scale convention of Imagen.
    """
    return weak(cond, wide(cond) - wide(uncond), guidance_scale)


def weak_to_strong(weak: Tensor, strong: Tensor, w2s_scale: float) -> Tensor:
    """Return ``weak + w2s_scale * (strong - weak)``; exact at 0 (weak) and at 1 (strong).

    Args:
        weak: the head's guided derivative, [B, C, H, W].
        strong: classifier-free guidance, same shape.
        w2s_scale: above 1 it extrapolates past CFG, away from the head.

    Returns:
        ``d``, shape and dtype of `strong`.

    Reference:
        CoRe^2, arXiv 2503.09662, the slow mode of Refine.
    """
    return torch.lerp(wide(weak), wide(strong), w2s_scale).to(strong.dtype)


def rescale(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Pull the spread of each guided sample towards that of cond, against overexposure.

    Args:
        guided: guided prediction, in the network's own terms (eps or v), [B, C, H, W].
        cond: prediction with the prompt, same shape.
        share: 0 changes nothing, 1 gives each sample the standard deviation of cond.

    Returns:
        The rescaled prediction, in float32 at least.

    Reference:
        Lin et al., arXiv 2305.08891, eq. 15 and 16.
    """
    guided, cond = wide(guided), wide(cond)
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (share * ratio + (1 - share))


def make_predict(
    denoiser: Denoiser,
    sigmas: Tensor,
    plan: Plan,
    cond: Conditioning,
    uncond: Conditioning | None,
    head: OutputHead | InModelHead | None = None,
    *,
    scale: Callable[[int], float] | None = None,
    conditioning: Callable[[int], Prompts] | None = None,
    on_pair: OnPair | None = None,
    capture_features: bool = False,
    adjust: Adjust | None = None,
    rule: SampleRule | None = None,
) -> Predict:
    """Bind network, prompt, head and plan into the ``d = predict(x, i)`` that samplers call.

    An in-model head is entered by the caller, with ``head.attached(denoiser.module)`` around the
    whole run; here it is only turned on for the passes that need it. An output head is reset.

    Args:
        denoiser: the network of one family.
        sigmas: noise levels, [N + 1] or [N]; step ``i`` is evaluated at ``sigmas[i]``.
        plan: one entry a step, [N].
        cond: the prompt.
        uncond: the negative prompt; None if the plan never asks for it.
        head: the weak head; None if the plan never asks for it.
        scale: guidance scale of step ``i``, in place of the plan's; 1 or less makes the step cond.
        conditioning: ``(cond, uncond)`` of step ``i``, in place of `cond` and `uncond`.
        on_pair: called with ``(i, x, cond, gap, features)`` wherever both passes were made.
        capture_features: hand the denoiser's last hidden state to `on_pair` even if the head
            does not read it.
        adjust: has the last word on predictions guided by a scale above 1, but for the fast steps
            of an in-model head, which know no cond.
        rule: picks the scale of each sample in the steps of ``plan.asking``, unless `scale` says
            another there than the plan; begun here.

    Returns:
        The closure; its result has the dtype of the network's output.

    Raises:
        ValueError: the plan needs something that is missing or does not fit it.
    """
    if len(sigmas) not in (len(plan), len(plan) + 1):
        raise ValueError(f"sigmas must cover the plan's {len(plan)} steps, got {len(sigmas)}")
    if plan.needs_uncond and uncond is None and conditioning is None:
        raise ValueError("the plan runs the negative prompt and must get uncond, got None")
    if plan.needs_head:
        if head is None:
            raise ValueError("the plan asks the head and must get a weak head, got None")
        if head.in_model != plan.in_model:
            raise ValueError(
                f"plan.in_model must be that of the head ({head.in_model}), got {plan.in_model}; "
                "make the plan with in_model=head.in_model"
            )
    if head is not None and not head.in_model:
        cast(OutputHead, head).reset()
    levels = noise_levels(sigmas, plan)
    prompts = conditioning or (lambda _i: (cond, uncond))
    if rule is not None:
        rule.begin(denoiser, levels)
    return _Guided(
        denoiser, levels, plan, head, scale, prompts, on_pair, capture_features, adjust, rule
    )


def noise_levels(sigmas: Tensor, plan: Plan) -> list[float]:
    """Return the noise levels of a run, [N + 1]; `sigmas` may lack the last, which is 0 then."""
    return [*sigmas.tolist(), 0.0][: len(plan) + 1]


@dataclass(slots=True, eq=False)
class _Guided:
    """`make_predict`'s closure, spelt out as an object so that each step kind is one method."""

    denoiser: Denoiser
    levels: Sequence[float]
    plan: Plan
    head: OutputHead | InModelHead | None
    scale: Callable[[int], float] | None
    prompts: Callable[[int], Prompts]
    on_pair: OnPair | None
    capture_features: bool
    adjust: Adjust | None
    rule: SampleRule | None
    _joined: tuple[Prompts, Stamp, Conditioning] | None = None

    def __call__(self, x: Tensor, i: int) -> Tensor:
        step = self.plan.steps[i]
        scale = step.guidance_scale if self.scale is None else self.scale(i)
        kind: Kind = step.kind if self.scale is None or scale > 1 else "cond"
        sigma = torch.full((x.shape[0],), self.levels[i], device=x.device, dtype=wide_dtype(x))
        if kind in ("cond", "uncond"):
            prompt, negative = self.prompts(i)
            return self.denoiser(x, sigma, prompt if kind == "cond" else _given(negative))
        rule = self.rule if i in self.plan.asking and scale == step.guidance_scale else None
        if rule is not None and not self.plan.in_model:
            scale = _ANY_SCALE
        if kind == "fast":
            return self._fast(x, sigma, i, scale, rule)
        cond, gap, features = self._pair(x, sigma, i)
        guided = weak(wide(cond), gap, scale)
        if kind == "slow":
            guess = self._weak(x, sigma, self.prompts(i)[0], scale, cond, features)
            guided = weak_to_strong(guess, guided, step.w2s_scale)
        if self.head is not None and not self.head.in_model:
            cast(OutputHead, self.head).observe(gap)
        if self.on_pair is not None:
            self.on_pair(i, x, cond, gap, features)
        return self._adjusted(i, x, cond, guided, scale, rule)

    def _adjusted(
        self,
        i: int,
        x: Tensor,
        cond: Tensor,
        guided: Tensor,
        scale: float,
        rule: SampleRule | None,
    ) -> Tensor:
        if rule is not None:
            return self._ruled(rule, i, x, cond, (wide(guided) - wide(cond)) / (scale - 1))
        if self.adjust is not None and scale > 1:
            guided = self.adjust(i, x, cond, guided)
        return guided.to(cond.dtype)

    def _ruled(self, rule: SampleRule, i: int, x: Tensor, cond: Tensor, gap: Tensor) -> Tensor:
        """Guide each sample at the scale that the rule picks for it."""

        def guided(scale: float | Tensor) -> Tensor:
            d = weak(wide(cond), gap, scale)
            return (d if self.adjust is None else self.adjust(i, x, cond, d)).to(cond.dtype)

        here, ahead = self.levels[i : i + 2]
        return guided(rule(Pair(i, x, cond, gap, here, ahead, self.prompts(i)[0], guided)))

    def _fast(
        self, x: Tensor, sigma: Tensor, i: int, scale: float, rule: SampleRule | None
    ) -> Tensor:
        head, prompt = self.head, self.prompts(i)[0]
        if head is None or head.in_model:
            return self._in_model(x, sigma, prompt, scale)
        cond, features = self._pass(x, sigma, prompt, cast(OutputHead, head).needs_features)
        guided = self._weak(x, sigma, prompt, scale, cond, features)
        return self._adjusted(i, x, cond, guided, scale, rule)

    def _weak(
        self,
        x: Tensor,
        sigma: Tensor,
        prompt: Conditioning,
        scale: float,
        cond: Tensor,
        features: Tensor | None,
    ) -> Tensor:
        """Return the head's guided d in float32, from a finished cond pass if the head can."""
        head = self.head
        if head is None or head.in_model:
            return self._in_model(x, sigma, prompt, scale)
        gap = cast(OutputHead, head)(
            cond,
            x=x,
            sigma=sigma,
            prompt_embeds=prompt.prompt_embeds,
            pooled=prompt.pooled,
            features=features,
        )
        return weak(wide(cond), gap, scale)

    def _in_model(self, x: Tensor, sigma: Tensor, prompt: Conditioning, scale: float) -> Tensor:
        with cast(InModelHead, self.head).active(scale):
            return self.denoiser(x, sigma, prompt)

    def _pair(self, x: Tensor, sigma: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make ONE pass of [uncond; cond]; return cond, the gap in float32, the cond features."""
        batch = x.shape[0]
        both, features = self._pass(
            torch.cat([x, x]),  # [2B, C, H, W]
            torch.cat([sigma, sigma]),
            self._join(self.prompts(i)),
            self.capture_features or bool(getattr(self.head, "needs_features", False)),
        )
        uncond, cond = both.chunk(2)
        gap = wide(cond) - wide(uncond)
        return cond, gap, None if features is None else features[batch:]

    def _pass(
        self, x: Tensor, sigma: Tensor, prompt: Conditioning, capture: bool
    ) -> tuple[Tensor, Tensor | None]:
        with self.denoiser.capture_features() if capture else nullcontext() as read:
            d = self.denoiser(x, sigma, prompt)
            return d, None if read is None else read()

    def _join(self, prompts: Prompts) -> Conditioning:
        cond, uncond = prompts[0], _given(prompts[1])
        now = stamp(uncond.prompt_embeds, uncond.pooled, cond.prompt_embeds, cond.pooled)
        known = self._joined
        if known is None or known[1] != now or known[0][0] is not cond or known[0][1] is not uncond:
            known = self._joined = (prompts, now, join(uncond, cond))
        return known[2]


def _given(uncond: Conditioning | None) -> Conditioning:
    if uncond is None:
        raise ValueError("a step that runs the negative prompt must get uncond, got None")
    return uncond
