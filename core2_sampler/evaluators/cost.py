"""What online feedback costs at full size: counted on the meta device, as a share of CFG."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.full_size import FullSize, example_call


def score_flops(model: FullSize, kind: str, **sizes: Any) -> int:
    """Return the FLOPs of scoring the latents of one image of 1024 x 1024 px once.

    Two for each multiplication with addition of matrix products and convolutions; nothing else.

    Args:
        model: an entry of `core2_sampler.full_size.FULL_SIZE`.
        kind: of evaluator.
        sizes: see `LatentEvaluator.for_model`.
    """
    call = example_call(model)
    evaluator = LatentEvaluator.for_model(kind, model.family, call.x, call.prompt, **sizes).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        evaluator(call.x, call.sigma, call.prompt)
    return counter.get_total_flops()


def online_share(
    model: FullSize, pass_flops: int, kinds: Iterable[str], candidates: int = 5, **sizes: Any
) -> float:
    """Return what an online scale adds to a run of CFG, as a share of its FLOPs.

    Args:
        model: an entry of `core2_sampler.full_size.FULL_SIZE`.
        pass_flops: of one pass of its denoiser; a step of CFG makes two.
        kinds: of the evaluators, all of which score every candidate.
        candidates: how many scales are tried in each step.
        sizes: see `LatentEvaluator.for_model`.
    """
    return candidates * sum(score_flops(model, kind, **sizes) for kind in kinds) / (2 * pass_flops)
