"""Frechet distance between generated and real images of the Shapes world, in its CLIP's features.

Reference: Heusel et al., arXiv 1706.08500 (FID), with other features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from core2_sampler.benchmarks.scorers.clip import ClipScorer, embed_images
from core2_sampler.benchmarks.stats import Array
from core2_sampler.benchmarks.study import Prompt
from core2_sampler.shapes.render import render

REAL_IMAGES = 4
"""Renders of each prompt that generated images are compared with."""

_BATCH = 96


def frechet_distance(features: Array, reference: Array) -> float:
    """Return the squared Frechet distance of two sets as if they were Gaussian.

    ``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))``. With few images it is above that of many, so only
    sets of one size may be compared with each other.

    Args:
        features: [n, D].
        reference: [m, D].

    Raises:
        ValueError: a set has fewer than two images.
    """
    if min(len(features), len(reference)) < 2:
        raise ValueError(
            f"both sets must have at least two images, got {len(features)} and {len(reference)}"
        )
    change = features.mean(0) - reference.mean(0)
    ours, theirs = (np.cov(each, rowvar=False) for each in (features, reference))
    # The product of two covariances has real eigenvalues of at least 0, up to rounding.
    roots = np.sqrt(np.linalg.eigvals(ours @ theirs).real.clip(min=0))
    return float(change @ change + np.trace(ours) + np.trace(theirs) - 2 * roots.sum())


def image_features(scorer: ClipScorer, images: Sequence[Image.Image]) -> Array:
    """Return the unit-length image features of a CLIP scorer, [n, D] float64."""
    parts = [
        embed_images(scorer.model, scorer.processor, images[start : start + _BATCH])
        for start in range(0, len(images), _BATCH)
    ]
    return np.concatenate([part.double().numpy(force=True) for part in parts])


def real_features(scorer: ClipScorer, prompts: Sequence[Prompt]) -> Array:
    """Return the features of `REAL_IMAGES` renders of each prompt, [m, D]."""
    images = [render(prompt, seed) for prompt in prompts for seed in range(REAL_IMAGES)]  # type: ignore[arg-type]
    return image_features(scorer, images)
