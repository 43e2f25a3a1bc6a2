"""One denoiser out of several stages of its training: the plain mean of their weights.

Networks that one training has passed through lie in one basin, where the mean of their weights is
often better than each of them (model soups, arXiv 2203.05482; WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core2_sampler.json_files import read_json
from core2_sampler.weights import weight_files

_DENOISERS = ("transformer", "unet")


def average(folders: Sequence[Path], out: Path) -> None:
    """Write a pipeline whose denoiser is the mean of those of several.

    The mean is taken in float64 and rounded to the dtype of the first; all else is the last's.

    Args:
        folders: of two or more trained pipelines, as ``from_pretrained`` loads them.
        out: the new pipeline's folder, which must not exist; it appears as a whole or not at all.

    Raises:
        ValueError: if there are fewer than two, one is no pipeline, their denoisers differ in
            more than their weights, or ``out`` exists.
    """
    if len(folders) < 2:
        raise ValueError(f"folders must be two trained pipelines or more, got {len(folders)}")
    if out.exists():
        raise ValueError(f"out must not exist yet, got {out}: remove it, or take another")
    name = _denoiser(folders[0])
    first = _description(folders[0] / name)
    for folder in folders[1:]:
        if _denoiser(folder) != name or _description(folder / name) != first:
            raise ValueError(
                "folders must be stages of one training, got denoisers of another class, config "
                f"or shape in {folders[0]} and {folder}"
            )
    mean = _mean([folder / name for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        shutil.copytree(folders[-1], new)
        for variant in set((new / name).glob("*.safetensors")) - set(_files(new / name)):
            variant.unlink()  # not of the mean
        for file in _files(new / name):
            tensors = {key: mean[key] for key in load_file(file)}
            save_file(tensors, file, metadata={"format": "pt"})
        new.rename(out)


def _denoiser(folder: Path) -> str:
    """Return the name of a pipeline's denoiser: that of its folder."""
    found = [name for name in _DENOISERS if _files(folder / name)]
    if not (folder / "model_index.json").is_file() or not found:
        raise ValueError(
            f"folders must be those of trained pipelines, got {folder} without model_index.json "
            "or the weights of a denoiser"
        )
    return found[0]


def _files(folder: Path) -> list[Path]:
    return [file for file in weight_files(folder) if file.suffix == ".safetensors"]


def _description(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return a network's config and the shape of every weight, none of which is loaded."""
    config = read_json(folder / "config.json")
    told = {key: value for key, value in config.items() if key == "_class_name" or key[0] != "_"}
    shapes: dict[str, list[int]] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return told, shapes


def _mean(networks: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the networks' weights, in the first's dtype."""
    dtypes: dict[str, torch.dtype] = {}
    total: dict[str, Tensor] = {}
    for folder in networks:
        for path in _files(folder):
            for key, value in load_file(path).items():
                dtypes.setdefault(key, value.dtype)
                total[key] = total.get(key, 0) + value.double()
    return {key: (total[key] / len(networks)).to(dtypes[key]) for key in total}
