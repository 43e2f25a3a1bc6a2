"""Images reduced to what is resampled: their prompts, by task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def prompt_means(
    values: ArrayLike, clusters: Sequence[str], strata: Sequence[str]
) -> dict[str, Array]:
    """Reduce images to one mean per prompt, grouped by task.

    Args:
        values: one number per image, [n].
        clusters: prompt of each image, n names.
        strata: task of each image, n names.

    Returns:
        Per task, in order of first appearance, the means of its prompts [n_prompts of the task].

    Raises:
        ValueError: if the lengths differ, nothing is given, a value is not finite, a prompt is in
            two tasks, or prompts do not have equally many images.
    """
    data = np.asarray(values, dtype=np.float64)
    if not (data.ndim == 1 and len(data) == len(clusters) == len(strata) and len(data) > 0):
        raise ValueError(
            "values, clusters and strata must be of one length above 0, "
            f"got {data.shape}, {len(clusters)} and {len(strata)}"
        )
    if not np.isfinite(data).all():
        raise ValueError("values must be finite; count a failed image as wrong, do not drop it")
    images: dict[str, list[float]] = {}
    task_of: dict[str, str] = {}
    for value, cluster, stratum in zip(data, clusters, strata, strict=True):
        images.setdefault(cluster, []).append(float(value))
        if task_of.setdefault(cluster, stratum) != stratum:
            raise ValueError(
                f"prompt {cluster!r} is in two tasks: {task_of[cluster]!r}, {stratum!r}"
            )
    sizes = {len(group) for group in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"every prompt must have equally many images, got {sorted(sizes)}")
    means: dict[str, list[float]] = {}
    for cluster, group in images.items():
        means.setdefault(task_of[cluster], []).append(math.fsum(group) / len(group))
    return {task: np.asarray(group) for task, group in means.items()}
