"""What the user asks to generate, checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core2_sampler.benchmarks.arms import SUITE_ARMS, Arm, build_arms
from core2_sampler.benchmarks.heads import available_arms, check_scales, head_folders
from core2_sampler.benchmarks.judges import check_judge, split_spec
from core2_sampler.benchmarks.options import GA_EVAL_MODES, GenerateConfig
from core2_sampler.benchmarks.presets import PRESETS, Preset
from core2_sampler.benchmarks.shard import Shard
from core2_sampler.benchmarks.suites import SuitePrompt, load
from core2_sampler.config import ConfigError, check_folder, user_input
from core2_sampler.evaluators.shipped import find_evaluator
from core2_sampler.model_files import ModelFiles, find_model
from core2_sampler.registry import unknown_name

_STEPS = (28,)
_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request to generate.

    Attributes:
        model: the model.
        suite: name of the suite.
        prompts: its prompts.
        seeds: seeds of each prompt.
        arms: each arm with the N and the scale that it was made for.
        deviations: where the preset, if there is one, is not followed.
        ga_eval_mode: what methods are matched by.
    """

    model: ModelFiles
    suite: str
    prompts: tuple[SuitePrompt, ...]
    seeds: tuple[int, ...]
    arms: tuple[tuple[Arm, int, float], ...]
    deviations: tuple[str, ...]
    ga_eval_mode: str = "signed"


def check_request(config: GenerateConfig) -> Request:
    """Check all that can be checked before weights are loaded.

    Raises:
        ConfigError: naming what must hold, what was given and what to do.
    """
    check_folder(config.out, "out")
    with user_input():
        preset = None if config.preset is None else PRESETS.get(config.preset)
        Shard.parse(config.shard)
    model = find_model(config.model)
    steps, scale = config.steps, config.guidance_scale
    limit = config.limit
    if preset is not None:
        steps = steps or (preset.steps[model.family],)
        scale = scale or preset.guidance_scale[model.family]
        limit = limit or preset.limit
    scale = scale or model.guidance_scale
    suite = config.suite or (preset.suite if preset else "shapes")
    seeds = config.seeds or (preset.seeds if preset else _SEEDS)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be distinct, got {','.join(map(str, seeds))}")
    mode = config.ga_eval_mode or (preset.ga_eval_mode if preset else GA_EVAL_MODES[0])
    _check_mode(mode, model)
    heads = head_folders(config.heads, model)
    names = available_arms(SUITE_ARMS, heads) if config.arms is None else config.arms
    with user_input():
        asked = [find_evaluator(each, model.family) for each in config.evaluators or ()]
        if len({folder.name for folder in asked}) < len(asked):
            raise ConfigError(
                f"evaluators must be folders of different names, got {', '.join(map(str, asked))}"
            )
        prompts = load(suite, config.source, limit=limit, skip_nsfw=config.skip_nsfw)
        arms = tuple(
            (arm, n, scale)
            for n in dict.fromkeys(steps or _STEPS)
            for arm in build_arms(names, n, scale, heads, ",".join(map(str, asked)))
        )
    check_scales([arm for arm, _, _ in arms], model)
    deviations = _deviations(config, preset)
    return Request(model, suite, tuple(prompts), tuple(seeds), arms, deviations, mode)


def _check_mode(mode: str, model: ModelFiles) -> None:
    if mode not in GA_EVAL_MODES:
        raise ConfigError(str(unknown_name("ga_eval_mode", mode, GA_EVAL_MODES)))
    if mode == "embedded" and model.family != "flux":
        raise ConfigError(
            f"ga_eval_mode embedded must come with a FLUX model, got one of {model.family}: leave "
            "it out"
        )


def _deviations(config: GenerateConfig, preset: Preset | None) -> tuple[str, ...]:
    """Return where a run does not follow its preset: by nature, and by the user's options."""
    if preset is None:
        return ()
    names = [
        "suite",
        "source",
        "limit",
        "steps",
        "guidance_scale",
        "seeds",
        "skip_nsfw",
        "ga_eval_mode",
    ]
    given = [f"{name} given as {getattr(config, name)}" for name in names if getattr(config, name)]
    return (*preset.deviations, *given)


def check_scorers(specs: Sequence[str]) -> None:
    """Check scorers before hours of generation.

    Raises:
        ConfigError: for one that does not exist.
        ModuleNotFoundError: for one whose packages are missing.
    """
    with user_input():
        for spec in specs:
            check_judge(*split_spec(spec))
