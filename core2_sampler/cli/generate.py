"""``core2 generate``: the options, and every check that needs no weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from core2_sampler.cli.loading import DEVICE_HELP, DTYPE_HELP, LENGTH_HELP, MODEL_HELP, Dtype
from core2_sampler.cli.options import add_command
from core2_sampler.cli.scale_rule import RULE_HELP, check_rule
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.fitting import HeadFiles, find_head
from core2_sampler.model_files import ModelFiles, find_model
from core2_sampler.plan import OPTION_MODES, PRESETS, Core2Config, Plan
from core2_sampler.scale_rules import ONLINE
from core2_sampler.steps import check_asking

GenerateMode = Literal[
    "fast", "balanced", "quality", "core", "zigzag", "zcore", "zfast", "z2", "cfg", "cond"
]
_CORE2_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(Core2Config)}
_ANY_SCALE = 2.0
"""Asks for guidance where a rule says every scale."""


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Options of ``core2 generate``."""

    prompts: tuple[str, ...] = option(help="What to draw; one or more texts.", positional=True)
    model: str = option("shapes-sd3", help=MODEL_HELP)
    steps: int = option(28, help="Sampling steps.", min=1)
    mode: GenerateMode = option(
        "fast",
        help="fast: one pass a step; balanced: CFG in the first quarter; quality: all slow; "
        "core: as --slow-steps says; zigzag: each step made, undone and made again by cfg "
        "(Z-Sampling); zcore: undone by the head; zfast: all of that by the head; "
        "z2: undone by the gap of the step before, at cfg's passes; cfg: plain guidance; "
        "cond: no guidance.",
    )
    guidance_scale: float | None = option(
        None, help="Strength of guidance; by default what the model's head was made for.", min=1
    )
    scale_rule: str | None = option(None, help=RULE_HELP)
    evaluators: tuple[Path, ...] | None = option(
        None, help="--scale-rule online: evaluators, folders or kinds of shipped ones."
    )
    candidates: tuple[float, ...] | None = option(
        None,
        help="--scale-rule online: the scales to pick from, 1,3,7.5,11,15 by default.",
        min=1,
    )
    save_schedule: bool = option(
        False, help="Write the guidance scale of each step beside each image, as JSON and a plot."
    )
    w2s_scale: float | None = option(None, help=_CORE2_HELP["w2s_scale"] + ".")
    slow_steps: int | float | tuple[int, ...] | str | None = option(
        None, help=_CORE2_HELP["slow_steps"] + "."
    )
    zig_steps: int | float | tuple[int, ...] | None = option(
        None, help=_CORE2_HELP["zig_steps"] + "."
    )
    inversion_scale: float | None = option(None, help=_CORE2_HELP["inversion_scale"] + ".")
    upstream: bool = option(False, help=_CORE2_HELP["upstream"] + ".")
    num_images: int = option(1, help="Images for each prompt.", short="-n", min=1)
    batch_size: int = option(8, help="Images drawn at once; changes no image.", min=1)
    seed: int = option(0, help="Seed of the first image; the next has seed + 1.", min=0, max=2**62)
    output: Path = option(
        Path("out"),
        help="Folder for the images; same prompt, seed and mode: same name.",
        short="-o",
    )
    negative_prompt: str | None = option(None, help="What not to draw.")
    height: int | None = option(None, help="Height in px; by default the model's.", min=1)
    width: int | None = option(None, help="Width in px; by default the model's.", min=1)
    max_sequence_length: int | None = option(None, help=LENGTH_HELP, min=1, max=512)
    head: str | None = option(
        None, help="A weak head's folder, hub id or control's name; by default the model's own."
    )
    compare: bool = option(False, help="Draw stock CFG beside it, on the same latents.")
    device: str = option("auto", help=DEVICE_HELP)
    dtype: Dtype = option("auto", help=DTYPE_HELP)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: all that drawing needs beyond the options."""

    model: ModelFiles
    head: HeadFiles | None
    core2: Core2Config  # without the rule of --scale-rule online, which needs weights
    plan: Plan
    guidance_scale: float
    height: int
    width: int
    tokens: int | None
    device: str


def generate(config: GenerateConfig) -> None:
    """Generate images, with all that made them in the PNG and in a JSON file beside it."""
    check_folder(config.output)
    job = check(config)

    from core2_sampler.cli.draw import draw

    draw(config, job)


def check(config: GenerateConfig) -> Job:
    """Check a request as far as it can be without loading a weight.

    Raises:
        ConfigError: naming what must hold, what was given and what to do.
    """
    from core2_sampler.info import pick_device

    if not config.prompts or not all(prompt.strip() for prompt in config.prompts):
        raise ConfigError("a prompt must have words, got an empty one")
    if config.compare and config.mode == "cfg":
        raise ConfigError("--compare sets CFG beside another mode, got mode 'cfg'; choose another")
    with user_input():
        core2 = core2_config(config)
        core2.plan(config.steps, 2.0, True, _worst)  # any scale and head: slow steps against steps
    model = find_model(config.model)
    check_rule(config, model)
    height, width = model.check_size(config.height, config.width)
    head = find_head(config.head, model)
    if head is not None and head.weak_guidance is not None:
        raise ConfigError(
            f"head must be of the gap to the negative prompt, got {head.name}, of that between "
            "embedded guidances: use it from Python, with weak_guidance="
        )
    scale = find_scale(config, model, head)
    with user_input():
        device = pick_device(config.device)
        plan = core2.plan(config.steps, scale, head is not None and head.in_model, _worst)
        if config.scale_rule == ONLINE:
            check_asking(plan)
    check_plan(config, plan, head)
    if head is not None and plan.needs_head:
        check_scales(plan, head)
        head.check_size(height, width)
    used = head if plan.needs_head else None
    tokens = model.check_tokens(config.max_sequence_length)
    return Job(model, used, core2, plan, scale, height, width, tokens, device)


def _worst(scales: Sequence[float]) -> list[float]:
    """Return errors that make slow what can be: noise levels, and so the card's, come later."""
    return [math.inf if scale > 1 else 0.0 for scale in scales]


def find_scale(config: GenerateConfig, model: ModelFiles, head: HeadFiles | None) -> float:
    """Return the single guidance scale; where a rule says every scale, one above 1."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    named = head.reference_scale if head is not None else None
    scale = model.guidance_scale if named is None else named
    if scale > 1 or config.mode == "cond":
        return scale
    if config.scale_rule is not None and not config.compare:
        return _ANY_SCALE
    raise ConfigError(
        f"guidance_scale must be given for {model.name}, whose stock call does not guide, "
        "got none: try 4, or take --mode cond"
    )


def core2_config(config: GenerateConfig) -> Core2Config:
    """Turn mode and its options into the pipelines' config; refuse what has no effect."""
    values = {name: getattr(config, name) for name in OPTION_MODES}
    given = {k: v for k, v in values.items() if v is not None and v is not False}
    base = PRESETS.get(config.mode) or Core2Config(mode=config.mode)  # type: ignore[arg-type]
    known = {name for name, modes in OPTION_MODES.items() if base.mode in modes}
    if base.mode == "zcore" and config.upstream and config.inversion_scale is None:
        known.add("w2s_scale")
    if unused := sorted(given.keys() - known):
        raise ConfigError(f"{unused[0]} has no effect in mode {config.mode!r}; leave it out")
    if config.mode == "cond" and config.guidance_scale is not None:
        raise ConfigError("guidance_scale has no effect in mode 'cond'; leave it out")
    if config.scale_rule == ONLINE:
        del given["scale_rule"]
    return dataclasses.replace(base, **given)


def check_plan(config: GenerateConfig, plan: Plan, head: HeadFiles | None) -> None:
    """Check a plan against the head and the options that only some plans use."""
    if plan.needs_head and head is None:
        raise ConfigError(
            f"mode {config.mode!r} needs a weak head and {config.model} has none; give one with "
            "--head (`core2 collect` and `core2 reflect` make it) or take --mode cfg"
        )
    online = config.scale_rule == ONLINE
    unused = config.scale_rule is not None and not (online and plan.needs_head and plan.in_model)
    if config.guidance_scale is not None and unused and not config.compare:
        raise ConfigError(
            f"guidance_scale has no effect with --scale-rule {config.scale_rule}; leave it out"
        )
    if config.head is not None and not plan.needs_head:
        raise ConfigError(f"head has no effect in mode {config.mode!r}; leave it out")
    read = plan.needs_uncond or (head is not None and plan.needs_head and head.reads_negative)
    if config.negative_prompt is not None and not read:
        raise ConfigError(
            f"negative_prompt has no effect in mode {config.mode!r}: no step runs it; "
            "take --slow-steps above 0 or --mode cfg"
        )
    if config.w2s_scale is not None and not plan.needs_uncond:
        raise ConfigError("w2s_scale has no effect without slow steps; give --slow-steps")


def check_scales(plan: Plan, head: HeadFiles) -> None:
    """Check that the head was made for the guidance scales that a plan asks it for."""
    for step in plan.steps:
        if step.kind in ("fast", "slow"):
            head.check_scale(step.guidance_scale)
        if step.inversion == "fast":
            try:
                head.check_scale(step.inversion_scale)
            except ConfigError as error:
                raise ConfigError(
                    "inversion_scale must be 0, 1 or a scale of the head, got "
                    f"{step.inversion_scale:g}: {error}"
                ) from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_command(app, "generate", GenerateConfig, generate)
