"""The precision of the maths: float32 at least, whatever the networks run in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or the dtype of ``x`` if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is wider."""
    return x.to(wide_dtype(x))
