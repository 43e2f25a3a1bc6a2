"""torch.compile and attention backends for a denoiser's network, in place.

The module and its class stay what they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    network._repeated_blocks = repeated_blocks(module)  # of this instance
    network.compile_repeated_blocks(**options)


def repeated_blocks(module: nn.Module) -> list[str]:
    """Return the classes of a diffusers network's repeated blocks.

    Args:
        module: the network.
    """
    named: Any = getattr(module, "_repeated_blocks", None)
    return list(named or _BLOCKS.get(type(module).__name__, ()))


_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""torch's own kernels by diffusers' names."""


def set_attention(module: nn.Module, backend: str) -> SDPBackend | None:
    """Switch a diffusers network to an attention backend, by diffusers' own switch if it asks it.

    Args:
        module: the network.
        backend: one of ``diffusers.models.attention_dispatch.AttentionBackendName``.

    Returns:
        None where the switch is all; for a network whose attention calls torch itself, what is to
        be chosen around each call, see `with_kernel`.

    Raises:
        ValueError: unknown backend, or for such a network one that is not torch's.
    """
    processors = [getattr(part, "processor", None) for part in module.modules()]
    if any(hasattr(processor, "_attention_backend") for processor in processors):
        cast(Any, module).set_attention_backend(backend)
        return None
    if backend not in _KERNELS:
        raise ValueError(
            f"attention must be one of {', '.join(_KERNELS)} for a network whose attention calls "
            f"torch itself, got {backend!r} for {type(module).__name__}"
        )
    return _KERNELS[backend]


def with_kernel(kernel: SDPBackend | None) -> AbstractContextManager[None]:
    """Let torch's attention use a kernel, and plain products where that cannot; None leaves it."""
    return nullcontext() if kernel is None else sdpa_kernel([kernel, SDPBackend.MATH])
