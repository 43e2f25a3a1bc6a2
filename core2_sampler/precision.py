"""Precisions by name; and that of the maths: float32 at least, whatever the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions of weights by name."""


def pick_dtype(name: str, device: str) -> str:
    """Return the precision of weights that ``auto`` stands for: bf16 on CUDA, fp32 elsewhere."""
    if name != "auto":
        return name
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or the dtype of ``x`` if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is wider."""
    return x.to(wide_dtype(x))
