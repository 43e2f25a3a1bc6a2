"""Hashes of what makes an image, and files of final latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from core2_sampler.atomic import write_atomic

_NOT_CONFIG = {
    "_name_or_path",
    "_diffusers_version",
    "_use_default_values",
    "transformers_version",
    "dtype",
    "torch_dtype",
}


def digest(*parts: Any) -> str:
    """Return 16 hex digits that name ``parts``, which must be JSON."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_pipeline(pipe: Any) -> str:
    """Hash weights, configs and vocabularies of everything in a pipeline but its weak head."""
    parts = {n: hash_component(c) for n, c in pipe.components.items() if n != "weak_head"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_component(component: Any) -> str:
    """Hash what decides a component's results: its class, config, weights and vocabulary."""
    digest = hashlib.sha256(type(component).__name__.encode())
    config = getattr(component, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in config.items() if key not in _NOT_CONFIG}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    if hasattr(component, "get_vocab"):
        digest.update(json.dumps(component.get_vocab(), sort_keys=True).encode())
    if isinstance(component, nn.Module):
        for name, tensor in sorted(component.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def write_latents(folder: Path, keys: Sequence[str], latents: Tensor) -> None:
    """Keep final latents [B, ...] of a batch in one file, under the keys of its images."""
    data = save({"latents": latents.contiguous()}, {"keys": json.dumps(list(keys))})
    write_atomic(folder / f"{digest(list(keys))}.safetensors", data)


def read_latents(folder: Path) -> dict[str, Tensor]:
    """Return all final latents that a folder keeps, by the key of their image."""
    kept: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys, latents = json.loads(file.metadata()["keys"]), file.get_tensor("latents")
        kept |= dict(zip(keys, latents, strict=True))
    return kept
