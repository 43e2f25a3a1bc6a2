"""The hot steps: one named function per step kind, sync-free, every shape fixed.

A step reads and writes nothing but the static buffers of its `Hot`, so the same call can be made
eagerly, compiled, or captured once as a CUDA graph and replayed for any plan.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from core2_sampler.fused import reference
from core2_sampler.fused.state import State
from core2_sampler.guidance import join
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
        cond: a view of the second half.
    """

    both: Conditioning
    cond: Conditioning

    @classmethod
    def of(cls, cond: Conditioning, uncond: Conditioning | None) -> Prompts:
        """Return buffers that hold a prompt and, where there is one, its negative."""
        both = join(uncond or cond, cond)

        def half(x: Tensor) -> Tensor:
            return x[len(x) // 2 :]

        extra = tree.tree_map_only(Tensor, half, dict(both.extra))
        return cls(both, Conditioning(half(both.prompt_embeds), half(both.pooled), extra))

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
        scale: guidance scale of the next step, for an in-model head alone: all others take theirs
            from the table.
    """

    denoiser: Denoiser
    head: OutputHead | InModelHead | None
    state: State
    prompts: Prompts
    update: Update
    observes: bool = True
    scale: float = 1.0
    _features: Callable[[], Tensor] | None = field(default=None, init=False)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep the hooks on the denoiser that the head needs."""
        head = self.head
        if head is None:
            yield
        elif head.in_model:
            with cast(InModelHead, head).attached(self.denoiser.module):
                yield
        elif not cast(OutputHead, head).needs_features:
            yield
        else:
            with self.denoiser.capture_features() as self._features:
                try:
                    yield
                finally:
                    self._features = None

    def one(self) -> Tensor:
        """Return cond, [B, C, H, W]."""
        batch = len(self.state.x)
        return self.denoiser(self.state.seen[:batch], self.state.sigma(batch), self.prompts.cond)

    def pair(self) -> Tensor:
        """Return [uncond; cond] of one batched pass, [2B, C, H, W]."""
        rows = len(self.state.seen)
        return self.denoiser(self.state.seen, self.state.sigma(rows), self.prompts.both)

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


def cond_step(hot: Hot) -> None:
    """One pass, no guidance."""
    hot.update(hot.state, hot.one())


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


STEPS: dict[Kind, Callable[[Hot], None]] = {
    "cond": cond_step,
    "cfg": cfg_step,
    "fast": fast_step,
    "slow": slow_step,
}
"""The hot step of each kind; a plan with other kinds runs through `core2_sampler.guidance`."""


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
