"""What a study is: prompts, seeds, arms' results, and the numbers drawn from them.

Each (prompt, seed) has its own initial latents, drawn on the CPU from a generator of its own, the
same in every arm: arms differ by the sampler alone, and are compared image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import digest, hash_pipeline
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.stats import Estimate, mean_estimate, share_estimate
from core2_sampler.precision import DTYPES
from core2_sampler.rows import stable_hash


class Prompt(Protocol):
    """What a study needs to know of a prompt."""

    @property
    def id(self) -> str:
        """Stable name, unique in the study."""
        ...

    @property
    def text(self) -> str:
        """The caption."""
        ...

    @property
    def task(self) -> str:
        """The task it belongs to."""
        ...


class Verdict(Protocol):
    """What a judge says of one image."""

    @property
    def correct(self) -> bool:
        """Whether the image shows what the prompt demands."""
        ...

    @property
    def reason(self) -> str:
        """Why not."""
        ...


Judge = Callable[[Image.Image, Any], Verdict]


@dataclass(frozen=True, slots=True)
class Case:
    """One image of a study: a prompt and a seed."""

    prompt: Prompt
    seed: int

    @property
    def key(self) -> str:
        """Name in the kept batches: another caption under the same id is another image."""
        return digest(self.prompt.id, self.prompt.text, self.seed)

    def generator(self) -> torch.Generator:
        """Return the generator of the initial latents, on the CPU; the same in every arm."""
        return torch.Generator().manual_seed(stable_hash("latents", self.prompt.id, self.seed))


def cases_of(prompts: Iterable[Prompt], seeds: Sequence[int]) -> list[Case]:
    """Return every prompt with every seed, prompt by prompt."""
    return [Case(prompt, seed) for prompt in prompts for seed in seeds]


@dataclass(frozen=True, slots=True)
class Study:
    """What all arms of a study share.

    Attributes:
        pipe: a CoRe2 pipeline, on its device.
        family: its model family.
        prompts: distinct prompts.
        seeds: distinct seeds; every prompt is sampled once with each.
        folder: where what was generated is kept.
        judge: decides whether an image is right; None where images are only generated.
        batch_size: images generated at once.
        dtype: precision that it samples in, a name of `DTYPES`.
        autocast: whether a ``dtype`` below fp32 is that of autocast over float32 weights; else it
            is that of the pipeline's own weights.
        max_sequence_length: T5 tokens of a prompt, as in the pipelines' call; an SD3 without its
            T5 takes zeros, which still get attention. None where the family has no T5.
        keep_latents: whether final latents are kept beside the images.
    """

    pipe: Any
    family: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    folder: Path
    judge: Judge | None = None
    batch_size: int = 96
    dtype: str = "fp32"
    autocast: bool = True
    max_sequence_length: int | None = 256
    keep_latents: bool = False
    _embeds: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _model_hash: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check what can be checked before anything runs."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        keys = [case.key for case in self.cases]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(
                "prompts and seeds must be distinct and not empty, "
                f"got {len(self.prompts)} prompts and seeds {self.seeds}"
            )

    @property
    def cases(self) -> list[Case]:
        """All images of an arm, in order."""
        return cases_of(self.prompts, self.seeds)

    @property
    def precision(self) -> str:
        """What records call the precision."""
        wide = self.dtype == "fp32" or not self.autocast
        return self.dtype if wide else f"{self.dtype} autocast"

    @property
    def model_hash(self) -> str:
        """Hash of all parts of the pipeline but its weak head, computed on first use."""
        if not self._model_hash:
            self._model_hash.append(hash_pipeline(self.pipe))
        return self._model_hash[0]

    @property
    def tasks(self) -> list[str]:
        """The tasks in order of first appearance."""
        return list(dict.fromkeys(prompt.task for prompt in self.prompts))


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What an arm made, in the order of ``Study.cases``.

    Attributes:
        arm: the arm.
        nfe: denoiser evaluations of one sample, counted.
        images: [n, H, W, 3] uint8.
        latents: final latents, [n, C, h, w] float32.
        correct: the judge's verdicts.
        reasons: its reasons.
    """

    arm: Arm
    nfe: float
    images: Tensor
    latents: Tensor
    correct: list[bool]
    reasons: list[str]

    def image(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self.images[index].numpy())


def result_rows(
    study: Study,
    result: ArmResult,
    reference: ArmResult | None = None,
    *,
    against: str = "cfg",
    command: str,
) -> list[Row]:
    """Return an arm's numbers with their intervals.

    Args:
        study: what the arms share.
        result: the arm.
        reference: the arm that it is compared with, image by image, or None.
        against: what the metrics call the reference.
        command: what makes the table again.

    Returns:
        Rows ``overall``, one per task, and with a reference ``overall_minus_cfg`` (paired) and
        ``latent_distance_to_cfg`` (of the final latents, relative to the norm of its).
    """
    clusters = [case.prompt.id for case in study.cases]
    strata = [case.prompt.task for case in study.cases]

    def row(metric: str, n_images: int, estimate: Estimate) -> Row:
        arm = result.arm
        return Row(
            family=study.family,
            arm=arm.name,
            steps=arm.steps,
            guidance_scale=1.0 if arm.mode == "cond" else arm.guidance_scale,
            nfe=result.nfe,
            n_images=n_images,
            metric=metric,
            value=estimate.value,
            low=estimate.low,
            high=estimate.high,
            command=command,
        )

    correct = np.asarray(result.correct, dtype=np.float64)
    rows = [row("overall", len(correct), share_estimate(correct, clusters, strata))]
    for task in study.tasks:
        own = [i for i, stratum in enumerate(strata) if stratum == task]
        names = [clusters[i] for i in own]
        rows.append(row(task, len(own), share_estimate(correct[own], names, [task] * len(own))))
    if reference is not None:
        change = mean_estimate(correct - np.asarray(reference.correct), clusters, strata)
        away = mean_estimate(latent_distance(result, reference), clusters, strata)
        rows.append(row(f"overall_minus_{against}", len(correct), change))
        rows.append(row(f"latent_distance_to_{against}", len(correct), away))
    return rows


def latent_distance(result: ArmResult, reference: ArmResult) -> Tensor:
    """Return ``|x - x_ref| / |x_ref|`` of the final latents, image by image, [n] float64."""
    ours, theirs = result.latents.double().flatten(1), reference.latents.double().flatten(1)
    return (ours - theirs).norm(dim=1) / theirs.norm(dim=1)


def worst_and_best(
    result: ArmResult, reference: ArmResult, count: int
) -> tuple[list[int], list[int]]:
    """Return the images that only the reference got right, and those that only the arm did.

    Each list has at most ``count`` indices, those furthest from the reference first.
    """
    order = latent_distance(result, reference).argsort(descending=True, stable=True).tolist()
    pairs = [(i, result.correct[i], reference.correct[i]) for i in order]
    worst = [i for i, ours, theirs in pairs if theirs and not ours]
    best = [i for i, ours, theirs in pairs if ours and not theirs]
    return worst[:count], best[:count]
