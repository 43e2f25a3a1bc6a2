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

from core2_sampler.benchmarks.arms import ARMS, ZIG_MODES, Arm, build_arms
from core2_sampler.benchmarks.heads import available_arms, check_scales, head_folders
from core2_sampler.benchmarks.notes import COUNTED, PAIRED, VALUES
from core2_sampler.benchmarks.options import StudyConfig, check_out, command_line
from core2_sampler.config import ConfigError, option, user_input
from core2_sampler.model_files import find_model

if TYPE_CHECKING:
    from core2_sampler.benchmarks.matching import Matched
    from core2_sampler.benchmarks.report import Row
    from core2_sampler.benchmarks.study import ArmResult, Study

STUDY_ARMS = ("fast", "zigzag", "zigzag-half", "zcore", "zfast", "zfast-cond", "z2")
"""What CFG is compared with."""

FIRST_OF = ("zigzag", "zcore", "zfast")
"""The arms that are also run with zigzag steps in the first k steps only."""

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
        (), help="Folders of heads: tap=FOLDER,adapter=FOLDER; the model's own is known."
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
    arms = study_arms(config, scale, head_folders(config.heads, model))
    check_scales(arms, model)
    study = open_study(config.study, model)
    cfg = Arm("cfg", "cfg", config.steps, scale)
    results = run_arms(study, [cfg, *arms])
    found = {arm.name: _measure(study, arm, config.ga_eval) for arm in arms}
    controls = [_equal_nfe(result) for result in results]
    matched = [found[arm.name].arm(arm) for arm in arms]
    others = list(dict.fromkeys([*controls, *matched]))
    done = dict(zip(others, run_arms(study, others), strict=True))
    from core2_sampler.benchmarks.study_table import write_study

    table = _Table(study, results, found, done, command_line(config))
    rows = table.rows()
    text = "\n\n".join([legend(arms), table.verdicts(), cheapest(rows), NOTES])
    write_study(config, study, rows, "Shapes: what zigzag steps buy", text)


def study_arms(config: ZigzagConfig, scale: float, heads: Mapping[str, str]) -> list[Arm]:
    """Return the arms but CFG, those with zigzag steps in the first k only among them.

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
    few = [
        dataclasses.replace(arm, name=f"{arm.name}-first-{k}", zig_steps=k)
        for arm in arms
        for k in dict.fromkeys(config.first)
        if arm.name in FIRST_OF and k < arm.zig_steps
    ]
    return [*arms, *few]


def legend(arms: Sequence[Arm]) -> str:
    """Return what each arm is, as a Markdown list."""
    lines = []
    for arm in arms:
        name, _, count = arm.name.partition("-first-")
        about = ARMS.get(name).about
        lines.append(f"- {arm.name}: {about}" + (f"; in the first {count} steps" if count else ""))
    return "\n".join(lines)


def cheapest(rows: Sequence[Row]) -> str:
    """Name the zigzag arm of the lowest NFE that is not shown to be worse than Z-Sampling."""
    against = [row for row in rows if row.metric == "overall_minus_zigzag"]
    if not against:
        return "Nothing was compared with Z-Sampling."
    kept = [row for row in against if not (math.isnan(row.high) or row.high < 0)]
    if not kept:
        return "Every other zigzag arm is shown to be worse than Z-Sampling, or has no interval."
    best = min(kept, key=lambda row: row.nfe)
    ends = f"{100 * best.value:+.1f} [{100 * best.low:+.1f}, {100 * best.high:+.1f}]"
    return (
        f"Cheapest zigzag arm that is not shown to be worse than Z-Sampling: {best.arm}, NFE "
        f"{best.nfe:g}, {ends} points."
    )


def _equal_nfe(result: ArmResult) -> Arm:
    """Return CFG at the arm's scale that spends its NFE on more steps."""
    steps = max(1, int(result.nfe / 2))
    return Arm("cfg", "cfg", steps, result.arm.guidance_scale)


def _measure(study: Study, arm: Arm, count: int) -> Matched:
    from core2_sampler.benchmarks.matching import match
    from core2_sampler.benchmarks.runner import arm_folder, resolve_head

    return match(study, arm, arm_folder(study, arm, resolve_head(study, arm.head)), count)


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
