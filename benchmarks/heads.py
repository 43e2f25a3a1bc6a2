"""Which heads a benchmark has: those given by the user, and the model's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from core2_sampler.benchmarks.arms import ARMS, OWN, Arm
from core2_sampler.config import ConfigError
from core2_sampler.fitting import UNTRAINED, find_head
from core2_sampler.model_files import ModelFiles


def head_folders(given: Sequence[str], model: ModelFiles) -> dict[str, str]:
    """Return the folder of every head at hand, by name; the model's own has two names.

    Args:
        given: ``name=FOLDER`` texts.
        model: the model, whose own head goes by its kind and by ``own``.

    Raises:
        ConfigError: if a head does not look like ``name=FOLDER``, comes twice, does not exist
            or is not of the model's family.
    """
    heads: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in heads:
            raise ConfigError(f"heads must be name=FOLDER, each name once, got {text!r}")
        heads[name] = folder
    own = find_head(None, model)
    if own is not None and own.folder is not None:
        for name in (_kind(own.folder), OWN):
            heads.setdefault(name, str(own.folder))
    for folder in heads.values():
        find_head(folder, model)
    return heads


def check_scales(arms: Iterable[Arm], model: ModelFiles) -> None:
    """Raise ConfigError if an arm's head was not made for its guidance scale."""
    for arm in arms:
        if arm.head is not None and Path(arm.head).is_dir():  # else a control, or to be fitted
            found = find_head(arm.head, model)
            if found is not None:
                found.check_scale(arm.guidance_scale)


def available_arms(names: Sequence[str], heads: Mapping[str, str]) -> tuple[str, ...]:
    """Return those of the named arms that these heads are enough for."""
    known = (None, *UNTRAINED, *heads)
    return tuple(name for name in names if ARMS.get(name).head in known)


def _kind(folder: Path) -> str:
    """Return the registered name of the head in a folder, which ``find_head`` has checked."""
    from core2_sampler.weak_heads import HEADS

    made_by = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    return next(name for name in HEADS.names() if HEADS.get(name).__name__ == made_by)
