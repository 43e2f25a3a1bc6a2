"""The scale rule of ``core2 generate``: its checks, its evaluators, and what it picked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.config import ConfigError, user_input
from core2_sampler.fitting import find_fitting_evaluator
from core2_sampler.model_files import ModelFiles
from core2_sampler.scale_rules import ONLINE

if TYPE_CHECKING:
    from torch import Tensor

    from core2_sampler.cli.generate import GenerateConfig
    from core2_sampler.scales import OnlineScale
    from core2_sampler.steps import Plan

RULE_HELP = (
    "Guidance scale of each step by a rule: constant:4.5, interval:6,0.2,0.8, linear:1,9, "
    "cosine:9,1, list:5,5,3,1; or online: in each step and for each image the one of --candidates "
    "that --evaluators score best one step ahead."
)


def check_rule(config: GenerateConfig, model: ModelFiles) -> None:
    """Check the options of a scale rule, and the evaluators as far as their configs tell.

    Raises:
        ConfigError: naming what must hold, what was given and what to do.
        ModuleNotFoundError: a plot is wanted and nothing could draw it.
    """
    if config.save_schedule and find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "--save-schedule needs matplotlib: pip install 'core2-sampler[train]'"
        )
    if config.scale_rule != ONLINE:
        for name in ("evaluators", "candidates"):
            if getattr(config, name) is not None:
                raise ConfigError(f"{name} has no effect without --scale-rule online; leave it out")
        return
    names = [folder.name for folder in config.evaluators or ()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            "--scale-rule online needs --evaluators, of different names: folders that `core2 "
            f"evaluators train` wrote, or kinds of shipped ones, got {', '.join(names) or 'none'}"
        )
    for folder in config.evaluators or ():
        find_fitting_evaluator(folder, model)


def online_scale(config: GenerateConfig, family: str, device: str) -> OnlineScale:
    """Load the evaluators and return the rule that asks them, for checked options."""
    from core2_sampler.evaluators import load_evaluator
    from core2_sampler.evaluators.shipped import find_evaluator
    from core2_sampler.scales import CANDIDATES, OnlineScale

    with user_input():
        loaded = {
            path.name: load_evaluator(find_evaluator(path, family)).to(device)
            for path in config.evaluators or ()
        }
        return OnlineScale(loaded, config.candidates or CANDIDATES)


def schedules(plan: Plan, chosen: Tensor | None, count: int) -> list[list[float]]:
    """Return the guidance scale of each step, for each image: what was picked, else the plan's.

    Args:
        plan: of the run.
        chosen: what a rule picked, [N, B], nan in steps that did not ask it; None if none did.
        count: images B.
    """
    planned = [step.guidance_scale for step in plan.steps]
    if chosen is None:
        return [planned] * count
    return [
        [
            scale if math.isnan(pick) else round(pick, 6)
            for pick, scale in zip(picks, planned, strict=True)
        ]
        for picks in chosen.T.tolist()
    ]


def save_schedule(path: Path, record: Mapping[str, Any], schedule: Sequence[float]) -> None:
    """Write an image's guidance scales as JSON, and as a plot beside it.

    Args:
        path: of the image; the files are NAME.schedule.json and NAME.schedule.svg.
        record: of the image.
        schedule: guidance scale of each step, [N].
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    keys = ("prompt", "seed", "mode", "scale_rule", "evaluators", "candidates")
    content = {key: record[key] for key in keys} | {"schedule": list(schedule)}
    file = path.with_name(path.stem + ".schedule.json")
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.step(range(len(schedule)), schedule, where="mid", marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="guidance scale", ylim=(0, None))
    with rc_context({"svg.hashsalt": "core2"}):  # the same schedule is the same file
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
