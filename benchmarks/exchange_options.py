"""The options of the ``core2 bench`` commands that give images and verdicts away, and take them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core2_sampler.benchmarks.options import OUT
from core2_sampler.config import option


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Options of ``core2 bench export``."""

    layout: Literal["geneval", "t2icompbench", "hpsv2"] = option(
        help="Whose file names: geneval, t2icompbench or hpsv2."
    )
    to: Path = option(help="Folder for the copies, one folder in it for each arm.")
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """Options of ``core2 bench import``."""

    results: Path = option(help="The results.jsonl that GenEval's own evaluator wrote.")
    images: Path = option(
        help="The folder that it judged: one arm's, as `core2 bench export --layout geneval` made."
    )
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class ImportImagesConfig:
    """Options of ``core2 bench import-images``."""

    images: Path = option(help="Folder of one arm's images, made elsewhere.")
    arm: str = option(help="What reports call these images; cfg is what others are compared with.")
    layout: Literal["plain", "geneval", "t2icompbench", "hpsv2"] = option(
        "plain",
        help="Whose file names: geneval, t2icompbench, hpsv2; or plain, which is 00012.png or "
        "00012-1.png by the place of the prompt in its list (from 0) and the image's number, or a "
        "metadata.jsonl beside the images with file_name and prompt in each line.",
    )
    run: str | None = option(
        None,
        help="A run of this folder that the images join, by its name in runs/; by default they are "
        "a run of their own, of the prompts that --suite, --source and --limit say.",
    )
    suite: str | None = option(
        None, help="The suite of the prompts; by default the layout's. Not with --run."
    )
    source: str | None = option(
        None,
        help="File or folder with the suite's prompts, https:// address, or "
        "hf:datasets/OWNER/NAME/FILE; by default they are fetched.",
    )
    limit: int | None = option(None, help="Only the first so many prompts.", min=1)
    skip_nsfw: bool = option(False, help="The prompts that are not safe for work are left out.")
    model: str | None = option(None, help="What reports call the model; not with --run.")
    steps: int | None = option(
        None, help="N of the arms that these are compared with; by default the run's.", min=1
    )
    guidance_scale: float | None = option(
        None, help="Scale of the arms that these are compared with; by default the run's.", min=1
    )
    nfe: float | None = option(
        None, help="Denoiser evaluations of an image, where they are known.", min=0
    )
    out: Path = OUT
