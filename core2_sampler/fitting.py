"""Find the weak head or evaluator that goes with a model, before any weight is loaded."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.config import ConfigError, user_input
from core2_sampler.json_files import find_file, read_json, read_model_json

if TYPE_CHECKING:
    from core2_sampler.model_files import ModelFiles

_SDXL_SIZES = 6  # heights, widths and offsets that SDXL's UNet reads beside the pooled prompt

UNTRAINED = ("cond", "last_gap")
"""Controls that need no weights, so that their name is enough."""


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A weak head as its ``config.json`` describes it.

    Attributes:
        name: what the user called it, or its folder.
        folder: where its config is; None for a control that has none.
        in_model: whether it changes the denoiser's pass (an adapter) or reads a finished one.
        reference_scale: guidance scale it was made for, where its config or card has one.
        scale_range: lowest and highest guidance scale it can be used at, where it has them.
        reads_negative: whether it reads the negative prompt, also where no step runs it.
        multiple: height and width must be a multiple of it, px, beside what the model asks for.
        own: whether the model's pipeline loads it by itself.
        weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learned.
        hub_id: where its weights are to be had, if not in the folder.
    """

    name: str
    folder: Path | None
    in_model: bool
    reference_scale: float | None = None
    scale_range: tuple[float, float] | None = None
    reads_negative: bool = False
    multiple: int = 1
    own: bool = False
    weak_guidance: float | None = None
    hub_id: str | None = None

    def check_scale(self, guidance_scale: float) -> None:
        """Raise ConfigError if the head was not made for this guidance scale."""
        low, high = self.scale_range or (guidance_scale, guidance_scale)
        if not low <= guidance_scale <= high:
            raise ConfigError(
                f"guidance_scale must be from {low:g} to {high:g} for the head {self.name}, "
                f"got {guidance_scale:g}"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError if the head cannot work at this size, in px."""
        if height % self.multiple or width % self.multiple:
            raise ConfigError(
                f"height and width must be multiples of {self.multiple} for the head {self.name}, "
                f"got {height} and {width}"
            )


def find_head(name: str | None, model: ModelFiles) -> HeadFiles | None:
    """Find the weak head to use, and check that it fits the model as far as its config tells.

    Args:
        name: a folder or hub id, the name of a control, or None for the head that the model itself
            has.
        model: the model it shall serve.

    Returns:
        The head; None if the model has none and none was named.

    Raises:
        ConfigError: if there is no such head, or it was made for another kind of model.
    """
    if name in UNTRAINED:
        return HeadFiles(name, None, in_model=False)
    if name is None:
        return _own_head(model)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _head_files(name, str(folder), "", model)
    if name.count("/") != 1:
        raise ConfigError(
            "head must be a folder that exists, a hub id owner/name or one of "
            f"{', '.join(UNTRAINED)}, got {name!r}"
        )
    return replace(_head_files(name, name, "", model), hub_id=name)


def find_fitting_evaluator(name: str | Path, model: ModelFiles) -> Path:
    """Find an evaluator, and check that it fits the model as far as its config tells.

    Args:
        name: a folder, or the kind of a shipped one.
        model: the model whose latents it shall see.

    Returns:
        Its folder.

    Raises:
        ConfigError: if there is no such evaluator, or it was made for another model.
    """
    from core2_sampler.evaluators import read_config
    from core2_sampler.evaluators.shipped import find_evaluator

    with user_input():
        folder = find_evaluator(name, model.family)
        config = read_config(folder)
    _check_fits("an evaluator", config, folder, model, **_prompt_widths(model))
    return folder


def _prompt_widths(model: ModelFiles) -> dict[str, int]:
    """Return the widths of the prompts that a model reads, as an evaluator's config names them.

    They tell models of one family and one number of latent channels apart.
    """
    component = "unet" if model.family == "sdxl" else "transformer"
    config = read_model_json(model.name, model.source, f"{component}/config.json")
    if model.family != "sdxl":
        return {
            "prompt_dim": config["joint_attention_dim"],
            "pooled_dim": config["pooled_projection_dim"],
        }
    sizes = _SDXL_SIZES * config["addition_time_embed_dim"]
    return {
        "prompt_dim": config["cross_attention_dim"],
        "pooled_dim": config["projection_class_embeddings_input_dim"] - sizes,
    }


def _own_head(model: ModelFiles) -> HeadFiles | None:
    """Return the head that the model's index names, or that lies beside a folder's parts."""
    index = read_model_json(model.name, model.source, "model_index.json")
    loaded = (index.get("weak_head") or [None])[0] is not None
    if not loaded and not (Path(model.source) / "weak_head").is_dir():
        return None
    name = f"{model.source}/weak_head"
    return replace(_head_files(name, model.source, "weak_head/", model), own=loaded)


def _head_files(name: str, source: str, inside: str, model: ModelFiles) -> HeadFiles:
    """Read a head's config, `inside` a folder or repository, and check it against the model's."""
    from core2_sampler.weak_heads import HEADS

    file = find_file(name, source, f"{inside}config.json", kind="weak head")
    config = read_json(file)
    classes = {HEADS.get(key).__name__: HEADS.get(key) for key in HEADS.names()}
    made_by = config.get("_class_name")
    if made_by not in classes:
        raise ConfigError(
            f"{name} is not a weak head: its class must be one of {', '.join(sorted(classes))}, "
            f"got {made_by}"
        )
    _check_fits("head", config, name, model)
    scales, kind = config.get("scale_range"), classes[made_by]
    scale = config.get("reference_scale")
    pairs = model.family == "sdxl" and kind.needs_features  # its tokens are 2 x 2 latents
    return HeadFiles(
        name,
        file.parent,
        kind.in_model,
        _collected_scale(name, source, f"{inside}card.json") if scale is None else scale,
        (float(scales[0]), float(scales[1])) if scales else None,
        # The released SD3.5 head reads the empty prompt in its place.
        bool(config.get("released")) and model.family == "sdxl",
        2 * model.pixels if pairs else 1,
        weak_guidance=config.get("weak_guidance"),
    )


def _check_fits(
    kind: str, config: dict[str, Any], where: str | Path, model: ModelFiles, **sizes: int
) -> None:
    """Raise ConfigError if a config names another family or size than the model's."""
    wanted_by_key = {"family": model.family, "latent_channels": model.channels, **sizes}
    for key, wanted in wanted_by_key.items():
        if config.get(key) != wanted:
            raise ConfigError(
                f"{kind} must have the {key} {wanted!r} of {model.name}, "
                f"got {config.get(key)!r} in {where}"
            )


def _collected_scale(name: str, source: str, path: str) -> float | None:
    """Return the median guidance scale of the data that a head's card names, if it has one."""
    try:
        file = find_file(name, source, path, kind="weak head")
    except ConfigError:
        return None  # a card is not needed
    data = read_json(file).get("data", {})
    parts = [data, *data.get("rounds", {}).values()]
    scales = [scale for part in parts for scale in part.get("guidance_scales", [])]
    return statistics.median(scales) if scales else None
