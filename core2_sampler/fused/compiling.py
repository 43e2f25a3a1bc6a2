"""torch.compile and attention backends for a denoiser's network, in place.

The module and its class stay what they are.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from torch import nn

from core2_sampler.registry import unknown_name

How = Literal["regional", "full"]

_BLOCKS = {"SD3Transformer2DModel": ["JointTransformerBlock"]}
"""Repeated blocks of networks whose class does not name them."""

_WHOLE = ("UNet2DConditionModel",)
"""Networks that ``regional`` compiles whole: their repeated blocks are a small part of them."""


def check_how(how: str) -> None:
    """Raise ValueError for an unknown way to compile."""
    if how not in get_args(How):
        raise unknown_name("way to compile", how, get_args(How))


def compile_network(module: nn.Module, how: How, **options: Any) -> None:
    """Compile a diffusers network in place.

    Args:
        module: the network.
        how: ``regional`` compiles each repeated block once, ``full`` the whole network.
        **options: of ``torch.compile``; ``fullgraph`` is True unless it is given.

    Raises:
        ValueError: unknown `how`, or a network that names no repeated blocks.
    """
    check_how(how)
    options = {"fullgraph": True, **options}
    name = type(module).__name__
    if how == "full" or name in _WHOLE:
        module.compile(**options)
        return
    network = cast(Any, module)
    if name in _BLOCKS and not network._repeated_blocks:
        network._repeated_blocks = _BLOCKS[name]  # of this instance
    network.compile_repeated_blocks(**options)


def set_attention(module: nn.Module, backend: str) -> None:
    """Switch a diffusers network to an attention backend, by diffusers' own switch.

    Args:
        module: the network.
        backend: one of ``diffusers.models.attention_dispatch.AttentionBackendName``.

    Raises:
        ValueError: unknown backend, or a network whose attention does not ask which one is set:
            the switch would do nothing.
    """
    processors = [getattr(part, "processor", None) for part in module.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            "attention must be None for a network whose attention calls torch itself, got "
            f"{backend!r} for {type(module).__name__}: choose torch's kernel around the call, with "
            "torch.nn.attention.sdpa_kernel(...)"
        )
    cast(Any, module).set_attention_backend(backend)
