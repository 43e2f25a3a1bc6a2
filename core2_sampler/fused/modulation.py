"""Tables of adaptive layer norms: the modulation of every step, computed before the first one.

In SD3.5 and FLUX each block scales and shifts by a linear layer of an embedding that depends on
noise level, pooled prompt and embedded guidance alone. Step by step these layers are products of
a matrix with a few rows, which read a quarter to a third of all weights; for a whole run they are
one product each. A pass then reads its rows from a table instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.fused.state import SIGMA, State
from core2_sampler.types import Conditioning, Denoiser

logger = logging.getLogger(__name__)

NORMS = (
    "AdaLayerNormZero",
    "AdaLayerNormZeroSingle",
    "AdaLayerNormContinuous",
    "SD35AdaLayerNormZeroX",
)
"""Classes of diffusers whose ``linear`` sees the activated embedding and nothing else."""


@runtime_checkable
class Modulated(Protocol):
    """A denoiser whose blocks are modulated by one embedding."""

    def embed_time(self, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the embedding [B, width] at ``sigma`` [B]."""
        ...


@dataclass(slots=True)
class _Rows:
    """The first row of a pass among those of a pair, shared by all layers."""

    first: int = 0


class _Looked(nn.Module):
    """Stands in for a layer: returns its rows of the step."""

    def __init__(self, now: Tensor, rows: _Rows) -> None:
        super().__init__()
        self._now, self._rows = now, rows

    def forward(self, embedding: Tensor) -> Tensor:
        first = self._rows.first
        return self._now[first : first + len(embedding)]


@dataclass(slots=True, eq=False)
class Modulation:
    """The tables of one shape; made where no hook but a head's is on the denoiser.

    Attributes:
        denoiser: the network.
        norms: what its layers belong to.
        layers: the layers, one of each.
        table: of each hot step, [capacity + 1, rows, width of all layers].
        now: of the next hot step, [1, rows, width of all layers].
    """

    denoiser: Denoiser
    norms: tuple[Any, ...]
    layers: tuple[nn.Linear, ...]
    table: Tensor
    now: Tensor
    _stand_ins: tuple[_Looked, ...] = field(init=False)
    _rows: _Rows = field(default_factory=_Rows, init=False)

    def __post_init__(self) -> None:
        """Give each layer its part of the row."""
        parts = self.now[0].split([layer.out_features for layer in self.layers], 1)
        self._stand_ins = tuple(_Looked(part, self._rows) for part in parts)

    @classmethod
    def allocate(cls, denoiser: Denoiser, state: State) -> Modulation | None:
        """Return tables for the layers that can have them; None if there are none.

        One log line says how many layers are left as they are, and why.

        Args:
            denoiser: the network; an in-model head is attached to it, if there is one.
            state: the run's buffers.

        Raises:
            ValueError: the network is not modulated by an embedding of its own.
        """
        check_modulated(denoiser)
        if _is_watched(getattr(denoiser.module, "time_text_embed", None)):
            _tell_once("AdaLN tables are left out: an adapter or a hook sits on the embedding")
            return None
        found = [part for part in denoiser.module.modules() if type(part).__name__ in NORMS]
        norms = tuple(part for part in found if _is_plain(cast(Any, part).linear, state.x.device))
        if len(norms) < len(found):
            _tell_once(
                f"AdaLN tables: {len(found) - len(norms)} of {len(found)} layers are computed step "
                "by step, because an adapter, a hook, quantisation or offload sits on them"
            )
        layers = tuple(cast(nn.Linear, norm.linear) for norm in norms)
        if not layers:
            return None
        width, rows = sum(layer.out_features for layer in layers), len(state.seen)
        table = layers[0].weight.new_zeros(len(state.table), rows, width)
        return cls(denoiser, norms, layers, table, table.new_zeros(1, rows, width))

    def fill(self, state: State, prompts: Conditioning, steps: int) -> None:
        """Compute the tables of a run.

        Args:
            state: the run's buffers, begun.
            prompts: the rows of a pass of all, [rows, ...] each.
            steps: hot steps of the run, M.
        """
        rows = self.now.shape[1]
        sigma = state.table[:steps, SIGMA, 0].repeat_interleave(rows)  # [M * rows]
        extra = {
            name: value.repeat(steps, *[1] * (value.ndim - 1))
            for name, value in prompts.extra.items()
            if isinstance(value, Tensor)
        }
        tokens = prompts.prompt_embeds[:1].expand(len(sigma), -1, -1)  # only counted
        repeated = Conditioning(tokens, prompts.pooled.repeat(steps, 1), extra)
        embedding = cast(Modulated, self.denoiser).embed_time(sigma, repeated)
        active, start = F.silu(embedding).to(self.table.dtype), 0
        for layer in self.layers:
            end = start + layer.out_features
            self.table[:steps, :, start:end] = layer(active).unflatten(0, (steps, rows))
            start = end

    def look_up(self, state: State, first: int) -> None:
        """Read the next step's row of the tables.

        Args:
            state: the run's buffers.
            first: number of the first row of the pass to come.
        """
        self._rows.first = first
        torch.index_select(self.table, 0, state.step[:1], out=self.now)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the layers read their tables; on exit they are what they were."""
        try:
            for norm, stand_in in zip(self.norms, self._stand_ins, strict=True):
                norm.linear = stand_in
            yield
        finally:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                norm.linear = layer


def check_modulated(denoiser: Denoiser) -> None:
    """Refuse a network without layers that depend on its embedding alone.

    Args:
        denoiser: the network.

    Raises:
        ValueError: see above.
    """
    if not isinstance(denoiser, Modulated):
        raise ValueError(
            "AdaLN tables need a network whose blocks are modulated by time and pooled prompt "
            f"alone (SD3.5, FLUX), got {type(denoiser.module).__name__}: leave them off"
        )


def _is_watched(embedding: nn.Module | None) -> bool:
    """Say whether what makes the embedding may say something else in another kind of step."""
    parts = () if embedding is None else embedding.modules()
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _is_plain(layer: Any, device: torch.device) -> bool:
    """Say whether a layer is just a product with weights that are there."""
    known = vars(layer)
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.device == device
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not known.keys() & {"forward", "_hf_hook"}
        and not getattr(known.get("_diffusers_hook"), "hooks", None)
    )


_tell_once: Callable[[str], None] = cache(logger.warning)
