"""Rows: the states that a head learns from, whether they come from a store or a running model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from core2_sampler.types import Conditioning

EXTRA = "extra."
"""Prefix of the tensors that a family adds to its prompts."""

TOKEN_MASK = "encoder_hidden_states_mask"
"""What networks whose prompts differ in tokens call that which tells the tokens from filling."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of visited states with both predictions known.

    Attributes:
        x: latents, [N, C, H, W].
        cond: prediction with the prompt, as ``x``.
        gap: ``cond - uncond``, as ``x``.
        sigma: noise level of each row, [N].
        step: index of the sampling step of each row, [N].
        prompt_embeds: token embeddings, [N, T, D].
        pooled: pooled embedding, [N, P].
        features: last hidden state of the cond pass, [N, T', D'], where it was recorded.
        extra: further tensors of the prompt's conditioning, [N, ...] each.
    """

    x: Tensor
    cond: Tensor
    gap: Tensor
    sigma: Tensor
    step: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    features: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Rows:
        """Build rows from tensors by field name; ``extra.<name>`` goes to ``extra``."""
        plain = {name: t for name, t in tensors.items() if not name.startswith(EXTRA)}
        extra = {name[len(EXTRA) :]: t for name, t in tensors.items() if name.startswith(EXTRA)}
        return cls(**plain, extra=extra)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor, as ``from_tensors`` takes them."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {name: value for name, value in plain.items() if isinstance(value, Tensor)}
        return found | {EXTRA + name: tensor for name, tensor in self.extra.items()}

    def map(self, function: Callable[[Tensor], Tensor]) -> Rows:
        """Return the rows with ``function`` applied to every tensor."""
        return Rows.from_tensors({name: function(t) for name, t in self.tensors().items()})

    def conditioning(self) -> Conditioning:
        """Return the rows' prompts as a denoiser takes them."""
        return Conditioning(self.prompt_embeds, self.pooled, self.extra)


class RowSource(Protocol):
    """Where Reflect gets its rows from."""

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the rows, as often as they occur, [N]."""
        ...

    def train(self, step: int, batch_size: int, seed: int) -> Rows:
        """Return random rows of the training prompts, a function of the arguments alone."""
        ...

    def held_out(self, batch_size: int) -> Iterator[Rows]:
        """Yield a fixed set of rows of prompts that ``train`` never returns."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a head's card says about its data."""
        ...


def stable_hash(*parts: object) -> int:
    """Return a 63-bit hash of ``parts`` that is the same in every process and version."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def is_held_out(prompt_id: str, share: float) -> bool:
    """Say whether a prompt belongs to the held-out ``share`` (0 to 1) of all prompts."""
    return stable_hash("held out", prompt_id) < share * 2**63


def widen(tensor: Tensor) -> Tensor:
    """Return a stored tensor in the precision to compute with: float32 for halves."""
    return tensor.float() if tensor.is_floating_point() else tensor


def encoding_tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the tensors of encoded prompts, [B, ...] each, under their names in a store."""
    tensors = {"prompt_embeds": conditioning.prompt_embeds, "pooled": conditioning.pooled}
    return tensors | {EXTRA + name: value for name, value in conditioning.extra.items()}
