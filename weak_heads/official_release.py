"""What the authors fixed in their release: sizes, scales, and the schedule behind the LoRAs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from core2_sampler.schedules import sigmas_from_scheduler


@dataclass(frozen=True, slots=True)
class Release:
    """What the authors fixed for one family.

    Attributes:
        tokens: of one prompt, T.
        num_layers: transformer blocks.
        num_slots: steps of the schedule that it was trained for, each with a LoRA.
        lora_rank: of each.
        reference_scale: guidance scale that the authors sample with; that of the training is not
            published.
    """

    tokens: int
    num_layers: int
    num_slots: int
    lora_rank: int
    reference_scale: float


RELEASES = {
    "sd3": Release(77 + 256, 8, 28, 64, 3.5),
    "sdxl": Release(77, 4, 50, 48, 5.5),
}
"""The released networks by family."""


def upstream_slot(step: int, num_steps: int, num_slots: int) -> int:
    """Return the slot that the released code takes at a step, float error included."""
    left = (num_steps - step) / num_steps
    return min(max(math.floor(num_slots - left * num_slots), 0), num_slots - 1)


def trained_levels(family: str, num_steps: int) -> list[float]:
    """Return the noise level of each step of the authors' schedule, first step first.

    SD3.5 has the flow grid of shift 3; SDXL "leading" steps of its 1000, here as noise per signal.
    """
    scheduler: Any
    if family == "sd3":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        )
    scheduler.set_timesteps(num_steps)
    return sigmas_from_scheduler(scheduler)[:-1].tolist()


def release_of(family: str) -> Release:
    """Return what was released for a family.

    Raises:
        ValueError: if nothing was.
    """
    if family not in RELEASES:
        raise ValueError(
            f"the official head exists for {' and '.join(sorted(RELEASES))}, got {family}: use "
            "another head"
        )
    return RELEASES[family]
