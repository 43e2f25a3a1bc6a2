"""Arms whose guidance scales a rule picks while they run: their images, and what was picked.

What a rule picks is known only from the run itself, so each batch keeps its scales beside its
images, in one file that is written whole: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.online import rule_key
from core2_sampler.benchmarks.runner import arm_key, decode, generate, resolve_head, using_head
from core2_sampler.benchmarks.study import ArmResult, Case, Judge, Study
from core2_sampler.precision import wide
from core2_sampler.rows import stable_hash
from core2_sampler.scales import CallableScale, OnlineScale, Pair, SampleRule


@dataclass(frozen=True, slots=True)
class Ruled:
    """A way of picking scales.

    Attributes:
        name: what tables call it.
        about: one line for the table's legend.
        key: all that decides its picks beside arm, prompt and seed; JSON.
        rule: makes the rule of a batch.
    """

    name: str
    about: str
    key: Any
    rule: Callable[[Sequence[Case]], SampleRule]


def run_ruled(
    study: Study,
    arm: Arm,
    ruled: Ruled,
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> tuple[ArmResult, Tensor]:
    """Generate what is missing of an arm under a rule, then judge all of it.

    Args:
        study: what the arms share, with a judge.
        arm: whose steps all ask the rule: of mode ``cfg``, or all fast with a head on outputs.
        ruled: the rule.
        on_images: told how many more images are there.

    Returns:
        The arm's result, and the scale of each image in each step, [n, N].

    Raises:
        ValueError: if the study has no judge, or as the rule and `resolve_head`.
    """
    judge = study.judge
    if judge is None:
        raise ValueError("a study must have a judge to have its arms judged, got none")
    named = replace(arm, name=ruled.name)
    head = resolve_head(study, arm.head)
    folder = study.folder / digest(arm_key(study, arm, head), ruled.key)
    cases, parts = study.cases, []
    with using_head(study.pipe, head):
        for start in range(0, len(cases), study.batch_size):
            batch = cases[start : start + study.batch_size]
            parts.append(_batch(study, named, ruled, batch, folder))
            on_images(len(batch))
    latents, images, scales = (
        torch.cat([part[name] for part in parts]) for name in ("latents", "images", "scales")
    )
    pairs = zip(images, cases, strict=True)
    verdicts = [judge(Image.fromarray(image.numpy()), case.prompt) for image, case in pairs]
    correct, reasons = [bool(v.correct) for v in verdicts], [v.reason for v in verdicts]
    return ArmResult(named, float(parts[0]["nfe"]), images, latents, correct, reasons), scales


def _batch(
    study: Study, arm: Arm, ruled: Ruled, cases: Sequence[Case], folder: Path
) -> dict[str, Tensor]:
    """Return what a batch made, from its file where that is there."""
    path = folder / f"{digest([case.key for case in cases])}.safetensors"
    if not path.exists():
        rule = ruled.rule(cases)
        latents, images, nfe = generate(study, replace(arm, sample_rule=rule), cases)
        scales = study.pipe.core2_schedule.T.float().cpu()  # [B, N]
        made = {"latents": latents, "images": images, "scales": scales, "nfe": torch.tensor(nfe)}
        write_atomic(path, save({name: tensor.contiguous() for name, tensor in made.items()}))
    return load(path.read_bytes())


def online(name: str, about: str, rule: OnlineScale) -> Ruled:
    """Return the paper's rule: the candidate that the evaluators score best one step ahead."""
    return Ruled(name, about, ["online", rule_key(rule)], lambda cases: rule)


def shuffled(name: str, about: str, study: Study, scales: Tensor, of: Any) -> Ruled:
    """Return the rule that replays each image's own scales in another order of the steps.

    Args:
        name: what tables call it.
        about: one line for the table's legend.
        study: tells the cases.
        scales: of each image in each step, [n, N].
        of: key of the rule that picked them.
    """
    orders = {
        case.key: picked[_order(case, len(picked))]
        for case, picked in zip(study.cases, scales, strict=True)
    }

    def rule(cases: Sequence[Case]) -> SampleRule:
        table = torch.stack([orders[case.key] for case in cases], 1)  # [N, B]
        return CallableScale(lambda pair: table[pair.i].to(pair.x.device))

    return Ruled(name, about, ["shuffled", of], rule)


def _order(case: Case, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(stable_hash("shuffle", case.key))
    return torch.randperm(steps, generator=generator)


def oracle(
    name: str,
    about: str,
    study: Study,
    steps: int,
    candidates: Sequence[float],
    scorer: Any,
    judge_key: str,
) -> Ruled:
    """Return the rule that decodes the ``x0`` each candidate leads to and asks the judge.

    Where the judge says the same of several, the scorer decides; the first of equals is taken.

    Args:
        name: what tables call it.
        about: one line for the table's legend.
        study: its pipeline decodes and its judge decides.
        steps: N of the run.
        candidates: scales to choose from.
        scorer: a `core2_sampler.benchmarks.scorers.base.Scorer` with scores of at most 100.
        judge_key: names the study's judge and everything that changes its verdicts.
    """
    pipe, judge = study.pipe, study.judge
    if judge is None:
        raise ValueError("a study must have a judge for an oracle to ask, got none")

    def rule(cases: Sequence[Case]) -> SampleRule:
        schedule = pipe.family.schedule(pipe, steps, pipe.family.latent_shape(pipe)[1:])

        def merit(pair: Pair, scale: float) -> Tensor:
            x0 = wide(pair.x) - pair.sigma * wide(pair.guided(scale))
            pixels = decode(pipe, schedule.to_pipeline(x0, steps))
            return _merits(judge, scorer, pixels, cases)

        def choose(pair: Pair) -> Tensor:
            best = torch.stack([merit(pair, scale) for scale in candidates]).argmax(0)
            return torch.tensor(list(candidates))[best].to(pair.x.device)

        return CallableScale(choose)

    return Ruled(name, about, ["oracle", list(candidates), scorer.key, judge_key], rule)


def _merits(judge: Judge, scorer: Any, pixels: Tensor, cases: Sequence[Case]) -> Tensor:
    """Return the scorer's scores of images [B, H, W, 3], the right ones 1000 higher, [B]."""
    images = [Image.fromarray(image.numpy()) for image in pixels]
    right = [judge(i, case.prompt).correct for i, case in zip(images, cases, strict=True)]
    scores = scorer.score(images, [case.prompt.text for case in cases])
    return 1000 * torch.tensor(right, dtype=torch.float64) + scores.double()
