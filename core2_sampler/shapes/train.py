"""Train the networks of the Shapes world from nothing: VAE, CLIP, T5, then a denoiser.

Every part is time-boxed, resumable after a kill (the same call goes on) and independent of the
device. ``core2 shapes train --part vae --minutes 14 --out runs/shapes`` and so on; CONTRIBUTING has
the whole chain with its measured times.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection

from core2_sampler.shapes import models
from core2_sampler.shapes.batches import TextEncoders, sample_prompts, sample_scenes
from core2_sampler.shapes.denoising import RECIPES, Probed, denoiser_loss, denoiser_report
from core2_sampler.shapes.lessons import ClipLesson, T5Lesson, VaeLesson
from core2_sampler.shapes.tokenizer import build_tokenizer
from core2_sampler.training import FitConfig, Log, Progress, fit
from core2_sampler.weights import hash_weights


class _Source(NamedTuple):
    """Where a part lies in a folder of trained ones, and how it is made anew."""

    folder: str
    build: Callable[[], nn.Module]


PARTS = ("vae", "clip", "t5", *RECIPES)
_SOURCES: dict[str, Any] = {
    "vae": _Source("vae", models.build_vae),
    "clip": _Source("clip", models.build_clip),
    "t5": _Source("text_encoder_3", models.build_t5),
    **RECIPES,
}
_SHARED = ("vae", "text_encoder", "text_encoder_3")  # what a denoiser is trained beside
_EMA_DECAY = {"vae": 0.999, "clip": 0.99, "t5": 0.99}  # denoisers: 0.999
_RATE = {"vae": 2e-3, "clip": 1e-3, "t5": 1e-3}  # denoisers: 1e-3
_BY_MUON = ("sd3", "flux")  # networks that are mostly matrices; Muon takes no convolutions


def _latent_scale(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of 512 training images."""
    pixels = sample_scenes(0, sample_prompts("scale", 0, 512))[0].to(vae.device)
    with torch.no_grad():
        return 1 / float(vae.encode(pixels).latent_dist.mean.std())


def _fit(
    part: str,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    report: Callable[[], dict[str, float]],
    *,
    folder: Path,
    minutes: float,
    log: Log,
) -> Progress:
    config = FitConfig(
        minutes=minutes,
        learning_rate=_RATE.get(part, 1e-3),
        hold_share=0.6,
        final_share=0.01,
        warmup_steps=100,
        ema_decay=_EMA_DECAY.get(part, 0.999),
        muon=part in _BY_MUON,
    )
    run = folder / f"{part}.run"
    beside = (f"{part}.start", *(_SHARED if part in RECIPES else ()))
    of = {"part": part, **{name: hash_weights([folder / name]) for name in beside}}
    return fit(module, loss, config, folder=run, evaluate=report, log=log, identity=of)


def _saved(part: str, folder: Path) -> Path:
    """Return where a trained part is saved."""
    return folder / (part if part in RECIPES else _SOURCES[part].folder)


def _closing_line(part: str, progress: Progress, folder: Path) -> str:
    """Say how far a part came: the figures are those of its lesson's report."""
    last = progress.evaluations[-1]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
    return (
        f"{part}: {progress.step} steps in {progress.seconds / 60:.1f} minutes, on held-out "
        f"captions {figures}; saved in {_saved(part, folder)}"
    )


def train_vae(folder: Path, minutes: float, device: torch.device, log: Log) -> Progress:
    """Train the autoencoder into ``folder/vae``."""
    vae: AutoencoderKL = _untrained("vae", folder).to(device)
    if importlib.util.find_spec("scipy") is None:
        log("without scipy the judge cannot accept images: pip install 'core2-sampler[bench]'")
    lesson = VaeLesson(vae)
    progress = _fit("vae", vae, lesson.loss, lesson.report, folder=folder, minutes=minutes, log=log)
    vae.register_to_config(scaling_factor=round(_latent_scale(vae), 4), shift_factor=0.0)
    vae.half().save_pretrained(folder / "vae")
    return progress


def train_clip(folder: Path, minutes: float, device: torch.device, log: Log) -> Progress:
    """Train the CLIP pair into ``folder/clip``; its text tower into ``folder/text_encoder``."""
    clip: CLIPModel = _untrained("clip", folder)
    lesson = ClipLesson(clip).to(device)
    progress = _fit(
        "clip", lesson, lesson.loss, lesson.report, folder=folder, minutes=minutes, log=log
    )
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    clip.half().save_pretrained(folder / "clip")
    build_tokenizer().save_pretrained(folder / "clip")
    models.build_image_processor().save_pretrained(folder / "clip")
    encoder.half().save_pretrained(folder / "text_encoder")
    return progress


def train_t5(folder: Path, minutes: float, device: torch.device, log: Log) -> Progress:
    """Train the T5 encoder into ``folder/text_encoder_3``."""
    lesson = T5Lesson(_untrained("t5", folder)).to(device)
    progress = _fit(
        "t5", lesson, lesson.loss, lesson.report, folder=folder, minutes=minutes, log=log
    )
    lesson.t5.half().save_pretrained(folder / "text_encoder_3")
    return progress


def train_denoiser(
    part: str, folder: Path, minutes: float, device: torch.device, log: Log, *, compiled: bool
) -> Progress:
    """Train a denoiser; ``folder/<part>`` becomes a stock pipeline folder."""
    recipe = RECIPES[part]
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device)
    network = _untrained(part, folder)
    probed = Probed(network, *recipe.probed).to(device)
    encode = TextEncoders.load(folder, device)
    if compiled:
        network.compile(dynamic=False)
    begun = hash_weights([folder / f"{part}.start"])  # so that a further training draws afresh
    loss = denoiser_loss(recipe, probed, vae, encode, seed=begun)
    report = denoiser_report(recipe, network, vae, encode)
    progress = _fit(part, probed, loss, report, folder=folder, minutes=minutes, log=log)
    save_half(recipe.assemble(network, folder), folder / part)
    return progress


def _untrained(part: str, folder: Path) -> Any:
    """Return the network of a part: new, or the one that `_take_over` put there."""
    network = _SOURCES[part].build()
    begun = folder / f"{part}.start"
    return type(network).from_pretrained(begun).float() if begun.exists() else network


def _take_over(part: str, start: Path, folder: Path) -> None:
    """Copy the networks of a trained pipeline that ``folder`` does not have yet.

    An SD3 pipeline lends its VAE and text encoders; those of the others are not all there.
    """
    if not start.is_dir():
        raise ValueError(f"start must be a folder that exists, got {start}")
    if part in RECIPES:
        missing = [name for name in _SHARED if not (folder / name).exists()]
        if missing and not (start / "text_encoder_3").is_dir():
            raise ValueError(
                f"start must be the folder of an SD3 pipeline, got {start}: or put {missing[0]} of "
                f"one into {folder}"
            )
        for name in missing:
            shutil.copytree(start / name, folder / name)
    own, begun = start / _SOURCES[part].folder, folder / f"{part}.start"
    if _saved(part, folder).resolve() in (start.resolve(), own.resolve()):
        raise ValueError(f"start must not be where {part} is saved, got {start}: take another out")
    if (own / "config.json").is_file():
        config = json.loads((own / "config.json").read_text(encoding="utf-8"))
        made_by = config.get("_class_name") or config["architectures"][0]
        if made_by == type(_SOURCES[part].build()).__name__:
            shutil.copytree(own, begun, dirs_exist_ok=True)


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in float16 that ``from_pretrained`` loads in float32 unless told otherwise.

    diffusers loads networks in float32 by default, but transformers in the dtype that the config
    names: left alone, the text encoders would not match the denoiser. Where the networks were
    loaded from is nobody else's business.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()  # the pipeline's own cast warns of layers to keep in float32: of none
    pipeline.save_pretrained(folder)
    tokenizers = folder.glob("*/tokenizer_config.json")
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *tokenizers]:
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):
            config.pop(name, None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train(
    part: str,
    folder: Path,
    minutes: float,
    device: str = "cpu",
    *,
    start: Path | None = None,
    compiled: bool = False,
    log: Log = print,
) -> None:
    """Train one part into ``folder``; the same call after a kill goes on.

    The last line of the log says how the part does on captions that training never sees.

    Args:
        part: one of ``PARTS``; a denoiser needs the VAE, CLIP and T5 to be there.
        folder: holds the finished parts and their checkpoints.
        minutes: time box; the learning rate falls at its end.
        device: a torch device.
        start: folder that holds the trained part (for CLIP, one with ``clip`` in it): training
            begins there. The folder of an SD3 pipeline also lends any denoiser its VAE and text
            encoders, where `folder` has none.
        compiled: whether a denoiser is compiled first, by ``torch.compile``.
        log: called with lines of progress.

    Raises:
        ValueError: if ``part`` is unknown or what it needs is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if start is not None:
        _take_over(part, start, folder)
    if part in RECIPES:
        for needed in _SHARED:
            if not (folder / needed).is_dir():
                raise ValueError(f"{folder / needed} must exist: train vae, clip and t5 first")
    torch.manual_seed(0)  # initial weights; nothing else draws from the global generator
    parts = {"vae": train_vae, "clip": train_clip, "t5": train_t5}
    run = parts.get(part, partial(train_denoiser, part, compiled=compiled))
    progress = run(folder, minutes, torch.device(device), log)
    log(_closing_line(part, progress, folder))
