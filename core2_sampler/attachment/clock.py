"""Where a stock loop stands: counted at its scheduler, which all loops step alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core2_sampler.attachment.layouts import Call
from core2_sampler.pipelines.adapters.discrete import grid_levels


@contextmanager
def after_each_step(scheduler: Any, act: Callable[[], None]) -> Iterator[None]:
    """Act after each ``scheduler.step``; on exit the scheduler is as it was."""
    own, step = "step" in vars(scheduler), scheduler.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        act()
        return result

    scheduler.step = counted
    try:
        yield
    finally:
        if own:
            scheduler.step = step
        else:
            del scheduler.step


def noise_levels(scheduler: Any) -> Tensor:
    """Return the noise level of each of a scheduler's timesteps, [N], float64."""
    flow = scheduler.config.get("use_flow_sigmas", False)
    if getattr(scheduler, "alphas_cumprod", None) is not None and not flow:
        return grid_levels(scheduler)
    return scheduler.sigmas.double().cpu()[: len(scheduler.timesteps)]


def predicts_noise(scheduler: Any) -> bool:
    """Say whether the network that a scheduler was made for predicts noise, not a velocity."""
    return scheduler.config.get("prediction_type") == "epsilon"


def final_level(scheduler: Any) -> float:
    """Return the noise level after a scheduler's last step."""
    signal = getattr(scheduler, "final_alpha_cumprod", None)  # of those that DDIM's kin make
    if signal is not None:
        return float(((1 - signal.double()) / signal.double()).sqrt())
    steps, levels = len(scheduler.timesteps), getattr(scheduler, "sigmas", ())
    return float(levels[steps]) if len(levels) > steps else 0.0


def first_step(scheduler: Any, call: Call, steps: int | None) -> int:
    """Return which of the scheduler's timesteps a loop starts at: not the first for image-to-image.

    Schedulers without a begin index belong to networks that are given the timestep as it is.

    Args:
        scheduler: with its timesteps set.
        call: the loop's first pass.
        steps: how many steps the loop has announced; tells which one of equal timesteps it is.
    """
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return begin
    given = torch.as_tensor(call.kwargs["timestep"] if "timestep" in call.kwargs else call.args[1])
    same = scheduler.timesteps.cpu() == given.flatten()[0].cpu()
    found = same.nonzero().flatten().tolist()
    to_the_end = [i for i in found if i + (steps or 0) == len(same)]
    return (to_the_end or found or [0])[0]
