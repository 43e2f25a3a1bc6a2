"""Draw what ``core2 generate`` was asked for, and write down what made each image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from PIL.Image import Image

from core2_sampler.cli.console import print_table, progress_bars
from core2_sampler.cli.generate import GenerateConfig, Job
from core2_sampler.cli.images import captioned, file_stem, grid, save_image
from core2_sampler.cli.loading import load_model, load_weak_head
from core2_sampler.cli.scale_rule import online_scale, save_schedule, schedules
from core2_sampler.config import user_input
from core2_sampler.info import environment
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.loop import NonFiniteError
from core2_sampler.plan import Core2Config, Plan, Step
from core2_sampler.scale_rules import ONLINE
from core2_sampler.scales import CANDIDATES

Advance = Callable[[int], None]

CAPTION = "{mode}: NFE {nfe}, {seconds:.2f} s"
"""What stands with the images of an arm, made from a record."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of drawing; ``core2`` None is the stock pipeline, whose plan is all CFG."""

    mode: str
    core2: Core2Config | None
    plan: Plan
    head: str | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """An image, its record, and the guidance scale of each step."""

    image: Image
    record: dict[str, Any]
    schedule: list[float]


@dataclass(frozen=True, slots=True)
class Studio:
    """A loaded pipeline with the request that it works on."""

    pipe: Any
    config: GenerateConfig
    job: Job

    def draw(self, arm: Arm, prompt: str, advance: Advance) -> list[Drawn]:
        """Draw all images of a prompt; ``advance`` counts image-steps."""
        config = self.config
        seeds = [config.seed + index for index in range(config.num_images)]
        batches = [
            seeds[start : start + config.batch_size]
            for start in range(0, len(seeds), config.batch_size)
        ]
        drawn: list[Drawn] = []
        for batch in batches:
            start = time.perf_counter()
            with count_nfe(self.pipe.family.denoiser(self.pipe).module) as counter:
                images = self.run(arm.core2, prompt, batch, config.steps, advance)
            seconds = (time.perf_counter() - start) / len(batch)
            counted = {"nfe": counter.per_sample(len(batch)), "seconds": round(seconds, 4)}
            plan = self.pipe.core2_plan or arm.plan  # the run's own, where it has one
            scales = schedules(plan, self.pipe.core2_schedule, len(batch))
            for image, seed, schedule in zip(images, batch, scales, strict=True):
                record = self.record(arm, plan, prompt, seed)
                record |= self.rule_record(arm, plan, schedule) | counted
                drawn.append(Drawn(image, record, schedule))
        return drawn

    def run(
        self,
        core2: Core2Config | None,
        prompt: str,
        seeds: Sequence[int],
        steps: int,
        advance: Advance,
    ) -> list[Image]:
        """Draw one batch: an image for each seed, each with its own generator."""

        def on_step(_p: Any, _i: int, _t: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
            advance(len(seeds))
            return tensors

        return self.pipe(
            prompt,
            height=self.job.height,
            width=self.job.width,
            num_inference_steps=steps,
            num_images_per_prompt=len(seeds),
            **self._family_arguments(),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step,
            core2=core2,
        ).images

    def _family_arguments(self) -> dict[str, Any]:
        family, job, negative = self.pipe.family, self.job, self.config.negative_prompt
        if family.name == "flux" and negative is None:
            negative = ""  # without one the stock call leaves guidance out
        arguments = {family.scale_argument: job.guidance_scale, "negative_prompt": negative}
        return arguments | ({} if job.tokens is None else {"max_sequence_length": job.tokens})

    def warm_up(self, arms: Sequence[Arm]) -> None:
        """Run two steps of each arm, since first runs pay for set-up; measured times shall not."""
        seeds = list(range(min(self.config.num_images, self.config.batch_size)))
        for arm in arms:
            core2 = arm.core2
            if core2 is not None and core2.sample_rule is None:
                core2 = replace(core2, scale_rule=None)  # may know no two steps
            if core2 is not None and core2.mode == "core":
                core2 = replace(core2, slow_steps=1)  # one step of each kind
            elif core2 is not None and core2.zig_steps is not None:
                core2 = replace(core2, zig_steps=None)  # two steps have no others
            self.run(core2, self.config.prompts[0], seeds, 2, lambda count: None)

    def record(self, arm: Arm, plan: Plan, prompt: str, seed: int) -> dict[str, Any]:
        """Return all that decides an image."""
        config, job, steps = self.config, self.job, plan.steps
        slow = [i for i, step in enumerate(steps) if step.kind in ("cfg", "slow")]
        return {
            "prompt": prompt,
            "negative_prompt": config.negative_prompt,
            "seed": seed,
            "model": config.model,
            "mode": arm.mode,
            "steps": config.steps,
            "w2s_scale": steps[slow[0]].w2s_scale if slow else None,
            "slow_steps": len(slow),
            "slow_positions": slow,
            "zig_positions": list(plan.zigs),
            "inversion_scale": steps[plan.zigs[0]].inversion_scale if plan.zigs else None,
            "upstream": plan.upstream is not None,
            "head": arm.head,
            "height": job.height,
            "width": job.width,
            "max_sequence_length": job.tokens,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            **environment(job.device),
        }

    def rule_record(self, arm: Arm, plan: Plan, schedule: list[float]) -> dict[str, Any]:
        """Return what decides the guidance scale of each step."""
        config, core2 = self.config, arm.core2
        scale: float | None = 1.0 if arm.mode == "cond" else self.job.guidance_scale
        if core2 is None or core2.scale_rule is None:
            unset = dict.fromkeys(("scale_rule", "evaluators", "candidates", "schedule"))
            return {"guidance_scale": scale, **unset}
        online = core2.sample_rule is not None
        single = online and len(plan.asking) < len(plan)
        return {
            "guidance_scale": scale if single else None,
            "scale_rule": config.scale_rule,
            "evaluators": [str(path) for path in config.evaluators or ()] if online else None,
            "candidates": list(config.candidates or CANDIDATES) if online else None,
            "schedule": schedule,
        }


def draw(config: GenerateConfig, job: Job) -> None:
    """Draw every prompt in every arm; write images, records, a grid and a summary."""
    pipe = load_model(job.model, job.device, config.dtype)
    if job.head is not None:
        pipe.register_modules(weak_head=load_weak_head(job.head, pipe))
    if config.scale_rule == ONLINE:
        rule = online_scale(config, job.model.family, job.device)
        job = replace(job, core2=replace(job.core2, scale_rule=rule))
    studio, arms = Studio(pipe, config, job), arms_of(config, job)
    config.output.mkdir(parents=True, exist_ok=True)
    with errors_in_one_line():
        if config.compare:
            studio.warm_up(arms)
        rows = _draw_all(studio, arms)
    sheets = [grid([[each.image for each in row] for row in rows[arm.mode]]) for arm in arms]
    sheets[-1].save(config.output / "grid.png")
    summaries = [_summary(rows[arm.mode]) for arm in arms]
    if config.compare:
        captions = [CAPTION.format(**each) for each in summaries]
        captioned(sheets, captions).save(config.output / "compare.png")
    _report(summaries, config)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Report what the pipeline refuses as bad input, and what it fails on as a failure."""
    try:
        with user_input():
            yield
    except NonFiniteError as error:
        raise typer.TyperException(str(error)) from error


def _draw_all(studio: Studio, arms: Sequence[Arm]) -> dict[str, list[list[Drawn]]]:
    """Draw and save; return the images of each prompt, by arm."""
    config = studio.config
    rows: dict[str, list[list[Drawn]]] = {arm.mode: [] for arm in arms}
    total = len(config.prompts) * config.num_images * config.steps
    with progress_bars({arm.mode: total for arm in arms}) as bars:
        for prompt in config.prompts:
            for arm in arms:
                drawn = studio.draw(arm, prompt, partial(bars.advance, arm.mode))
                rows[arm.mode].append(drawn)
                _save(drawn, config)
    return rows


def arms_of(config: GenerateConfig, job: Job) -> list[Arm]:
    """Return the ways of drawing that a request asks for, stock CFG first."""
    head = job.head.name if job.head is not None else None
    arms = [Arm(config.mode, job.core2, job.plan, head)]
    if config.compare:
        stock = Plan((Step("cfg", job.guidance_scale),) * config.steps)
        arms.insert(0, Arm("cfg", None, stock, None))
    return arms


def _save(drawn: Sequence[Drawn], config: GenerateConfig) -> None:
    for each in drawn:
        stem = file_stem(each.record["prompt"], each.record["seed"], each.record["mode"])
        path = config.output / f"{stem}.png"
        save_image(each.image, path, each.record)
        if config.save_schedule:
            save_schedule(path, each.record, each.schedule)


def _summary(rows: Sequence[Sequence[Drawn]]) -> dict[str, Any]:
    """Return one arm's numbers: NFE, and the mean seconds of an image."""
    records = [each.record for row in rows for each in row]
    seconds = sum(record["seconds"] for record in records) / len(records)
    return records[0] | {"images": len(records), "seconds": seconds}


def _report(summaries: Sequence[Mapping[str, Any]], config: GenerateConfig) -> None:
    """Print what was drawn, a line for each arm."""
    header = ("mode", "images", "steps", "scale", "NFE", "seconds per image", "head")
    rows = [
        [
            *(each[key] for key in ("mode", "images", "steps")),
            each["scale_rule"] or each["guidance_scale"],
            *(each["nfe"], f"{each['seconds']:.3f}", Path(each["head"] or "").name),
        ]
        for each in summaries
    ]
    print_table(header, rows)
    name = "compare.png" if config.compare else "grid.png"
    print(f"{config.output / name}, and every image with its JSON beside it")
