"""What of this installation would change a score: activations, resampling, return types, versions.

Nothing is downloaded: a model that is not in the local cache is reported as not checked.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from core2_sampler.benchmarks.geneval.color import CLIP as COLOR_MODEL
from core2_sampler.benchmarks.scorers.clip import (
    CLIPSCORE,
    CLIPSCORE_GAEVAL,
    CLIPSCORE_HESSEL,
    PICKSCORE,
    embed_images,
)
from core2_sampler.benchmarks.scorers.hpsv21 import MEAN, STD, open_clip, preprocess
from core2_sampler.info import check_torchvision

ACTIVATIONS = {
    CLIPSCORE.model: "quick_gelu",
    CLIPSCORE_GAEVAL.model: "quick_gelu",
    CLIPSCORE_HESSEL.model: "quick_gelu",
    PICKSCORE.model: "gelu",
}
"""The activation that each scorer's weights were trained with."""

_PIXELS = 2 / 255  # rounding of one resampled pixel, and a little
_PACKAGES = (
    *("torch", "transformers", "pillow", "scipy"),
    *("open_clip_torch", "torchvision", "spacy"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: whether scores can be trusted as far as this goes; None if it could not be checked.
        means: what was found, and what follows.
    """

    name: str
    ok: bool | None
    means: str


def examine(activations: Mapping[str, str] = ACTIVATIONS) -> list[Check]:
    """Return every finding about this installation.

    Args:
        activations: folder or hub id of each CLIP model, and the activation it must have.
    """
    return [
        *(check_activation(source, wanted) for source, wanted in activations.items()),
        check_open_clip(),
        check_features(),
        check_clip_pixels(),
        check_antialias(),
        check_torchvision_default(),
        *check_versions(),
    ]


def check_activation(source: str, wanted: str) -> Check:
    """Check the activation of a CLIP model's config; a wrong one changes every score silently."""
    from transformers import CLIPConfig

    name = f"activation of {source}"
    try:
        config = CLIPConfig.from_pretrained(source, local_files_only=True)
    except OSError:
        return Check(name, None, f"not in the local cache, so not checked; it must be {wanted}")
    found = {config.text_config.hidden_act, config.vision_config.hidden_act}
    return Check(
        name,
        found == {wanted},
        f"its weights were trained with {wanted}, its config says {' and '.join(sorted(found))}",
    )


def check_open_clip() -> Check:
    """Check that open_clip has GenEval's colour model with the activation it was trained with."""
    name = "open_clip"
    try:
        config = open_clip().get_model_config(COLOR_MODEL)
    except ModuleNotFoundError as error:
        return Check(name, None, f"{error}; HPSv2.1 and GenEval's colours need it")
    quick = bool(config and config.get("quick_gelu"))
    return Check(
        name,
        quick,
        f"{COLOR_MODEL} has QuickGELU: {'yes' if quick else 'no'}; plain ViT-L-14 has not had it "
        "since open_clip 2.29, which changes GenEval's colours",
    )


def check_features() -> Check:
    """Check the embeddings that scorers use against the model's own, on a tiny random model."""
    from transformers import CLIPImageProcessorPil

    model = _tiny_clip()
    size = model.config.vision_config.image_size
    crop = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
    images = [_checkerboard(size), Image.new("RGB", (size, size), "red")]
    ids = torch.tensor([[1, 5, 2], [1, 6, 2]])
    with torch.no_grad():
        own = model(
            input_ids=ids, pixel_values=processor(images, return_tensors="pt").pixel_values
        ).image_embeds
        same = torch.allclose(embed_images(model, processor, images), own, atol=1e-5)
        kind = type(model.get_text_features(input_ids=ids)).__name__
    return Check(
        "CLIP features",
        same,
        f"get_text_features returns {kind}; scripts that take it for a tensor fail from "
        "transformers 5 on. The scorers here "
        + ("agree with the model's own embeddings" if same else "do not agree with the model"),
    )


def check_clip_pixels() -> Check:
    """Check CLIP's image preparation against PIL: bicubic, short side 224, centre crop."""
    from transformers import CLIPImageProcessorPil

    image = _photo(300, 260)
    found = CLIPImageProcessorPil()([image], return_tensors="pt").pixel_values[0]
    short = image.resize((int(224 * 300 / 260), 224), Image.Resampling.BICUBIC)
    left = (short.width - 224) // 2
    crop = np.asarray(short.crop((left, 0, left + 224, 224)), dtype=np.float32) / 255
    wanted = torch.from_numpy((crop - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)
    off = (found - wanted).abs().max().item() * min(STD)
    return Check(
        "CLIP preprocessing",
        off < _PIXELS,
        f"differs from PIL's bicubic by at most {off:.4f} of the range 0..1; all CLIP scorers here "
        "go through PIL, whatever transformers' default backend is",
    )


def check_antialias() -> Check:
    """Check that HPSv2.1's resize averages what it leaves out: a fine checkerboard turns grey."""
    pixels = preprocess(_checkerboard(448), 224) * torch.tensor(STD)[:, None, None]
    spread = pixels[:, 8:-8, 8:-8].std(dim=(1, 2)).max().item()
    return Check(
        "HPSv2.1 antialias",
        spread < _PIXELS,
        f"a checkerboard of single pixels, halved, varies by {spread:.4f}; published HPSv2 numbers "
        "may come from versions of torchvision that did not antialias tensors",
    )


def check_torchvision_default() -> Check:
    """Check torchvision's default for tensors, which other tools of the same metric rely on."""
    name = "torchvision antialias"
    try:
        check_torchvision()
    except ValueError as error:
        return Check(name, False, str(error))
    if importlib.util.find_spec("torchvision") is None:
        return Check(name, None, "torchvision is not installed; only HPSv2.1 and GenEval need it")
    from torchvision.transforms.functional import resize

    default = inspect.signature(resize).parameters["antialias"].default
    return Check(
        name,
        default is True,
        f"resize of tensors antialiases by default: {default}; the original HPSv2 code follows "
        "this default, the scorers here do not",
    )


def check_versions(requirements: Sequence[str] | None = None) -> list[Check]:
    """Check the packages that scores depend on against the versions that this package asks for.

    Args:
        requirements: as in a package's metadata; default: those of this package.
    """
    stated = requires("core2-sampler") or [] if requirements is None else requirements
    wanted = {each.name: each.specifier for each in map(Requirement, stated)}
    checks = []
    for name in _PACKAGES:
        asked = wanted.get(name, SpecifierSet())
        try:
            found = version(name)
        except PackageNotFoundError:
            checks.append(Check(f"version of {name}", None, "not installed"))
            continue
        ok = asked.contains(found, prereleases=True) if asked else None
        bound = f"it must be {asked}" if asked else "no version is asked for, so not checked"
        checks.append(Check(f"version of {name}", ok, f"{found}; {bound}"))
    return checks


def _tiny_clip() -> Any:
    """Return a random CLIP model of the real class, under a second."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = tower | {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(config).eval()


def _checkerboard(size: int) -> Image.Image:
    """Return black and white single pixels."""
    rows, columns = np.indices((size, size))
    return Image.fromarray((255 * ((rows + columns) % 2)).astype(np.uint8)).convert("RGB")


def _photo(width: int, height: int) -> Image.Image:
    """Return something with edges and gradients in every channel."""
    y, x = np.mgrid[:height, :width]
    channels = [x % 256, (y * 2) % 256, ((x // 16 + y // 16) % 2) * 255]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))
