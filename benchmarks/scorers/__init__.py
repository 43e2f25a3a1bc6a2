"""Scorers: judges of (image, prompt) pairs, each by name and loaded on first use."""

from __future__ import annotations

from core2_sampler.benchmarks.scorers.base import Loader
from core2_sampler.registry import Registry, unknown_name

_HERE = "core2_sampler.benchmarks.scorers"

SCORERS: Registry[Loader] = Registry(
    "scorer",
    {
        "aes": f"{_HERE}.aes:AesScorer",
        "blipvqa": f"{_HERE}.blipvqa:BlipVqaScorer",
        "clipscore": f"{_HERE}.clip:CLIPSCORE",
        "clipscore-gaeval": f"{_HERE}.clip:CLIPSCORE_GAEVAL",
        "clipscore-hessel": f"{_HERE}.clip:CLIPSCORE_HESSEL",
        "hpsv21": f"{_HERE}.hpsv21:HpsScorer",
        "imagereward": f"{_HERE}.imagereward:ImageRewardScorer",
        "pickscore": f"{_HERE}.clip:PICKSCORE",
        "plugin": f"{_HERE}.plugin:PluginScorer",
        "shapes": f"{_HERE}.shapes:ShapesScorer",
        "shapes-clip": f"{_HERE}.shapes:ShapesClip",
        "t2icompbench-clip": f"{_HERE}.clip:T2ICOMPBENCH_CLIP",
    },
)
"""Every scorer by name; ``SCORERS.get(name).load()`` makes one."""

T2ICOMPBENCH = {
    "color": "blipvqa",
    "shape": "blipvqa",
    "texture": "blipvqa",
    "non_spatial": "t2icompbench-clip",
}
"""Scorer of each category of T2I-CompBench that does not need UniDet."""

_UNIDET = ("spatial", "3d_spatial", "numeracy", "complex")


def t2icompbench_scorer(category: str) -> str:
    """Return the name of the scorer that T2I-CompBench uses for a category.

    Raises:
        ValueError: if the category needs UniDet, which has no port here, or is unknown.

    Reference:
        T2I-CompBench (arXiv 2307.06350); ``complex`` also has prompts that UniDet judges.
    """
    if category in T2ICOMPBENCH:
        return T2ICOMPBENCH[category]
    if category in _UNIDET:
        raise ValueError(
            f"category {category!r} of T2I-CompBench is not supported: it is judged by the UniDet "
            f"detector; supported are {', '.join(T2ICOMPBENCH)}"
        )
    raise unknown_name("T2I-CompBench category", category, [*T2ICOMPBENCH, *_UNIDET])
