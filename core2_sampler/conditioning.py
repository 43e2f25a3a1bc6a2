"""Encoded prompts: both sides of guidance as one batch, and what tells one prompt from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from core2_sampler.types import Conditioning

Stamp = tuple[tuple[int, int | None], ...]
"""See `stamp`."""


def stamp(*tensors: Tensor) -> Stamp:
    """Return what tells tensors from others, and from themselves before an edit in place.

    Args:
        *tensors: the caller keeps them, so that no other tensor takes their place in memory.

    Returns:
        An identity and a count of edits each; None for inference tensors, which do not count.
    """
    return tuple((id(x), None if x.is_inference() else x._version) for x in tensors)


def join(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """Return both prompts as one batch, negative first, as diffusers lays it out.

    Args:
        uncond: the negative prompt, B rows.
        cond: the prompt, B rows.

    Returns:
        The batch of 2B rows; tensors in ``extra``, also inside lists and dicts, are joined too,
        other values are cond's.
    """
    return Conditioning(
        torch.cat([uncond.prompt_embeds, cond.prompt_embeds]),
        torch.cat([uncond.pooled, cond.pooled]),
        _join_extra(uncond.extra, cond.extra),
    )


def _join_extra(uncond: Mapping[str, Any], cond: Mapping[str, Any]) -> dict[str, Any]:
    if uncond.keys() != cond.keys():
        raise ValueError(
            f"cond and uncond must carry the same extra arguments, got {sorted(cond)} and "
            f"{sorted(uncond)}"
        )
    return {name: _join_value(uncond[name], value) for name, value in cond.items()}


def _join_value(uncond: Any, cond: Any) -> Any:
    if isinstance(cond, Tensor):
        return torch.cat([uncond, cond])
    if isinstance(cond, Mapping):
        return _join_extra(uncond, cond)
    if isinstance(cond, list | tuple):
        return type(cond)(_join_value(u, c) for u, c in zip(uncond, cond, strict=True))
    return cond
