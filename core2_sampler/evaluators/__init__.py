"""Latent evaluators: small models that tell good noisy latents from bad, without decoding them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core2_sampler.evaluators.network import LatentEvaluator


def load_evaluator(path: str | Path, family: str | None = None) -> LatentEvaluator:
    """Load an evaluator from a folder that ``save_pretrained`` wrote.

    Args:
        path: folder with ``config.json`` and the weights.
        family: family of the denoiser it is wanted for; None accepts every family.

    Returns:
        The evaluator, in eval mode.

    Raises:
        ValueError: the folder holds no evaluator, or one of another family.
    """
    from core2_sampler.evaluators.network import LatentEvaluator

    file = Path(path) / "config.json"
    try:
        name = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name != LatentEvaluator.__name__:
        raise ValueError(
            f"an evaluator must be a folder that `core2 evaluators train` wrote, got {path}"
        )
    evaluator = LatentEvaluator.from_pretrained(path)
    if family is not None:
        evaluator.check_family(family)
    return evaluator
