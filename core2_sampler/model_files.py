"""What a model's and a head's JSON files tell before any weight is loaded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core2_sampler.config import ConfigError, user_input
from core2_sampler.registry import unknown_name
from core2_sampler.shapes import MODELS, model_path

FAMILIES = ("sd3", "sdxl", "flux")
"""The model families, by the names that heads and results use."""

EMBEDDED = {f"shapes-{family}": family for family in FAMILIES if (MODELS / family).is_dir()}
"""Names of the embedded models, and what `core2_sampler.shapes.model_path` calls them."""

UNTRAINED = ("cond", "last_gap")
"""Controls that need no weights, so that their name is enough."""

_STOCK_SCALE = {"sd3": 7.0, "sdxl": 5.0, "flux": 1.0}
"""Default scale of classifier-free guidance of the stock calls; FLUX's is ``true_cfg_scale``."""

_STOCK_TOKENS = {"sd3": ("tokenizer_3", 256), "flux": ("tokenizer_2", 512)}
"""Where a family has T5: its tokenizer, and ``max_sequence_length`` of the stock call."""

_FLUX_SIZE = 128
"""Default height and width of the stock FLUX call, in latents."""

_PIPELINES = {
    "CoRe2StableDiffusion3Pipeline": "sd3",
    "CoRe2StableDiffusionXLPipeline": "sdxl",
    "CoRe2FluxPipeline": "flux",
}


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A weak head as its ``config.json`` describes it.

    Attributes:
        name: what the user called it, or its folder.
        folder: where its files are; None for a control that has none.
        in_model: whether it changes the denoiser's pass (an adapter) or reads a finished one.
        reference_scale: guidance scale it was made for, where its config or card has one.
        scale_range: lowest and highest guidance scale it can be used at, where it has them.
        reads_negative: whether it reads the negative prompt, also where no step runs it.
        multiple: height and width must be a multiple of it, px, beside what the model asks for.
        own: whether the model's pipeline loads it by itself.
        weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learned.
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


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder or hub repository that is known to be usable.

    Attributes:
        name: what the user called it.
        source: folder or hub id, for ``from_pretrained``.
        family: one of `FAMILIES`.
        channels: of the latents.
        pixels: of the image, to one latent.
        size: default height and width, px.
        multiple: height and width must be a multiple of it, px.
        largest: greatest height and width, px; None where the network sets no limit.
        tokens: T5 tokens of a prompt unless others are asked for: the stock call's default, or
            fewer where the tokenizer was made for fewer; None where the family has no T5.
    """

    name: str
    source: str
    family: str
    channels: int
    pixels: int
    size: int
    multiple: int
    largest: int | None
    tokens: int | None

    @property
    def guidance_scale(self) -> float:
        """The scale that fits the model: its own head's, else the stock pipeline's default."""
        own = find_head(None, self)
        if own is not None and own.reference_scale is not None:
            return own.reference_scale
        return _STOCK_SCALE[self.family]

    def check_tokens(self, asked: int | None) -> int | None:
        """Return the T5 tokens of a prompt, the model's own number where None is asked for."""
        if asked is not None and self.tokens is None:
            raise ConfigError(
                f"max_sequence_length is for models with T5, got {asked} for {self.name}: "
                "leave it out"
            )
        return self.tokens if asked is None else asked

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in px, the model's own where None is given."""
        sizes = []
        for name, value in (("height", height), ("width", width)):
            value = self.size if value is None else value
            largest = value if self.largest is None else self.largest
            if value % self.multiple or not 0 < value <= largest:
                limit = "up" if self.largest is None else f"to {self.largest}"
                raise ConfigError(
                    f"{name} must be a multiple of {self.multiple} from {self.multiple} {limit} "
                    f"for {self.name}, got {value}"
                )
            sizes.append(value)
        return sizes[0], sizes[1]


def find_model(name: str) -> ModelFiles:
    """Find a model by the name of an embedded one, a folder or a hub id, and read its JSON files.

    Raises:
        ConfigError: if there is none, it is no diffusers model, or its family is not supported.
    """
    from core2_sampler.pipelines.auto import pipeline_class

    source = model_source(name)
    try:
        family = _PIPELINES[pipeline_class(source).__name__]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    index = _read(name, source, "model_index.json")
    vae = _read(name, source, "vae/config.json")
    layout, component = _LAYOUTS[family]
    network = _read(name, source, f"{component}/config.json")
    try:
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)  # per latent
        channels, size, multiple, largest = layout(network, vae, pixels)
    except KeyError as error:
        raise ConfigError(f"{name} is not a usable model: its configs lack {error}") from None
    tokens = _prompt_tokens(name, source, family, index)
    return ModelFiles(name, source, family, channels, pixels, size, multiple, largest, tokens)


Config = dict[str, Any]
"""What a ``config.json`` holds."""

Layout = tuple[int, int, int, int | None]
"""Latent channels; default, unit and greatest height and width, px."""


def _sd3_layout(transformer: Config, vae: Config, pixels: int) -> Layout:
    token = transformer["patch_size"] * pixels
    largest = transformer["pos_embed_max_size"] * token
    return transformer["in_channels"], transformer["sample_size"] * pixels, token, largest


def _sdxl_layout(unet: Config, vae: Config, pixels: int) -> Layout:
    return unet["in_channels"], unet["sample_size"] * pixels, max(8, pixels), None


def _flux_layout(transformer: Config, vae: Config, pixels: int) -> Layout:
    token = 2 * pixels
    size = vae.get("sample_size", _FLUX_SIZE * pixels)  # the network names no size
    return transformer["in_channels"] // 4, size // token * token, token, None


_LAYOUTS: dict[str, tuple[Callable[[Config, Config, int], Layout], str]] = {
    "sd3": (_sd3_layout, "transformer"),
    "sdxl": (_sdxl_layout, "unet"),
    "flux": (_flux_layout, "transformer"),
}


def _prompt_tokens(name: str, source: str, family: str, index: dict[str, Any]) -> int | None:
    if family not in _STOCK_TOKENS:
        return None
    component, stock = _STOCK_TOKENS[family]
    if index.get(component, [None, None])[0] is None:
        return stock
    tokenizer = _read(name, source, f"{component}/tokenizer_config.json")
    return min(stock, int(tokenizer.get("model_max_length", stock)))


def model_source(name: str) -> str:
    """Return the folder or hub id behind a model's name; an embedded one may go by its own.

    Raises:
        ConfigError: if it is neither of them.
    """
    if name in EMBEDDED:
        return str(model_path(EMBEDDED[name]))
    if "/" not in name and not Path(name).is_dir():
        raise ConfigError(f"{unknown_name('model', name, EMBEDDED)}, a folder or a hub id")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def find_head(name: str | None, model: ModelFiles) -> HeadFiles | None:
    """Find the weak head to use, and check that it fits the model as far as its config tells.

    Args:
        name: a folder, the name of a control, or None for the head that the model itself has.
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
    if not folder.is_dir():
        controls = ", ".join(UNTRAINED)
        raise ConfigError(f"head must be a folder that exists or one of {controls}, got {name!r}")
    return _head_files(name, str(folder), "", model)


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
    for key, wanted in (("family", model.family), ("latent_channels", model.channels)):
        if config.get(key) != wanted:
            raise ConfigError(
                f"an evaluator must have the {key} {wanted!r} of {model.name}, got "
                f"{config.get(key)!r} in {folder}"
            )
    return folder


def _own_head(model: ModelFiles) -> HeadFiles | None:
    """Return the head that the model's index names, or that lies beside a folder's parts."""
    index = _read(model.name, model.source, "model_index.json")
    loaded = (index.get("weak_head") or [None])[0] is not None
    if not loaded and not (Path(model.source) / "weak_head").is_dir():
        return None
    name = f"{model.source}/weak_head"
    return replace(_head_files(name, model.source, "weak_head/", model), own=loaded)


def _head_files(name: str, source: str, inside: str, model: ModelFiles) -> HeadFiles:
    """Read a head's config, `inside` a folder or repository, and check it against the model's."""
    from core2_sampler.weak_heads import HEADS

    file = _find_file(name, source, f"{inside}config.json", kind="weak head")
    config = _read_json(file)
    classes = {HEADS.get(key).__name__: HEADS.get(key) for key in HEADS.names()}
    made_by = config.get("_class_name")
    if made_by not in classes:
        raise ConfigError(
            f"{name} is not a weak head: its class must be one of {', '.join(sorted(classes))}, "
            f"got {made_by}"
        )
    for key, wanted in (("family", model.family), ("latent_channels", model.channels)):
        if config.get(key) != wanted:
            raise ConfigError(
                f"head must have the {key} {wanted!r} of {model.name}, "
                f"got {config.get(key)!r} in {name}"
            )
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


def _collected_scale(name: str, source: str, path: str) -> float | None:
    """Return the median guidance scale of the data that a head's card names, if it has one."""
    try:
        file = _find_file(name, source, path, kind="weak head")
    except ConfigError:
        return None  # a card is not needed
    data = _read_json(file).get("data", {})
    parts = [data, *data.get("rounds", {}).values()]
    scales = [scale for part in parts for scale in part.get("guidance_scales", [])]
    return statistics.median(scales) if scales else None


def _read(name: str, source: str, path: str) -> dict[str, Any]:
    """Read a JSON file of a folder or hub repository that is a model."""
    return _read_json(_find_file(name, source, path, kind="diffusers model"))


def _find_file(name: str, source: str, path: str, *, kind: str) -> Path:
    """Return a file of a folder, or of a hub repository in the local cache."""
    file = Path(source) / path
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            file = Path(hf_hub_download(source, path))
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{name} must be a {kind} with {path}: {reason}") from error
    if not file.is_file():
        raise ConfigError(f"{name} is not a {kind}: it has no {path}")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} must be a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
