"""Images that evaluators learn from, as clean latents: real ones, and ends of trajectories."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core2_sampler.guidance import weak
from core2_sampler.rows import is_held_out
from core2_sampler.trajectory import Record, TrajectoryStore

Accept = Callable[[str], bool]
"""Says whether a caption is wanted."""


class Captioned(Protocol):
    """Real images as clean latents, with captions."""

    def draw(self, step: int, count: int, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return ``count`` at most with captions that ``accept`` wants, by the step alone."""
        ...

    def held_out(self, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return those that ``draw`` never does."""
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
        self._captions, self._encode = found, cache(lambda file: encode(file).cpu())
        self._parts = [
            [file for file in found if is_held_out(file.name, held_out_share) is part]
            for part in (False, True)
        ]
        if not all(self._parts):
            raise ValueError(
                "images must be a folder with NAME.png beside NAME.txt, enough of them to hold "
                f"some out, got {len(found)} in {folder}"
            )

    def draw(self, step: int, count: int, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return images of the training part."""
        files = self._wanted(self._parts[0], accept)
        return self._take(random.Random(f"draw/{step}").sample(files, min(count, len(files))))

    def held_out(self, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return the images of the other part."""
        return self._take(self._wanted(self._parts[1], accept))

    def _wanted(self, files: Sequence[Path], accept: Accept | None) -> Sequence[Path]:
        wanted = [file for file in files if accept is None or accept(self._captions[file])]
        if not wanted:
            raise ValueError("each part of the images must have fitting captions, got none")
        return wanted

    def _take(self, files: Sequence[Path]) -> tuple[Tensor, list[str]]:
        return torch.stack([self._encode(file) for file in files]), [
            self._captions[file] for file in files
        ]


@dataclass(frozen=True, slots=True)
class Finals:
    """Where trajectories ended: generated images as clean latents.

    Attributes:
        x0: [n, C, H, W].
        records: whose they are, n.
    """

    x0: Tensor
    records: list[Record]

    def of(self, held_out: bool, share: float) -> list[int]:
        """Return the indices of those whose prompt is held out, or of the others."""
        parts = [is_held_out(record.prompt_id, share) for record in self.records]
        return [i for i, part in enumerate(parts) if part is held_out]


def final_latents(store: TrajectoryStore) -> Finals:
    """Return the ends of the trajectories that CFG drove and whose last step the store holds.

    Args:
        store: what `core2 collect` filled; the last step is one Euler step from the final latents.

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
    return Finals(torch.stack(x0), records)
