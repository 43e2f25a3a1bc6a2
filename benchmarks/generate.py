"""Generate what is missing of an arm's images; one that fails does not end the run.

This is the one loop that makes images, of suites and of the tables of Shapes alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.cache import read_latents, write_latents
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.runner import (
    arm_folder,
    encode,
    generate,
    resolve_head,
    using_head,
)
from core2_sampler.benchmarks.shard import Shard
from core2_sampler.benchmarks.study import ArmResult, Case, Study

MAX_IN_A_ROW = 8
"""So many failures without a success between them are no longer a matter of single images."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an arm's images in one run.

    Attributes:
        folder: where they are.
        made: how many this run generated.
        failed: how many it could not.
        error: what the first of these failed with.
    """

    folder: Path
    made: int
    failed: int
    error: str = ""


def missing_cases(study: Study, store: ImageStore, shard: Shard) -> list[Case]:
    """Return the cases of a shard that have no image yet, failed ones among them."""
    kept = set(store.records())
    if study.keep_latents:
        kept &= set(read_latents(store.folder))
    return [case for case in shard.of(study.cases) if case.key not in kept]


def fill_arm(
    study: Study,
    arm: Arm,
    shard: Shard | None = None,
    *,
    on_images: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Generate the images of an arm that are not there yet.

    A batch that fails is tried again image by image, so that one image costs no other.

    Args:
        study: what the arms share.
        arm: the arm.
        shard: the share of this process; all of it by default.
        on_images: told how many more images are settled: there, or failed.

    Raises:
        ValueError: if the arm's head does not fit the model, or its settings are impossible.
        Exception: what `MAX_IN_A_ROW` images in a row failed with, or the last of fewer if the arm
            then has no image at all.
    """
    shard = shard or Shard()
    head = resolve_head(study, arm.head)
    folder = arm_folder(study, arm, head, shard.index)
    store = ImageStore(folder, shard.index)
    missing = missing_cases(study, store, shard)
    on_images(len(shard.of(study.cases)) - len(missing))
    size = study.batch_size
    queue = deque(missing[start : start + size] for start in range(0, len(missing), size))
    made = failed = in_a_row = 0
    first_error = ""
    with using_head(study.pipe, head):
        while queue:
            batch = queue.popleft()
            try:
                latents, images, nfe, seconds = _timed(study, arm, batch)
            except Exception as error:
                if len(batch) > 1:
                    queue.extendleft([case] for case in reversed(batch))
                    continue
                store.add_failure(batch[0], error)
                failed, in_a_row = failed + 1, in_a_row + 1
                first_error = first_error or f"{type(error).__name__}: {error}"
                if in_a_row == MAX_IN_A_ROW or not (queue or store.records()):
                    raise
            else:
                if study.keep_latents:
                    write_latents(folder, [case.key for case in batch], latents)
                for case, image in zip(batch, images, strict=True):
                    store.add(case, image, nfe, seconds)
                made, in_a_row = made + len(batch), 0
            on_images(len(batch))
    return Outcome(folder, made, failed, first_error)


def judge_arm(
    study: Study, arm: Arm, *, on_images: Callable[[int], None] = lambda count: None
) -> ArmResult:
    """Generate what is missing of an arm, then judge all of it.

    Args:
        study: what the arms share, with a judge; it keeps latents.
        arm: the arm.
        on_images: see `fill_arm`.

    Raises:
        ValueError: if the study has no judge or keeps no latents, or as `fill_arm`.
        RuntimeError: if an image could not be generated.
    """
    judge = study.judge
    if judge is None or not study.keep_latents:
        raise ValueError("a study must have a judge and keep latents to have its arms judged")
    done = fill_arm(study, arm, on_images=on_images)
    if done.failed:
        raise RuntimeError(
            f"all images of arm {arm.name!r} must be there, got {done.failed} that failed, the "
            f"first with {done.error}: run it again"
        )
    store = ImageStore(done.folder)
    records, latents = store.records(), read_latents(done.folder)
    pictures = [store.read(records[case.key]) for case in study.cases]
    verdicts = [judge(image, c.prompt) for image, c in zip(pictures, study.cases, strict=True)]
    return ArmResult(
        arm,
        records[study.cases[0].key].nfe,
        torch.stack([torch.from_numpy(np.array(image)) for image in pictures]),
        torch.stack([latents[case.key] for case in study.cases]),
        [bool(verdict.correct) for verdict in verdicts],
        [verdict.reason for verdict in verdicts],
    )


def _timed(study: Study, arm: Arm, batch: list[Case]) -> tuple[Tensor, Tensor, float, float]:
    """Return latents, images, NFE and seconds of an image; prompts are encoded beforehand."""
    encode(study, batch, with_negative=False)  # the study keeps both sides
    if study.pipe.device.type == "cuda":
        torch.cuda.synchronize(study.pipe.device)
    started = time.monotonic()
    latents, images, nfe = generate(study, arm, batch)
    return latents, images, nfe, (time.monotonic() - started) / len(batch)
