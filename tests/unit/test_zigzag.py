"""Zigzag steps: Z-Sampling, Z-CoRe^2 and their cheap kin, in the engine and in every pipeline.

Truth: the closed-form Gaussian flow; the steps written out on bare networks, for SDXL with the
schedulers of diffusers; and the released loops, written out.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
)

from core2_sampler.benchmarks.ga_eval import measure_effective_scale
from core2_sampler.cli.generate import GenerateConfig, core2_config
from core2_sampler.config import ConfigError
from core2_sampler.guidance import make_predict, rescale
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters.discrete import eps_from_v, v_from_eps
from core2_sampler.plan import Core2Config, make_plan
from core2_sampler.samplers import euler_inverse, sample_euler, sample_zigzag
from core2_sampler.testing import (
    SDXL_SCHEDULER,
    GaussianDenoiser,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
)
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import AffineHead
from core2_sampler.z2 import LatestGap, z2_predict

N, SCALE, BACK = 6, 3.5, 0.5


class PerfectHead:
    """An output head that says the true gap, computed beside the counted module."""

    in_model = False
    needs_features = False

    def __init__(self, denoiser, uncond):
        self.denoiser, self.uncond = denoiser, uncond

    def reset(self):
        pass

    def observe(self, gap):
        pass

    def __call__(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        return cond - self.denoiser.module.forward(x, sigma, self.uncond.pooled)


def run(world, plan):
    denoiser, x, cond, uncond, sigmas = world
    head = PerfectHead(denoiser, uncond)
    predict = make_predict(denoiser, sigmas, plan, cond, uncond, head)
    undo = make_predict(denoiser, sigmas[1:], plan.undo, cond, uncond, head)
    return sample_zigzag(predict, x, sigmas, undo=undo, zigs=plan.zigs)


def close(ours, truth, tolerance=1e-12):
    torch.testing.assert_close(ours, truth, atol=tolerance * float(truth.abs().max()), rtol=0)


def written_out(d, x, sigmas, back, zigs):
    """Zigzag steps as three Euler lines; ``d(x, sigma, scale)``."""
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        y = x + (t - s) * d(x, s, SCALE)
        if i in zigs:
            start = y - (t - s) * d(y, t, back)
            y = start + (t - s) * d(start, s, SCALE)
        x = y
    return x


def moved_on(d, x, sigmas, back, zigs):
    """The same where the gap of the step before stands in for there and back."""
    gap = None
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if i in zigs and gap is not None:
            x = x + (t - s) * (SCALE - back) * gap
        gap = d(x, s, 1.0, plain=True) - d(x, s, 0.0, plain=True)
        x = x + (t - s) * d(x, s, SCALE)
    return x


# The engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zigs", [None, (0, 3)])
@pytest.mark.parametrize("back", [-0.5, 0.0, BACK, 1.0, SCALE])
def test_z_sampling_is_its_steps_written_out(world, back, zigs):
    denoiser, x, cond, uncond, sigmas = world

    def d(x, sigma, scale):
        level = torch.full((2,), sigma, dtype=torch.float64)
        c, u = (denoiser.module.forward(x, level, prompt.pooled) for prompt in (cond, uncond))
        return u + scale * (c - u)

    ours = run(world, make_plan("zigzag", N, SCALE, inversion_scale=back, zig_steps=zigs))
    close(ours, written_out(d, x, sigmas.tolist(), back, zigs or range(N - 1)))


@pytest.mark.parametrize("mode", ["zcore", "zfast"])
@pytest.mark.parametrize("back", [-0.5, 0.0, BACK])
def test_with_a_perfect_head_every_mode_is_z_sampling_at_the_same_inversion_scale(
    world, mode, back
):
    truth = run(world, make_plan("zigzag", N, SCALE, inversion_scale=back))
    close(run(world, make_plan(mode, N, SCALE, inversion_scale=back)), truth)
    assert float((truth - run(world, make_plan("cfg", N, SCALE))).abs().max()) > 1e-2


def test_the_released_weight_that_matches_an_inversion_scale(world):
    """With an exact head ``w = (b - 1) / (s - 1)`` makes Z-CoRe^2 Z-Sampling at b."""
    weight = (BACK - 1) / (SCALE - 1)
    plan = make_plan("zcore", N, SCALE, w2s_scale=weight, upstream=True)
    close(run(world, plan), run(world, make_plan("zigzag", N, SCALE, inversion_scale=BACK)))


@pytest.mark.parametrize("path", ["flow", "ve"])
def test_a_step_undone_at_its_own_scale_comes_back_to_second_order(world, path):
    denoiser, means = GaussianDenoiser(0.5, path), [prompt.pooled for prompt in world[2:4]]
    x, errors = world[1], []
    for dt in (0.1, 0.05, 0.025, 0.0125):
        sigmas = torch.tensor([0.6, 0.6 - dt], dtype=torch.float64)
        plan = make_plan("cfg", 1, SCALE)
        cond, uncond = map(denoiser.prompt, means)
        there = make_predict(denoiser, sigmas, plan, cond, uncond)
        back = make_predict(denoiser, sigmas[1:], plan, cond, uncond)
        y = sample_euler(there, x, sigmas)
        errors.append(float((euler_inverse(back, sigmas)(y, 0) - x).norm()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 2) < 0.2 for order in orders), orders


def test_with_equal_scales_a_run_converges_to_the_guided_flow_as_euler_does(world):
    denoiser, x, cond, uncond, _ = world
    mean = uncond.pooled + SCALE * (cond.pooled - uncond.pooled)
    errors = []
    for n in (32, 64, 128):
        sigmas = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)
        plan = make_plan("zigzag", n, SCALE, inversion_scale=SCALE)
        ours = run((denoiser, x, cond, uncond, sigmas), plan)
        errors.append(float((ours - denoiser.solution(x, 0.95, 0.05, mean)).norm()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 1) < 0.15 for order in orders), orders


@pytest.mark.parametrize(
    ("options", "nfe"),
    [
        ({"mode": "zigzag", "inversion_scale": BACK}, 6 * N - 4),
        ({"mode": "zigzag", "inversion_scale": 0.0}, 5 * N - 3),
        ({"mode": "zigzag", "inversion_scale": 1.0}, 5 * N - 3),
        ({"mode": "zcore", "inversion_scale": BACK}, 5 * N - 3),
        ({"mode": "zfast", "inversion_scale": BACK}, 3 * N - 2),
        ({"mode": "zfast", "inversion_scale": BACK, "zig_steps": 2}, N + 4),
        ({"mode": "zigzag", "zig_steps": 0}, 2 * N),
    ],
)
def test_evaluations_are_counted_and_as_planned(world, options, nfe):
    plan = make_plan(num_steps=N, guidance_scale=SCALE, **options)
    with count_nfe(world[0].module) as counter:
        run(world, plan)
    assert counter.per_sample(2) == plan.nfe == nfe


def test_without_zigzag_steps_it_is_cfg_bit_for_bit(world):
    denoiser, x, cond, uncond, sigmas = world
    cfg = make_predict(denoiser, sigmas, make_plan("cfg", N, SCALE), cond, uncond)
    ours = run(world, make_plan("zigzag", N, SCALE, zig_steps=0))
    assert torch.equal(ours, sample_euler(cfg, x, sigmas))


# By the gap of the step before ------------------------------------------------------------------


def run_z2(world, plan):
    denoiser, x, cond, uncond, sigmas = world
    latest = LatestGap()
    predict = make_predict(denoiser, sigmas, plan, cond, uncond, on_pair=latest.see)

    def push(i):
        step = plan.steps[i]
        if step.inversion is None:
            return None
        return latest.push(step.guidance_scale, step.inversion_scale)

    return sample_euler(z2_predict(predict, push, sigmas), x, sigmas)


@pytest.mark.parametrize("path", ["flow", "ve"])
def test_z2_with_the_true_gap_is_an_explicit_zigzag_step_to_second_order(world, path):
    denoiser, x, errors = GaussianDenoiser(0.5, path), world[1], []
    cond, uncond = (denoiser.prompt(prompt.pooled) for prompt in world[2:4])
    level = torch.full((2,), 0.6, dtype=torch.float64)
    gap = denoiser(x, level, cond) - denoiser(x, level, uncond)
    low = 1.5  # above 1, so that a plan of CFG makes the way back as well
    plan, undo = make_plan("cfg", 1, SCALE), make_plan("cfg", 1, low)
    for dt in (0.1, 0.05, 0.025, 0.0125):
        sigmas = torch.tensor([0.6, 0.6 - dt], dtype=torch.float64)
        there = make_predict(denoiser, sigmas, plan, cond, uncond)
        back = make_predict(denoiser, sigmas[1:], undo, cond, uncond)
        whole = z2_predict(there, lambda _i: LatestGap(gap).push(SCALE, low), sigmas)
        explicit = sample_zigzag(there, x, sigmas, undo=back, zigs=(0,))
        errors.append(float((sample_euler(whole, x, sigmas) - explicit).norm()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 2) < 0.2 for order in orders), orders


@pytest.mark.parametrize("zigs", [None, (1, 3), (0, 2, 3)])
@pytest.mark.parametrize("back", [-0.5, 0.0, BACK])
def test_z2_is_cfg_at_higher_scales(world, back, zigs):
    """The identity of the module's text; in the last zigzag step and after, no scale is raised."""
    sigmas = world[4].tolist()
    dt = [t - s for s, t in zip(sigmas, sigmas[1:], strict=False)]
    moved = [i for i in (range(N - 1) if zigs is None else zigs) if i > 0]
    scales = [SCALE] * N
    for j in moved:
        scales[j - 1] += (SCALE - back) * dt[j] / dt[j - 1]
    denoiser, x, cond, uncond, levels = world
    cfg = make_predict(denoiser, levels, make_plan("cfg", N, scales), cond, uncond)
    plan = make_plan("z2", N, SCALE, inversion_scale=back, zig_steps=zigs)
    assert plan.zigs == plan.by_gap == tuple(moved)
    close(run_z2(world, plan), sample_euler(cfg, x, levels))


def test_z2_without_a_difference_of_scales_is_cfg_bit_for_bit(world):
    denoiser, x, cond, uncond, sigmas = world
    cfg = sample_euler(
        make_predict(denoiser, sigmas, make_plan("cfg", N, SCALE), cond, uncond), x, sigmas
    )
    assert torch.equal(run_z2(world, make_plan("z2", N, SCALE, inversion_scale=SCALE)), cfg)
    assert torch.equal(run_z2(world, make_plan("z2", N, SCALE, zig_steps=1)), cfg)


# The pipelines -----------------------------------------------------------------------------------

PROMPTS = ["a red circle", "two blue rings"]
STEPS = 5
DDIM = {**SDXL_SCHEDULER, "clip_sample": False, "set_alpha_to_one": False}


def with_scheduler(pipe, scheduler):
    pipe.register_modules(scheduler=scheduler)
    return pipe


PIPES = {
    "sd3": tiny_sd3_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sdxl ddim": lambda: with_scheduler(tiny_sdxl_pipeline(), DDIMScheduler(**DDIM)),
    "flux": tiny_flux_pipeline,
}


@pytest.fixture(params=PIPES)
def pipe(request):
    return PIPES[request.param]()


def lengths(pipe):
    return {} if pipe.family.name == "sdxl" else {"max_sequence_length": 8}


def sample(pipe, scale=SCALE, **options):
    defaults = {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS,
        pipe.family.scale_argument: scale,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
        **lengths(pipe),
    }
    return pipe(**{**defaults, **options}).images


def noise(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe.family.noise(pipe, generators, 16, 16)


def affine(pipe):
    """Give the pipeline a head of known coefficients: ``gap = 0.2 cond + 0.1 x``."""
    head = AffineHead(pipe.family.name, 4)
    head.coefficients[..., 0], head.coefficients[..., 1] = 0.2, 0.1
    pipe.register_modules(weak_head=head)
    return pipe


@torch.no_grad()
def bare(pipe, back, zigs, share=0.0, steps=written_out):
    """Zigzag steps on the family's bare parts, without plan, closure and loop.

    A share above 0 is SDXL's guidance rescale for a network that predicts v.
    """
    cond, uncond = pipe.family.encode(pipe, PROMPTS, **lengths(pipe))
    schedule = pipe.family.schedule(pipe, STEPS, (8, 8))
    denoiser = pipe.family.denoiser(pipe)

    def d(x, sigma, scale, plain=not share):
        level = torch.full((2,), sigma)
        c, u = denoiser(x, level, cond), denoiser(x, level, uncond)
        guided = u + scale * (c - u)
        if plain:
            return guided
        level = level[:, None, None, None]
        v = rescale(*(v_from_eps(each, x, level) for each in (guided, c)), share)
        return eps_from_v(v, x, level)

    x = schedule.noise_scale * schedule.unpack(noise(pipe))
    x = steps(d, x, schedule.sigmas.tolist(), back, zigs)
    return schedule.to_pipeline(x, STEPS)


@pytest.mark.parametrize("back", [0.0, BACK])
def test_a_run_is_its_steps_written_out_on_bare_parts(pipe, back):
    core2 = Core2Config(mode="zigzag", inversion_scale=back)
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        ours = sample(pipe, core2=core2)
    nfe = 5 * STEPS - 3 if back == 0 else 6 * STEPS - 4
    assert counter.per_sample(2) == pipe.core2_plan.nfe == nfe
    close(ours, bare(pipe, back, range(STEPS - 1)), 3e-5)


@pytest.mark.parametrize("zigs", [None, (2, 3)])
def test_z2_is_its_steps_written_out_on_bare_parts(pipe, zigs):
    core2 = Core2Config(mode="z2", inversion_scale=BACK, zig_steps=zigs)
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        ours = sample(pipe, core2=core2)
    assert counter.per_sample(2) == pipe.core2_plan.nfe == 2 * STEPS
    close(ours, bare(pipe, BACK, zigs or range(STEPS - 1), steps=moved_on), 3e-5)
    assert not torch.allclose(ours, sample(pipe, core2=Core2Config(mode="cfg")), atol=1e-3)


@pytest.mark.parametrize(("mode", "steps"), [("zigzag", written_out), ("z2", moved_on)])
def test_guidance_rescale_acts_at_the_noise_level_that_was_asked(mode, steps):
    pipe = tiny_sdxl_pipeline(prediction_type="v_prediction")
    core2 = Core2Config(mode=mode, inversion_scale=2.0)
    ours = sample(pipe, core2=core2, guidance_rescale=0.7)
    close(ours, bare(pipe, 2.0, range(STEPS - 1), share=0.7, steps=steps), 3e-5)
    assert not torch.allclose(ours, sample(pipe, core2=core2), atol=1e-3)


@pytest.mark.parametrize(("mode", "nfe"), [("zcore", 5 * STEPS - 3), ("zfast", 3 * STEPS - 2)])
def test_counted_evaluations_are_those_of_the_plan(pipe, mode, nfe):
    affine(pipe)
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        images = sample(pipe, core2=Core2Config(mode=mode, inversion_scale=BACK))
    assert counter.per_sample(2) == pipe.core2_plan.nfe == nfe
    assert torch.isfinite(images).all()


def test_without_zigzag_steps_a_run_is_cfg_bit_for_bit(pipe):
    cfg = sample(pipe, core2=Core2Config(mode="cfg"))
    assert torch.equal(sample(pipe, core2=Core2Config(mode="zigzag", zig_steps=0)), cfg)
    assert torch.equal(sample(pipe, core2=Core2Config(mode="z2", inversion_scale=SCALE)), cfg)
    cond = sample(pipe, 1.0, core2=Core2Config(mode="z2"))
    assert torch.equal(cond, sample(pipe, core2=Core2Config(mode="cond")))
    assert not torch.allclose(sample(pipe, core2=Core2Config(mode="zigzag", zig_steps=1)), cfg)


def test_an_adapter_makes_the_steps_and_the_negative_prompt_undoes_them():
    pipe = tiny_sd3_pipeline()
    head = AdapterHead.for_denoiser(pipe.family.denoiser(pipe), scale_range=(2.0, 6.0))
    pipe.register_modules(weak_head=head)
    with count_nfe(pipe.transformer) as counter:
        sample(pipe, core2=Core2Config(mode="zfast"))
    assert counter.per_sample(2) == pipe.core2_plan.nfe == 3 * STEPS - 2
    with pytest.raises(ValueError, match="inversion_scale must be 0, 1 or .* got 0.5: .* 2.0 to 6"):
        sample(pipe, core2=Core2Config(mode="zfast", inversion_scale=0.5))


@pytest.mark.parametrize(("mode", "passes"), [("zigzag", 5), ("z2", 2)])
def test_callbacks_see_a_zigzag_step_once_and_may_end_the_run(pipe, mode, passes):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append((i, float(t), tensors["latents"]))
        pipe._interrupt = i == 2
        return tensors

    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        ours = sample(pipe, core2=Core2Config(mode=mode), callback_on_step_end=stop)
    times = pipe.scheduler.timesteps.tolist()
    assert [step[:2] for step in seen] == [(i, times[i]) for i in range(3)]
    assert torch.equal(ours, seen[-1][2])
    assert counter.per_sample(2) == 3 * passes


@pytest.mark.parametrize(("mode", "passes"), [("zigzag", 5), ("z2", 2)])
def test_turning_guidance_off_ends_the_zigzag_steps(mode, passes):
    def cut_off(pipe, i, t, tensors):
        if i == 1:
            pipe._guidance_scale = 0.0
            tensors = {k: v.chunk(2)[1] if k != "latents" else v for k, v in tensors.items()}
        return tensors

    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    cut = {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": names}
    pipe = tiny_sd3_pipeline()
    with count_nfe(pipe.transformer) as counter:
        ours = sample(pipe, core2=Core2Config(mode=mode), **cut)
    assert counter.per_sample(2) == 2 * passes + 3
    scales = Core2Config(mode=mode, guidance_scales=(SCALE, SCALE, 1.0, 1.0, 1.0))
    close(ours, sample(pipe, core2=scales), 1e-5)


def test_the_measured_scale_is_that_of_whole_steps():
    """Undone at its own scale, a step of a smooth field is CFG's to first order."""
    pipe = tiny_sd3_pipeline()
    equal = {"core2": Core2Config(mode="zigzag", inversion_scale=SCALE), "prompt": PROMPTS}
    options = {"num_inference_steps": 20, "guidance_scale": SCALE, "max_sequence_length": 8}
    found = measure_effective_scale(pipe, **equal, **options)
    assert found.nfe == 6 * 20 - 4
    assert found.scales.shape == (20, 2)
    assert abs(found.mean - SCALE) < 0.1


# The released code -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("upstream", [False, True])
def test_sdxl_is_the_loop_of_ddim_and_its_inverse_scheduler(upstream):
    """Exact inverts to ``timesteps[i]``; the released loop asks early and inverts one late."""
    pipe = PIPES["sdxl ddim"]()
    core2 = Core2Config(mode="zigzag", inversion_scale=BACK, upstream=upstream)
    ours = sample(pipe, core2=core2)
    cond, uncond = pipe.family.encode(pipe, PROMPTS)
    scheduler, inverse = pipe.scheduler, DDIMInverseScheduler(**DDIM)
    scheduler.set_timesteps(STEPS)
    inverse.set_timesteps(STEPS)
    times = scheduler.timesteps.tolist()

    def eps(x, t, scale):
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)
        u, c = (
            pipe.unet(
                x,
                t,
                encoder_hidden_states=side.prompt_embeds,
                added_cond_kwargs={"text_embeds": side.pooled, "time_ids": ids},
            ).sample
            for side in (uncond, cond)
        )
        return u + scale * (c - u)

    x = noise(pipe)
    for i, t in enumerate(times):
        y = scheduler.step(eps(x, t, SCALE), t, x).prev_sample
        if i < STEPS - 1:
            e = eps(y, t if upstream else times[i + 1], BACK)
            x = inverse.step(e, times[i + 1] if upstream else t, y).prev_sample
            y = scheduler.step(eps(x, t, SCALE), t, x).prev_sample
        x = y
    close(ours, x, 3e-5)
    other = sample(pipe, core2=Core2Config(mode="zigzag", inversion_scale=BACK))
    assert upstream != torch.allclose(ours, other, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["zigzag", "zcore"])
def test_sd3_upstream_is_the_released_loop(mode):
    pipe, scale, weight = affine(tiny_sd3_pipeline()), 4.0, 1.5
    back = {"inversion_scale": BACK} if mode == "zigzag" else {"w2s_scale": weight}
    ours = sample(pipe, scale, core2=Core2Config(mode=mode, upstream=True, **back))
    cond, uncond = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8)
    pipe.scheduler.set_timesteps(STEPS)
    times, sigmas = pipe.scheduler.timesteps, pipe.scheduler.sigmas

    def v(x, t, side):
        return pipe.transformer(
            x,
            timestep=t.expand(2),
            encoder_hidden_states=side.prompt_embeds,
            pooled_projections=side.pooled,
        ).sample

    def cfg(x, t, scale):
        u = v(x, t, uncond)
        return u + scale * (v(x, t, cond) - u)

    x = noise(pipe)
    for i, t in enumerate(times):
        dt = sigmas[i + 1] - sigmas[i]
        y = x + dt * cfg(x, t, scale)
        if i < STEPS - 1 and mode == "zigzag":
            back = y - dt * cfg(y, max(torch.tensor(0.0), t - 1000 // STEPS), BACK)
            y = back + dt * cfg(back, t, scale)
        elif i < STEPS - 1:
            c = v(y, t, cond)
            g = c + (scale - 1) * (0.2 * c + 0.1 * y)
            back = y - dt * (c + weight * (g - c))
            y = back + dt * cfg(back, t, 3.5)
        x = y
    close(ours, x, 3e-5)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: with_scheduler(tiny_sdxl_pipeline(), DPMSolverMultistepScheduler(**DPM)),
            {},
            "makes Euler steps, got DPMSolverMultistepScheduler: use EulerDiscreteScheduler",
        ),
        (
            lambda: with_scheduler(tiny_sd3_pipeline(), FlowMatchHeunDiscreteScheduler()),
            {},
            "got FlowMatchHeunDiscreteScheduler: use FlowMatchEulerDiscreteScheduler",
        ),
        (tiny_sdxl_pipeline, {"upstream": True}, "must come with DDIMScheduler"),
        (tiny_flux_pipeline, {"upstream": True}, "upstream must be False for FLUX"),
        (tiny_sd3_pipeline, {"mode": "zcore"}, "weak head, got none"),
        (tiny_sd3_pipeline, {"zig_steps": 5}, r"but the last \(4\), got 5"),
        (
            lambda: with_scheduler(tiny_sd3_pipeline(), FlowMatchHeunDiscreteScheduler()),
            {"mode": "z2"},
            "got FlowMatchHeunDiscreteScheduler: use FlowMatchEulerDiscreteScheduler",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_encoded(make, options, message):
    pipe = make()
    core2 = Core2Config(**{"mode": "zigzag", **options})
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        sample(pipe, core2=core2)
    assert counter.calls == 0


DPM = {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}


def test_a_cache_of_the_transformer_is_refused():
    pipe = tiny_flux_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="must be off for zigzag steps, got FirstBlockCacheConfig"):
        sample(pipe, core2=Core2Config(mode="zigzag"))


# The command line --------------------------------------------------------------------------------


def config_of(**options):
    return core2_config(GenerateConfig(prompts=("a",), **options))


def test_options_of_zigzag_steps_reach_the_config():
    assert config_of(mode="zfast", zig_steps=0.5, inversion_scale=0.0) == Core2Config(
        mode="zfast", zig_steps=0.5, inversion_scale=0.0
    )
    assert config_of(mode="z2", zig_steps=3) == Core2Config(mode="z2", zig_steps=3)
    released = config_of(mode="zcore", upstream=True, w2s_scale=2.5)
    assert released == Core2Config(mode="zcore", upstream=True, w2s_scale=2.5)
    assert config_of(mode="quality", slow_steps=0).slow_steps == 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "cfg", "inversion_scale": 0.0},
        {"mode": "fast", "zig_steps": 2},
        {"mode": "zfast", "upstream": True},
        {"mode": "z2", "upstream": True},
        {"mode": "zigzag", "slow_steps": 0},
        {"mode": "zcore", "w2s_scale": 2.5},
    ],
)
def test_options_without_effect_are_refused(options):
    name = next(name for name in options if name != "mode")
    with pytest.raises(ConfigError, match=f"{name} has no effect in mode '{options['mode']}'"):
        config_of(**options)
