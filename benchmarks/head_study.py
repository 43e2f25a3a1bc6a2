"""``core2 bench heads``: what weak heads are worth for what they cost, on the Shapes world.

A head is compared with CFG at the same number of steps, with CFG at half of them, which costs what
an all-fast run does, and with CFG at its own effective guidance scale and NFE (GA-Eval); all on the
same initial latents. The controls need no training: a learned head has to beat them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.benchmarks.arms import OWN, Arm, build_arms
from core2_sampler.benchmarks.heads import check_scales, head_folders
from core2_sampler.benchmarks.options import StudyConfig, check_out
from core2_sampler.config import ConfigError, option, user_input
from core2_sampler.model_files import ModelFiles, find_model
from core2_sampler.placement import Placement

if TYPE_CHECKING:
    from core2_sampler.benchmarks.head_tables import Entry
    from core2_sampler.benchmarks.study import Study

CONTROLS = ("cond", "cfg", "cfg-half", "last-gap")

Group = tuple[int, float]
"""Number of steps and guidance scale, within which arms are compared."""


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """Options of ``core2 bench heads``."""

    study: StudyConfig
    heads: tuple[str, ...] = option(
        (), help="Heads: tap=FOLDER,mine=FOLDER, by any name; by default the model's own."
    )
    steps: tuple[int, ...] = option((28,), help="Number of steps N, or several.", min=2)
    guidance_scales: tuple[float, ...] | None = option(
        None, help="Scales of all arms; by default what the model's head was made for.", min=1.01
    )
    slow_shares: tuple[float, ...] = option(
        (),
        help="Also each head with this share of the steps by CFG: the first ones, and those where "
        "its card says that it is worst.",
        min=0,
        max=1,
    )
    w2s_scale: float | None = option(
        None, help="Also each head all slow, at this weak-to-strong scale."
    )
    ga_eval: int = option(
        16, help="Images on which each arm's effective guidance scale is measured.", min=1
    )
    out: Path = option(Path("out/heads.md"), help="The tables; their JSON lies beside them.")


def bench_heads(config: HeadsConfig) -> None:
    """Compare weak heads with CFG and with what its passes buy otherwise, on the Shapes world."""
    from core2_sampler.benchmarks.cli import about_study, open_study

    check_out(config.out)
    model = find_model(config.study.model)
    heads = study_heads(config.heads, model)
    scales = config.guidance_scales or (model.guidance_scale,)
    groups = [(n, scale) for n in dict.fromkeys(config.steps) for scale in dict.fromkeys(scales)]
    arms: dict[Group, list[Arm]] = {group: group_arms(config, heads, group) for group in groups}
    check_scales([arm for group in arms.values() for arm in group], model)
    study = open_study(config.study, model)
    with user_input():
        for group, own in arms.items():
            own += placed_arms(config, study, heads, group)
    from core2_sampler.benchmarks.head_tables import write_tables

    entries = run_groups(config, study, arms)
    print(write_tables(config, study, entries, about_study(config.study, study)))


def study_heads(given: Sequence[str], model: ModelFiles) -> dict[str, str]:
    """Return the folders of the heads to compare by name: those given, else the model's own.

    Raises:
        ConfigError: as `head_folders`; if there is none, or a name is one of a control.
    """
    found = head_folders(given, model)
    names = [text.partition("=")[0] for text in given] or [name for name in found if name != OWN]
    if not names or not set(names).isdisjoint(CONTROLS):
        raise ConfigError(
            f"heads must be name=FOLDER, with other names than {', '.join(CONTROLS)}, got "
            f"{', '.join(names) or 'none'} for {model.name}"
        )
    return {name: found[name] for name in names}


def group_arms(config: HeadsConfig, heads: Mapping[str, str], group: Group) -> list[Arm]:
    """Return the arms of one number of steps and scale that no loaded head is needed for."""
    n, scale = group
    with user_input():
        arms = build_arms(CONTROLS, n, scale, {})
    for name, folder in heads.items():
        arms.append(Arm(name, "core", n, scale, folder))
        for count in _counts(config, n):
            arms.append(Arm(f"{name}-first-{count}", "core", n, scale, folder, count))
        if config.w2s_scale is not None:
            arms.append(Arm(f"{name}-slow", "core", n, scale, folder, n, config.w2s_scale))
    return arms


def placed_arms(
    config: HeadsConfig, study: Study, heads: Mapping[str, str], group: Group
) -> list[Arm]:
    """Return each head's arms with its worst steps by CFG.

    Raises:
        ValueError: if a head's card does not tell them.
    """
    from core2_sampler.weak_heads import load_head
    from core2_sampler.weak_heads.card import step_errors

    (n, scale), pipe = group, study.pipe
    arms = []
    for name, folder in heads.items() if config.slow_shares else ():
        sigmas = pipe.family.schedule(pipe, n, pipe.family.latent_shape(pipe)[1:]).sigmas
        errors = step_errors(load_head(folder), sigmas, [scale] * n)
        for count in _counts(config, n):
            slow: Any = Placement("budget", n + count).place(errors, passes=1)
            arms.append(Arm(f"{name}-placed-{count}", "core", n, scale, folder, slow))
    return arms


def _counts(config: HeadsConfig, num_steps: int) -> list[int]:
    """Return the numbers of slow steps that are asked for, each once."""
    counts = (math.floor(share * num_steps + 0.5) for share in config.slow_shares)
    return [count for count in dict.fromkeys(counts) if count]


def run_groups(
    config: HeadsConfig, study: Study, arms: Mapping[Group, Sequence[Arm]]
) -> dict[Group, list[Entry]]:
    """Run all arms, then CFG at each method's effective guidance scale and NFE."""
    from core2_sampler.benchmarks.cli import run_arms
    from core2_sampler.benchmarks.head_tables import Entry
    from core2_sampler.benchmarks.matching import is_plain, match_arm

    results = run_arms(study, [arm for group in arms.values() for arm in group])
    methods = [result.arm for result in results if not is_plain(result.arm)]
    with user_input():
        measured = [match_arm(study, arm, config.ga_eval) for arm in methods]
    controls = [found.arm(arm) for arm, found in zip(methods, measured, strict=True)]
    pairs = zip(measured, run_arms(study, controls), strict=True)
    of_arm = dict(zip(methods, pairs, strict=True))
    left = iter(results)
    entries: dict[Group, list[Entry]] = {}
    for group, own in arms.items():
        done = {arm.name: next(left) for arm in own}
        references = {"cfg": done["cfg"], "cfg_half": done["cfg-half"]}
        entries[group] = [
            Entry(result, references, *of_arm.get(result.arm, (None, None)))
            for result in done.values()
        ]
    return entries
