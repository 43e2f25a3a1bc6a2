"""What a result depends on besides its seed: versions, device, attention backends."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
OPTIONAL = ("torchvision", "xformers", "open_clip_torch", "peft", "gradio")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that images depend on."""
    import torch

    from core2_sampler import __version__

    found = {"python": platform.python_version(), "core2_sampler": __version__}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with the build, such as +cpu, that pip leaves out


def pick_device(name: str = "auto") -> str:
    """Return ``name``, or for ``auto`` the best device here.

    Args:
        name: ``auto`` or a torch device such as ``cuda:1``.

    Raises:
        ValueError: if there is no such device here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"device must be one of this machine, got {name!r} ({text})") from None
    return name


def describe_device(name: str) -> str:
    """Return a device's name with the hardware behind it, for records of results."""
    import torch

    kind = torch.device(name).type
    if kind == "cuda":
        return f"{name} ({torch.cuda.get_device_name(name)})"
    return f"{name} ({torch.get_num_threads()} threads)" if kind == "cpu" else name


def attention_backends() -> list[str]:
    """Return the attention backends of diffusers whose packages are installed here."""
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
    )

    usable = []
    for backend in AttentionBackendName:
        try:
            _check_attention_backend_requirements(backend)
        except (RuntimeError, ImportError):
            continue
        usable.append(backend.value)
    return sorted(usable)


def check_torchvision() -> None:
    """Check that a torchvision, if there is one, fits torch; transformers fails on another.

    Raises:
        ValueError: if it does not.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except (ImportError, RuntimeError, OSError) as error:
        found = versions()
        raise ValueError(
            f"torchvision must be built for the torch beside it, got {found.get('torchvision')} "
            f"with torch {found.get('torch')} ({str(error).splitlines()[0]}): install both from "
            "one index, or uninstall torchvision"
        ) from error


def environment(device: str) -> dict[str, Any]:
    """Return versions and device as they go into every result's record."""
    return {"device": describe_device(device), "versions": versions()}
