"""Linear layers in float8, by torchao: the products of tokens on GPUs that multiply in it.

Each weight, and in each call each input, gets one scale; sums stay in float32. What sees one row an
image (modulation, embeddings of time and pooled prompt) and what is first and last stays as it is.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from core2_sampler.fused.compiling import repeated_blocks
from core2_sampler.fused.keys import carries_adapters
from core2_sampler.fused.modulation import NORMS

_CAPABILITY = (8, 9)
_MULTIPLE = 16
"""Both sides of a float8 product's matrix are multiples of this."""


def check_float8(module: nn.Module) -> None:
    """Refuse a network that cannot compute in float8 here.

    Args:
        module: a diffusers network.

    Raises:
        ValueError: no such GPU, no torchao, weights that are not bfloat16, adapters on the network,
            or no layer to convert.
    """
    device, dtype = (getattr(next(module.parameters()), name) for name in ("device", "dtype"))
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY
    if not capable:
        raise ValueError(
            "fp8 must run on a GPU of compute capability 8.9 or above (Ada, Hopper), got "
            f"{device}: leave it off"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("fp8 must find torchao, got none: pip install torchao")
    check_layers(module, dtype)


def check_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Do what `check_float8` does about the network itself."""
    if dtype != torch.bfloat16:
        raise ValueError(f"fp8 must start from bfloat16 weights, got {dtype}: load them in that")
    if carries_adapters(module):
        raise ValueError(
            "fp8 must have a network without adapters, got some: fuse_lora() and "
            "unload_lora_weights() first"
        )
    if not float8_layers(module):
        raise ValueError(
            "fp8 must find linear layers of plain weights in the network's repeated blocks, got "
            f"none in {type(module).__name__}: leave it off, also where it is converted already"
        )


def float8_layers(module: nn.Module) -> list[str]:
    """Return the names of the linear layers to convert: those of repeated blocks that see tokens.

    Args:
        module: a diffusers network.
    """
    names, kinds = [], repeated_blocks(module)
    for block_name, block in module.named_modules():
        if type(block).__name__ not in kinds:
            continue
        modulation = {id(part.linear) for part in block.modules() if type(part).__name__ in NORMS}
        names += [
            f"{block_name}.{name}"
            for name, part in block.named_modules()
            if type(part) is nn.Linear
            and type(part.weight) is nn.Parameter
            and id(part) not in modulation
            and not (part.in_features % _MULTIPLE or part.out_features % _MULTIPLE)
        ]
    return names


def convert_to_float8(module: nn.Module) -> None:
    """Convert a network's large linear layers, in place and for good.

    Args:
        module: that `check_float8` takes; not compiled yet, or to be compiled anew.
    """
    torchao: Any = importlib.import_module("torchao.quantization")
    names = frozenset(float8_layers(module))
    config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerTensor())
    torchao.quantize_(module, config, filter_fn=lambda _part, name: name in names)
