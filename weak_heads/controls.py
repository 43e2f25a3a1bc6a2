"""Heads that learn nothing, or next to nothing: a learned head has to beat them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from core2_sampler.rows import Rows
from core2_sampler.weak_heads.base import WeakHead


class CondHead(WeakHead):
    """No guidance: the gap is zero."""

    @register_to_config
    def __init__(self, family: str, latent_channels: int) -> None:
        super().__init__()
        _hold_a_tensor(self)

    def forward(
        self,
        cond: Tensor,
        *,
        x: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return zeros, as ``cond`` [B, C, H, W]."""
        self.check_latents(cond.shape[1])
        return torch.zeros_like(cond)


class LastGapHead(WeakHead):
    """Guidance by the gap of the latest slow step; zero before there was one."""

    @register_to_config
    def __init__(self, family: str, latent_channels: int) -> None:
        super().__init__()
        _hold_a_tensor(self)
        self._gap: Tensor | None = None

    def reset(self) -> None:
        """Forget the gap of an earlier run."""
        self._gap = None

    def observe(self, gap: Tensor) -> None:
        """Keep the true gap of a slow step."""
        self._gap = gap.detach().clone()

    def forward(
        self,
        cond: Tensor,
        *,
        x: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the latest true gap, as ``cond`` [B, C, H, W]."""
        self.check_latents(cond.shape[1])
        if self._gap is None:
            return torch.zeros_like(cond)
        if self._gap.shape != cond.shape:
            raise ValueError(
                f"cond must have the shape {tuple(self._gap.shape)} of the observed gap, got "
                f"{tuple(cond.shape)}: call reset() before another run"
            )
        return self._gap.to(cond)


class AffineHead(WeakHead):
    """Per noise level and channel ``gap = a * cond + b * x + c``, by least squares.

    The coefficients are linear in sigma between the fitted noise levels and constant outside.

    Reference:
        LinearAG of Adaptive Guidance, arXiv 2312.12487, section 5, with the state as a regressor
        in place of its earlier predictions, so that it needs no history.
    """

    levels: Tensor
    coefficients: Tensor

    @register_to_config
    def __init__(self, family: str, latent_channels: int, num_levels: int = 1) -> None:
        super().__init__()
        self._allocate(num_levels)

    def _allocate(self, num_levels: int) -> None:
        self.register_buffer("levels", torch.arange(num_levels, dtype=torch.float32))
        shape = (num_levels, self.config.latent_channels, 3)  # a, b, c
        self.register_buffer("coefficients", torch.zeros(shape))

    @torch.no_grad()
    def fit(self, rows: Iterable[Rows], max_levels: int = 64) -> None:
        """Fit the coefficients to collected rows, in float64.

        Args:
            rows: batches of rows. Rows of one noise level are fitted together; where there are
                more than ``max_levels`` levels, neighbours are merged.
            max_levels: largest number of noise levels kept.
        """
        sums: dict[float, tuple[Tensor, Tensor, int]] = {}
        for batch in rows:
            self.check_latents(batch.cond.shape[1])
            for sigma in batch.sigma.unique().tolist():
                moments = _moments(batch, batch.sigma == sigma)
                old = sums.get(sigma)
                sums[sigma] = moments if old is None else _add(old, moments)
        ordered = sorted(sums)
        bounds = torch.linspace(0, len(ordered), min(max_levels, len(ordered)) + 1).long().tolist()
        groups = [ordered[i:j] for i, j in zip(bounds, bounds[1:], strict=False)]
        levels, solved = [], []
        for group in groups:
            gram, right, count = sums[group[0]]
            for sigma in group[1:]:
                gram, right, count = _add((gram, right, count), sums[sigma])
            levels.append(sum(sigma * sums[sigma][2] for sigma in group) / count)
            # the pseudo-inverse: x and cond may be collinear (at the first step x is pure noise)
            solved.append((torch.linalg.pinv(gram, hermitian=True) @ right[..., None])[..., 0])
        device = self.levels.device
        self._allocate(len(groups))
        self.register_to_config(num_levels=len(groups))
        self.levels = torch.tensor(levels, device=device)
        self.coefficients = torch.stack(solved).float().to(device)

    def forward(
        self,
        cond: Tensor,
        *,
        x: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the fitted gap, as ``cond`` [B, C, H, W]; ``sigma`` is [B]."""
        self.check_latents(cond.shape[1])
        levels, coefficients = self.levels.float(), self.coefficients.float()
        above = torch.searchsorted(levels, sigma.float().contiguous()).clamp(max=len(levels) - 1)
        below = (above - 1).clamp(min=0)
        low, high = levels[below], levels[above]
        share = ((sigma.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        picked = coefficients[below].lerp(coefficients[above], share[:, None, None])  # [B, C, 3]
        a, b, c = picked[..., None, None].unbind(2)  # [B, C, 1, 1]
        return (a * cond.float() + b * x.float() + c).to(cond.dtype)


def _hold_a_tensor(head: WeakHead) -> None:
    """Give a head without weights something to save: without it there is no file to load."""
    head.register_buffer("placeholder", torch.zeros(1))


def _moments(rows: Rows, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the Gram matrix [C, 3, 3], right-hand side [C, 3] and row count of the masked rows."""
    chosen = (tensor[mask].double() for tensor in (rows.cond, rows.x, rows.gap))
    cond, x, gap = (tensor.transpose(0, 1).flatten(1) for tensor in chosen)  # [C, N]
    design = torch.stack([cond, x, torch.ones_like(x)], 2)  # [C, N, 3]
    return design.mT @ design, (design.mT @ gap[..., None])[..., 0], int(mask.sum())


def _add(
    left: tuple[Tensor, Tensor, int], right: tuple[Tensor, Tensor, int]
) -> tuple[Tensor, Tensor, int]:
    return left[0] + right[0], left[1] + right[1], left[2] + right[2]
