"""Which weights a model has: a hash of its files, whatever precision they are loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from core2_sampler.json_files import find_file, read_json


def model_weights(name: str, source: str) -> str:
    """Return 16 hex digits that name the weights of a pipeline, its weak head aside.

    Args:
        name: what the user called the model.
        source: its folder or hub id, loaded before, so that its files are here.

    Raises:
        ConfigError: if it is no diffusers model.
    """
    index = find_file(name, source, "model_index.json", kind="diffusers model")
    components = {key for key, made_by in read_json(index).items() if isinstance(made_by, list)}
    return hash_weights(index.parent / each for each in components - {"weak_head"})


def hash_weights(components: Iterable[Path]) -> str:
    """Return 16 hex digits that name the weights in the folders of components.

    Only files that are loaded by default count: variants such as ``model.fp16.safetensors`` do
    not, nor does ``*.bin`` beside safetensors. Components without weights change nothing.
    """
    digest = hashlib.sha256()
    for folder in sorted(components):
        for file in weight_files(folder):
            with file.open("rb") as content:
                told = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{folder.name}/{file.name} {told}\n".encode())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a component's weights that are loaded by default."""
    for kind in ("*.safetensors", "*.bin"):
        if found := [path for path in folder.glob(kind) if "." not in path.stem]:
            return sorted(found)
    return []
