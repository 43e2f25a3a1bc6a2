"""How several evaluators become one score."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 0.1  # of a score, as a divisor: scores are logits, whose unit is 1
_ROUNDING = 1e-6  # of a score's size: below it, candidates differ by rounding errors alone


def normalised(scores: Tensor) -> Tensor:
    """Return scores with mean 0 and standard deviation 1 over the candidates of each sample.

    So each evaluator has the same say, whatever its unit; scores that are equal up to rounding
    become 0.

    Args:
        scores: [E, K, B].
    """
    mean = scores.mean(1, keepdim=True)
    centred = scores - mean
    spread = centred.square().mean(1, keepdim=True).sqrt()
    least = _ROUNDING * mean.abs().clamp(min=1)
    return torch.where(spread > least, centred / spread.maximum(least), torch.zeros_like(centred))


def mixed(scores: Tensor, weights: Tensor, *, raw: bool = False) -> Tensor:
    """Return the weighted sum of what evaluators say, [K, B].

    Args:
        scores: [E, K, B].
        weights: of each evaluator, [E, 1], or of each for each sample, [E, B].
        raw: take the scores as they are, and not normalised.
    """
    return (weights[:, None] * (scores if raw else normalised(scores))).sum(0)


def adaptive_weights(now: Tensor, before: Tensor | None, *, upstream: bool = False) -> Tensor:
    """Return the weight of each evaluator for each sample: its relative gain since the last step.

    The paper's ``(e_t - e_{t+1}) / e_{t+1}`` weighs a loss negatively, and a gain too where the
    score is negative. Here a gain over a score's size counts, a loss is 0, and weights sum to 1;
    where nothing gained they are equal, as in the first step. The divisor is 0.1 at least.

    Args:
        now: mean score of the candidates, [E, B]; the paper's weight has no index of them.
        before: the same of the step before; None in the first step.
        upstream: the paper's formula as printed, but for the least divisor.

    Returns:
        Weights, [E, B].

    Reference:
        arXiv 2509.16131: the adaptive combination of evaluators.
    """
    equal = torch.full_like(now, 1 / len(now))
    if before is None:
        return equal
    size = before.abs().clamp(min=_LEAST)
    if upstream:
        return (now - before) / size.copysign(before)
    gain = ((now - before) / size).clamp(min=0)
    total = gain.sum(0)  # [B]
    return torch.where(total > 0, gain / total.clamp(min=torch.finfo(now.dtype).tiny), equal)
