"""GenEval's folder of images: ``00000/metadata.jsonl`` and ``00000/samples/00000.png``."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.geneval.prompts import GenEvalPrompt, parse_prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a folder.

    Attributes:
        path: where it lies.
        prompt: what it must show.
        index: its number among the images of the prompt.
    """

    path: Path
    prompt: GenEvalPrompt
    index: int

    @property
    def filename(self) -> str:
        """Path below the folder; with forward slashes."""
        return "/".join(self.path.parts[-3:])


def place_of(prompt_id: str, index: int) -> str:
    """Return the path of an image below the folder."""
    return f"{prompt_id}/samples/{index:05d}.png"


def write_folder(
    folder: Path, images: Iterable[tuple[GenEvalPrompt, Sequence[Image.Image]]]
) -> None:
    """Write images as the official evaluator reads them; every file whole or not at all.

    Args:
        folder: made if need be.
        images: prompts, each with its images in the order of their seeds.

    Raises:
        ValueError: if a prompt's id is not digits, as the evaluator would pass it over.
    """
    for prompt, samples in images:
        if not prompt.id.isdigit():
            raise ValueError(f"the id of a prompt must be digits, got {prompt.id!r}")
        place = folder / prompt.id
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_atomic(place / "metadata.jsonl", prompt.metadata_line().encode())
        for index, image in enumerate(samples):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            write_atomic(folder / place_of(prompt.id, index), buffer.getvalue())


def read_folder(folder: Path) -> list[Sample]:
    """Return the images of a folder, by prompt and number.

    As upstream, only folders and files named by digits count; ``grid.png`` and the like do not.

    Raises:
        ValueError: if there is no such folder, nothing in it, a prompt without metadata or
            without images, or see ``parse_prompt``.
    """
    if not folder.is_dir():
        raise ValueError(f"images must lie in a folder, got {folder} which is none")
    places = [p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()]
    if not places:
        raise ValueError(
            f"{folder} must hold a folder for each prompt, named 00000 and so on, got none: "
            "write_folder makes them"
        )
    return [sample for p in sorted(places, key=lambda p: int(p.name)) for sample in _read(p)]


def _read(place: Path) -> list[Sample]:
    file = place / "metadata.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if len(lines) != 1:
        raise ValueError(f"{file} must be a file of one line, got {len(lines)} lines")
    prompt = parse_prompt(lines[0], place.name, str(file))
    samples = [
        Sample(path, prompt, int(path.stem))
        for path in place.glob("samples/*.png")
        if re.fullmatch(r"\d+", path.stem)
    ]
    if not samples:
        raise ValueError(
            f"{place / 'samples'} must hold images named 00000.png and so on, got none: a prompt "
            "without images would leave the score unnoticed"
        )
    return sorted(samples, key=lambda sample: sample.index)
