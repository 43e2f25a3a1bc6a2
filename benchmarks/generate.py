"""Generate what is missing of an arm's images; one that fails does not end the run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.runner import (
    arm_folder,
    encode,
    generate,
    resolve_head,
    using_head,
)
from core2_sampler.benchmarks.shard import Shard
from core2_sampler.benchmarks.study import Case, Study

MAX_IN_A_ROW = 8
"""So many failures without a success between them are no longer a matter of single images."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an arm's images in one run.

    Attributes:
        folder: where they are.
        made: how many this run generated.
        failed: how many it could not.
    """

    folder: Path
    made: int
    failed: int


def missing_cases(study: Study, store: ImageStore, shard: Shard) -> list[Case]:
    """Return the cases of a shard that have no image yet, failed ones among them."""
    kept = store.records()
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
        Exception: what `MAX_IN_A_ROW` images in a row failed with.
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
    with using_head(study.pipe, head):
        while queue:
            batch = queue.popleft()
            try:
                images, nfe, seconds = _timed(study, arm, batch)
            except Exception as error:
                if len(batch) > 1:
                    queue.extendleft([case] for case in reversed(batch))
                    continue
                store.add_failure(batch[0], error)
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row == MAX_IN_A_ROW:
                    raise
            else:
                for case, image in zip(batch, images, strict=True):
                    store.add(case, image, nfe, seconds)
                made, in_a_row = made + len(batch), 0
            on_images(len(batch))
    return Outcome(folder, made, failed)


def _timed(study: Study, arm: Arm, batch: list[Case]) -> tuple[Tensor, float, float]:
    """Return images, NFE, and seconds of an image; prompts are encoded before the clock starts."""
    encode(study, batch, with_negative=False)  # the study keeps both sides
    if study.pipe.device.type == "cuda":
        torch.cuda.synchronize(study.pipe.device)
    started = time.monotonic()
    _, images, nfe = generate(study, arm, batch)
    return images, nfe, (time.monotonic() - started) / len(batch)
