"""``core2 shapes``: render, judge and train the embedded world."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from core2_sampler.cli.loading import DEVICE_HELP
from core2_sampler.cli.options import add_command
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.json_files import read_json

if TYPE_CHECKING:
    from core2_sampler.shapes.world import Prompt

app = typer.Typer(
    help="Render, judge and train the embedded world.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of ``core2 shapes train``."""

    part: Literal["vae", "clip", "t5", "sd3", "sdxl", "flux"] = option(
        help="vae, clip, t5, or a denoiser, which needs those three: sd3, sdxl or flux."
    )
    minutes: float = option(help="Length of the training; time before a kill counts.", min=0.001)
    out: Path = option(
        Path("runs/shapes"), help="Folder of the parts; the same command again resumes.", short="-o"
    )
    start: Path | None = option(
        None,
        help="Folder of a trained pipeline (for clip: of `clip`) to go on from; SD3's lends its "
        "VAE and text encoders where --out has none.",
    )
    compile: bool = option(
        False, help="Compile a denoiser first: takes minutes, and a C++ compiler on a CPU."
    )
    device: str = option("auto", help=DEVICE_HELP)


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """Options of ``core2 shapes render``."""

    num_images: int = option(16, help="How many images, each of another prompt.", short="-n", min=1)
    split: Literal["train", "val", "test"] = option(
        "test", help="Prompts of this split: train, val or test."
    )
    seed: int = option(0, help="Of the first image; with train also of the prompts.", min=0)
    output: Path = option(Path("out"), help="Folder for images and GenEval metadata.", short="-o")


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Options of ``core2 shapes judge``."""

    folders: tuple[str, ...] = option(
        help="Folders of PNG files with their JSON, as `core2 generate` writes them.",
        positional=True,
    )


@dataclass(frozen=True, slots=True)
class ShipOptions:
    """Options of ``core2 shapes ship``."""

    folders: tuple[str, ...] = option(
        help="A trained pipeline, or the trained CLIP pair, as `core2 shapes train` leaves them.",
        positional=True,
    )
    head: Path | None = option(None, help="Folder of the trained weak head to put inside.")
    into: Path | None = option(
        None, help="Folder of the shipped models; by default that of this installation."
    )


@dataclass(frozen=True, slots=True)
class RebuildOptions:
    """Options of ``core2 shapes rebuild``."""

    out: Path = option(
        help="Folder of all that is made; the same command again goes on. The models that could "
        "be shipped end in its folder `models`.",
        short="-o",
    )
    minutes: float | None = option(
        None,
        help="Time for the whole chain, shared by its stages in proportion; by default what the "
        "shipped models had. Very short ones take longer: nothing is measured on no images.",
        min=0.001,
    )
    device: str = option("auto", help=DEVICE_HELP)


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """Options of ``core2 shapes average``."""

    folders: tuple[str, ...] = option(
        help="Trained pipelines of one family, stages of one training; the last lends the rest.",
        positional=True,
    )
    out: Path = option(help="Folder for the new pipeline; it must not exist.", short="-o")


def train(options: TrainOptions) -> None:
    """Train one part of the Shapes model; a killed run resumes."""
    check_folder(options.out, "out")

    from core2_sampler.info import pick_device
    from core2_sampler.progress import hide_loading
    from core2_sampler.shapes.train import train as train_part

    hide_loading()
    with user_input():
        device = pick_device(options.device)
        train_part(
            options.part,
            options.out,
            options.minutes,
            device,
            start=options.start,
            compiled=options.compile,
        )


def ship(options: ShipOptions) -> None:
    """Put a trained model in this installation, where `--model shapes-...` finds it."""
    if len(options.folders) != 1:
        raise ConfigError(f"folders must be one trained model, got {len(options.folders)}")
    from core2_sampler.cli.ship import ship as ship_model
    from core2_sampler.shapes import MODELS

    models = options.into or MODELS
    check_folder(models, "into")
    with user_input():
        models.mkdir(parents=True, exist_ok=True)
        for line in ship_model(Path(options.folders[0]), options.head, models):
            print(line)


def rebuild(options: RebuildOptions) -> None:
    """Train all embedded models and their heads from nothing; a killed run goes on.

    The installation is left as it is; `core2 shapes ship` puts a model there.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("the judge needs scipy: pip install 'core2-sampler[bench]'")
    check_folder(options.out, "out")

    from core2_sampler.info import pick_device
    from core2_sampler.shapes.rebuild import RECORD, chain
    from core2_sampler.shapes.rebuild import rebuild as rebuild_models

    with user_input():
        device = pick_device(options.device)
        stages = chain(options.out, options.minutes, device)
        record = rebuild_models(
            stages, options.out, _run_command, minutes=options.minutes, device=device
        )
    took = sum(stage["minutes"] for stage in record["stages"].values())
    print(f"{options.out / 'models'}: {took:.1f} minutes in all, in {options.out / RECORD}")


def _run_command(arguments: list[str]) -> None:
    from core2_sampler.cli import main

    try:
        main(arguments)
    except SystemExit as done:
        if done.code:
            raise


def average(options: AverageOptions) -> None:
    """Average the denoisers of several trained pipelines into a new one."""
    check_folder(options.out.parent, "the folder of out")

    from core2_sampler.shapes.averaging import average as average_models

    with user_input():
        average_models([Path(folder) for folder in options.folders], options.out)
    print(f"the mean of {len(options.folders)} denoisers in {options.out}")


def render(options: RenderOptions) -> None:
    """Render real images of the world, each with its prompt in a JSON file beside it."""
    check_folder(options.output)

    from core2_sampler.cli.images import file_stem, grid, save_image
    from core2_sampler.shapes.render import render as render_image
    from core2_sampler.shapes.world import held_out_prompts, training_prompt, write_metadata

    with user_input():
        if options.split == "train":
            rng = random.Random(f"render/{options.seed}")
            prompts = [training_prompt(rng) for _ in range(options.num_images)]
        else:
            prompts = held_out_prompts(options.num_images, options.split)
        options.output.mkdir(parents=True, exist_ok=True)
    images = []
    for index, prompt in enumerate(prompts):
        seed = options.seed + index
        images.append(render_image(prompt, seed))
        stem = file_stem(prompt.text, seed, "render")
        record = {"prompt": prompt.text, "seed": seed, "task": prompt.task, "split": options.split}
        save_image(images[-1], options.output / f"{stem}.png", record)
    write_metadata(prompts, options.output / "evaluation_metadata.jsonl")
    grid([images[i : i + 8] for i in range(0, len(images), 8)]).save(options.output / "grid.png")
    print(f"{len(images)} images in {options.output}")


def judge(options: JudgeOptions) -> None:
    """Judge images of the world against their prompts, and print the share that is right."""
    from PIL import Image

    from core2_sampler.cli.console import print_table
    from core2_sampler.shapes.judge import judge as judge_image

    records = [each for folder in options.folders for each in _records(Path(folder))]
    tasks: dict[str, list[bool]] = {}
    for file, prompt in records:
        with Image.open(file) as image:
            verdict = judge_image(image.convert("RGB"), prompt)
        tasks.setdefault(prompt.task, []).append(verdict.correct)
        if not verdict.correct:
            print(f"{file}: {verdict.reason}")
    tasks["all"] = [right for each in tasks.values() for right in each]
    rows = [(task, len(each), f"{sum(each) / len(each):.3f}") for task, each in tasks.items()]
    print_table(("task", "images", "right"), rows)


def _records(folder: Path) -> list[tuple[Path, Prompt]]:
    """Return the images of a folder that have a record, with their prompts.

    Raises:
        ConfigError: if there are none, or a prompt is none of the world.
    """
    known = all_texts()
    found = []
    for file in sorted(folder.glob("*.json")):
        if not file.with_suffix(".png").is_file():
            continue
        text = read_json(file).get("prompt")
        if not isinstance(text, str) or text not in known:
            raise ConfigError(f"the prompt must be a caption of Shapes, got {text!r} in {file}")
        found.append((file.with_suffix(".png"), known[text]))
    if not found:
        raise ConfigError(f"a folder must hold PNG files with their JSON, got {folder} without")
    return found


def all_texts() -> dict[str, Prompt]:
    """Return every prompt of the world by its text, in every wording."""
    from dataclasses import replace

    from core2_sampler.shapes.world import PREFIXES, TASKS, all_prompts

    worded = (
        replace(prompt, prefix=prefix)
        for task in TASKS
        for prompt in all_prompts(task)
        for prefix in PREFIXES
    )
    return {prompt.text: prompt for prompt in worded}


add_command(app, "train", TrainOptions, train)
add_command(app, "average", AverageOptions, average)
add_command(app, "rebuild", RebuildOptions, rebuild)
add_command(app, "ship", ShipOptions, ship)
add_command(app, "render", RenderOptions, render)
add_command(app, "judge", JudgeOptions, judge)
