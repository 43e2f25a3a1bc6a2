"""A folder of generated images: plain PNG files, and manifests that say what each one is.

An image counts when its line is in a manifest, which is written after the file. So a run that is
killed loses at most what it was about to write, and writes it again. Every process has a manifest
of its own; all of them are read.
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.lines import append_lines, digest_bytes, read_lines
from core2_sampler.benchmarks.study import Case


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One line of a manifest.

    Attributes:
        key: of the image's case: prompt id, prompt and seed.
        prompt_id: the prompt's id.
        prompt: the prompt.
        seed: its seed.
        file: name of the PNG file.
        sha256: of that file.
        nfe: denoiser evaluations, counted.
        seconds: wall time of its batch, shared out over the images: sampling and the VAE, without
            the text encoders.
    """

    key: str
    prompt_id: str
    prompt: str
    seed: int
    file: str
    sha256: str
    nfe: float
    seconds: float


class ImageStore:
    """The images of one arm.

    Args:
        folder: where they lie.
        writer: number of the process; two that write at the same time need different ones.
    """

    def __init__(self, folder: Path, writer: int = 0) -> None:
        self.folder, self.writer = folder, writer

    def records(self) -> dict[str, ImageRecord]:
        """Return what is there, by the key of its case."""
        lines = _read_all(self.folder, "manifest")
        return {line["key"]: ImageRecord(**line) for line in lines}

    def failures(self) -> dict[str, str]:
        """Return the error of each case that was tried and is not there, by its key."""
        errors = {line["key"]: line["error"] for line in _read_all(self.folder, "failures")}
        kept = self.records()
        return {key: error for key, error in errors.items() if key not in kept}

    def add(self, case: Case, image: Tensor, nfe: float, seconds: float) -> None:
        """Keep an image [H, W, 3] uint8: first the file, then its line."""
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
        data = buffer.getvalue()
        prompt = case.prompt
        file = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', prompt.id)[:80]}-{case.seed}-{case.key[:8]}.png"
        write_atomic(self.folder / file, data, self.writer)
        record = ImageRecord(
            case.key, prompt.id, prompt.text, case.seed, file, digest_bytes(data), nfe, seconds
        )
        append_lines(self._path("manifest"), [asdict(record)])

    def add_failure(self, case: Case, error: Exception) -> None:
        """Note that a case was tried and failed; a later success outweighs it."""
        text = f"{type(error).__name__}: {error}"
        append_lines(self._path("failures"), [{"key": case.key, "error": text}])

    def read(self, record: ImageRecord) -> Image.Image:
        """Return an image.

        Raises:
            ValueError: if its file is gone or not the one that was written.
        """
        path = self.folder / record.file
        data = path.read_bytes() if path.is_file() else b""
        if digest_bytes(data) != record.sha256:
            raise ValueError(
                f"{path} must be the image that the manifest names, got "
                f"{'another' if data else 'none'}: take its line out of the manifest and generate "
                "it again"
            )
        return Image.open(io.BytesIO(data)).convert("RGB")

    def _path(self, kind: str) -> Path:
        return self.folder / f"{kind}.{self.writer}.jsonl"


def _read_all(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of all processes' files of a kind."""
    return [line for path in sorted(folder.glob(f"{kind}.*.jsonl")) for line in read_lines(path)]
