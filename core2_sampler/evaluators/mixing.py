"""How several evaluators become one score."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 0.1  # of a score, as the printed formula's divisor
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


def adaptive_weights(scores: Tensor, before: Tensor | None, *, upstream: bool = False) -> Tensor:
    """Return the weight of each evaluator for each sample: its relative gain since the last step.

    The paper's ``(e_t - e_{t+1}) / e_{t+1}`` depends on where an evaluator's scores have their
    zero, which no training by comparisons fixes. Here a gain is relative to how far the candidates
    moved: with ``m_k`` the score of candidate k less the mean score of the step before, it is
    ``mean(m) / sqrt(mean(m^2))``. That is the mean move alone where candidates agree (1) and
    nothing where their spread hides it (0), and it is the same for ``a e + b`` with any a > 0.
    A loss counts as 0, and so do moves that are rounding errors. Weights sum to 1; where nothing
    gained they are equal, as in the first step.

    Args:
        scores: of the candidates, [E, K, B].
        before: their mean in the step before, [E, B]; the paper's weight has no index of them.
            None in the first step.
        upstream: the paper's formula as printed, of mean scores, with a divisor of 0.1 at least.

    Returns:
        Weights, [E, B].

    Reference:
        arXiv 2509.16131: the adaptive combination of evaluators.
    """
    equal = torch.full_like(scores[:, 0], 1 / len(scores))
    if before is None:
        return equal
    gain = scores.mean(1) - before  # [E, B]
    if upstream:
        return gain / before.abs().clamp(min=_LEAST).copysign(before)
    size = (scores - before[:, None]).square().mean(1).sqrt()
    least = _ROUNDING * before.abs().clamp(min=1)
    gain = torch.where(size > least, gain / size.maximum(least), 0).clamp(min=0)
    total = gain.sum(0)  # [B]
    return torch.where(total > 0, gain / total.clamp(min=torch.finfo(gain.dtype).tiny), equal)
