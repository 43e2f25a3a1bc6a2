"""The authors' head: PromptSD35Net and PromptSDXLNet, with one LoRA a step of their schedule.

Reference:
    The code released with CoRe^2, arXiv 2503.09662. Its checkpoints become heads by
    `core2_sampler.weak_heads.official_import`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional as F

from core2_sampler.conditioning import Stamp, stamp
from core2_sampler.precision import wide
from core2_sampler.types import Conditioning, Denoiser
from core2_sampler.weak_heads.base import WeakHead, network_config, sdxl_pooled_dim
from core2_sampler.weak_heads.official_net import (
    HEAD_DIM,
    MAX_LAYERS,
    MAX_SIDE,
    PATCH,
    OfficialNet,
    PromptFactors,
    factorise,
)
from core2_sampler.weak_heads.official_release import release_of, trained_levels, upstream_slot


class OfficialHead(WeakHead):
    """The authors' network: from cond and the prompt to guidance, one LoRA a step.

    The network knows one guidance scale, the reference scale s0: its output H is what CFG would
    predict there. Hence ``gap = (H - cond) / (s0 - 1)``: `weak` is H at s0, cond at scale 1, and on
    the line through both at any other scale, which no one has trained it for. The released code
    takes H itself whatever the guidance scale.

    The prompt enters by the singular value decomposition of its tokens together with those of the
    negative prompt, which `begin` or `set_negative` gives; the latents ``x`` do not enter. The
    noise level only chooses the LoRA. With ``upstream`` the numbers are those of the released
    code, whose decomposition takes rows for columns; the weights were most likely trained on that,
    and which of both they serve better has not been measured.

    A head built here (``released`` False) adds the network's zero-initialised output to cond
    instead, so that untrained it means cond, asks for no negative prompt but takes zeros, and fills
    up shorter prompts with zeros.
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        latent_channels: int,
        text_dim: int,
        pooled_dim: int,
        tokens: int,
        num_heads: int,
        num_layers: int,
        num_slots: int,
        lora_rank: int,
        reference_scale: float,
        released: bool = False,
        upstream: bool = False,
    ) -> None:
        """Build the head.

        Args:
            family: ``sd3`` or ``sdxl``.
            latent_channels: C.
            text_dim: width D of the prompt's tokens.
            pooled_dim: width P of the pooled embedding.
            tokens: T of one prompt.
            num_heads: attention heads of width 64.
            num_layers: transformer blocks, 1 to 8.
            num_slots: LoRAs, one for each step of the schedule of training.
            lora_rank: of each LoRA.
            reference_scale: guidance scale of the network's output, above 1.
            released: the network's output is the guided prediction itself, as in the release.
            upstream: reproduce the numbers of the released code.
        """
        super().__init__()
        _check(family, num_layers, reference_scale, released, upstream)
        self.net = OfficialNet(
            latent_channels,
            text_dim,
            pooled_dim,
            tokens,
            num_heads,
            num_layers,
            num_slots,
            lora_rank,
        )
        self._negative: tuple[Tensor, Tensor] | None = None
        self._factors: tuple[Tensor, Tensor, Stamp, PromptFactors] | None = None
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def fit_config(cls, denoiser: Denoiser) -> dict[str, Any]:
        """Return the arguments of the constructor that follow from an SD3 or SDXL denoiser.

        Raises:
            ValueError: if it is of another family.
        """
        release = release_of(denoiser.family)
        config = network_config(denoiser)
        if denoiser.family == "sd3":
            text_dim, pooled_dim = config.joint_attention_dim, config.pooled_projection_dim
        else:
            text_dim, pooled_dim = config.cross_attention_dim, sdxl_pooled_dim(config)
        num_heads = max(1, min(24, text_dim // HEAD_DIM))  # no wider than the prompt
        return super().fit_config(denoiser) | {
            "text_dim": text_dim,
            "pooled_dim": pooled_dim,
            "tokens": release.tokens,
            "num_heads": num_heads,
            "num_layers": release.num_layers,
            "num_slots": release.num_slots,
            "lora_rank": max(1, release.lora_rank * num_heads // 24),
            "reference_scale": release.reference_scale,
        }

    @property
    def needs_negative(self) -> Literal["call", "empty"] | None:
        """As the released code: SD3.5 always the empty prompt, SDXL the one of the call."""
        if not self.config.released:
            return None
        return "empty" if self.config.family == "sd3" else "call"

    def begin(self, sigmas: Sequence[float], negative: Conditioning | None) -> None:
        """Take the noise levels and the negative prompt of the run to come."""
        self.reset()
        self.set_schedule(sigmas)
        if self.needs_negative is None or negative is None:
            self._negative = None
        else:
            self.set_negative(negative.prompt_embeds, negative.pooled)

    def reset(self) -> None:
        """Forget the prompt of an earlier run."""
        self._factors = None

    def set_negative(self, prompt_embeds: Tensor, pooled: Tensor) -> None:
        """Give the encoded negative prompt of the runs to come, up to the next `begin`.

        Args:
            prompt_embeds: token embeddings, [B, T, D] or [1, T, D].
            pooled: pooled embeddings, [B, P] or [1, P].
        """
        self._negative, self._factors = (prompt_embeds, pooled), None

    def set_schedule(self, sigmas: Sequence[float]) -> None:
        """Give the noise levels of the runs to come, [N] without the final one, up to `begin`.

        With ``upstream``, the released code's slot of step i of N is taken where the noise level
        is nearest to that step's. Otherwise it has no effect: a noise level has one slot.
        """
        count = self.config.num_slots
        if self.config.upstream:
            slots = [upstream_slot(i, len(sigmas), count) for i in range(len(sigmas))]
        else:
            sigmas, slots = trained_levels(self.config.family, count), list(range(count))
        self._table = torch.tensor(sigmas, dtype=torch.float32), torch.tensor(slots)

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
        """Return the predicted gap, [B, C, H, W], in float32 so that `weak` rounds to H.

        Args:
            cond: prediction with the prompt, [B, C, H, W], sides even and at most 384.
            x: latents; not used.
            sigma: noise levels, [B].
            prompt_embeds: token embeddings, [B, T, D].
            pooled: pooled embeddings, [B, P].
            features: not used.

        Raises:
            ValueError: if a shape does not fit, or a released SD3.5 head has no negative prompt.
        """
        self.check_latents(cond.shape[1])
        height, width = cond.shape[2:]
        if height % PATCH or width % PATCH or max(height, width) > MAX_SIDE:
            raise ValueError(
                f"latents must have even sides of at most {MAX_SIDE} for this head, got "
                f"{height} x {width}: choose another image size"
            )
        prompt = self._describe(prompt_embeds, pooled)
        output = wide(self.net(cond, self._slot(sigma), prompt))
        change = output - wide(cond) if self.config.released else output
        return change / (self.config.reference_scale - 1)

    def _slot(self, sigma: Tensor) -> Tensor:
        """Return the slot whose noise level is nearest, [B]."""
        if self._table is None:
            self.set_schedule(trained_levels(self.config.family, self.config.num_slots))
        levels, slots = (part.to(sigma.device) for part in cast(tuple[Tensor, Tensor], self._table))
        self._table = levels, slots  # copied to the device once
        return slots[(sigma.float()[:, None] - levels).abs().argmin(1)]

    def _describe(self, prompt_embeds: Tensor, pooled: Tensor) -> PromptFactors:
        """Return the factors of a prompt; those of the latest are kept, as steps share it."""
        known, now = self._factors, stamp(prompt_embeds, pooled)
        if known is None or known[2] != now:
            config = self.config
            tokens = self._fill(prompt_embeds)
            negative, negative_pooled = self._negative_of(tokens, pooled)
            pairs = [[tokens, negative], [pooled, negative_pooled]]
            if config.family == "sdxl":
                pairs = [pair[::-1] for pair in pairs]
            both, both_pooled = (torch.cat(pair, dim=1) for pair in pairs)
            factors = factorise(both, both_pooled, upstream=config.upstream)
            known = self._factors = (prompt_embeds, pooled, now, factors)
        return known[3]

    def _negative_of(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        if self._negative is not None:
            negative, negative_pooled = self._negative
            if len(negative) not in (1, len(tokens)):
                raise ValueError(
                    f"the negative prompt must have 1 row or the prompt's {len(tokens)}, got "
                    f"{len(negative)}: call set_negative for this batch"
                )
            return (
                self._fill(negative.to(tokens)).expand_as(tokens),
                negative_pooled.to(pooled).expand_as(pooled),
            )
        if self.config.released and self.config.family == "sd3":
            raise ValueError(
                "the released SD3.5 head must know the empty prompt's embeddings, got none: call "
                "set_negative(prompt_embeds, pooled) before sampling"
            )
        return torch.zeros_like(tokens), torch.zeros_like(pooled)

    def _fill(self, prompt_embeds: Tensor) -> Tensor:
        """Return [B, T, D] of exactly the head's T."""
        wanted, got = self.config.tokens, prompt_embeds.shape[1]
        if got > wanted or (self.config.released and got < wanted):
            raise ValueError(
                f"prompt_embeds must have {wanted} tokens for this head, got {got}: encode the "
                "prompt with another max_sequence_length"
            )
        return F.pad(prompt_embeds, (0, 0, 0, wanted - got))


def _check(
    family: str, num_layers: int, reference_scale: float, released: bool, upstream: bool
) -> None:
    release_of(family)
    if not 1 <= num_layers <= MAX_LAYERS:
        raise ValueError(f"num_layers must be 1 to {MAX_LAYERS}, got {num_layers}")
    if not reference_scale > 1:
        raise ValueError(f"reference_scale must be above 1, got {reference_scale}")
    if upstream and not released:
        raise ValueError("upstream must be False for a head that is not released, got True")
