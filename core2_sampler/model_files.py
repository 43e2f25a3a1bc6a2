"""What a model's JSON files tell before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core2_sampler.config import ConfigError
from core2_sampler.fitting import find_head
from core2_sampler.json_files import read_model_json
from core2_sampler.registry import unknown_name
from core2_sampler.shapes import MODELS, model_path

FAMILIES = ("sd3", "sdxl", "flux")
"""The model families, by the names that heads and results use."""

EMBEDDED = {f"shapes-{family}": family for family in FAMILIES if (MODELS / family).is_dir()}
"""Names of the embedded models, and what `core2_sampler.shapes.model_path` calls them."""

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
    index = read_model_json(name, source, "model_index.json")
    try:
        family = _PIPELINES[pipeline_class(source).__name__]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    vae = read_model_json(name, source, "vae/config.json")
    layout, component = _LAYOUTS[family]
    network = read_model_json(name, source, f"{component}/config.json")
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
    tokenizer = read_model_json(name, source, f"{component}/tokenizer_config.json")
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
