"""Solvers. Truth: the closed-form Gaussian flow, and diffusers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from core2_sampler.guidance import make_predict
from core2_sampler.plan import make_plan
from core2_sampler.samplers import (
    euler_inverse,
    sample_dpmpp_2m,
    sample_euler,
    sample_scheduler,
    sample_zigzag,
)
from core2_sampler.schedules import flow_sigmas, sigmas_from_scheduler
from core2_sampler.testing import GaussianDenoiser

SCALE = 3.0


def setting(path, sigma):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    denoiser = GaussianDenoiser(0.5, path)
    means = randn(2, 3), randn(2, 3)
    return denoiser, randn(2, 3, 2, 2) * max(sigma, 1), means


def guided(denoiser, sigmas, means, steps=None):
    plan = make_plan("cfg", steps or len(sigmas) - 1, SCALE)
    return make_predict(denoiser, sigmas, plan, *map(denoiser.prompt, means))


def mean_of_cfg(means):
    cond, uncond = means
    return uncond + SCALE * (cond - uncond)


def orders(errors):
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


GRIDS = {
    "flow": lambda n: torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64),
    "ve": lambda n: torch.logspace(1, -1, n + 1, dtype=torch.float64),
}


@pytest.mark.parametrize("path", ["flow", "ve"])
@pytest.mark.parametrize(("solver", "order"), [(sample_euler, 1), (sample_dpmpp_2m, 2)])
def test_order_of_convergence_to_the_guided_gaussian(path, solver, order):
    errors = []
    for n in (32, 64, 128, 256):
        sigmas = GRIDS[path](n)
        first, last = float(sigmas[0]), float(sigmas[-1])
        denoiser, x, means = setting(path, first)
        options = {} if solver is sample_euler else {"path": path}
        ours = solver(guided(denoiser, sigmas, means), x, sigmas, **options)
        truth = denoiser.solution(x, first, last, mean_of_cfg(means))
        errors.append(float((ours - truth).norm() / truth.norm()))
    assert errors[-1] < 1e-2
    assert all(abs(found - order) < 0.15 for found in orders(errors)), (errors, orders(errors))


@pytest.mark.parametrize("solver", [sample_euler, sample_dpmpp_2m])
def test_from_pure_noise_to_data(solver):
    """The flow's ends, sigma 1 and 0, are infinite in log SNR; both solvers must pass them."""
    sigmas = flow_sigmas(200)
    denoiser, x, means = setting("flow", 1.0)
    ours = solver(guided(denoiser, sigmas, means), x, sigmas)
    truth = denoiser.solution(x, 1.0, 0.0, mean_of_cfg(means))
    torch.testing.assert_close(ours, truth, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("path", "last"), [("flow", 0.0), ("flow", 0.05), ("ve", 0.1)])
def test_euler_inverse_undoes_sample_euler_to_first_order(path, last):
    errors = []
    for n in (32, 64, 128):
        sigmas = GRIDS[path](n) if last else flow_sigmas(n)
        denoiser, x, means = setting(path, float(sigmas[0]))
        there = back = sample_euler(guided(denoiser, sigmas, means), x, sigmas)
        invert = euler_inverse(guided(denoiser, sigmas[1:], means, n), sigmas)
        for i in reversed(range(n)):
            back = invert(back, i)
        errors.append(float((back - x).norm() / (there - x).norm()))
    assert errors[-1] < 0.1
    assert all(0.8 < found < 1.3 for found in orders(errors)), (errors, orders(errors))


def stock_loop(scheduler, x, velocity):
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
    return x


def float32_setting():
    denoiser, x, means = setting("flow", 1.0)
    mean = mean_of_cfg(means).float()

    def velocity(x, t):
        sigma = torch.full((x.shape[0],), float(t) / 1000)
        return denoiser(x, sigma, denoiser.prompt(mean))

    return x.float(), velocity


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}])
def test_euler_is_the_stock_flow_match_scheduler(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(12)
    x, velocity = float32_setting()
    stock = stock_loop(scheduler, x, velocity)
    ours = sample_euler(
        lambda x, i: velocity(x, scheduler.timesteps[i]), x, sigmas_from_scheduler(scheduler)
    )
    torch.testing.assert_close(ours, stock, atol=2e-6, rtol=2e-6)


def test_dpmpp_2m_is_the_stock_multistep_scheduler():
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(12)
    x, velocity = float32_setting()
    sigmas = sigmas_from_scheduler(scheduler)
    stock = x
    for i, t in enumerate(scheduler.timesteps):
        stock = scheduler.step(velocity(stock, 1000 * sigmas[i]), t, stock, return_dict=False)[0]
    ours = sample_dpmpp_2m(lambda x, i: velocity(x, 1000 * sigmas[i]), x, sigmas)
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
    ],
)
def test_sample_scheduler_is_the_stock_loop(scheduler):
    scheduler.set_timesteps(6)
    x, velocity = float32_setting()
    stock = stock_loop(scheduler, x, velocity)
    scheduler.set_timesteps(6)
    ours = sample_scheduler(lambda x, i: velocity(x, scheduler.timesteps[i]), x, scheduler)
    assert torch.equal(ours, stock)


def test_a_stochastic_scheduler_draws_from_the_generator(global_random_state):
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)

    def images(seed):
        scheduler.set_timesteps(4)
        x, velocity = float32_setting()
        return sample_scheduler(
            lambda x, i: velocity(x, scheduler.timesteps[i]),
            x,
            scheduler,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(images(1), images(1))
    assert not torch.equal(images(1), images(2))


def all_zigzag(predict, x, sigmas, *, on_step=None):
    every = range(len(sigmas) - 1)
    return sample_zigzag(predict, x, sigmas, undo=predict, zigs=every, on_step=on_step)


@pytest.mark.parametrize("solver", [sample_euler, sample_dpmpp_2m, all_zigzag])
def test_on_step_sees_every_step_and_may_replace_the_latents(solver):
    sigmas = GRIDS["flow"](4)
    x, seen = torch.zeros(1, 1, 2, 2), []

    def on_step(i, x):
        seen.append(i)
        return torch.full_like(x, 7.0) if len(seen) == 4 else None

    out = solver(lambda x, i: torch.ones_like(x), x, sigmas, on_step=on_step)
    assert seen == [0, 1, 2, 3]
    assert (out == 7.0).all()


@pytest.mark.parametrize("solver", [sample_euler, sample_dpmpp_2m, all_zigzag])
def test_latents_keep_their_dtype_and_updates_are_float32(solver):
    x = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    sigmas = torch.tensor([0.5, 0.25], dtype=torch.float64)
    out = solver(lambda x, i: torch.full_like(x, 1 / 3), x, sigmas)
    assert out.dtype == torch.bfloat16
    step = 0.25 * float(torch.tensor(1 / 3, dtype=torch.bfloat16))
    assert out.item() == torch.tensor(1.0 - step).bfloat16().item()
