"""The contract of scorers, and what their implementations share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from core2_sampler.benchmarks.cache import digest, hash_component
from core2_sampler.benchmarks.fetch import unreachable

Images = Sequence[Image.Image]
Source = str | Path | None

_MLP_WIDTHS = (1024, 128, 64, 16)


class Scorer(Protocol):
    """Judges images, each against its own prompt.

    Attributes:
        key: names the variant and everything that changes a score: model, weights, preprocessing,
            formula, dtype. Scores under one key may be compared, others not.
    """

    key: str

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, float32 on the CPU, [B]; higher is better.

        A score depends on its own pair alone, whatever else is in the batch.

        Raises:
            ValueError: if there is not one prompt an image, or a prompt cannot be judged.
        """
        ...


class Loader(Protocol):
    """What the registry holds: makes a scorer."""

    def load(
        self, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Scorer:
        """Return the scorer.

        Args:
            source: folder, hub id or command, as the scorer says; None takes the published one.
            device: of the model, where the scorer has one of its own.
            dtype: of the model's weights; what follows the model is float32.

        Raises:
            ValueError: if the source is not there, or cannot be reached.
            ModuleNotFoundError: if a package of the extra ``bench`` is missing.
        """
        ...


def need(what: str, *packages: str) -> None:
    """Raise ModuleNotFoundError if a package that something needs is missing; none is imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{what} needs {package}: pip install 'core2-sampler[bench]'")


def pairs(images: Images, prompts: Sequence[str]) -> list[Image.Image]:
    """Return the images as RGB, after a check that every one has its prompt.

    Raises:
        ValueError: if the numbers differ or are 0.
    """
    if not images or len(images) != len(prompts):
        raise ValueError(
            f"every image must have one prompt, got {len(images)} images and {len(prompts)} prompts"
        )
    return [image.convert("RGB") for image in images]


def make_key(name: str, **parts: Any) -> str:
    """Return a scorer's key: its name, then every part that changes a score, sorted."""
    return ";".join([name, *(f"{part}={parts[part]}" for part in sorted(parts))])


def model_parts(model: nn.Module, processor: Any = None) -> dict[str, str]:
    """Return the key's parts of a model and its image processor: hashes and the dtype."""
    parts = {
        "weights": hash_component(model)[:16],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if processor is not None:
        parts["preprocess"] = digest(processor.to_json_string())
    return parts


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn the many ways in which a hub download fails into one clear error."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, OSError) as error:
        raise unreachable(what, error) from error


def place(model: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a model on its device, in its dtype, for inference only."""
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint from safetensors, or from a pickle that may hold weights only."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def first_file(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that fits a pattern.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} must hold one file {pattern}, got {len(found)}")
    return found[0]


class AffineMlp(nn.Module):
    """Five linear layers without activations, as LAION's aesthetic predictor and ImageReward have.

    Args:
        width: of the input; the others are 1024, 128, 64, 16 and 1.

    Reference:
        christophschuhmann/improved-aesthetic-predictor; its dropout does nothing in inference, but
        takes the places 1, 3 and 5 in the names of the weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, *_MLP_WIDTHS, 1)
        linear = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        dropout = [[nn.Identity()], [nn.Identity()], [nn.Identity()], [], []]
        layers = [m for layer, gap in zip(linear, dropout, strict=True) for m in (layer, *gap)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a row of ``x`` [B, width], [B]."""
        return self.layers(x)[:, 0]
