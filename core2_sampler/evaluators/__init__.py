"""Latent evaluators: small models that tell good noisy latents from bad, without decoding them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core2_sampler.evaluators.network import LatentEvaluator

_CLASS = "LatentEvaluator"


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the config of a saved evaluator, without its weights.

    Args:
        path: folder that ``save_pretrained`` wrote.

    Raises:
        ValueError: the folder holds no evaluator.
    """
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("_class_name") != _CLASS:
        raise ValueError(
            f"an evaluator must be a folder that `core2 evaluators train` wrote, got {path}"
        )
    return config


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
    read_config(path)
    from core2_sampler.evaluators.network import LatentEvaluator

    evaluator = LatentEvaluator.from_pretrained(path)
    if family is not None:
        evaluator.check_family(family)
    return evaluator
