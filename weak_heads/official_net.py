"""The network of the authors' heads, and the factors of a prompt that it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64
"""Width of one attention head."""

PATCH = 2
"""Side of the square of latents that is one token of the network."""

MAX_SIDE = 384
"""Longest side of the latents that the network has positions for."""

MAX_LAYERS = 8
"""Most transformer blocks that the network has modulations for."""

_GROUP = 4  # blocks that share a modulation
_RANKS = 64  # or as many as there are
_HIDDEN = 128  # of the small networks on the prompt


@dataclass(frozen=True, slots=True)
class PromptFactors:
    """A prompt as the head reads it, negative prompt included.

    Attributes:
        tokens: the matrix that the factors multiply to, [B, 2T, D].
        ranks: of each singular value the left factor, the value and the right factor,
            [B, R, 2T + 1 + D].
        pooled: both pooled embeddings, [B, 2P].
    """

    tokens: Tensor
    ranks: Tensor
    pooled: Tensor


@torch.no_grad()
def factorise(prompt: Tensor, pooled: Tensor, *, upstream: bool) -> PromptFactors:
    """Factorise the tokens of prompt and negative prompt by their R = 64 largest singular values.

    Args:
        prompt: both prompts' tokens, [B, 2T, D].
        pooled: both pooled embeddings, [B, 2P].
        upstream: as the authors' code has it: the first ROWS of U stand for its first columns, so
            that the product is no approximation of the prompt and depends on the solver's choice
            of signs and of a basis of the null space; all in bfloat16. Otherwise the rank-R
            approximation in float32: signs are fixed, singular values of zero have no factors.

    Returns:
        The factors, in float32 or bfloat16.
    """
    num_ranks = min(_RANKS, *prompt.shape[1:])
    left, values, right = torch.linalg.svd(prompt.float(), full_matrices=upstream)
    values, right = values[..., :num_ranks], right[..., :num_ranks, :]  # [B, R], [B, R, D]
    if upstream:
        left = left[..., :num_ranks, :].bfloat16()  # [B, R, 2T]
        values, right = values.bfloat16(), right.bfloat16()
    else:
        left, right = _canonical(left[..., :num_ranks].mT, values, right)
    tokens = (left.mT * values[..., None, :]) @ right
    return PromptFactors(tokens, torch.cat([left, values[..., None], right], -1), pooled)


def _canonical(left: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each right factor positive, and drop those of singular value 0."""
    sign = right.gather(-1, right.abs().argmax(-1, keepdim=True)).sign()
    noise = values[..., :1] * max(left.shape[-1], right.shape[-1]) * torch.finfo(values.dtype).eps
    kept = sign * (values > noise)[..., None]
    return left * kept, right * kept


class SlotLinear(nn.Linear):
    """A linear layer with one low-rank addition for each slot of the schedule."""

    def __init__(self, into: int, out: int, slots: int, rank: int, *, bias: bool = True) -> None:
        super().__init__(into, out, bias=bias)
        self.down = nn.Parameter(torch.empty(slots, into, rank))
        self.up = nn.Parameter(torch.zeros(slots, rank, out))
        nn.init.normal_(self.down, std=rank**-0.5)

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``x`` [B, T, in] to [B, T, out]; ``slot`` [B] is each row's."""
        # A product with a single row rounds by where in memory the row lies, which loading changes.
        weight = self.weight.clone() if self.out_features == 1 else self.weight
        return F.linear(x, weight, self.bias) + x @ self.down[slot] @ self.up[slot]


class TokenMLP(nn.Module):
    """A small network on every token of the prompt, averaged over them."""

    def __init__(self, text_dim: int, width: int, slots: int, rank: int) -> None:
        super().__init__()
        self.inner = SlotLinear(text_dim, _HIDDEN, slots, rank)
        self.norm = nn.LayerNorm(_HIDDEN)
        self.outer = SlotLinear(_HIDDEN, width, slots, rank)

    def forward(self, tokens: Tensor, slot: Tensor) -> Tensor:
        """Map tokens [B, T, D] to [B, 1, W]."""
        hidden = self.norm(F.silu(self.inner(tokens, slot)))
        return self.outer(hidden, slot).mean(1, keepdim=True)


class Block(nn.Module):
    """diffusers' ``BasicTransformerBlock`` with self-attention alone, of slot layers."""

    def __init__(self, width: int, slots: int, rank: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.to_q = SlotLinear(width, width, slots, rank, bias=False)
        self.to_k = SlotLinear(width, width, slots, rank, bias=False)
        self.to_v = SlotLinear(width, width, slots, rank, bias=False)
        self.to_out = SlotLinear(width, width, slots, rank)
        self.norm3 = nn.LayerNorm(width)
        self.ff_in = SlotLinear(width, 4 * width, slots, rank)
        self.ff_out = SlotLinear(2 * width, width, slots, rank)

    def forward(self, x: Tensor, slot: Tensor) -> Tensor:
        """Map patches [B, N, W]."""
        x = x + self._attend(self.norm1(x), slot)
        hidden, gate = self.ff_in(self.norm3(x), slot).chunk(2, -1)
        return x + self.ff_out(hidden * F.gelu(gate), slot)

    def _attend(self, x: Tensor, slot: Tensor) -> Tensor:
        def heads(layer: nn.Module) -> Tensor:
            return layer(x, slot).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # [B, heads, N, 64]

        query, key, value = heads(self.to_q), heads(self.to_k), heads(self.to_v)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).flatten(2), slot)


class OfficialNet(nn.Module):
    """PromptSD35Net and PromptSDXLNet; they differ in their sizes alone.

    The prompt scales and shifts the patches before the first block and after every block, by one
    pair of small networks each for the start, the first four blocks and the rest.
    """

    def __init__(
        self,
        latent_channels: int,
        text_dim: int,
        pooled_dim: int,
        tokens: int,
        num_heads: int,
        num_layers: int,
        num_slots: int,
        lora_rank: int,
    ) -> None:
        """Build it; the output is zero at first. Arguments as those of ``OfficialHead``."""
        super().__init__()
        width, size = num_heads * HEAD_DIM, (num_slots, lora_rank)
        self.pos_embed = PatchEmbed(
            128, 128, PATCH, latent_channels, width, pos_embed_max_size=MAX_SIDE // PATCH
        )
        self.transformer_blocks = nn.ModuleList(Block(width, *size) for _ in range(num_layers))
        self.modulation = SlotLinear(width, 2 * width, *size)
        self.proj_out = SlotLinear(width, PATCH**2 * latent_channels, *size)
        groups = range(1 + MAX_LAYERS // _GROUP)  # all of them, as in the checkpoints
        self.shifts = nn.ModuleList(TokenMLP(text_dim, width, *size) for _ in groups)
        self.scales = nn.ModuleList(TokenMLP(text_dim, width, *size) for _ in groups)
        self.last_linear = TokenMLP(text_dim, width, *size)
        self.skip_connection2 = SlotLinear(text_dim, 1, *size, bias=False)
        self.skip_connection = SlotLinear(2 * tokens + 1, 2 * latent_channels, *size, bias=False)
        self.trans_linear = SlotLinear(2 * tokens + 1 + text_dim, width, *size, bias=False)
        self.pool_prompt_linear = (
            SlotLinear(2 * pooled_dim, text_dim, *size, bias=False)
            if 2 * pooled_dim != text_dim
            else None
        )
        zeroed = [self.skip_connection, self.trans_linear, self.proj_out]
        for layer in (*zeroed, *(each.outer for each in (*self.shifts, *self.scales))):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, cond: Tensor, slot: Tensor, prompt: PromptFactors) -> Tensor:
        """Map ``cond`` [B, C, H, W], with each row's slot [B], to its like in the net's dtype."""
        dtype = self.proj_out.weight.dtype
        cond, pooled = cond.to(dtype), prompt.pooled[:, None].to(dtype)
        if self.pool_prompt_linear is not None:
            pooled = self.pool_prompt_linear(pooled, slot)
        tokens = torch.cat([prompt.tokens.to(dtype), pooled], 1)  # [B, 2T + 1, D]
        common = self.trans_linear(prompt.ranks.to(dtype), slot).mean(1, keepdim=True)  # [B, 1, W]
        groups = range(1 + math.ceil(len(self.transformer_blocks) / _GROUP))
        scales = [1 + self.scales[i](tokens, slot) + common for i in groups]
        shifts = [self.shifts[i](tokens, slot) for i in groups]
        hidden = self.pos_embed(cond) * scales[0] + shifts[0]  # [B, H/2 * W/2, W]
        for i, block in enumerate(self.transformer_blocks):
            hidden = block(hidden, slot) * scales[1 + i // _GROUP] + shifts[1 + i // _GROUP]
        ending = F.silu(self.last_linear(tokens, slot))
        scale, shift = self.modulation(ending, slot).chunk(2, -1)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale) + shift
        patches = self.proj_out(hidden, slot)
        skip = self.skip_connection(self.skip_connection2(tokens, slot).mT, slot)  # [B, 1, 2C]
        scale, shift = skip[:, 0, :, None, None].chunk(2, 1)
        return _unpatchify(patches, cond.shape[2], cond.shape[3]) + cond * scale + shift


def _unpatchify(patches: Tensor, height: int, width: int) -> Tensor:
    """Return [B, C, H, W] of patches [B, H/2 * W/2, 2 * 2 * C]."""
    grid = patches.unflatten(1, (height // PATCH, -1)).unflatten(-1, (PATCH, PATCH, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)
