"""The runs of ``core2 bench dynamic-cfg``, their numbers and the plot of what was picked."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cli import run_arms
from core2_sampler.benchmarks.dynamic_cfg import (
    DynamicCfgConfig,
    constant_arms,
    fast_arms,
    mean_arm,
    static_arms,
)
from core2_sampler.benchmarks.frechet import frechet_distance, image_features, real_features
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.ruled import Ruled, online, oracle, run_ruled, shuffled
from core2_sampler.benchmarks.runner import check_arm
from core2_sampler.benchmarks.scorers import SCORERS
from core2_sampler.benchmarks.scorers.shapes import ShapesScorer
from core2_sampler.benchmarks.stats import Estimate
from core2_sampler.benchmarks.study import ArmResult, Study, result_rows
from core2_sampler.benchmarks.study_table import estimate, score_change, with_metric
from core2_sampler.config import user_input
from core2_sampler.progress import progress_bar
from core2_sampler.scales import OnlineScale

if TYPE_CHECKING:
    from core2_sampler.evaluators.base import Evaluator

NAMED_TASKS = ("counting", "position")
"""The tasks whose differences are told apart from the overall one."""

ADAPTIVE, _MEAN = "online-adaptive", "online-mean"


@dataclass(slots=True)
class Runs:
    """What was run.

    Attributes:
        best: the result at the constant scale with the highest overall score.
        scorer: the Shapes CLIP.
        results: all results, in the order of the table.
        scales: by name of the arms under a rule, the scale of each image in each step, [n, N].
        abouts: by name of the arms that are made for this study, one line each.
        fast: by name of the arms that pick in fast steps, the same steps at one scale.
    """

    best: ArmResult
    scorer: Any
    results: list[ArmResult]
    scales: dict[str, Tensor] = field(default_factory=dict)
    abouts: dict[str, str] = field(default_factory=dict)
    fast: dict[str, ArmResult] = field(default_factory=dict)

    @property
    def best_scale(self) -> float:
        """The constant scale of `best`."""
        return self.best.arm.guidance_scale

    def add(self, study: Study, arm: Arm, ruled: Ruled) -> Tensor:
        """Run an arm under a rule, and return what it picked, [n, N]."""
        with progress_bar(ruled.name, len(study.cases)) as bar:
            result, scales = run_ruled(study, arm, ruled, on_images=bar.advance)
        self.results.append(result)
        self.scales[ruled.name], self.abouts[ruled.name] = scales, ruled.about
        return scales

    def rows(self, study: Study, command: str) -> list[Row]:
        """Return all numbers of all arms."""
        real = real_features(self.scorer, study.prompts)
        constant = self._clip(study, self.best)
        rows = []
        for result in self.results:
            own = self._rows_of(study, result, command)
            first, clip = own[0], self._clip(study, result)
            own.append(with_metric(first, "clip_score", estimate(study, clip)))
            if result is not self.best:
                change = estimate(study, clip - constant)
                own.append(with_metric(first, "clip_score_minus_best_constant", change))
            distance = frechet_distance(image_features(self.scorer, _pictures(result)), real)
            away = Estimate(distance, math.nan, math.nan)
            own.append(with_metric(first, "frechet_distance", away))
            effective = estimate(study, self._effective(result))
            own.append(with_metric(first, "effective_scale", effective))
            rows += own
        return rows

    def _rows_of(self, study: Study, result: ArmResult, command: str) -> list[Row]:
        """Return the judge's numbers of an arm, and what tells it from others."""
        reference = None if result is self.best else self.best
        rows = result_rows(study, result, reference, against="best_constant", command=command)
        name = result.arm.name
        if name in self.scales or name == _MEAN:  # the arm's own scale did nothing
            rows = [replace(row, guidance_scale=math.nan) for row in rows]
        if reference is not None:
            change = score_change(result, reference)
            rows += [
                with_metric(rows[0], f"{task}_minus_best_constant", estimate(study, change, task))
                for task in named_tasks(study)
            ]
        if name in self.fast:
            change = score_change(result, self.fast[name])
            rows.append(with_metric(rows[0], "overall_minus_fast", estimate(study, change)))
        return rows

    def _clip(self, study: Study, result: ArmResult) -> Tensor:
        """Return the CLIP score of each image, a cosine, [n]."""
        texts = [case.prompt.text for case in study.cases]
        return self.scorer.score(_pictures(result), texts) / 100

    def _effective(self, result: ArmResult) -> Tensor:
        """Return the mean scale of each image over the steps, [n]."""
        if result.arm.name in self.scales:
            return self.scales[result.arm.name].mean(1)
        steps = result.arm.plan(in_model=False).steps
        scales = [1.0 if step.kind == "cond" else step.guidance_scale for step in steps]
        return torch.full((len(result.correct),), sum(scales) / len(scales))


def named_tasks(study: Study) -> list[str]:
    """Return those of `NAMED_TASKS` that the study has."""
    return [task for task in NAMED_TASKS if task in study.tasks]


def _pictures(result: ArmResult) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in result.images]


def run_study(
    study: Study,
    config: DynamicCfgConfig,
    evaluators: Mapping[str, Evaluator],
    heads: Mapping[str, str],
) -> Runs:
    """Run all arms: constant scales, static rules, online rules and their controls, the oracle.

    Args:
        study: what the arms share.
        config: of the command.
        evaluators: by name.
        heads: folders of heads on outputs by name, in whose fast steps scales are picked as well.

    Raises:
        ConfigError: a head does not fit the model.
    """
    with user_input():
        for arm in fast_arms(config, heads, max(config.candidates)).values():
            check_arm(study, arm)
    sweep = run_arms(study, constant_arms(config))
    best = max(sweep, key=lambda result: result_rows(study, result, command="")[0].value)
    scorer = SCORERS.get("shapes-clip").load(device=str(study.pipe.device))
    static = run_arms(study, static_arms(config, best.arm.guidance_scale))
    runs = Runs(best, scorer, [*sweep, *static])
    arm = Arm("online", "cfg", config.steps, max(config.candidates))
    rule = partial(OnlineScale, candidates=config.candidates)
    for name, evaluator in evaluators.items():
        alone = rule({name: evaluator})
        runs.add(study, arm, online(f"online-{name}", f"picked by {name} alone", alone))
    equal = rule(evaluators, weights=dict.fromkeys(evaluators, 1.0))
    runs.add(study, arm, online("online-fixed", "picked by all evaluators, weighed alike", equal))
    adaptive = online(ADAPTIVE, "picked by all, weighed by their relative gain", rule(evaluators))
    picked = runs.add(study, arm, adaptive)
    mean = mean_arm(_MEAN, arm, picked.mean(0).tolist())
    runs.results += run_arms(study, [mean])
    runs.abouts[_MEAN] = f"the mean of {ADAPTIVE} over all images, for all: {mean.scale_rule}"
    text = f"each image's own scales of {ADAPTIVE} in another order of the steps"
    runs.add(study, arm, shuffled("online-shuffled", text, study, picked, adaptive.key))
    _run_fast(study, config, heads, runs, rule(evaluators))
    text = "picked by the judge, on the image that each candidate leads to; ties by the Shapes CLIP"
    asked = (study, config.steps, config.candidates, scorer, ShapesScorer.key)
    runs.add(study, arm, oracle("oracle", text, *asked))
    return runs


def _run_fast(
    study: Study,
    config: DynamicCfgConfig,
    heads: Mapping[str, str],
    runs: Runs,
    rule: OnlineScale,
) -> None:
    """Run each head's fast steps at the best constant scale, and with scales picked in them."""
    constant = fast_arms(config, heads, runs.best_scale)
    open_to = fast_arms(config, heads, max(config.candidates))
    for name, result in zip(heads, run_arms(study, list(constant.values())), strict=True):
        runs.results.append(result)
        runs.abouts[result.arm.name] = (
            f"the head {name} in all steps, at the best constant scale of CFG"
        )
        about = f"as {ADAPTIVE}, in steps that the head {name} makes fast"
        picking = online(f"{name}-online", about, rule)
        runs.fast[picking.name] = result
        runs.add(study, open_to[name], picking)


def pattern_plot(study: Study, runs: Runs) -> bytes:
    """Draw the mean scale of each step: of all arms under a rule, and of one by task; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, scales in runs.scales.items():
        _draw(left, scales, name)
    tasks = [case.prompt.task for case in study.cases]
    for task in study.tasks:
        own = [i for i, other in enumerate(tasks) if other == task]
        _draw(right, runs.scales[ADAPTIVE][own], task)
    left.set(xlabel="step", ylabel="guidance scale picked, mean of images", title="by arm")
    right.set(xlabel="step", title=f"{ADAPTIVE} by task")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw(axes: Any, scales: Tensor, label: str) -> None:
    """Draw the mean of the images [n, N] with a band of one standard error."""
    mean = scales.mean(0)
    error = scales.std(0, correction=0) / math.sqrt(len(scales))
    steps: Sequence[int] = range(len(mean))
    axes.plot(steps, mean, marker=".", label=label)
    axes.fill_between(steps, mean - error, mean + error, alpha=0.15, linewidth=0)
    axes.legend(fontsize="small")
