"""Pick the pipeline class from a model's own index, as diffusers' AutoPipeline does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

from diffusers import DiffusionPipeline

from core2_sampler.registry import Registry

PIPELINES: Registry[Any] = Registry(
    "pipeline class",
    {
        "StableDiffusionXLPipeline": "core2_sampler.pipelines.sdxl:CoRe2StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline": "core2_sampler.pipelines.sd3:CoRe2StableDiffusion3Pipeline",
        "FluxPipeline": ("core2_sampler.pipelines.flux:CoRe2FluxPipeline"),
    },
)
"""Our class for each stock class that a ``model_index.json`` may name."""

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
"""Options of ``from_pretrained`` that say where an index is found."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load_pipeline(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load a pipeline, with the weak head that its folder may hold.

    Args:
        path_or_id: a diffusers folder, or a hub id ``owner/name``.
        **kwargs: as diffusers' ``from_pretrained``; ``weak_head`` among them.

    Returns:
        A pipeline of the class that fits the model.

    Raises:
        ValueError: nothing is there, it is no diffusers model, or its family is not supported.
    """
    options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    return pipeline_class(path_or_id, **options).from_pretrained(
        str(Path(path_or_id).expanduser()), **kwargs
    )


class CoRe2Pipeline:
    """Load the CoRe^2 pipeline of any supported model; a namespace, never built itself."""

    def __init__(self) -> None:
        raise TypeError("CoRe2Pipeline is not built itself: use from_pretrained or from_pipe")

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs: Any) -> Any:
        """Load a pipeline; this is `load_pipeline` under the name that diffusers users know."""
        return load_pipeline(path_or_id, **kwargs)

    @classmethod
    def from_pipe(cls, pipe: Any, **kwargs: Any) -> Any:
        """Build on a stock pipeline's components, without loading or casting anything.

        Args:
            pipe: a stock pipeline of a supported family.
            **kwargs: as diffusers' ``from_pipe``; ``weak_head`` among them.

        Returns:
            A pipeline that shares the components.

        Raises:
            ValueError: the family is not supported.
        """
        known = PIPELINES.names()
        for base in type(pipe).__mro__:
            if base.__name__ in known:
                return PIPELINES.get(base.__name__).from_pipe(pipe, **kwargs)
        _refuse_family(type(pipe).__name__, "the pipeline")


def pipeline_class(path_or_id: str | Path, **options: Any) -> Any:
    """Return our pipeline class for a model; only its index is read.

    Args:
        path_or_id: a diffusers folder, or a hub id ``owner/name``.
        **options: diffusers' hub options, such as ``revision`` and ``local_files_only``.

    Returns:
        The class.

    Raises:
        ValueError: as `load_pipeline`.
    """
    source = str(path_or_id)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / DiffusionPipeline.config_name).is_file():
            raise ValueError(
                f"a model folder must hold {DiffusionPipeline.config_name}, got {source} without "
                "one: give the folder that save_pretrained wrote"
            )
        source = str(folder)
    elif isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"a model must be a folder or a hub id owner/name, got {source!r}: no such"
        )
    try:
        name = DiffusionPipeline.load_config(source, **options).get("_class_name")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the model's index must be readable, got {source!r}: {reason}") from error
    if name not in PIPELINES.names():
        _refuse_family(name, source)
    return PIPELINES.get(name)


def _refuse_family(name: object, source: str) -> NoReturn:
    raise ValueError(
        f"the model's pipeline must be one of {', '.join(PIPELINES.names())}, "
        f"got {name} in {source}"
    )
