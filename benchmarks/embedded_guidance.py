"""The embedded guidance that a run of FLUX.1-dev amounts to, step by step.

FLUX.1-dev is guided within its single pass, by a number that it embeds. What a method does on top
may be no more than another such number: each prediction is set beside those of the network itself
at the same latents, at one number after another, and the nearest is taken.

This measure is ours: GA-Eval (arXiv 2602.22570) has none for a network without a negative pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.flux import with_guidance
from core2_sampler.precision import wide
from core2_sampler.types import Conditioning, Denoiser

GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)
"""The numbers that are tried, beside the call's own."""


def check_embeds(module: object) -> None:
    """Refuse a network that embeds no guidance.

    Raises:
        ValueError: see above.
    """
    if not getattr(getattr(module, "config", None), "guidance_embeds", False):
        raise ValueError(
            "embedded guidance must be measured on a network that embeds one, as FLUX.1-dev does, "
            f"got {type(module).__name__} that does not: measure its true CFG instead"
        )


def nearest_guidance(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: Prompts, d: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the embedded guidance at which the network's own prediction is nearest to ``d``.

    Args:
        denoiser: of FLUX, with an embedded guidance.
        x: latents, [B, C, H, W].
        sigma: their noise level, [B].
        prompts: the prompt; a negative one is not read.
        d: the method's prediction, as `x`.

    Returns:
        ``(guidance, share)``, [B] each. Share is the distance that is left over that to the
        network at the call's own guidance: 0 where another number is all that the method does (or
        it does nothing), 1 where no other number is nearer.

    Raises:
        ValueError: from `check_embeds`.
    """
    check_embeds(denoiser.module)
    prompt = prompts[0]
    best = prompt.extra["guidance"].clone()  # [B]
    change = left = _distance(d, denoiser(x, sigma, prompt))
    for guidance in GUIDANCES:
        away = _distance(d, denoiser(x, sigma, _embedding(denoiser, prompt, guidance)))
        best = torch.where(away < left, guidance, best)
        left = torch.minimum(away, left)
    return best, torch.where(change > 0, left / change, 0.0)


def _distance(d: Tensor, other: Tensor) -> Tensor:
    return (wide(d) - wide(other)).flatten(1).norm(dim=1)


def _embedding(denoiser: Denoiser, prompt: Conditioning, guidance: float) -> Conditioning:
    embeds, pooled, extra = prompt.prompt_embeds, prompt.pooled, prompt.extra
    return with_guidance(denoiser.module, embeds, pooled, guidance, extra)
