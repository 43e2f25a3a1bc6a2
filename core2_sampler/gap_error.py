"""The gap that a head predicts, and how far it is off: one formula for every kind of head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from core2_sampler.rows import Rows
from core2_sampler.types import Denoiser, InModelHead, OutputHead


def predict_gap(
    head: OutputHead | InModelHead,
    rows: Rows,
    denoiser: Denoiser | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """Return the gap that a head predicts for stored rows, [N, C, H, W].

    Args:
        head: the head; an in-model head must be attached to the denoiser.
        rows: the states, on the head's device.
        denoiser: needed by an in-model head, and by one that reads features that are not stored.
        guidance_scale: for an in-model head, the scale it is run at; not 1.
    """
    if head.in_model:
        if denoiser is None or guidance_scale is None:
            raise ValueError("an in-model head must be run in a denoiser at a scale, got None")
        with cast(InModelHead, head).active(guidance_scale):
            d = _run(denoiser, rows)
        return (d.float() - rows.cond) / (guidance_scale - 1)
    head = cast(OutputHead, head)
    features = rows.features
    if head.needs_features and features is None:
        if denoiser is None:
            raise ValueError("the rows must have features, or a denoiser must be given, got None")
        with torch.no_grad(), denoiser.capture_features() as latest:
            _run(denoiser, rows)
            features = latest().float()
    gap = head(
        rows.cond,
        x=rows.x,
        sigma=rows.sigma,
        prompt_embeds=rows.prompt_embeds,
        pooled=rows.pooled,
        features=features if head.needs_features else None,
    )
    return gap.float()


def _run(denoiser: Denoiser, rows: Rows) -> Tensor:
    dtype = next((p.dtype for p in denoiser.module.parameters()), torch.float32)
    cast_rows = rows.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return denoiser(cast_rows.x, rows.sigma, cast_rows.conditioning())


def scales_of(head: OutputHead | InModelHead) -> tuple[float, ...] | None:
    """Return the guidance scales to evaluate at: the ends and the middle of an in-model head's."""
    if not head.in_model:
        return None
    low, high = cast(Any, head).config.scale_range
    return (low,) if low == high else (low, (low + high) / 2, high)


@dataclass(frozen=True, slots=True)
class NoiseBins:
    """Bins that hold about the same number of noise levels each."""

    edges: Tensor  # [K + 1]

    @classmethod
    def of(cls, sigmas: Tensor, count: int) -> NoiseBins:
        """Cut the noise levels that occur, [N], into at most ``count`` bins."""
        cuts = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        return cls(torch.quantile(sigmas.double().unique(), cuts).unique())

    def __len__(self) -> int:
        return max(len(self.edges) - 1, 1)

    def sum(self, sigma: Tensor, values: Tensor) -> Tensor:
        """Return the sums of ``values`` [N] by bin of ``sigma`` [N], float64 [K]."""
        total = torch.zeros(len(self), dtype=torch.float64)
        return total.index_add(0, self.index(sigma).cpu(), values.double().cpu())

    def index(self, sigma: Tensor) -> Tensor:
        """Return the bin of each noise level, [N]."""
        inner = self.edges[1:-1].to(sigma.device)
        return torch.bucketize(sigma.double(), inner, right=True)


@torch.no_grad()
def relative_gap_error(
    head: OutputHead | InModelHead,
    batches: Iterable[Rows],
    bins: NoiseBins,
    denoiser: Denoiser | None = None,
    guidance_scale: float | None = None,
) -> tuple[float, list[float | None]]:
    """Return squared gap error over squared gap: of all rows, and by noise bin.

    0 is a perfect head, 1 is no guidance at all.
    """
    device = next(iter(cast(nn.Module, head).state_dict().values()), torch.empty(0)).device
    error, power = torch.zeros(2, len(bins), dtype=torch.float64)
    for batch in batches:
        rows = batch.map(lambda tensor: tensor.to(device))
        gap = predict_gap(head, rows, denoiser, guidance_scale)
        error += bins.sum(rows.sigma, (gap - rows.gap).square().flatten(1).sum(1))
        power += bins.sum(rows.sigma, rows.gap.square().flatten(1).sum(1))
    by_bin = [float(e / p) if p > 0 else None for e, p in zip(error, power, strict=True)]
    return float(error.sum() / power.sum()), by_bin
