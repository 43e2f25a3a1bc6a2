"""What a model's and a head's JSON files tell before any weight is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core2_sampler.config import ConfigError
from core2_sampler.registry import unknown_name

EMBEDDED = {"shapes-sd3": "sd3"}
FAMILIES = {"StableDiffusion3Pipeline": "sd3", "CoRe2StableDiffusion3Pipeline": "sd3"}
HEAD_FOLDER = "weak_head"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A weak head as its ``config.json`` describes it.

    Attributes:
        name: what the user called it, or where the model keeps it.
        source: its folder; None for a control that needs no weights.
        in_model: whether it changes the denoiser's pass (an adapter) or reads a finished one.
        reference_scale: guidance scale it was trained for, where it has one.
        scale_range: guidance scales it may be used at, where it has them.
    """

    name: str
    source: str | None
    in_model: bool
    reference_scale: float | None = None
    scale_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder or hub repository that is known to be usable.

    Attributes:
        name: what the user called it.
        source: folder or hub id, for ``from_pretrained``.
        family: ``sd3``.
        size: default height and width, px.
        multiple: height and width must be a multiple of it, px.
        largest: greatest height and width, px.
    """

    name: str
    source: str
    family: str
    size: int
    multiple: int
    largest: int

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in px, the model's own where None is given."""
        sizes = []
        for name, value in (("height", height), ("width", width)):
            value = self.size if value is None else value
            if value % self.multiple or not 0 < value <= self.largest:
                raise ConfigError(
                    f"{name} must be a multiple of {self.multiple} from {self.multiple} to "
                    f"{self.largest} for {self.name}, got {value}"
                )
            sizes.append(value)
        return sizes[0], sizes[1]


def find_model(name: str) -> ModelFiles:
    """Find a model by the name of an embedded one, a folder or a hub id, and read its JSON files.

    Raises:
        ConfigError: if there is none, it is no diffusers model, or its family is not supported.
    """
    source = model_source(name)
    pipeline = _read(name, source, "model_index.json").get("_class_name")
    if pipeline not in FAMILIES:
        raise ConfigError(
            f"model must be of a supported family ({', '.join(sorted(FAMILIES))}), got {pipeline} "
            f"in {name}"
        )
    vae = _read(name, source, "vae/config.json")
    transformer = _read(name, source, "transformer/config.json")
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        patch, largest = transformer["patch_size"], transformer["pos_embed_max_size"]
        size = transformer["sample_size"] * factor
    except KeyError as error:
        raise ConfigError(f"{name} is not a usable model: its configs lack {error}") from None
    return ModelFiles(
        name, source, FAMILIES[pipeline], size, factor * patch, largest * factor * patch
    )


def model_source(name: str) -> str:
    """Return the folder or hub id behind a model's name."""
    if name in EMBEDDED:
        from core2_sampler.shapes import model_path

        return str(model_path(EMBEDDED[name]))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if _HUB_ID.fullmatch(name):
        return name
    raise ConfigError(
        f"{unknown_name('model', name, EMBEDDED)}; give one of them, a folder that exists or a "
        "hub id owner/name"
    )


def find_head(name: str | None, model: ModelFiles) -> HeadFiles | None:
    """Find the weak head to use, and check that it belongs to the model's family.

    Args:
        name: a folder, the name of a control, or None for the head that the model itself has.
        model: the model it shall serve.

    Returns:
        The head; None if the model has none and none was named.

    Raises:
        ConfigError: if there is no such head, or it is one of another family.
    """
    from core2_sampler.weak_heads import HEADS

    if name is None:
        own = Path(model.source) / HEAD_FOLDER
        if not (own / "config.json").is_file():
            return None
        name, config = str(own), _read_json(own / "config.json")
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        config = _read(name, str(folder), "config.json", kind="weak head")
        name = str(folder)
    else:
        raise ConfigError(f"head must be a folder that exists, got {name!r}")
    return _head_files(name, config, model, HEADS)


def _head_files(name: str, config: dict[str, Any], model: ModelFiles, heads: Any) -> HeadFiles:
    family = config.get("family")
    if family != model.family:
        raise ConfigError(
            f"head must be of the model's family {model.family}, got {family} in {name}"
        )
    return HeadFiles(name, name, False)


def _read(name: str, source: str, path: str, kind: str = "diffusers model") -> dict[str, Any]:
    """Read a JSON file of a folder or hub repository."""
    if Path(source).is_dir():
        file = Path(source) / path
        if not file.is_file():
            raise ConfigError(f"{name} is not a {kind}: it has no {path}")
        return _read_json(file)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _read_json(Path(hf_hub_download(source, path)))
    except LocalEntryNotFoundError as error:
        reason = "it is not in the cache and the hub cannot be reached"
        raise ConfigError(f"model {name!r} is no folder here, and {reason}") from error
    except EntryNotFoundError as error:
        raise ConfigError(f"{name} is not a {kind}: it has no {path}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} is no folder here, and the hub says: {reason}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} must be a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
