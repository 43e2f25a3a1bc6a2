"""A stock pipeline of diffusers on the command line: its class, its call, its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.config import ConfigError, read_yaml, user_input
from core2_sampler.model_files import model_source
from core2_sampler.registry import unknown_name

if TYPE_CHECKING:
    from core2_sampler.trajectory import Record

PIPELINE_HELP = (
    "Class of diffusers to collect from, in place of ours, such as StableDiffusionPipeline; `auto` "
    "is the one that the model names."
)
CALL_HELP = (
    "With --pipeline: YAML file of further arguments of its call, an image as the path of its file."
)

_IMAGES = ("image", "mask_image", "control_image")

_BY_OPTION = {"prompt": "prompts", "num_inference_steps": "steps"}
"""Arguments of a call that an option of the command gives."""

_EACH = (*_IMAGES, "negative_prompt", "negative_prompt_2", "negative_prompt_3")
"""Arguments of which a call takes one for each prompt."""


@dataclass(frozen=True, slots=True)
class StockModel:
    """A model and the pipeline that runs it.

    Attributes:
        model: an embedded model, a folder or a hub id.
        pipeline: class of diffusers, or ``auto``.
        call: further arguments of its call, as the YAML file has them.
        steps: sampling steps.
    """

    model: str
    pipeline: str
    call: Mapping[str, Any]
    steps: int

    def facts(self) -> dict[str, Any]:
        """Return what a round of a store keeps of it."""
        return {"model": self.model, "call": dict(self.call), "steps": self.steps}

    @classmethod
    def of_round(cls, settings: Mapping[str, Any]) -> StockModel:
        """Return what a round of a store was collected from."""
        return cls(*(settings[name] for name in ("model", "pipeline", "call", "steps")))

    def load(self, device: str, dtype: str) -> Any:
        """Load the pipeline onto a device, without bars and chatter.

        Args:
            device: from ``pick_device``.
            dtype: of the weights: ``fp32``, ``fp16``, ``bf16`` or ``auto``.

        Raises:
            ConfigError: diffusers has no such class, its call takes no such argument, or the model
                is not there or not for it.
        """
        import diffusers

        from core2_sampler.precision import DTYPES, pick_dtype
        from core2_sampler.progress import hide_loading

        name = "DiffusionPipeline" if self.pipeline == "auto" else self.pipeline
        found = getattr(diffusers, name, None)
        if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
            raise ConfigError(f"pipeline must be a pipeline class of diffusers, got {name!r}")
        pipeline_class: Any = found
        if pipeline_class is not diffusers.DiffusionPipeline:
            self._check_call(pipeline_class)
        hide_loading()
        weights = DTYPES[pick_dtype(dtype, device)]
        with user_input():
            pipe = pipeline_class.from_pretrained(model_source(self.model), dtype=weights)
        self._check_call(type(pipe))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    def _check_call(self, pipeline_class: type) -> None:
        """Raise ConfigError for an argument that the call of a pipeline has not."""
        found = inspect.signature(pipeline_class.__call__).parameters.values()
        names = [each.name for each in found if each.kind is not each.VAR_KEYWORD][1:]
        for name in self.call:
            if name not in names:
                kind = f"argument of {pipeline_class.__name__}"
                raise ConfigError(f"{unknown_name(kind, name, names)} (in --call)")

    def arguments(self) -> Callable[[Sequence[Record]], dict[str, Any]]:
        """Return the arguments of a call for some trajectories; images are read here.

        Raises:
            ConfigError: a file is no image.
        """
        with user_input():
            given = {k: _image(v) if k in _IMAGES else v for k, v in self.call.items()}

        def of(records: Sequence[Record]) -> dict[str, Any]:
            each = {name: [given[name]] * len(records) for name in _EACH if name in given}
            return {**given, **each, "num_inference_steps": self.steps}

        return of


def read_call(pipeline: str | None, file: Path | None) -> dict[str, Any]:
    """Return the arguments of ``--call``.

    Raises:
        ConfigError: the file cannot be read or has what an option gives, or there is no pipeline
            to call.
    """
    if file is None:
        return {}
    if pipeline is None:
        raise ConfigError(f"call has no effect without --pipeline, got {file}")
    call = read_yaml(file)
    for name, option in _BY_OPTION.items():
        if name in call:
            raise ConfigError(f"{name} must be left to --{option}, got {call[name]!r} in {file}")
    return call


def _image(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
