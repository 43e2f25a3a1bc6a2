"""Scorers of the Shapes world: its judge, and its own CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Self

import torch
from torch import Tensor

from core2_sampler.benchmarks.scorers.base import Images, Source, make_key, pairs
from core2_sampler.benchmarks.scorers.clip import ClipScorer, ClipVariant
from core2_sampler.shapes import model_path
from core2_sampler.shapes.judge import judge
from core2_sampler.shapes.world import PREFIXES, TASKS, Prompt, all_prompts

REVISION = 1
"""Part of the key: raise it when a change of the judge changes verdicts."""


class ShapesScorer:
    """Scores 1 where the judge finds exactly what the caption demands, else 0."""

    key = make_key("shapes", revision=REVISION)

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer; it has no model, so it takes no source and runs on the CPU.

        Raises:
            ValueError: if a source is given.
        """
        if source is not None:
            raise ValueError(f"the Shapes judge must be loaded without a source, got {source}")
        return cls()

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says.

        Raises:
            ValueError: if a prompt is no caption of the Shapes world.
        """
        rgb = pairs(images, prompts)
        demands = [demand(prompt) for prompt in prompts]
        verdicts = [judge(image, wanted) for image, wanted in zip(rgb, demands, strict=True)]
        return torch.tensor([float(verdict.correct) for verdict in verdicts])


class ShapesClip:
    """Scores by the cosine of the CLIP pair that is embedded for the Shapes world, times 100."""

    @staticmethod
    def load(
        source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ClipScorer:
        """Return the scorer; ``source`` is a folder with another CLIP pair."""
        variant = ClipVariant("shapes-clip", str(model_path("clip")), "100*cos")
        return variant.load(source or variant.model, device=device, dtype=dtype)


def demand(text: str) -> Prompt:
    """Return what a caption of the Shapes world demands, whatever its wording.

    Raises:
        ValueError: if it is no such caption.
    """
    table = _captions()
    for prefix in PREFIXES:
        if text.startswith(prefix) and text.removeprefix(prefix) in table:
            return table[text.removeprefix(prefix)]
    raise ValueError(
        f"a prompt must be a caption of the Shapes world to be judged, got {text!r}: use another "
        "scorer for other prompts"
    )


@cache
def _captions() -> dict[str, Prompt]:
    """Every caption in the plain wording."""
    return {prompt.text: prompt for task in TASKS for prompt in all_prompts(task)}
