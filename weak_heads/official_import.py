"""Import the authors' checkpoints: a ``.pth`` file of tensors becomes a head's folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core2_sampler.weak_heads.official import OfficialHead
from core2_sampler.weak_heads.official_net import HEAD_DIM, PATCH, SlotLinear
from core2_sampler.weak_heads.official_release import RELEASES

_FAMILIES = {16: "sd3", 4: "sdxl"}  # by latent channels

_PATHS = {
    "modulation": "norm_out.linear",
    **{f"shifts.{i}": f"pre{8 * (i + 1)}_linear" for i in range(3)},
    **{f"scales.{i}": f"pre{8 * (i + 1)}_linear2" for i in range(3)},
}  # our name of a module -> the release's, at the start

_LAST = {
    **{name: f"attn1.{name}" for name in ("to_q", "to_k", "to_v")},
    "to_out": "attn1.to_out.0",
    "ff_in": "ff.net.0.proj",
    "ff_out": "ff.net.2",
    "inner": "0",
    "norm": "2",
    "outer": "3",
}  # the same, at the end


def import_official(
    checkpoint: str | Path, folder: str | Path, *, upstream: bool = False
) -> OfficialHead:
    """Read a checkpoint of the authors and save it as a weak head.

    Nothing but tensors is read from the file, memory-mapped; their dtypes are kept.

    Args:
        checkpoint: ``sd35_noise_model.pth`` or ``sdxl_noise_model.pth``.
        folder: gets ``config.json`` and the weights.
        upstream: the head reproduces the numbers of the released code.

    Returns:
        The head.

    Raises:
        ValueError: if the file is damaged, holds anything but tensors, or is no such checkpoint.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"the head's folder must be new or a folder, got the file {folder}")
    head = official_from(read_tensors(Path(checkpoint)), upstream=upstream)
    head.save_pretrained(folder)
    return head


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that ``torch.save`` wrote, by name; no code of it is run.

    Raises:
        ValueError: if the file is missing or damaged, or holds anything else.
    """
    if not file.is_file():
        raise ValueError(f"the checkpoint must be a file that exists, got {file}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} must hold tensors and nothing else, got other objects, which may run code "
            "when they are loaded: get the file from its authors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} must be a complete file of torch.save ({reason}): download it again"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{file} must hold tensors by name and nothing else, got other values")
    return dict(found)


def official_from(state: Mapping[str, Tensor], *, upstream: bool = False) -> OfficialHead:
    """Build a head from the tensors of a checkpoint; on the meta device its layout alone.

    Args:
        state: tensors by the authors' names, each with all its LoRAs.
        upstream: the head reproduces the numbers of the released code.

    Raises:
        ValueError: if a tensor is missing, unknown, or of another shape or kind.
    """
    config = read_config(state)
    with torch.device("meta"):
        head = OfficialHead(**config, released=True, upstream=upstream)
    sources = released_names(head)
    _check(state, head, sources)
    weights = {
        name: torch.stack([state[key] for key in keys]) if _is_lora(name) else state[keys[0]]
        for name, keys in sources.items()
    }
    head.load_state_dict(weights, assign=True)
    return head.eval()


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of ``OfficialHead`` that a checkpoint's shapes tell.

    Raises:
        ValueError: if they belong to no head of the authors.
    """
    patch, width = _shape(state, "proj_out.linear.weight")
    family = _FAMILIES.get(patch // PATCH**2)
    if family is None or patch % PATCH**2 or width % HEAD_DIM:
        raise ValueError(
            "proj_out must be that of a head for SD3.5 (64 outputs) or SDXL (16), of a width that "
            f"{HEAD_DIM} divides, got {patch} outputs of {width}: import a checkpoint of CoRe^2"
        )
    text_dim = _shape(state, "skip_connection2.linear.weight")[1]
    pooled = text_dim  # both pooled embeddings, which are a token where no layer makes them one
    if "pool_prompt_linear.linear.weight" in state:
        pooled = _shape(state, "pool_prompt_linear.linear.weight")[1]
    return {
        "family": family,
        "latent_channels": patch // PATCH**2,
        "text_dim": text_dim,
        "pooled_dim": pooled // 2,
        "tokens": (_shape(state, "skip_connection.linear.weight")[1] - 1) // 2,
        "num_heads": width // HEAD_DIM,
        "num_layers": _count(state, r"transformer_blocks\.(\d+)\."),
        "num_slots": _count(state, r"proj_out\.lora\.(\d+)\."),
        "lora_rank": _shape(state, "proj_out.lora.0.A")[1],
        "reference_scale": RELEASES[family].reference_scale,
    }


def released_names(head: OfficialHead) -> dict[str, list[str]]:
    """Return for each tensor of a head the authors' names: one, or one for each LoRA."""
    names = {}
    for name in head.state_dict():
        path, _, kind = name.rpartition(".")
        layer, path = head.get_submodule(path), _released_path(path.removeprefix("net."))
        if not isinstance(layer, SlotLinear):
            names[name] = [f"{path}.{kind}"]
        elif kind in ("weight", "bias"):
            names[name] = [f"{path}.linear.{kind}"]
        else:
            letter = {"down": "A", "up": "B"}[kind]
            names[name] = [f"{path}.lora.{k}.{letter}" for k in range(head.config.num_slots)]
    return names


def _released_path(path: str) -> str:
    for ours, released in _PATHS.items():
        if path == ours or path.startswith(f"{ours}."):
            path = released + path[len(ours) :]
    parent, dot, last = path.rpartition(".")
    return parent + dot + _LAST.get(last, last)


def _check(
    state: Mapping[str, Tensor], head: OfficialHead, sources: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError, with all that is wrong, unless the tensors are exactly the head's."""
    wanted = {
        key: tensor.shape[1:] if _is_lora(name) else tensor.shape
        for name, tensor in head.state_dict().items()
        for key in sources[name]
    }
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    wrong = [
        f"{key} {tuple(state[key].shape)} in place of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    strange = [key for key in state if not state[key].is_floating_point()]
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "of a wrong shape": wrong,
        "not of floating point": strange,
    }
    if any(kinds.values()):
        found = "; ".join(f"{len(v)} {kind} ({_some(v)})" for kind, v in kinds.items() if v)
        raise ValueError(
            f"the checkpoint must have the tensors of the released {head.config.family} head, got "
            f"{found}: import the file as the authors published it"
        )


def _is_lora(name: str) -> bool:
    """Say whether a tensor of a head is that of all slots, stacked."""
    return name.endswith((".down", ".up"))


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """Return the two sides of a matrix.

    Raises:
        ValueError: if it is missing or no matrix.
    """
    shape = tuple(state[key].shape) if key in state else None
    if shape is None or len(shape) != 2:
        raise ValueError(
            f"the checkpoint must have a matrix {key}, got {shape or 'none'}: import a checkpoint "
            "of CoRe^2"
        )
    return shape[0], shape[1]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the highest number in the names that a pattern finds."""
    found = (re.match(pattern, key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
