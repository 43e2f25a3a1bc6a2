"""The options of the ``core2 bench`` commands, each declared once."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core2_sampler.benchmarks.arms import FIRST_TABLE, SUITE_ARMS
from core2_sampler.config import ConfigError, check_folder, option


@dataclass(frozen=True, slots=True)
class StudyConfig:
    """What all bench commands share."""

    model: str = option("shapes-sd3", help="An embedded model, a folder or a hub id owner/name.")
    prompts: int = option(240, help="Held-out Shapes prompts.", min=1)
    split: Literal["test", "val"] = option(
        "test", help="Which held-out prompts: test for reporting, val for choosing."
    )
    seeds: int = option(2, help="Images of each prompt; seeds 0, 1, ...", min=1)
    batch_size: int = option(96, help="Images generated at once.", min=1)
    dtype: Literal["fp32", "bf16"] = option("fp32", help="Precision; bf16 is autocast.")
    device: str = option("auto", help="A torch device such as cuda:0; auto takes the best one.")
    threads: int | None = option(None, help="CPU threads; by default torch's choice.", min=1)
    max_sequence_length: int | None = option(
        None,
        help="T5 tokens; by default the stock call's, or the model's if fewer.",
        min=1,
        max=512,
    )
    cache: Path = option(
        Path("out/bench"), help="Folder of what is generated; nothing in it is made twice."
    )


@dataclass(frozen=True, slots=True)
class ShapesConfig:
    """Options of ``core2 bench shapes``."""

    study: StudyConfig
    steps: tuple[int, ...] = option((28,), help="Number of steps N, or several.", min=1)
    guidance_scale: float | None = option(
        None, help="Scale of every arm; by default what the model's head was made for.", min=1
    )
    arms: tuple[str, ...] | None = option(
        None, help=f"Arms, of: {', '.join(FIRST_TABLE)}; by default those whose heads are given."
    )
    heads: tuple[str, ...] = option(
        (), help="Folders of heads: tap=FOLDER,adapter=FOLDER; the model's own is known."
    )
    trajectories: Path | None = option(
        None, help="Trajectory store to fit the affine control on, where it has no folder."
    )
    sheets: bool = option(False, help="Also draw each arm's worst and best images against CFG.")
    out: Path = option(Path("out/shapes.md"), help="The table; its JSON lies beside it.")


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """Options of ``core2 bench sweep``."""

    study: StudyConfig
    steps: int = option(28, help="Number of steps.", min=1)
    scales: tuple[float, ...] = option((1.0, 2.0, 3.0, 4.5, 7.0), help="Guidance scales.", min=1)
    out: Path = option(Path("out/sweep.md"), help="The table; its JSON lies beside it.")


@dataclass(frozen=True, slots=True)
class KneeConfig:
    """Options of ``core2 bench knee``."""

    study: StudyConfig
    steps: tuple[int, ...] = option(
        (4, 6, 8, 10, 12, 14, 20, 28), help="Numbers of steps N; each also runs at 2N.", min=1
    )
    guidance_scale: float | None = option(
        None, help="Scale of CFG; by default what the model's head was made for.", min=1
    )
    out: Path = option(Path("out/knee.md"), help="The table; its JSON lies beside it.")


GA_EVAL_MODES = ("signed", "official", "embedded")
"""What methods are matched by, see `core2_sampler.benchmarks.ga_eval.measuring`."""

BenchConfig = ShapesConfig | SweepConfig | KneeConfig

OUT = option(Path("out/suites"), help="Folder of the results; nothing in it is made twice.")


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Options of ``core2 bench generate``; a preset stands in for what is left out."""

    suite: str | None = option(
        None,
        help="A prompt suite: shapes, drawbench, geneval, hpdv2, pickapic or t2icompbench; by "
        "default the preset's, else shapes.",
    )
    source: str | None = option(
        None,
        help="File or folder with the suite's prompts, https:// address, or "
        "hf:datasets/OWNER/NAME/FILE; by default they are fetched.",
    )
    limit: int | None = option(
        None, help="Only so many prompts, of every task alike, of those not left out.", min=1
    )
    skip_nsfw: bool = option(False, help="Leave out prompts that are not safe for work.")
    preset: str | None = option(
        None, help="A published protocol: xielab-pick101, geneval-official, ga-eval, core2-paper."
    )
    model: str = option("shapes-sd3", help="An embedded model, a folder or a hub id owner/name.")
    arms: tuple[str, ...] | None = option(
        None,
        help=f"Arms, by default those of {', '.join(SUITE_ARMS)} whose heads are there.",
    )
    heads: tuple[str, ...] = option(
        (), help="Folders of heads: tap=FOLDER,adapter=FOLDER; the model's own is known."
    )
    evaluators: tuple[str, ...] | None = option(
        None, help="Evaluators of the arm online: folders, or kinds of the shipped ones."
    )
    steps: tuple[int, ...] | None = option(
        None, help="Number of steps N, or several; by default 28.", min=1
    )
    guidance_scale: float | None = option(
        None, help="Scale of every arm; by default what the model's head was made for.", min=1
    )
    seeds: tuple[int, ...] | None = option(
        None, help="Seeds of each prompt; by default 0,1.", min=0
    )
    batch_size: int = option(16, help="Images generated at once.", min=1)
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto", help="Precision of the model's weights; auto is bf16 on CUDA and fp32 elsewhere."
    )
    device: str = option("auto", help="A torch device such as cuda:0; auto takes the best one.")
    threads: int | None = option(None, help="CPU threads; by default torch's choice.", min=1)
    max_sequence_length: int | None = option(
        None,
        help="T5 tokens; by default the stock call's, or the model's if fewer.",
        min=1,
        max=512,
    )
    ga_eval: int = option(
        16,
        help="Images on which each method's effective guidance scale is measured, so that it is "
        "also compared with CFG at that scale and NFE; 0 leaves this out.",
        min=0,
    )
    ga_eval_mode: str | None = option(
        None,
        help="What is measured: signed, the effective guidance scale; official, as the released "
        "evaluation measures it, of every image, each with CFG at its own scale; embedded, for "
        "FLUX.1-dev, the embedded guidance that comes nearest. By default the preset's, else "
        "signed.",
    )
    shard: str = option("0/1", help="Share i/n of the images, i from 0 to n - 1.")
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class Judging:
    """Which judges look at the images."""

    scorers: tuple[str, ...] | None = option(
        None,
        help="Scorers as name or name=SOURCE (folder, hub id, command); the source tiny is a "
        "random model. By default the preset's, or those that the suite declares.",
    )
    judge_batch_size: int = option(16, help="Images judged at once.", min=1)
    judge_device: str = option("auto", help="A torch device for the judges; auto: the best one.")
    judge_dtype: Literal["fp32", "fp16", "bf16"] = option(
        "fp32",
        help="Precision of the judges' weights; part of what scores are kept by. GenEval's judge "
        "is always fp32, and a plugin chooses its own.",
    )


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Options of ``core2 bench score``."""

    judging: Judging
    suites: tuple[str, ...] | None = option(None, help="Only these suites; by default all.")
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class ReportConfig:
    """Options of ``core2 bench report``."""

    sheet: int = option(10, help="Best and worst pairs in each contact sheet; 0 is none.", min=0)
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Options of ``core2 bench run``: those of generate and score."""

    generate: GenerateConfig
    judging: Judging


@dataclass(frozen=True, slots=True)
class CalibrateConfig:
    """Options of ``core2 bench calibrate-geneval``."""

    labels: Path = option(help="Human labels: an annotations_*.csv of djghosh13/geneval.")
    images: Path = option(
        help="Folder for the labelled images, 00000/samples/00000.png and so on; what is not there "
        "is fetched from the addresses in the labels."
    )
    source: str | None = option(
        None, help="GenEval's evaluation_metadata.jsonl; by default it is fetched."
    )
    detector: str | None = option(
        None,
        help="Folder or hub id of another Mask2Former; the word tiny is a random model. By "
        "default the one that --scorers geneval loads.",
    )
    judge_device: str = option("auto", help="A torch device for the judge; auto: the best one.")
    out: Path = OUT


@dataclass(frozen=True, slots=True)
class DoctorConfig:
    """``core2 bench doctor`` has no options."""


def check_out(path: Path) -> None:
    """Raise ConfigError unless ``path`` can name a table, and be written."""
    if path.suffix != ".md" or path.is_dir():
        raise ConfigError(f"out must be a file that ends in .md, got {path}")
    check_folder(path.parent, "the folder of out")


def command_line(config: Any) -> str:
    """Return the command that makes the table again: the options that are not the defaults."""
    words = re.findall("[A-Z][a-z]+", type(config).__name__.removesuffix("Config"))
    name = "-".join(words).lower()
    return shlex.join(["core2", "bench", name, *_words(config)])


def _words(config: Any) -> list[str]:
    """Return a config's options as words, its own before those of nested configs."""
    words: list[str] = []
    nested: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested += _words(value)
        elif value != field.default:
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{flag}")
            else:
                items = value if isinstance(value, tuple) else (value,)
                words += [f"--{flag}", ",".join(map(_text, items))]
    return words + nested


def _text(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)
