"""The options of the ``core2 bench`` commands, each declared once."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core2_sampler.benchmarks.arms import FIRST_TABLE
from core2_sampler.config import option


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
        Path("out/bench"), help="Folder of finished batches; nothing in it is generated again."
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


BenchConfig = ShapesConfig | SweepConfig | KneeConfig


def command_line(config: BenchConfig) -> str:
    """Return the command that makes the table again: the options that are not the defaults."""
    name = type(config).__name__.removesuffix("Config").lower()
    words = ["core2", "bench", name]
    for part in (config, config.study):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name == "study" or value == field.default:
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{flag}")
            else:
                items = value if isinstance(value, tuple) else (value,)
                words += [f"--{flag}", ",".join(map(_text, items))]
    return shlex.join(words)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
