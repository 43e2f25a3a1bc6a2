"""Images that evaluators learn from, as clean latents: real ones, and ends of trajectories."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core2_sampler.guidance import weak
from core2_sampler.rows import is_held_out
from core2_sampler.trajectory import Record, TrajectoryStore

Edits = Callable[[str], Iterable[str]]
"""Returns what one changed word makes of a caption."""


class Images(Protocol):
    """Real images as clean latents, with captions."""

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        """Return ``count`` at most with their captions, by the step alone."""
        ...

    def held_out(self) -> tuple[Tensor, list[str]]:
        """Return those that ``draw`` never does."""
        ...


class Captioned(Images, Protocol):
    """Images some of whose captions are edits of each other."""

    def twins(self, edits: Edits) -> Images:
        """Return the images in twos, each followed by one whose caption is an edit of its own.

        Both are of the same part, so that no caption is only ever the wrong one. Images without
        such a twin are left out.

        Raises:
            ValueError: a part has no twins.
        """
        ...


class ImageFolder:
    """Real images of a folder, each with its caption in a text file of the same name."""

    def __init__(
        self, folder: Path, encode: Callable[[Path], Tensor], held_out_share: float
    ) -> None:
        """Take a folder, and what makes clean latents [C, H, W] of an image file.

        Latents are made when they are first wanted, and kept.

        Raises:
            ValueError: the folder has too few images with captions.
        """
        found = {
            file: file.with_suffix(".txt").read_text(encoding="utf-8").strip()
            for file in sorted(folder.glob("*"))
            if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
            and file.with_suffix(".txt").is_file()
        }
        self.captions, self._encode = found, cache(lambda file: encode(file).cpu())
        self._parts = [
            [file for file in found if is_held_out(file.name, held_out_share) is part]
            for part in (False, True)
        ]
        if not all(self._parts):
            raise ValueError(
                "images must be a folder with NAME.png beside NAME.txt, enough of them to hold "
                f"some out, got {len(found)} in {folder}"
            )

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        """Return images of the training part."""
        files = self._parts[0]
        return self.take(random.Random(f"draw/{step}").sample(files, min(count, len(files))))

    def held_out(self) -> tuple[Tensor, list[str]]:
        """Return the images of the other part."""
        return self.take(self._parts[1])

    def twins(self, edits: Edits) -> Images:
        """Return the images that have twins; see `Captioned`."""
        return _FolderTwins(self, [self._twins(files, edits) for files in self._parts])

    def _twins(self, files: Sequence[Path], edits: Edits) -> dict[Path, list[Path]]:
        """Return the twins of each of the files that has some, among these."""
        by_caption: dict[str, list[Path]] = {}
        for file in files:
            by_caption.setdefault(self.captions[file], []).append(file)
        each = {
            file: [twin for text in edits(self.captions[file]) for twin in by_caption.get(text, ())]
            for file in files
        }
        return {file: found for file, found in each.items() if found}

    def take(self, files: Sequence[Path]) -> tuple[Tensor, list[str]]:
        """Return these images with their captions."""
        return torch.stack([self._encode(file) for file in files]), [
            self.captions[file] for file in files
        ]


class _FolderTwins:
    """Those images of a folder that have twins, each followed by one."""

    def __init__(self, images: ImageFolder, parts: Sequence[dict[Path, list[Path]]]) -> None:
        check_twins([len(part) for part in parts])
        self._images, self._parts = images, parts

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        part, rng = self._parts[0], random.Random(f"twins/{step}")
        files = rng.sample(list(part), min(count // 2, len(part)))
        return self._images.take([f for file in files for f in (file, rng.choice(part[file]))])

    def held_out(self) -> tuple[Tensor, list[str]]:
        part = self._parts[1]
        return self._images.take([f for file in part for f in (file, part[file][0])])


def check_twins(counts: Sequence[int]) -> None:
    """Raise ValueError unless the training and the held-out part have captions with twins."""
    if not all(counts):
        raise ValueError(
            "captions must have edits (one word changed) that are captions of other images, in the "
            f"training and in the held-out part, got {counts[0]} and {counts[1]} such captions: "
            "give images of such edits, or hold more out"
        )


@dataclass(frozen=True, slots=True)
class Finals:
    """Where trajectories ended: generated images as clean latents.

    Attributes:
        x0: [n, C, H, W].
        records: whose they are, n.
        says: returns what a prompt says, whatever its words.
    """

    x0: Tensor
    records: list[Record]
    says: Callable[[str], str] = str

    def of(self, held_out: bool, share: float) -> list[int]:
        """Return the indices of those of whose prompt what it says is held out, or the others."""
        parts = [is_held_out(self.says(record.prompt), share) for record in self.records]
        return [i for i, part in enumerate(parts) if part is held_out]


def final_latents(store: TrajectoryStore, says: Callable[[str], str] = str) -> Finals:
    """Return the ends of the trajectories that CFG drove and whose last step the store holds.

    Args:
        store: what `core2 collect` filled; the last step is one Euler step from the final latents.
        says: returns what a prompt says, whatever its words.

    Raises:
        ValueError: if there are none.
    """
    x0, records = [], []
    for name, entry in store.entries():
        unit = [Record(**item) for item in entry["records"]]
        settings = store.settings(unit[0].round)
        if settings["policy"] != "cfg":
            continue
        rows = store.shard(name)
        sigmas = settings["sigmas"]
        for row in (rows["step"] == len(sigmas) - 2).nonzero().flatten().tolist():
            record = unit[int(rows["record"][row])]
            x, cond, gap = (rows[part][row].float() for part in ("x", "cond", "gap"))
            x0.append(x + (sigmas[-1] - sigmas[-2]) * weak(cond, gap, record.guidance_scale))
            records.append(record)
    if not records:
        raise ValueError(
            f"{store.root} must hold last steps of trajectories that CFG drove, got none: collect "
            "with --steps-per-trajectory none"
        )
    return Finals(torch.stack(x0), records, says)
