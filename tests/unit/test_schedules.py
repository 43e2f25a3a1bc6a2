"""Grids. Truth: diffusers' schedulers, and the papers' formulas at their ends."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from core2_sampler.schedules import (
    flow_sigmas,
    karras_sigmas,
    shift_sigmas,
    sigmas_from_scheduler,
)


def test_the_schedulers_grid_is_taken_as_it_is():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    sigmas = sigmas_from_scheduler(scheduler)
    assert (sigmas.dtype, sigmas.shape, sigmas.device.type) == (torch.float64, (8,), "cpu")
    assert sigmas.tolist() == scheduler.sigmas.tolist()


def test_an_unset_scheduler_is_refused():
    class Bare:
        sigmas = None

    with pytest.raises(ValueError, match="set_timesteps first"):
        sigmas_from_scheduler(Bare())


def test_flow_grid_is_the_stock_one_between_the_same_ends():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = torch.linspace(1, 0, 11)[:-1].tolist()
    scheduler.set_timesteps(sigmas=grid)
    torch.testing.assert_close(flow_sigmas(10, 3.0).float(), scheduler.sigmas)


def test_flow_grid_ends_are_exact_and_it_falls():
    sigmas = flow_sigmas(50, 3.0)
    assert (sigmas[0].item(), sigmas[-1].item(), sigmas.dtype) == (1.0, 0.0, torch.float64)
    assert (sigmas.diff() < 0).all()
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_karras_grid_is_the_stock_one():
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(9)
    ours = karras_sigmas(9, float(scheduler.sigmas[-2]), float(scheduler.sigmas[0]))
    torch.testing.assert_close(ours.float(), scheduler.sigmas)


def test_bad_grids_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        flow_sigmas(0)
    with pytest.raises(ValueError, match="shift must be above 0, got 0"):
        flow_sigmas(4, 0)
    with pytest.raises(ValueError, match="sigma_min"):
        karras_sigmas(4, 2.0, 1.0)
