"""The hot steps: one named function per step kind, sync-free, every shape fixed.

A step reads and writes nothing but the static buffers of its `Hot`, so the same call can be made
eagerly, compiled, or captured once as a CUDA graph and replayed for any plan.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from core2_sampler.conditioning import join
from core2_sampler.fused import reference
from core2_sampler.fused.modulation import Modulation
from core2_sampler.fused.moves import Move
from core2_sampler.fused.online import Online
from core2_sampler.fused.state import EXTRA, W2S, State, keep
from core2_sampler.precision import wide
from core2_sampler.steps import Kind
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead

Update = Callable[..., None]
"""``update(state, d, guess, guess_is_gap=)``: see `core2_sampler.fused.reference.guided_step`."""


@dataclass(slots=True, eq=False)
class Prompts:
    """An encoded prompt in static buffers.

    Attributes:
        both: uncond then cond, 2B rows; where there is no uncond, cond twice.
        uncond: a view of the first half.
        cond: a view of the second half.
    """

    both: Conditioning
    uncond: Conditioning
    cond: Conditioning

    @classmethod
    def of(cls, cond: Conditioning, uncond: Conditioning | None) -> Prompts:
        """Return buffers that hold a prompt and, where there is one, its negative."""
        both = join(uncond or cond, cond)

        def half(index: int) -> Conditioning:
            def rows(x: Tensor) -> Tensor:
                return x.chunk(2)[index]

            extra = tree.tree_map_only(Tensor, rows, dict(both.extra))
            return Conditioning(rows(both.prompt_embeds), rows(both.pooled), extra)

        return cls(both, half(0), half(1))

    def load(self, cond: Conditioning, uncond: Conditioning | None) -> None:
        """Put in another prompt of the same `signature`."""
        for buffer, value in zip(
            _tensors(self.both), _tensors(join(uncond or cond, cond)), strict=True
        ):
            buffer.copy_(value)


@dataclass(slots=True, eq=False)
class Hot:
    """What the steps of one shape work on.

    Attributes:
        denoiser: the network; not shared with another shape, as it may cache tensors of a shape.
        head: the weak head; None if no step asks for it.
        state: the run's buffers.
        prompts: the run's prompt.
        update: the fused operation.
        observes: whether the head wants to see the gaps of pairs.
        online: the scale rule's buffers; None without one.
        modulation: the network's AdaLN tables; None without them.
        split: whether pairs are two passes of B rows, as all other passes are.
        scale: guidance scale of the next step, for an in-model head alone: all others take theirs
            from the table.
        keeps: whether the next step keeps the gap of its pair.
    """

    denoiser: Denoiser
    head: OutputHead | InModelHead | None
    state: State
    prompts: Prompts
    update: Update
    observes: bool = True
    online: Online | None = None
    modulation: Modulation | None = None
    split: bool = False
    scale: float = 1.0
    keeps: bool = False
    _features: Callable[[], Tensor] | None = field(default=None, init=False)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep on the denoiser what the steps need there: the head's hooks, and the tables."""
        head = self.head
        with ExitStack() as stack:
            if head is not None and head.in_model:
                stack.enter_context(cast(InModelHead, head).attached(self.denoiser.module))
            elif head is not None and cast(OutputHead, head).needs_features:
                self._features = stack.enter_context(self.denoiser.capture_features())
                stack.callback(setattr, self, "_features", None)
            if self.modulation is not None:
                stack.enter_context(self.modulation.on())
            yield

    def begin(self, x: Tensor, table: Tensor) -> None:
        """Start a run: outside every captured graph, as the host writes here.

        Args:
            x: latents at the first noise level, [B, C, H, W].
            table: of `core2_sampler.fused.state.step_table`.
        """
        self.state.begin(x, table)
        if self.online is not None:
            self.online.begin()
        if self.modulation is not None:
            pairs = len(self.state.seen) > len(x)
            prompts = self.prompts.both if pairs else self.prompts.cond
            self.modulation.fill(self.state, prompts, len(table) - 1)

    def keep(self) -> Callable[[], None]:
        """Return a function that puts back all that steps change."""
        online = () if self.online is None else self.online.changing
        return keep((*self.state.changing, *online))

    def one(self) -> Tensor:
        """Return cond, [B, C, H, W]."""
        return self._pass(self.prompts.cond, len(self.state.seen) - len(self.state.x))

    def other(self) -> Tensor:
        """Return uncond, [B, C, H, W]."""
        return self._pass(self.prompts.uncond, 0)

    def pair(self) -> Tensor:
        """Return [uncond; cond] of one batched pass, or of two if they are split, [2B, C, H, W]."""
        if self.split:  # cond last: a head reads features of the latest pass
            pair = torch.cat([self.other(), self.one()])
        else:
            pair = self._pass(self.prompts.both, 0)
        if self.keeps:
            uncond, cond = pair.chunk(2)
            torch.sub(wide(cond), wide(uncond), out=self.state.gap)
        return pair

    def _pass(self, prompt: Conditioning, first: int) -> Tensor:
        """Return d for the rows of a prompt, the first of which is a pair's row ``first``."""
        rows = len(prompt.pooled)
        if self.modulation is not None:
            self.modulation.look_up(self.state, first)
        return self.denoiser(self.state.seen[:rows], self.state.sigma(rows), prompt)

    def observe(self, pair: Tensor) -> None:
        """Show an output head the gap of a pair, once the step has asked it."""
        if self.observes and self.head is not None and not self.head.in_model:
            uncond, cond = pair.chunk(2)
            cast(OutputHead, self.head).observe(wide(cond) - wide(uncond))

    def gap(self, cond: Tensor) -> Tensor:
        """Return an output head's gap from a finished cond pass, as cond."""
        batch, features = len(cond), None if self._features is None else self._features()
        return cast(OutputHead, self.head)(
            cond,
            x=self.state.x,
            sigma=self.state.sigma(batch),
            prompt_embeds=self.prompts.cond.prompt_embeds,
            pooled=self.prompts.cond.pooled,
            features=None if features is None else features[len(features) - batch :],
        )

    def in_model(self) -> Tensor:
        """Return the guided d of a pass with an in-model head on, [B, C, H, W]."""
        with cast(InModelHead, self.head).active(self.scale):
            return self.one()

    def guide_online(self, cond: Tensor, gap: Tensor) -> None:
        """Let the rule pick a scale for each sample, and make the step at it."""
        cast(Online, self.online).pick(self.state, self.prompts.cond, cond, gap)
        self.update(self.state, cond, gap)


def cond_step(hot: Hot) -> None:
    """One pass, no guidance."""
    hot.update(hot.state, hot.one())


def uncond_step(hot: Hot) -> None:
    """One pass with the negative prompt, as steps are undone by."""
    hot.update(hot.state, hot.other())


def cfg_step(hot: Hot) -> None:
    """One pass of 2B rows, classifier-free guidance."""
    pair = hot.pair()
    hot.observe(pair)
    hot.update(hot.state, pair)


def fast_step(hot: Hot) -> None:
    """One pass and the weak head."""
    if cast(Any, hot.head).in_model:
        hot.update(hot.state, hot.in_model())
    else:
        cond = hot.one()
        hot.update(hot.state, cond, hot.gap(cond))


def slow_step(hot: Hot) -> None:
    """One pass of 2B rows and the weak head, which inside the denoiser is a pass more."""
    pair, guess_is_gap = hot.pair(), not cast(Any, hot.head).in_model
    guess = hot.gap(pair[len(hot.state.x) :]) if guess_is_gap else hot.in_model()
    hot.observe(pair)
    hot.update(hot.state, pair, guess, guess_is_gap=guess_is_gap)


def gap_step(hot: Hot) -> None:
    """No pass: the gap that was kept, as often as the table says."""
    hot.update(hot.state, hot.state.gap)


def online_cfg_step(hot: Hot) -> None:
    """As `cfg_step`, each sample at the scale that the rule picks for it."""
    pair = hot.pair()
    uncond, cond = pair.chunk(2)
    hot.observe(pair)
    hot.guide_online(cond, wide(cond) - wide(uncond))


def online_fast_step(hot: Hot) -> None:
    """As `fast_step` with an output head, each sample at the scale that the rule picks for it."""
    cond = hot.one()
    hot.guide_online(cond, hot.gap(cond))


def online_slow_step(hot: Hot) -> None:
    """As `slow_step`, each sample at the scale that the rule picks for it.

    Guidance is linear in the scale, so what it multiplies is the head's gap and the true one mixed.
    """
    pair = hot.pair()
    uncond, cond = pair.chunk(2)
    if cast(Any, hot.head).in_model:
        guess = (wide(hot.in_model()) - wide(cond)) / hot.state.column(EXTRA)
    else:
        guess = wide(hot.gap(cond))
    hot.observe(pair)
    gap = torch.lerp(guess, wide(cond) - wide(uncond), hot.state.column(W2S))
    hot.guide_online(cond, gap)


HotStep = Callable[[Hot], None]

STEPS: dict[Kind, HotStep] = {
    "cond": cond_step,
    "uncond": uncond_step,
    "cfg": cfg_step,
    "fast": fast_step,
    "slow": slow_step,
}
"""The hot step of each kind."""

ONLINE: dict[Kind, HotStep] = {
    "cfg": online_cfg_step,
    "fast": online_fast_step,
    "slow": online_slow_step,
}
"""The hot step of each kind that can ask a scale rule."""


def step_of(move: Move) -> HotStep:
    """Return the hot step that makes a move."""
    if move.push is not None:
        return gap_step
    return (ONLINE if move.picks else STEPS)[move.step.kind]


def update_for(device: torch.device) -> Update:
    """Return the fused operation of a device: the Triton kernel where there can be one."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from core2_sampler.fused import kernel

        return kernel.guided_step
    return reference.guided_step


def signature(cond: Conditioning, uncond: Conditioning | None) -> tuple[Any, ...]:
    """Return what prompts must share to use the same buffers: shapes, and values if not tensors.

    Args:
        cond: the prompt.
        uncond: the negative prompt, if the plan has one.
    """
    leaves, layout = tree.tree_flatten((cond.prompt_embeds, cond.pooled, dict(cond.extra)))
    parts = [
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return (uncond is not None, str(layout), *parts)


def _tensors(prompt: Conditioning) -> list[Tensor]:
    leaves = tree.tree_leaves((prompt.prompt_embeds, prompt.pooled, dict(prompt.extra)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
