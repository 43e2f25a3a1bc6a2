"""Keep what the shipped models have in common once: equal weight files become relative links.

The same text tower serves both of SD3's CLIP slots, both of SDXL's, FLUX's one and the CLIP pair,
with its projection or without. So it lies in a file of its own, as a shard of a sharded checkpoint,
and every folder stays one that stock ``from_pretrained`` loads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_TOWER, _PROJECTION = "text_model.", "text_projection."


def share(models: Path) -> None:
    """Split the CLIP checkpoints under ``models``, then link every weight file that is there twice.

    Folders come in the order of their names, but ``sd3``, which has every shared part, first.

    Args:
        models: folder of pipelines' folders, and of ``clip``.
    """
    for file in models.glob("*/text_encoder*/model.safetensors"):
        if not file.is_symlink():
            _split(file, lambda key: int(key.startswith(_PROJECTION)))
    if (models / "clip" / "model.safetensors").is_file():
        _split(models / "clip" / "model.safetensors", _part_of_pair)
    first: dict[str, Path] = {}
    files = [path.relative_to(models) for path in models.rglob("*.safetensors")]
    for file in (models / path for path in sorted(files, key=lambda p: (p.parts[0] != "sd3", p))):
        if file.is_symlink():
            continue
        origin = first.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
        if origin is not file:
            file.unlink()
            file.symlink_to(os.path.relpath(origin, file.parent))


def _part_of_pair(key: str) -> int:
    return 0 if key.startswith(_TOWER) else 1 if key.startswith(_PROJECTION) else 2


def _split(file: Path, part: Callable[[str], int]) -> None:
    """Replace a CLIP checkpoint by shards, `part` of a key counted from 0; T5's is left alone."""
    tensors = load_file(file)
    if any(key.startswith("encoder.block") for key in tensors):
        return
    if not any(key.startswith(_TOWER) for key in tensors):
        tensors = {_TOWER + key: value for key, value in tensors.items()}  # a plain text tower
    shards: dict[int, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        shards.setdefault(part(key), {})[key] = tensors[key]
    file.unlink()
    names = {
        at: f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else file.name
        for at in shards
    }
    for at, shard in shards.items():
        save_file(shard, file.with_name(names[at]), metadata={"format": "pt"})
    if len(shards) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        where = {key: names[at] for at, shard in shards.items() for key in shard}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        file.with_name("model.safetensors.index.json").write_text(text, encoding="utf-8")
