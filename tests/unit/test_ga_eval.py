"""GA-Eval: effective guidance scales that are known beforehand, and what they are compared with.

Truth: the algebra of heads whose part along the gap and across it is chosen, on the Gaussian
denoiser; for pipelines, one-step runs of the stock classes.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.effective_scale import EffectiveScale, Meter, project
from core2_sampler.benchmarks.ga_eval import (
    Difference,
    matched_arms,
    measure_effective_scale,
    measuring,
    verdict,
)
from core2_sampler.benchmarks.stats import Estimate
from core2_sampler.guidance import make_predict
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Core2Config, Plan, make_plan
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler
from core2_sampler.schedules import flow_sigmas
from core2_sampler.testing import (
    GaussianDenoiser,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
)
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead
from core2_sampler.weak_heads.tap import TapHead

N, SCALE, W2S = 5, 3.5, 1.5
CFG = Core2Config(mode="cfg")


def across(gap):
    """Return a direction of the gap's length, orthogonal to it sample by sample."""
    other = torch.randn(gap.shape, generator=torch.Generator().manual_seed(7), dtype=gap.dtype)
    dims = (1, 2, 3)
    other -= (other * gap).sum(dims, True) / gap.square().sum(dims, True) * gap
    length = (gap.square().sum(dims, True) / other.square().sum(dims, True)).sqrt()
    return other * length


class MixHead:
    """An output head: so much of the true gap, and so much of a direction across it."""

    in_model, needs_features = False, False

    def __init__(self, world, along, aside=0.0):
        self.world, self.along, self.aside = world, along, aside

    def reset(self):
        pass

    def observe(self, gap):
        pass

    def __call__(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        denoiser, _, _, uncond, _ = self.world
        gap = cond - denoiser.module.forward(x, sigma, uncond.pooled)
        return self.along * gap + self.aside * across(gap)


class PerfectInModelHead:
    """An in-model head that is CFG exactly: were it on, cond would measure as the guided d."""

    in_model = True

    def __init__(self, world):
        self.world, self.strength = world, 0.0

    @contextmanager
    def attached(self, module):
        _, _, cond, uncond, _ = self.world

        def hook(_module, inputs, d):
            if self.strength == 0:
                return None
            x, sigma, _mean = inputs
            gap = module.forward(x, sigma, cond.pooled) - module.forward(x, sigma, uncond.pooled)
            return d + self.strength * gap

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def active(self, guidance_scale):
        self.strength = guidance_scale - 1
        try:
            yield
        finally:
            self.strength = 0.0


@pytest.fixture
def world():
    """A Gaussian denoiser, latents, two prompts and a grid, in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    denoiser = GaussianDenoiser()
    cond, uncond = denoiser.prompt(randn(2, 3)), denoiser.prompt(randn(2, 3))
    return denoiser, randn(2, 3, 4, 4), cond, uncond, flow_sigmas(N)


def run(world, plan, head=None, sampler=sample_euler):
    """Return the final latents without and with measurement, and the measurement."""
    denoiser, x, cond, uncond, sigmas = world
    predict = make_predict(denoiser, sigmas, plan, cond, uncond, head)
    plain = sampler(predict, x, sigmas)
    meter = Meter(denoiser, sigmas, lambda _i: (cond, uncond))
    return plain, sampler(meter.watch(predict), x, sigmas), meter.result()


def constant(value):
    return torch.full((N, 2), float(value), dtype=torch.float64)


def close(measured, expected, tolerance=1e-9):
    torch.testing.assert_close(measured, expected, atol=tolerance, rtol=0)


# The measurement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.2, 3.5, 20.0])
def test_cfg_measures_its_own_scale_and_no_orthogonal_share(world, scale):
    _, _, measured = run(world, make_plan("cfg", N, scale))
    close(measured.scales, constant(scale))
    close(measured.shares, constant(0.0))


def test_cond_measures_exactly_1(world):
    for plan, head in (
        (make_plan("cond", N, SCALE), None),
        (make_plan("core", N, SCALE), MixHead(world, 0.0)),
    ):
        _, _, measured = run(world, plan, head)
        assert torch.equal(measured.scales, constant(1.0))
        assert torch.equal(measured.shares, constant(0.0))


@pytest.mark.parametrize(
    ("along", "aside"), [(1.0, 0.0), (0.6, 0.0), (0.0, 1.0), (0.6, 0.8), (-0.7, 0.2)]
)
@pytest.mark.parametrize("slow_steps", [0, N])
def test_a_head_measures_as_its_part_along_the_gap(world, along, aside, slow_steps):
    plan = make_plan("core", N, SCALE, slow_steps=slow_steps, w2s_scale=W2S)
    _, _, measured = run(world, plan, MixHead(world, along, aside))
    if slow_steps:  # weak + w2s (strong - weak), by hand
        along, aside = along + W2S * (1 - along), (1 - W2S) * aside
    along, aside = 1 + (SCALE - 1) * along, (SCALE - 1) * aside  # of d - uncond, in gaps
    close(measured.scales, constant(along))
    close(measured.shares, constant(abs(aside) / math.hypot(along, aside)))
    assert measured.mean == pytest.approx(along)
    assert measured.orthogonal_share == pytest.approx(abs(aside) / math.hypot(along, aside))


def test_a_head_that_predicts_nothing_makes_slow_steps_cfg_at_a_higher_scale(world):
    """The example of the design: w2s 1.5 at 3.5 is CFG at 4.75."""
    plan = make_plan("core", N, 3.5, slow_steps=N, w2s_scale=1.5)
    head = MixHead(world, 0.0)
    plain, _, measured = run(world, plan, head)
    close(measured.scales, constant(4.75))
    close(plain, run(world, make_plan("cfg", N, measured.mean))[0])


@pytest.mark.parametrize("slow_steps", [0, 2])
def test_cond_is_measured_with_an_in_model_head_off(world, slow_steps):
    head = PerfectInModelHead(world)
    plan = make_plan("core", N, SCALE, slow_steps=slow_steps, w2s_scale=W2S, in_model=True)
    with head.attached(world[0].module):
        plain, measured_run, measured = run(world, plan, head)
    close(measured.scales, constant(SCALE))
    assert torch.equal(plain, measured_run)
    assert measured.nfe == plan.nfe


PLANS = {
    "cond": make_plan("cond", N, SCALE),
    "cfg": make_plan("cfg", N, SCALE),
    "fast": make_plan("core", N, SCALE),
    "mixed": make_plan("core", N, SCALE, slow_steps=(1, 3), w2s_scale=W2S),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("sampler", [sample_euler, sample_dpmpp_2m])
def test_a_measured_run_is_the_run_and_its_own_passes_are_counted(world, name, sampler):
    plan = PLANS[name]
    plain, measured_run, measured = run(world, plan, MixHead(world, 0.6, 0.3), sampler)
    assert torch.equal(plain, measured_run)
    assert measured.nfe == plan.nfe


def test_each_step_and_sample_has_its_own_scale(world):
    scales = [2.0, 6.0, 3.0, 1.0, 4.0]
    _, _, measured = run(world, make_plan("cfg", N, scales))
    close(measured.per_step, torch.tensor(scales, dtype=torch.float64))
    close(measured.per_sample, torch.full((2,), 3.2, dtype=torch.float64))


def test_projection_is_that_of_the_released_code_with_its_sign_kept():
    """Its formulas in numpy: v1 = d - uncond, v2 = w D, vp = <v1, v2> / <v2, v2> v2, |vp| / |D|.

    And |v1 - vp| / |v1|.
    """
    generator = torch.Generator().manual_seed(3)
    d, cond, uncond = torch.randn(3, 4, 2, 6, 6, generator=generator, dtype=torch.float64)
    d += torch.tensor([-2.0, -1.0, 0.0, 2.0])[:, None, None, None] * (cond - uncond)
    scale, share = project(d, cond, cond - uncond)
    for k in range(4):
        v1, gap = ((a - b)[k].numpy().ravel() for a, b in ((d, uncond), (cond, uncond)))
        v2 = 5.5 * gap
        vp = v1 @ v2 / (v2 @ v2) * v2
        assert abs(float(scale[k])) == pytest.approx(np.linalg.norm(vp) / np.linalg.norm(gap))
        assert float(share[k]) == pytest.approx(np.linalg.norm(v1 - vp) / np.linalg.norm(v1))
    assert bool((scale < 0).any()) and bool((scale > 0).any())  # so that the sign is seen


def test_bfloat16_is_projected_in_float32():
    cond, gap = torch.randn(2, 2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    cond, d = cond.bfloat16(), (cond.bfloat16().float() + 2 * gap).bfloat16()
    scale, _ = project(d, cond, gap.bfloat16())
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, torch.full((2,), 3.0), atol=2e-3, rtol=0)


def test_guidance_away_from_the_prompt_is_negative_and_official_loses_the_sign():
    cond = torch.zeros(1, 1, 2, 2)
    gap = torch.ones_like(cond)
    scale, share = project(cond - 3 * gap, cond, gap)
    assert (scale.item(), share.item()) == (-2.0, 0.0)
    measured = EffectiveScale(torch.stack([scale, torch.tensor([4.0])]), torch.zeros(2, 1), nfe=2)
    assert measured.mean == 1.0
    assert measured.official().mean == 3.0
    assert measured.official().nfe == 2


def test_a_zero_gap_has_no_scale_and_is_left_out_of_means():
    cond = torch.ones(2, 1, 2, 2)
    gap = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    scale, share = project(cond + 2, cond, gap)
    assert math.isnan(scale[0]) and scale[1] == 3
    assert share.tolist() == [1.0, 0.0]
    measured = EffectiveScale(torch.stack([scale, torch.tensor([5.0, 7.0])]), torch.zeros(2, 2), 4)
    assert measured.per_sample.tolist() == [5.0, 5.0]
    assert measured.mean == 5.0
    assert math.isnan(EffectiveScale(scale[None, :1], torch.ones(1, 1), 2).mean)


def test_batches_of_an_arm_are_put_together():
    first = EffectiveScale(torch.full((3, 2), 2.0), torch.zeros(3, 2), 6)
    second = EffectiveScale(torch.full((3, 1), 5.0), torch.ones(3, 1), 6)
    both = EffectiveScale.of_batches([first, second])
    assert (both.per_sample.tolist(), both.mean, both.nfe) == ([2.0, 2.0, 5.0], 3.0, 6)
    assert both.orthogonal_share == pytest.approx(1 / 3)
    for bad in ([], [first, EffectiveScale(torch.zeros(3, 1), torch.zeros(3, 1), 3)]):
        with pytest.raises(ValueError, match="one arm"):
            EffectiveScale.of_batches(bad)


def test_what_cannot_be_measured_is_refused(world):
    denoiser, x, cond, _, sigmas = world
    meter = Meter(denoiser, sigmas, lambda _i: (cond, None))
    with pytest.raises(ValueError, match="got none"):
        meter.result()
    watched = meter.watch(make_predict(denoiser, sigmas, make_plan("cond", N, 1.0), cond, None))
    with pytest.raises(ValueError, match="negative prompt must be there in every step"):
        watched(x, 0)
    denoiser.module._cache_config = object()
    with pytest.raises(ValueError, match="disable_cache"):
        Meter(denoiser, sigmas, lambda _i: (cond, cond))


# Pipelines ---------------------------------------------------------------------------------------

FAMILIES = {
    "sd3": (tiny_sd3_pipeline, {"max_sequence_length": 8}),
    "sdxl": (tiny_sdxl_pipeline, {}),
    "flux": (tiny_flux_pipeline, {"max_sequence_length": 8, "height": 16, "width": 16}),
}


def arguments(pipe, family, scale=SCALE, steps=N, **more):
    return {
        "prompt": ["a red circle", "two blue rings"],
        "negative_prompt": ["", ""],
        "num_inference_steps": steps,
        pipe.family.scale_argument: scale,
        "generator": [torch.Generator().manual_seed(s) for s in (1, 2)],
        "output_type": "latent",
        **FAMILIES[family][1],
        **more,
    }


def with_head(family, head_class, **options):
    """Return the family's tiny pipeline with a head whose weights are not zero."""
    pipe = FAMILIES[family][0]()
    head = head_class.for_denoiser(pipe.family.denoiser(pipe), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    pipe.register_modules(weak_head=head)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("core2", "expected", "nfe"),
    [
        (CFG, SCALE, 2 * N),
        (Core2Config(mode="cond"), 1.0, N),
        ("fast", 1.0, N),
        ("quality", 1 + 1.5 * (SCALE - 1), 2 * N),
    ],
)
def test_a_pipeline_with_a_head_that_predicts_nothing(family, core2, expected, nfe):
    pipe = FAMILIES[family][0](weak_head=CondHead(family, 4))
    plain = pipe(**arguments(pipe, family), core2=core2).images
    plan = pipe.core2_plan
    with measuring(pipe) as read:
        images = pipe(**arguments(pipe, family), core2=core2).images
    measured = read()
    assert torch.equal(images, plain)
    torch.testing.assert_close(measured.scales, torch.full((N, 2), expected), atol=2e-3, rtol=0)
    assert measured.shares.max() < 2e-3
    assert measured.nfe == nfe
    assert pipe.core2_plan == plan and type(pipe.core2_plan) is Plan
    assert pipe._core2_observer is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["tap", "adapter"])
def test_a_head_in_a_pipeline_against_one_step_runs_of_the_stock_class(family, head):
    """In one Euler step the latents are linear in d: cond and gap follow from stock runs."""
    scales = {"reference_scale": SCALE, "scale_range": (2.0, 6.0)}
    head_class, options = {"tap": (TapHead, {}), "adapter": (AdapterHead, scales)}[head]
    pipe = with_head(family, head_class, **options)
    cond, doubled = (
        pipe(**arguments(pipe, family, scale, steps=1)).images.double() for scale in (1.0, 2.0)
    )
    fast = pipe(**arguments(pipe, family, steps=1), core2="fast").images.double()
    measured = measure_effective_scale(pipe, **arguments(pipe, family, steps=1), core2="fast")
    change, gap = (fast - cond).flatten(1), (doubled - cond).flatten(1)
    along = (change * gap).sum(1) / gap.square().sum(1)
    cosine = torch.cosine_similarity(change, gap)
    torch.testing.assert_close(measured.scales[0].double(), 1 + along, atol=1e-3, rtol=1e-3)
    sine = (1 - cosine.square()).sqrt()
    assert sine.min() > 0.1  # a random head is no guidance
    expected = change.norm(dim=1) * sine / (change + gap).norm(dim=1)  # of d - uncond
    torch.testing.assert_close(measured.shares[0].double(), expected, atol=1e-3, rtol=1e-3)
    assert measured.nfe == 1


def test_a_scheduler_that_makes_its_own_steps():
    pipe = tiny_sd3_pipeline(weak_head=CondHead("sd3", 4))
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    plain = pipe(**arguments(pipe, "sd3"), core2="quality").images
    with measuring(pipe) as read:
        images = pipe(**arguments(pipe, "sd3"), core2="quality").images
    assert torch.equal(images, plain)
    assert read().nfe == pipe.core2_plan.nfe
    expected = torch.full((len(pipe.core2_plan), 2), 4.75)
    torch.testing.assert_close(read().scales, expected, atol=2e-3, rtol=0)


def test_the_gap_of_flux_may_be_that_of_another_embedded_guidance():
    pipe = tiny_flux_pipeline()
    call = arguments(pipe, "flux", weak_guidance=1.0, negative_prompt=None)
    measured = measure_effective_scale(pipe, **call, core2=CFG)
    torch.testing.assert_close(measured.scales, torch.full((N, 2), SCALE), atol=2e-3, rtol=0)
    assert measured.nfe == 2 * N


def test_the_latest_call_is_read_and_the_pipeline_is_left_as_it_was():
    pipe = tiny_sd3_pipeline()
    with measuring(pipe) as read:
        pipe(**arguments(pipe, "sd3", 2.0), core2=CFG)
        assert read().mean == pytest.approx(2.0, abs=1e-3)
        pipe(**arguments(pipe, "sd3", 6.0), core2=CFG)
    assert read().mean == pytest.approx(6.0, abs=1e-3)
    with pytest.raises(KeyError), measuring(pipe):
        raise KeyError
    with count_nfe(pipe.transformer) as counter:
        pipe(**arguments(pipe, "sd3"), core2=CFG)
    assert counter.per_sample(2) == 2 * N


def test_a_call_that_cannot_be_measured_is_refused():
    pipe = tiny_sd3_pipeline()
    with pytest.raises(ValueError, match=r"with core2= must be made"):
        measure_effective_scale(pipe, **arguments(pipe, "sd3"))
    with pytest.raises(ValueError, match="guidance scale above 1"):
        measure_effective_scale(pipe, **arguments(pipe, "sd3", 1.0), core2=CFG)


# The comparisons ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "nfe", "scale", "matched"),
    [
        (50, 50, 4.2, ("cfg", 25, 4.2)),  # ratio 1/2: int(50 * 0.5)
        (50, 100, 4.75, ("cfg", 50, 4.75)),  # ratio 1
        (50, 150, 7.0, ("cfg", 75, 7.0)),  # ratio 1.5, as PAG
        (28, 35, 3.0, ("cfg", 17, 3.0)),  # int(28 * 0.625)
        (28, 28, 1.00001, ("cond", 28, 1.0)),  # cond, up to rounding: one pass a step
        (28, 28, -0.4, ("cond", 28, 1.0)),
    ],
)
def test_matched_cfg_costs_what_the_method_costs(steps, nfe, scale, matched):
    arm = Arm("tap-fast", "core", steps, SCALE, "tap")
    default, other = matched_arms(arm, scale, nfe)
    assert default == Arm("cfg", "cfg", steps, SCALE)
    assert other == Arm("tap-fast-matched", *matched)
    assert nfe - 1 <= other.plan(in_model=False).nfe <= nfe


@pytest.mark.parametrize(("scale", "nfe", "message"), [(math.nan, 28, "finite"), (3.0, 1, "pay")])
def test_no_comparison_is_refused(scale, nfe, message):
    with pytest.raises(ValueError, match=message):
        matched_arms(Arm("a", "core", 28, SCALE, "tap"), scale, nfe)


WIN, LOSS = Difference(Estimate(2.0, 1, 3), 0.01), Difference(Estimate(-2.0, -3, -1), 0.01)
TIE, UNKNOWN = (
    Difference(Estimate(0.5, -0.5, 1.5), 0.4),
    Difference(Estimate(2, *[math.nan] * 2), 0),
)
CHANCE = Difference(Estimate(2.0, 1.0, 3.0), 0.05)  # Holm takes away what the interval alone says


@pytest.mark.parametrize(
    ("default", "matched", "start", "end"),
    [
        (WIN, WIN, "beats default CFG", "more than a change of guidance scale."),
        (WIN, TIE, "beats default CFG", "wins only against default CFG"),
        (WIN, LOSS, "beats default CFG", "wins only against default CFG"),
        (WIN, UNKNOWN, "beats default CFG", "wins only against default CFG"),
        (TIE, WIN, "cannot be told from default CFG", "for the same cost"),
        (LOSS, WIN, "loses to default CFG", "for the same cost"),
        (TIE, TIE, "cannot be told from default CFG", "no gain over CFG is shown."),
        (UNKNOWN, LOSS, "has too few prompts, or no spread, for an interval", "no gain"),
        (CHANCE, CHANCE, "cannot be told from default CFG (+2 [+1, +3], p (Holm) 0.05)", "no gain"),
        (WIN, CHANCE, "beats default CFG", "wins only against default CFG"),
        (Difference(LOSS.estimate, 0.2), WIN, "cannot be told from default CFG", "the same cost"),
    ],
)
def test_verdicts(default, matched, start, end):
    said = verdict("tap-fast", default, matched)
    assert said.startswith(f"tap-fast {start}")
    assert end in said
    assert "nan" not in said
    assert "CFG at its own effective scale and NFE" in said
