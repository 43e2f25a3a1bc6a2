"""Weak heads: small models that predict the gap of classifier-free guidance."""

from __future__ import annotations

if __name__ == "weak_heads":  # pragma: no cover
    raise ImportError("import core2_sampler.weak_heads, not the folder by its bare name")

import json
from pathlib import Path
from typing import TYPE_CHECKING

from core2_sampler.registry import Registry

if TYPE_CHECKING:
    from core2_sampler.weak_heads.base import WeakHead

HEADS: Registry[type[WeakHead]] = Registry(
    "weak head",
    {
        "adapter": "core2_sampler.weak_heads.adapter:AdapterHead",
        "affine": "core2_sampler.weak_heads.controls:AffineHead",
        "cond": "core2_sampler.weak_heads.controls:CondHead",
        "conv": "core2_sampler.weak_heads.conv:ConvHead",
        "last_gap": "core2_sampler.weak_heads.controls:LastGapHead",
        "official": "core2_sampler.weak_heads.official:OfficialHead",
        "patch": "core2_sampler.weak_heads.patch:PatchHead",
        "tap": "core2_sampler.weak_heads.tap:TapHead",
    },
)
"""Every weak head by name, imported on first use."""


def load_head(path: str | Path, family: str | None = None) -> WeakHead:
    """Load a weak head of any registered class from a folder that ``save_pretrained`` wrote.

    Args:
        path: folder with ``config.json`` and the weights.
        family: family of the denoiser it is wanted for; None accepts every family.

    Returns:
        The head, in eval mode.

    Raises:
        ValueError: if the folder or its config is missing, the class is unknown or the head was
            made for another family.
    """
    folder = Path(path)
    config_file = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"a weak head must be a folder, got {folder}, which is not there")
    if not config_file.is_file():
        raise ValueError(
            f"a weak head's folder must hold config.json, got {folder} without one: give the "
            "folder that save_pretrained wrote"
        )
    try:
        name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise ValueError(f"{config_file} must be a JSON object, got other text") from None
    classes = {HEADS.get(key).__name__: HEADS.get(key) for key in HEADS.names()}
    if name not in classes:
        raise ValueError(
            f"{config_file} must name a weak head class in _class_name, got {name!r}: known are "
            f"{', '.join(sorted(classes))}"
        )
    head = classes[name].from_pretrained(folder)
    if family is not None:
        head.check_family(family)
    return head
