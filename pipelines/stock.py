"""Staying a drop-in for the stock classes: their call's signature, from_pipe, the saved index."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import ModelMixin

HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
"""Options of ``from_pretrained`` that say where an index is found."""


def with_core2(stock_call: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that shows the stock call's arguments in place of ``(*args, **kwargs)``.

    Args:
        stock_call: the stock pipeline's ``__call__``.

    Returns:
        The decorator, for a ``__call__(self, *args, core2=None, **kwargs)``.
    """

    def show(function: Callable[..., Any]) -> Any:
        stock = inspect.signature(stock_call)
        core2 = inspect.signature(function).parameters["core2"]
        shown = stock.replace(parameters=[*stock.parameters.values(), core2])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return show


def bind(
    stock_call: Callable[..., Any],
    handled: set[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> SimpleNamespace:
    """Return the stock call's arguments by name, defaults included.

    Args:
        stock_call: the stock pipeline's ``__call__``.
        handled: the arguments that our loop knows.
        args: positional arguments, the pipeline first.
        kwargs: keyword arguments.

    Returns:
        One attribute an argument.

    Raises:
        TypeError: as the stock call would for arguments that it does not have.
        ValueError: an argument that a newer diffusers has and our loop would ignore.
    """
    bound = inspect.signature(stock_call).bind(*args, **kwargs)
    if unknown := bound.arguments.keys() - handled - {"self"}:
        raise ValueError(
            "core2 knows the arguments of the diffusers that it was tried with, got the newer "
            f"{', '.join(sorted(unknown))}: drop it, or call without core2"
        )
    bound.apply_defaults()
    return SimpleNamespace(**{k: v for k, v in bound.arguments.items() if k != "self"})


def from_pipe_as_is(cls: Any, stock_class: Any, pipeline: Any, kwargs: dict[str, Any]) -> Any:
    """Run the stock ``from_pipe``, but keep every component's dtype unless one is asked for.

    The stock method ends in ``.to(float32)``, which casts the modules that both pipelines share
    (https://github.com/huggingface/diffusers/issues/12754).

    Args:
        cls: our pipeline class.
        stock_class: the stock class it derives from.
        pipeline: the pipeline whose components are shared.
        kwargs: of the stock method; the other pipeline's ``weak_head`` is the default.

    Returns:
        The new pipeline.
    """
    kwargs = {"weak_head": getattr(pipeline, "weak_head", None), **kwargs}
    from_pipe = stock_class.from_pipe.__func__
    if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
        return from_pipe(cls, pipeline, **kwargs)
    uncast = type(cls.__name__, (cls,), {"to": lambda self, *_args, **_kwargs: self})
    pipe = from_pipe(uncast, pipeline, **kwargs)
    pipe.__class__ = cls
    return pipe


def from_pretrained_with_head(cls: Any, stock_class: Any, source: Any, kwargs: Any) -> Any:
    """Run the stock ``from_pretrained`` so that it can load a head of any module.

    The stock loader takes a component from a module outside diffusers only if that module also
    holds the name of the base class; a head's own module need not know that.

    Args:
        cls: our pipeline class.
        stock_class: the stock class it derives from.
        source: folder or hub id.
        kwargs: of the stock method.

    Returns:
        The pipeline.
    """
    if "weak_head" not in kwargs:
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        module, _ = cls.load_config(source, **options).get("weak_head") or (None, None)
        if module is not None:
            vars(importlib.import_module(module)).setdefault("ModelMixin", ModelMixin)
    return stock_class.from_pretrained.__func__(cls, source, **kwargs)


def rename_index(file: Path, class_name: str) -> None:
    """Write another ``_class_name`` into a saved ``model_index.json``.

    Args:
        file: the JSON file.
        class_name: of the stock class, so that the folder loads for everyone.
    """
    index = json.loads(file.read_text(encoding="utf-8"))
    index["_class_name"] = class_name
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
