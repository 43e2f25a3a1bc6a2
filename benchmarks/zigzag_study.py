"""``core2 bench zigzag``: what zigzag steps are worth for what they cost, on the Shapes world.

A zigzag step pays for one to three predictions, so each arm is compared with CFG at the same number
of steps, with CFG that spends the same NFE on more steps, and with CFG at the arm's own effective
guidance scale and NFE (GA-Eval), on the same initial latents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core2_sampler.benchmarks.arms import ARMS, OWN, ZIG_MODES, Arm, build_arms, coinciding
from core2_sampler.benchmarks.heads import available_arms, check_scales, head_folders
from core2_sampler.benchmarks.notes import COUNTED, PAIRED, VALUES
from core2_sampler.benchmarks.options import StudyConfig, check_out, command_line
from core2_sampler.config import ConfigError, option, user_input
from core2_sampler.fitting import find_head
from core2_sampler.model_files import ModelFiles, find_model

if TYPE_CHECKING:
    from core2_sampler.benchmarks.matching import Matched
    from core2_sampler.benchmarks.report import Row
    from core2_sampler.benchmarks.study import ArmResult, Study

STUDY_ARMS = ("fast", "zigzag", "zigzag-half", "zcore", "zfast", "zfast-cond", "z2")
"""What CFG is compared with."""

FIRST_OF = ("zigzag", "zcore", "zfast")
"""The arms that are also run with zigzag steps in the first k steps only."""

OF_EACH_HEAD = ("zcore", "zfast")
"""The arms of each further head."""

CFG_RUNS = {
    "overall_minus_cfg": "at the same N",
    "overall_minus_cfg_equal_nfe": "at the same NFE",
    "overall_minus_matched": "at its effective scale and NFE",
}
"""Metrics of the differences to CFG, and where each compares."""

NOTES = (
    f"{VALUES}. {PAIRED}: with CFG at the same N (cfg), with CFG at as many steps as the same NFE "
    "pays for (equal nfe), with CFG at the arm's own effective guidance scale and NFE (matched), "
    f"and with Z-Sampling (zigzag). {COUNTED}; p-values are corrected over all comparisons with "
    "cfg and matched (Holm)."
)


@dataclass(frozen=True, slots=True)
class ZigzagConfig:
    """Options of ``core2 bench zigzag``."""

    study: StudyConfig
    steps: int = option(28, help="Number of steps N.", min=2)
    guidance_scale: float | None = option(
        None, help="Scale of every arm; by default what the model's head was made for.", min=1.01
    )
    arms: tuple[str, ...] | None = option(
        None, help=f"Arms, by default those of {', '.join(STUDY_ARMS)} whose heads are there."
    )
    first: tuple[int, ...] = option(
        (2, 7, 14), help=f"Also {', '.join(FIRST_OF)} with zigzag steps in the first k only.", min=1
    )
    heads: tuple[str, ...] = option(
        (),
        help="Folders of further heads, tap=FOLDER,mine=FOLDER, by any name: each gets arms "
        f"{' and '.join(OF_EACH_HEAD)} of its own; the model's own is known.",
    )
    ga_eval: int = option(
        16, help="Images on which each arm's effective guidance scale is measured.", min=1
    )
    out: Path = option(Path("out/zigzag.md"), help="The table; its JSON lies beside it.")


def bench_zigzag(config: ZigzagConfig) -> None:
    """Compare zigzag steps with CFG, for the quality that an NFE buys, on the Shapes world."""
    from core2_sampler.benchmarks.cli import open_study, run_arms

    check_out(config.out)
    model = find_model(config.study.model)
    scale = model.guidance_scale if config.guidance_scale is None else config.guidance_scale
    abouts = study_arms(config, scale, head_folders(config.heads, model))
    check_scales(abouts, model)
    inside = {arm.head for arm in abouts if is_inside(arm, model)}
    cfg = Arm("cfg", "cfg", config.steps, scale)
    same = coinciding([cfg, *abouts], inside)
    arms = [arm for arm in abouts if arm.name not in same]
    study = open_study(config.study, model)
    results = run_arms(study, [cfg, *arms])
    from core2_sampler.benchmarks.matching import match_arm

    with user_input():
        found = {arm.name: match_arm(study, arm, config.ga_eval) for arm in arms}
    controls = [_equal_nfe(result) for result in results]
    matched = [found[arm.name].arm(arm) for arm in arms]
    others = list(dict.fromkeys([*controls, *matched]))
    done = dict(zip(others, run_arms(study, others), strict=True))
    from core2_sampler.benchmarks.study_table import choice_note, write_study

    table = _Table(study, results, found, done, command_line(config))
    rows = table.rows()
    legend = "\n".join(f"- {arm.name}: {abouts[arm]}" for arm in arms)
    found_out = f"{against_cfg(rows)} {cheapest(rows)} {choice_note(config.study)}"
    parts = [legend, left_out(same, inside=bool(inside)), table.verdicts(), found_out, NOTES]
    text = "\n\n".join(part for part in parts if part)
    write_study(config, study, rows, "Shapes: what zigzag steps buy", text)


def study_arms(config: ZigzagConfig, scale: float, heads: Mapping[str, str]) -> dict[Arm, str]:
    """Return the arms but CFG with what each is, those with few zigzag steps among them.

    Raises:
        ConfigError: an arm does not exist or has no head, or k leaves no step without.
    """
    names = available_arms(STUDY_ARMS, heads) if config.arms is None else config.arms
    with user_input():
        arms = build_arms(names, config.steps, scale, heads)
    if "cfg" in names:
        raise ConfigError("arms must be what CFG is compared with, got cfg: leave it out")
    if max(config.first, default=0) > config.steps - 1:
        raise ConfigError(
            f"first must be counts up to the number of steps but the last ({config.steps - 1}), "
            f"got {max(config.first)}"
        )
    abouts = {arm: ARMS.get(arm.name).about for arm in arms}
    repeated = [arm for arm in arms if arm.name in FIRST_OF]
    for name in (text.partition("=")[0] for text in config.heads):
        for arm in _of_head(name, config.steps, scale, heads):
            abouts[arm] = f"{ARMS.get(arm.mode).about}; that head is {name} here"
            repeated.append(arm)
    for arm in repeated:
        for k in dict.fromkeys(config.first):
            if k < arm.zig_steps:
                few = dataclasses.replace(arm, name=f"{arm.name}-first-{k}", zig_steps=k)
                abouts[few] = f"{abouts[arm]}; in the first {k} steps"
    return abouts


def _of_head(name: str, steps: int, scale: float, heads: Mapping[str, str]) -> list[Arm]:
    """Return the arms of a further head; the model's own has them already."""
    if name == OWN:
        return []
    arms = build_arms(OF_EACH_HEAD, steps, scale, {OWN: heads[name]})
    return [dataclasses.replace(arm, name=f"{name}-{arm.name}") for arm in arms]


def is_inside(arm: Arm, model: ModelFiles) -> bool:
    """Tell whether an arm has a head that works inside the denoiser."""
    head = None if arm.head is None else find_head(arm.head, model)
    return head is not None and head.in_model


def left_out(same: Mapping[str, str], *, inside: bool) -> str:
    """Say which arms are not shown because they are others of the table, and why.

    Args:
        same: from `coinciding`.
        inside: whether a head of the study works inside the denoiser.
    """
    if not same:
        return ""
    pairs = ", ".join(f"{name} = {other}" for name, other in same.items())
    why = (
        " A head inside the denoiser is made for scales above 1 only: the negative prompt undoes "
        "the steps of its zcore, which are those of Z-Sampling."
    )
    text = f"Not shown twice, for each takes the very steps of the other: {pairs}."
    return text + why * inside


def against_cfg(rows: Sequence[Row]) -> str:
    """Say whether Z-Sampling itself is better than CFG, by each of the three comparisons."""
    own = {row.metric: row for row in rows if row.arm == "zigzag"}
    if not own:
        return "Z-Sampling itself (zigzag) was not run."
    told = []
    for metric, where in CFG_RUNS.items():
        row = own[metric]
        word = "better" if row.low > 0 else "worse" if row.high < 0 else "not told apart"
        told.append(f"{where} {word} ({_points(row)})")
    return (
        f"Z-Sampling itself (zigzag, NFE {row.nfe:g}) against CFG, better or worse where the "
        f"interval excludes 0: {', '.join(told)}."
    )


def cheapest(rows: Sequence[Row]) -> str:
    """Name the arm of the lowest NFE, below that of Z-Sampling, that is shown to be as good.

    As good is a loss of less than the knee's margin: non-inferiority, for that an interval reaches
    0 is no evidence that nothing is lost.
    """
    from core2_sampler.benchmarks.cli import KNEE_LOSS

    against = [row for row in rows if row.metric == "overall_minus_zigzag"]
    if not against:
        return "Nothing was compared with Z-Sampling."
    limit = next(row.nfe for row in rows if row.arm == "zigzag")
    kept = [row for row in against if row.low > -KNEE_LOSS and row.nfe < limit]
    margin = f"{100 * KNEE_LOSS:g} point"
    rule = f"shown to lose less than {margin} against it (interval above -{margin})"
    if not kept:
        return f"No zigzag arm of fewer NFE is {rule}."
    best = min(kept, key=lambda row: row.nfe)
    return f"The cheapest zigzag arm {rule}: {best.arm}, NFE {best.nfe:g}, {_points(best)}."


def _points(row: Row) -> str:
    value, low, high = (f"{100 * number:+.1f}" for number in (row.value, row.low, row.high))
    return f"{value} points" if math.isnan(row.low) else f"{value} [{low}, {high}] points"


def _equal_nfe(result: ArmResult) -> Arm:
    """Return CFG at the arm's scale that spends its NFE on more steps."""
    steps = max(1, int(result.nfe / 2))
    return Arm("cfg", "cfg", steps, result.arm.guidance_scale)


@dataclass(frozen=True, slots=True)
class _Table:
    """The results of a study, CFG first, and the CFG runs that they are compared with."""

    study: Study
    results: Sequence[ArmResult]
    found: Mapping[str, Matched]
    done: Mapping[Arm, ArmResult]
    command: str

    def rows(self) -> list[Row]:
        """Return all numbers."""
        from core2_sampler.benchmarks.study import result_rows

        cfg, *methods = self.results
        rows = result_rows(self.study, cfg, command=self.command)
        for result in methods:
            own = result_rows(self.study, result, cfg, command=self.command)
            rows += [*own, *self._compared(own[0], result)]
        shown = {(row.arm, row.steps, row.guidance_scale) for row in rows}
        for arm, result in self.done.items():
            if (arm.name, arm.steps, arm.guidance_scale) not in shown:
                rows += result_rows(self.study, result, command=self.command)
        return rows

    def _compared(self, row: Row, result: ArmResult) -> list[Row]:
        from core2_sampler.benchmarks.stats import Estimate
        from core2_sampler.benchmarks.study_table import estimate, score_change, with_metric

        found = self.found[result.arm.name]
        others = {
            "overall_minus_cfg_equal_nfe": self.done[_equal_nfe(result)],
            "overall_minus_matched": self.done[found.arm(result.arm)],
        }
        zigzag = next((other for other in self.results if other.arm.name == "zigzag"), None)
        if zigzag is not None and result is not zigzag and result.arm.mode in ZIG_MODES:
            others["overall_minus_zigzag"] = zigzag
        rows = [
            with_metric(row, name, estimate(self.study, score_change(result, other)))
            for name, other in others.items()
        ]
        for name in ("effective_scale", "orthogonal_share"):
            rows.append(with_metric(row, name, Estimate(getattr(found, name), math.nan, math.nan)))
        return rows

    def verdicts(self) -> str:
        """Say of each arm whether it is better than CFG, as a Markdown list."""
        from core2_sampler.benchmarks.study_table import method_verdicts

        cfg, *methods = self.results
        compared = [
            (own.arm.name, own, cfg, self.done[self.found[own.arm.name].arm(own.arm)])
            for own in methods
        ]
        return "\n".join(f"- {line}" for line in method_verdicts(self.study, compared))
