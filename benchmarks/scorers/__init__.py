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

ABOUT = {
    "aes": "predictor Apache-2.0, on openai/clip-vit-large-patch14: MIT (openai/CLIP)",
    "blipvqa": "weights BSD-3-Clause (Salesforce/blip-vqa-capfilt-large); run at the size of their "
    "conversion to transformers, where T2I-CompBench runs 480 px",
    "clipscore": "weights MIT (openai/CLIP; openai/clip-vit-large-patch14)",
    "clipscore-gaeval": "weights MIT (openai/CLIP; openai/clip-vit-base-patch16)",
    "clipscore-hessel": "weights MIT (openai/CLIP; openai/clip-vit-base-patch32)",
    "geneval": "weights of the detector: other, as its hub card says "
    "(facebook/mask2former-swin-small-coco-instance); of the colors: MIT (openai/CLIP)",
    "hpsv21": "weights Apache-2.0 (xswu/HPSv2)",
    "imagereward": "weights Apache-2.0 (THUDM/ImageReward)",
    "pickscore": "weights without a stated licence (yuvalkirstain/PickScore_v1), made from a "
    "CLIP-H of MIT (laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
    "shapes": "rules of this package, Apache-2.0",
    "shapes-clip": "weights of this package, Apache-2.0",
    "t2icompbench-clip": "weights MIT (openai/CLIP; openai/clip-vit-base-patch32)",
}
"""Licence of each judge's published weights as far as it is stated, and where it runs otherwise."""

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
