"""What a loop of classifier-free guidance is told in the place of what its network says.

The loop keeps its own line, ``uncond + scale * (cond - uncond)``, and all that follows it. It
always gets the true cond; in the place of uncond it gets ``cond - gap`` with the gap of the step's
kind: the head's (fast), ``weak_to_strong`` of the head's and the true one (slow), the true one
(CFG), none (cond). Guidance is linear in the gap, so this is the same `d` that our own loops make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from core2_sampler.attachment.layouts import Call
from core2_sampler.attachment.measure import Measure
from core2_sampler.attachment.networks import Network
from core2_sampler.guidance import weak, weak_to_strong
from core2_sampler.plan import Core2Config
from core2_sampler.precision import wide
from core2_sampler.scales import Pair, SampleRule
from core2_sampler.steps import Step
from core2_sampler.weak_heads.base import WeakHead

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A step that has run both prompts, as the loop and the network have it.

    Attributes:
        i: number of the step.
        levels: noise levels of the run, [N + 1].
        network: that has run.
        call: the pass of the prompt, B rows.
        cond: its prediction, [B, ...].
        gap: the true one, as `cond`.
        features: last hidden state of that pass, if the watcher wants it.
    """

    i: int
    levels: Sequence[float]
    network: Network
    call: Call
    cond: Tensor
    gap: Tensor
    features: Tensor | None


class Watch(Protocol):
    """Sees a run and changes nothing."""

    @property
    def features(self) -> bool:
        """Whether it wants the last hidden state."""
        ...

    def __call__(self, seen: Seen) -> None:
        """See a step that has run both prompts."""
        ...


@dataclass(slots=True)
class _PromptPass:
    """The pass of the prompt: what the answer to that of the negative prompt needs."""

    call: Call
    output: Any
    cond: Tensor
    features: Tensor | None
    guess: Tensor | None = None


@dataclass(slots=True, eq=False)
class Answers:
    """Answers the passes of a run, step by step.

    Attributes:
        head: the weak head; one inside the denoiser is attached by the caller.
        scale: the guidance scale that the loop applies to a network, in our convention, as it is
            now.
        own_scales: whether a step's scale is that of the plan, not the loop's.
        rule: picks the scale of each sample, unless the loop's is no longer the plan's.
        watch: sees the steps that run both prompts.
        measure: how the rule sees a step.
        levels: noise levels of the run, [N + 1].
        step: of the plan.
        i: its number.
        asks: whether it asks the rule.
        sigma: its noise level.
        guided: whether the loop has asked for guidance at all.
        apart: whether both prompts of a pass are run one after the other.
    """

    head: WeakHead | None
    scale: Callable[[Network], float]
    own_scales: bool
    rule: SampleRule | None = None
    watch: Watch | None = None
    measure: Measure | None = None
    levels: Sequence[float] = ()
    step: Step = Step("cond")
    i: int = 0
    asks: bool = False
    sigma: float = 0.0
    guided: bool = False
    apart: bool = False
    _first: _PromptPass | None = None

    @property
    def waits(self) -> bool:
        """Whether the next pass of the step is that of the negative prompt."""
        return self._first is not None

    def go_on(self) -> None:
        """Leave a step behind."""
        self._first = None

    def pair(self, network: Network, forward: Forward, call: Call, batch: int) -> Any:
        """Answer one pass of both prompts; run the prompt's rows alone where that is enough.

        Apart, passes have the rows of one prompt in all steps.

        Args:
            network: that is asked.
            forward: runs it.
            call: the loop's arguments, 2B rows.
            batch: B.
        """
        self.guided = True
        prompt = network.rows(call, batch, prompt=True)
        if self.apart or self.step.kind not in ("cfg", "slow"):
            output = self.prompt(network, forward, prompt)
            negative = network.rows(call, batch, prompt=False)
            told = network.prediction(self.negative(network, forward, negative))
            return network.join(output, network.prediction(output), told)
        with network.capture(self._reads) as read:
            output = forward(*call.args, **call.kwargs)
        features = read()
        cond, uncond = network.split(network.prediction(output))
        features = None if features is None else network.split(features)[0]
        first = _PromptPass(prompt, output, cond, features)
        first.guess = self._in_model_guess(network, forward, first)
        told = self._with_negative(network, first, uncond)
        return output if told is uncond else network.join(output, cond, told)

    def prompt(self, network: Network, forward: Forward, call: Call) -> Any:
        """Answer the first of a step's two passes: cond, whatever the kind."""
        kept = call.kept()  # because a loop may change its dicts in place before the second pass
        with self._active(network), network.capture(self._reads) as read:
            output = forward(*call.args, **call.kwargs)
        first = _PromptPass(kept, output, network.prediction(output), read())
        first.guess = self._in_model_guess(network, forward, first)
        self._first = first
        return output

    def negative(self, network: Network, forward: Forward, call: Call) -> Any:
        """Answer the second of a step's two passes; run it only where it is needed."""
        first, self._first, self.guided = cast(_PromptPass, self._first), None, True
        if self.step.kind in ("cfg", "slow"):
            output = forward(*call.args, **call.kwargs)
            told = self._with_negative(network, first, network.prediction(output))
            return network.replace(output, told)
        return network.replace(first.output, self._without_negative(network, first))

    def _without_negative(self, network: Network, first: _PromptPass) -> Tensor:
        """Return what the loop is told in the place of uncond by a step that does not run it."""
        if self.step.kind == "cond" or cast(WeakHead, self.head).in_model:
            return first.cond  # of an in-model head that is the guided d already
        gap = self._gap(network, first)
        return _told(first.cond, gap, self._share(network, first, gap))

    def _with_negative(self, network: Network, first: _PromptPass, uncond: Tensor) -> Tensor:
        """Return what the loop is told in the place of a true uncond."""
        true = gap = wide(first.cond) - wide(uncond)
        if self.step.kind == "slow":
            guess = self._gap(network, first) if first.guess is None else first.guess
            gap = weak_to_strong(guess, gap, self.step.w2s_scale)
        if self.head is not None and not self.head.in_model:
            self.head.observe(network.true_gap(true, first.call, self.sigma))
        if self.watch is not None:
            seen = Seen(self.i, self.levels, network, first.call, first.cond, true, first.features)
            self.watch(seen)
        share = self._share(network, first, gap)
        if self.step.kind != "cfg":
            return _told(first.cond, gap, share)
        if isinstance(share, Tensor):  # at the loop's own scale the true uncond, bit for bit
            told = _told(first.cond, gap, share)
            return torch.where(_rows(share == 1, told), uncond, told)
        return uncond if share == 1 else _told(first.cond, gap, share)

    def _gap(self, network: Network, first: _PromptPass) -> Tensor:
        head = cast(WeakHead, self.head)
        return network.predict_gap(head, first.cond, first.call, self.sigma, first.features)

    def _in_model_guess(
        self, network: Network, forward: Forward, first: _PromptPass
    ) -> Tensor | None:
        """Return the gap that an in-model head means in a slow step, by a pass of its own."""
        if self.step.kind != "slow" or not cast(WeakHead, self.head).in_model:
            return None
        scale = self._scale_of(network)
        with cast(Any, self.head).active(scale):
            output = forward(*first.call.args, **first.call.kwargs)
        return (wide(network.prediction(output)) - wide(first.cond)) / (scale - 1)

    def _active(self, network: Network) -> AbstractContextManager[None]:
        if self.step.kind != "fast" or not cast(WeakHead, self.head).in_model:
            return nullcontext()
        return cast(Any, self.head).active(self._scale_of(network))

    def _scale_of(self, network: Network) -> float:
        return self.step.guidance_scale if self.own_scales else self.scale(network)

    @property
    def _reads(self) -> bool:
        """Whether somebody reads the network's last hidden state."""
        watched = self.watch is not None and self.watch.features
        return watched or (self.head is not None and self.head.needs_features)

    def _share(self, network: Network, first: _PromptPass, gap: Tensor) -> float | Tensor:
        """Return by how much to stretch a gap, so that the loop's scale acts as the step's."""
        now = self.scale(network)
        if self.rule is not None and self.asks and now == self.step.guidance_scale:
            picked = self.rule(self._pair(network, first, gap))  # [B]
            return torch.where(picked == now, 1.0, (picked - 1) / (now - 1))
        return (self.step.guidance_scale - 1) / (now - 1) if self.own_scales else 1.0

    def _pair(self, network: Network, first: _PromptPass, gap: Tensor) -> Pair:
        """Return the step as a rule sees it."""
        measure = cast(Measure, self.measure)
        shown = measure.show(first.cond, first.call, self.sigma)
        ours = measure.gap(gap, first.call, self.sigma)

        def guided(scale: float | Tensor) -> Tensor:
            return measure.finish(weak(wide(shown.cond), ours, scale), shown.cond)

        here, ahead = self.levels[self.i : self.i + 2]
        return Pair(self.i, shown.x, shown.cond, ours, here, ahead, shown.prompt, guided)


def _told(cond: Tensor, gap: Tensor, share: float | Tensor) -> Tensor:
    """Return ``cond - share * gap``, with one share for all samples or one for each, [B]."""
    if isinstance(share, Tensor):
        gap, share = wide(gap) * _rows(share, gap), 1.0
    return weak(cond, gap, 1 - share)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each sample, [B], as [B, 1, ...] with the dimensions of another."""
    return values.view(-1, *[1] * (like.ndim - 1))


def has_own_scales(config: Core2Config) -> bool:
    """Say whether a config tells the guidance scale of each step, in place of the loop."""
    return config.guidance_scales is not None or config.scale_rule is not None
