"""The negative prompt's embeddings, kept from call to call: an unchanged text is encoded once.

They are kept under all that they depend on. Weights are known by where they lie, by their count of
edits, and by their norms: a LoRA that was fused and unloaded has moved nothing and counted nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from core2_sampler.fused.keys import carries_adapters, hook_on, kernels

logger = logging.getLogger(__name__)

Side = tuple[Tensor, Tensor]
"""Token embeddings and pooled ones of the negative prompt."""

Negatives = OrderedDict[Hashable, Side]
"""What is kept, the least recently used one first."""

_CAPACITY = 4

_ARGUMENTS = (
    *("negative_prompt", "negative_prompt_2", "negative_prompt_3"),
    *("clip_skip", "max_sequence_length", "num_images_per_prompt", "batch"),
)


def encode_negative(
    kept: Negatives | None, pipe: Any, call: SimpleNamespace, encode: Callable[[], Side]
) -> Side:
    """Return what ``encode()`` returns; it is not called where that is known.

    Args:
        kept: what is known, and what this adds to; None keeps nothing.
        pipe: the pipeline.
        call: the stock call's arguments by name, with ``batch``.
        encode: encodes the negative prompt.
    """
    zeros = call.negative_prompt is None and pipe.config.get("force_zeros_for_empty_prompt")
    given = call.negative_prompt_embeds is not None
    key = None if kept is None or given or zeros else _key(pipe, call)
    if kept is None or key is None:
        return encode()
    if key not in kept:
        side = encode()
        while len(kept) >= _CAPACITY:
            kept.popitem(last=False)
        kept[key] = side
    kept.move_to_end(key)
    return kept[key]


def encode_sides(
    kept: Negatives | None,
    pipe: Any,
    call: SimpleNamespace,
    encode: Callable[[bool], tuple[Tensor, ...]],
    paired: bool,
) -> tuple[Tensor, ...]:
    """Return what ``encode(paired)`` returns: embeddings, negative, pooled, negative pooled.

    Args:
        kept: see `encode_negative`.
        pipe: the pipeline.
        call: the stock call's arguments by name, with ``batch``.
        encode: encodes the prompt, and the negative prompt too if it is told to.
        paired: whether the negative prompt is wanted.
    """
    if not paired:
        return encode(False)
    both: tuple[Tensor, ...] = ()

    def whole() -> Side:
        nonlocal both
        both = encode(True)
        return both[1], both[3]

    negative, negative_pooled = encode_negative(kept, pipe, call, whole)
    embeds, _, pooled, _ = both or encode(False)
    return embeds, negative, pooled, negative_pooled


def _key(pipe: Any, call: SimpleNamespace) -> Hashable | None:
    """Return all that a negative prompt's embeddings depend on; None where that is not known."""
    encoders = _parts(pipe, "text_encoder")
    for name, encoder in encoders.items():
        if reason := _unsteady(encoder):
            _tell_once(f"the negative prompt is encoded in every call: {name} {reason}")
            return None
    device = pipe._execution_device
    given = call.prompt_embeds  # SDXL cuts the negative prompt to its length
    return (
        tuple(repr(getattr(call, name, None)) for name in _ARGUMENTS),
        None if given is None else (tuple(given.shape), given.dtype),
        device,
        tuple(_words(tokenizer) for tokenizer in _parts(pipe, "tokenizer").values()),
        tuple((name, _weights(encoder)) for name, encoder in encoders.items()),
        (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        torch.is_inference_mode_enabled(),
        kernels(),
    )


def _parts(pipe: Any, prefix: str) -> dict[str, Any]:
    found = {name: part for name, part in pipe.components.items() if name.startswith(prefix)}
    return {name: part for name, part in found.items() if part is not None}


def _unsteady(encoder: nn.Module) -> str | None:
    """Return why equal weights may encode otherwise, or may not be told; None if they do not."""
    if carries_adapters(encoder):
        return "carries adapters"
    # Textual inversion that is unloaded leaves a new table, which has no other mode.
    if any(part.training for part in encoder.modules() if type(part) is not nn.Embedding):
        return "is in training mode (call eval())"
    if any(
        type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_inference()
        for weight in encoder.parameters()
    ):
        return "has weights that cannot be told from others"
    return hook_on(encoder)


def _words(tokenizer: Any) -> Hashable:
    added = tuple(sorted(tokenizer.get_added_vocab().items()))
    return id(tokenizer), tokenizer.model_max_length, added


def _weights(encoder: nn.Module) -> Hashable:
    weights: list[Tensor] = list(encoder.parameters())
    places = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
    with torch.no_grad():
        norms = torch.stack(torch._foreach_norm(weights, 2, torch.float32))
    return id(encoder), places, tuple(norms.tolist())


_tell_once: Callable[[str], None] = cache(logger.warning)
