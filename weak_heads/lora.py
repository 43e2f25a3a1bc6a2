"""The adapter head at one guidance scale as a LoRA file, which stock pipelines load and fuse."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.base import WeakHead

_NETWORKS = {"sd3": "transformer", "sdxl": "unet", "flux": "transformer"}
"""What the stock pipelines call the denoiser of a family."""


def lora_weights(head: WeakHead, guidance_scale: float) -> dict[str, Tensor]:
    """Return an adapter's low-rank changes at one guidance scale, by the names that diffusers has.

    Args:
        head: the adapter.
        guidance_scale: within those it was trained for.

    Returns:
        ``<network>.<layer>.lora_A.weight`` [rank, in, ...] and ``lora_B`` [out, rank, ...]: a layer
        with the weights ``W + lora_B @ lora_A`` is guided at that scale.

    Raises:
        ValueError: if the head is no adapter, was not trained for the scale, or its family is not
            one whose stock pipeline loads a LoRA by these names.

    Reference:
        LoRA, arXiv 2106.09685, eq. 3.
    """
    if not isinstance(head, AdapterHead):
        raise ValueError(
            f"a LoRA must be made of an adapter, got a {type(head).__name__}, which is no change "
            "of weights"
        )
    family = head.config.family
    if family not in _NETWORKS:
        raise ValueError(
            f"a LoRA must be made of a head for {', '.join(_NETWORKS)}, got one for {family}: use "
            "the head itself, with attach"
        )
    strength = head.strength(guidance_scale)
    weights = {}
    for key in head.down:
        layer = f"{_NETWORKS[family]}.{key.replace('/', '.')}"
        weights[f"{layer}.lora_A.weight"] = head.down[key].detach()
        weights[f"{layer}.lora_B.weight"] = strength * head.up[key].detach()
    return weights


def write_lora(head: WeakHead, guidance_scale: float, file: Path) -> None:
    """Write an adapter at one guidance scale as a LoRA for ``load_lora_weights``.

    The stock call is then made without guidance of its own (``guidance_scale=1``; FLUX: no
    ``true_cfg_scale``); after ``fuse_lora`` a pass costs what it costs without a head.

    Args:
        head: the adapter.
        guidance_scale: as in `lora_weights`.
        file: ``*.safetensors``, the ending that the stock loader knows the format by.

    Raises:
        ValueError: as `lora_weights`, or the file has another ending.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"a LoRA file must end in .safetensors, got {file}")
    tensors = {name: x.cpu().contiguous() for name, x in lora_weights(head, guidance_scale).items()}
    write_atomic(file, save(tensors, {"format": "pt", "guidance_scale": f"{guidance_scale:g}"}))
