"""``core2 generate``: check everything, load once, draw, and write down what made each image."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from core2_sampler.cli.models import HeadFiles, ModelFiles, find_head, find_model
from core2_sampler.cli.options import add_command, user_input
from core2_sampler.config import ConfigError, option
from core2_sampler.plan import PRESETS, Core2Config, Plan, Step

if TYPE_CHECKING:
    from PIL.Image import Image

GenerateMode = Literal["fast", "balanced", "quality", "core", "cfg", "cond"]
_CORE2_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(Core2Config)}


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Options of ``core2 generate``."""

    prompts: tuple[str, ...] = option(help="What to draw; one or more texts.", positional=True)
    model: str = option("shapes-sd3", help="An embedded model, a folder or a hub id owner/name.")
    steps: int = option(28, help="Sampling steps.", min=1)
    mode: GenerateMode = option(
        "fast",
        help="fast: one pass a step; balanced: CFG in the first quarter; quality: all slow; "
        "core: as --slow-steps says; cfg: plain guidance; cond: no guidance.",
    )
    guidance_scale: float | None = option(
        None, help="Strength of guidance; by default what the model's head was made for.", min=1
    )
    w2s_scale: float | None = option(None, help=_CORE2_HELP["w2s_scale"] + ".")
    slow_steps: int | float | tuple[int, ...] | None = option(
        None, help=_CORE2_HELP["slow_steps"] + "."
    )
    num_images: int = option(1, help="Images for each prompt.", short="-n", min=1)
    batch_size: int = option(8, help="Images drawn at once; changes no image.", min=1)
    seed: int = option(0, help="Seed of the first image; the next has seed + 1.", min=0)
    output: Path = option(
        Path("out"),
        help="Folder for the images; same prompt, seed and mode: same name.",
        short="-o",
    )
    negative_prompt: str | None = option(None, help="What not to draw.")
    height: int | None = option(None, help="Height in px; by default the model's.", min=1)
    width: int | None = option(None, help="Width in px; by default the model's.", min=1)
    head: str | None = option(
        None, help="A weak head's folder or a control's name; by default the model's own."
    )
    compare: bool = option(False, help="Draw stock CFG beside it, on the same latents.")
    device: str = option("auto", help="A torch device such as cuda:0; auto takes the best one.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto", help="Precision; auto is bfloat16 on CUDA and float32 elsewhere."
    )


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: all that drawing needs beyond the options."""

    model: ModelFiles
    head: HeadFiles | None
    core2: Core2Config
    plan: Plan
    guidance_scale: float
    height: int
    width: int
    device: str


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of drawing: ``core2`` None is the stock pipeline with CFG."""

    mode: str
    core2: Core2Config | None
    plan: Plan
    head: str | None


def generate(config: GenerateConfig) -> None:
    """Generate images, with all that made them in the PNG and in a JSON file beside it."""
    job = check(config)
    _draw(config, job)


def check(config: GenerateConfig) -> Job:
    """Check a request as far as it can be without loading a weight.

    Raises:
        ConfigError: naming what must hold, what was given and what to do.
    """
    from core2_sampler.info import pick_device

    if not config.prompts or not all(prompt.strip() for prompt in config.prompts):
        raise ConfigError("a prompt must have words, got an empty one")
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"output must be a folder, got the file {config.output}")
    if config.compare and config.mode == "cfg":
        raise ConfigError("--compare sets CFG beside another mode, got mode 'cfg'; choose another")
    with user_input():
        core2 = core2_config(config)
        core2.plan(config.steps, 2.0)  # any scale: slow steps against steps
    model = find_model(config.model)
    height, width = model.check_size(config.height, config.width)
    head = find_head(config.head, model)
    scale = _guidance_scale(config, model, head)
    with user_input():
        device = pick_device(config.device)
        plan = core2.plan(config.steps, scale, head is not None and head.in_model)
    check_plan(config, plan, head)
    used = head if plan.needs_head else None
    return Job(model, used, core2, plan, scale, height, width, device)


def core2_config(config: GenerateConfig) -> Core2Config:
    """Turn mode, slow steps and scale into the pipelines' config; refuse what has no effect."""
    given = {
        name: getattr(config, name)
        for name in ("slow_steps", "w2s_scale")
        if getattr(config, name) is not None
    }
    if config.mode in PRESETS:
        return dataclasses.replace(PRESETS[config.mode], **given)
    if config.mode != "core" and given:
        raise ConfigError(f"{min(given)} has no effect in mode {config.mode!r}; leave it out")
    if config.mode == "cond" and config.guidance_scale is not None:
        raise ConfigError("guidance_scale has no effect in mode 'cond'; leave it out")
    return Core2Config(mode=config.mode, **given)  # type: ignore[arg-type]


def check_plan(config: GenerateConfig, plan: Plan, head: HeadFiles | None) -> None:
    """Check a plan against the head and the options that only some plans use."""
    if plan.needs_head and head is None:
        raise ConfigError(
            f"mode {config.mode!r} needs a weak head and {config.model} has none; give one with "
            "--head (`core2 collect` and `core2 reflect` make it) or take --mode cfg"
        )
    if config.head is not None and not plan.needs_head:
        raise ConfigError(f"head has no effect in mode {config.mode!r}; leave it out")
    if config.negative_prompt is not None and not plan.needs_uncond:
        raise ConfigError(
            f"negative_prompt has no effect in mode {config.mode!r}: no step runs it; "
            "take --slow-steps above 0 or --mode cfg"
        )
    if config.w2s_scale is not None and not plan.needs_uncond:
        raise ConfigError("w2s_scale has no effect without slow steps; give --slow-steps")


def _guidance_scale(config: GenerateConfig, model: ModelFiles, head: HeadFiles | None) -> float:
    """Return the scale asked for, else the head's, else the model family's own."""
    if config.guidance_scale is not None:
        return config.guidance_scale
    if head is not None and head.reference_scale is not None:
        return head.reference_scale
    return model.guidance_scale


def _arms(config: GenerateConfig, job: Job) -> list[Arm]:
    head = job.head.name if job.head is not None else None
    arms = [Arm(config.mode, job.core2, job.plan, head)]
    if config.compare:
        stock = Plan((Step("cfg", job.guidance_scale),) * config.steps)
        arms.insert(0, Arm("cfg", None, stock, None))
    return arms


def _load(config: GenerateConfig, job: Job) -> Any:
    """Load the pipeline and the head onto the device."""
    import diffusers
    import torch
    import transformers

    from core2_sampler.pipelines.auto import load_pipeline
    from core2_sampler.weak_heads import load_head

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    auto = "bfloat16" if job.device.startswith("cuda") else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    pipe = load_pipeline(job.model.source, torch_dtype=dtype)
    if job.head is not None:
        pipe.register_modules(weak_head=load_head(job.head.source).to(dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(job.device)


def _draw(config: GenerateConfig, job: Job) -> None:
    """Draw every prompt with every arm, and write images, records, grids and the summary."""
    from core2_sampler.cli.images import captioned, file_stem, grid, save_image

    pipe = _load(config, job)
    arms = _arms(config, job)
    config.output.mkdir(parents=True, exist_ok=True)
    if config.compare:  # the first run of a shape pays for set-up that neither arm shall answer for
        _run(pipe, config, job, arms[0], config.prompts[0], [config.seed], steps=1)
    drawn: list[list[list[tuple[Image, dict[str, Any]]]]] = [[] for _ in arms]
    count = len(config.prompts) * config.num_images
    with _progress(arms, config.steps * count) as advance:
        for prompt in config.prompts:
            for index, arm in enumerate(arms):
                drawn[index].append([])
                for seeds in _batches(config):
                    pairs = _run(pipe, config, job, arm, prompt, seeds, advance=advance[index])
                    drawn[index][-1] += pairs
                    for image, record in pairs:
                        stem = file_stem(prompt, record["seed"], arm.mode)
                        save_image(image, config.output / f"{stem}.png", record)
    sheets = [grid([[image for image, _ in row] for row in rows]) for rows in drawn]
    sheets[-1].save(config.output / "grid.png")
    summaries = [_summary(arm, rows) for arm, rows in zip(arms, drawn, strict=True)]
    if config.compare:
        captions = ["{mode}: NFE {nfe}, {seconds:.2f} s".format(**each) for each in summaries]
        captioned(sheets, captions).save(config.output / "compare.png")
    _report(summaries, config)


def _batches(config: GenerateConfig) -> Iterator[list[int]]:
    """Yield the seeds of one prompt's images, a batch at a time."""
    seeds = [config.seed + index for index in range(config.num_images)]
    for start in range(0, len(seeds), config.batch_size):
        yield seeds[start : start + config.batch_size]


def _run(
    pipe: Any,
    config: GenerateConfig,
    job: Job,
    arm: Arm,
    prompt: str,
    seeds: list[int],
    *,
    steps: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[tuple[Image, dict[str, Any]]]:
    """Draw one batch of one prompt; return each image with its record."""
    import torch

    from core2_sampler.nfe import count_nfe

    def on_step(_pipe: Any, _i: int, _t: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        if advance is not None:
            advance(len(seeds))
        return tensors

    start = time.perf_counter()
    with count_nfe(pipe.transformer) as counter:
        images = pipe(
            prompt,
            negative_prompt=config.negative_prompt,
            height=job.height,
            width=job.width,
            num_inference_steps=steps or config.steps,
            guidance_scale=job.guidance_scale,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step,
            core2=arm.core2,
        ).images
    seconds = (time.perf_counter() - start) / len(seeds)
    nfe = counter.per_sample(len(seeds))
    return [
        (image, _record(config, job, arm, prompt, seed, nfe, seconds))
        for image, seed in zip(images, seeds, strict=True)
    ]


def _record(
    config: GenerateConfig, job: Job, arm: Arm, prompt: str, seed: int, nfe: int, seconds: float
) -> dict[str, Any]:
    """Return all that made an image. ``nfe`` was counted; ``seconds`` is its share of the batch."""
    from core2_sampler.info import environment

    slow = [step for step in arm.plan.steps if step.kind in ("cfg", "slow")]
    return {
        "prompt": prompt,
        "negative_prompt": config.negative_prompt,
        "seed": seed,
        "model": config.model,
        "mode": arm.mode,
        "steps": config.steps,
        "guidance_scale": 1.0 if config.mode == arm.mode == "cond" else job.guidance_scale,
        "w2s_scale": slow[0].w2s_scale if slow else None,
        "slow_steps": len(slow),
        "nfe": nfe,
        "head": arm.head,
        "height": job.height,
        "width": job.width,
        "seconds": round(seconds, 4),
        "dtype": config.dtype,
        **environment(job.device),
    }


@contextmanager
def _progress(arms: list[Arm], steps: int) -> Iterator[list[Callable[[int], None]]]:
    """Show one bar for each arm; yields a function for each that counts image-steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeRemaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemaining())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = [progress.add_task(arm.mode, total=steps) for arm in arms]
        yield [lambda count, task=task: progress.advance(task, count) for task in tasks]


def _summary(arm: Arm, rows: list[list[tuple[Image, dict[str, Any]]]]) -> dict[str, Any]:
    records = [record for row in rows for _, record in row]
    seconds = sum(record["seconds"] for record in records) / len(records)
    return {
        "mode": arm.mode,
        "images": len(records),
        "steps": records[0]["steps"],
        "nfe": records[0]["nfe"],
        "seconds": seconds,
        "head": arm.head or "",
    }


def _report(summaries: list[dict[str, Any]], config: GenerateConfig) -> None:
    """Print what was drawn, a line for each arm."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*("mode", "images", "steps", "NFE", "seconds per image", "head"))
    for each in summaries:
        cells = [each["mode"], each["images"], each["steps"], each["nfe"]]
        table.add_row(*map(str, cells), f"{each['seconds']:.3f}", Path(each["head"]).name)
    console = Console()
    console.print(table)
    name = "compare.png" if config.compare else "grid.png"
    console.print(f"Wrote {config.output / name} and every image with its JSON in {config.output}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_command(app, "generate", GenerateConfig, generate)
