"""The trained evaluators of the embedded models: where they lie, and how they get there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from core2_sampler.atomic import write_atomic
from core2_sampler.evaluators import load_evaluator, read_config

SHIPPED = Path(__file__).parents[1] / "shapes" / "models" / "evaluators"
"""Holds FAMILY/KIND, each a folder that ``save_pretrained`` wrote in float16."""

_PREFIX = "shapes-"


def shipped_kinds(family: str) -> list[str]:
    """Return the kinds of the evaluators that are shipped for the embedded model of a family."""
    return sorted(config.parent.name for config in (SHIPPED / family).glob("*/config.json"))


def find_evaluator(name: str | Path, family: str) -> Path:
    """Return the folder of an evaluator.

    Args:
        name: a folder that exists, or the kind of a shipped one, also as ``shapes-KIND``.
        family: family of the denoiser it is wanted for.

    Returns:
        The folder; what is in it was not looked at.

    Raises:
        ValueError: neither.
    """
    if Path(name).is_dir():
        return Path(name)
    kind, kinds = str(name).removeprefix(_PREFIX), shipped_kinds(family)
    if kind not in kinds:
        raise ValueError(
            "an evaluator must be a folder that `core2 evaluators train` wrote, or one that is "
            f"shipped for {family} ({', '.join(kinds) or 'none is'}), got {name}"
        )
    return SHIPPED / family / kind


def ship_evaluator(folder: Path) -> Path:
    """Put a trained evaluator in float16 where `find_evaluator` finds it by its kind.

    Args:
        folder: of the evaluator, with its card.

    Returns:
        Its new folder; what was there before is gone.

    Raises:
        ValueError: the folder holds no evaluator.
    """
    evaluator = load_evaluator(folder).half()
    target = SHIPPED / evaluator.config.family / evaluator.config.kind
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary) / target.name
        evaluator.save_pretrained(new)
        config = read_config(new)
        config.pop("_name_or_path", None)  # where it was loaded from is nobody else's business
        write_atomic(new / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        if (folder / "card.json").is_file():
            shutil.copy(folder / "card.json", new)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    return target
