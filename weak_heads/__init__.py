"""Weak heads: small models that predict the gap of classifier-free guidance."""

from __future__ import annotations

if __name__ == "weak_heads":  # pragma: no cover
    raise ImportError("import core2_sampler.weak_heads, not the folder by its bare name")

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from core2_sampler.json_files import find_file
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


def load_head(
    source: str | Path,
    family: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
) -> WeakHead:
    """Load a weak head of any registered class, as ``save_pretrained`` wrote it.

    Args:
        source: folder with ``config.json`` and the weights, or else a hub id ``owner/name``; a
            ``Path`` is a folder.
        family: family of the denoiser it is wanted for; None accepts every family.
        subfolder: of the folder or repository, in which the head lies.
        revision: of the repository: a branch, tag or commit; None is the main branch.

    Returns:
        The head, in eval mode. From a `subfolder` or `revision` of the hub it goes by its folder in
        the local cache, because the id would mean another one.

    Raises:
        ValueError: if there is neither folder nor repository, the config is missing, the class is
            unknown or the head was made for another family.
        OSError: if there are no weights in safetensors.
    """
    inside = f"{subfolder}/" if subfolder else ""
    config_file = _find(source, f"{inside}config.json", revision)
    head_class = _class_of(config_file)
    if Path(source).is_dir():
        head = head_class.from_pretrained(config_file.parent)
    else:
        head = head_class.from_pretrained(source, subfolder=subfolder, revision=revision)
        if subfolder or revision:
            with suppress(ValueError):  # not every head has a card
                _find(source, f"{inside}card.json", revision)
            head.register_to_config(_name_or_path=str(config_file.parent))
    if family is not None:
        head.check_family(family)
    return head


def _find(source: str | Path, path: str, revision: str | None) -> Path:
    return find_file(str(source), source, path, kind="weak head", revision=revision)


def _class_of(config_file: Path) -> type[WeakHead]:
    """Return the class that a head's config names."""
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
    return classes[name]
