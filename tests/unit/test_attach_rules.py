"""Scale rules that see the latents, on stock pipelines.

Truth: our own loops, stock calls, and the latents that a stock loop goes on to.
"""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

from core2_sampler import attach, attached, testing
from core2_sampler.attachment.layouts import Call
from core2_sampler.attachment.measure import check_pass
from core2_sampler.attachment.networks import find_networks
from core2_sampler.plan import Core2Config
from core2_sampler.scales import CallableScale, OnlineScale, next_latents
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import AffineHead

NAMES = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
PICKED = torch.tensor([2.0, 6.0])
KINDS = {
    "cfg": {"mode": "cfg"},
    "fast": {"slow_steps": 0},
    "slow": {"slow_steps": (0, 2), "w2s_scale": 1.5},
}


class Smallness:
    """Minus the distance of the latents' size to one that the prompt names: a clear winner."""

    def check_family(self, family):
        if family not in NAMES:
            raise ValueError(f"made for {', '.join(NAMES)}, got {family}")

    def check_latents(self, channels):
        assert channels == 4

    def __call__(self, x, sigma, conditioning):
        wanted = 0.8 + conditioning.pooled.float().mean(1).sin()
        return -(x / (1 + sigma[:, None, None, None])).flatten(1).std(1).sub(wanted).abs()


def close(ours, truth):
    torch.testing.assert_close(ours, truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


def affine(family):
    """Return a head of known coefficients: ``gap = 0.2 cond + 0.1 x``."""
    head = AffineHead(family, 4)
    head.coefficients[..., 0], head.coefficients[..., 1] = 0.2, 0.1
    return head


def both(family, scheduler=None, **options):
    """Return our own pipeline and the stock one of the same parts."""
    own = getattr(testing, f"tiny_{family}_pipeline")(weak_head=affine(family), **options)
    if scheduler is not None:
        own.register_modules(scheduler=scheduler)
    parts = {k: v for k, v in own.components.items() if k != "weak_head"}
    pipe = getattr(diffusers, f"{NAMES[family]}Pipeline")(**parts)
    pipe.set_progress_bar_config(disable=True)
    return STOCK[f"{NAMES[family]}Pipeline"], own, pipe


DDIM = diffusers.DDIMScheduler(**testing.SDXL_SCHEDULER, clip_sample=False)
DPM = diffusers.DPMSolverMultistepScheduler(**testing.SDXL_SCHEDULER)
PAIRS = {
    "sdxl": lambda: both("sdxl"),
    "sdxl v": lambda: both("sdxl", prediction_type="v_prediction"),
    "sdxl DDIM": lambda: both("sdxl", DDIM),
    "sdxl DPM": lambda: both("sdxl", DPM),
    "sd3": lambda: both("sd3"),
    "flux": lambda: both("flux"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_rule_picks_what_it_picks_in_our_own_pipeline(pair, kind):
    (stock, own, pipe), picks = PAIRS[pair](), []
    for rule in (
        OnlineScale({"small": Smallness()}, (1.0, 3.0, 7.5)),
        CallableScale(lambda p: 2 + p.x.abs().mean((1, 2, 3)) + p.sigma_next),
    ):
        core2 = Core2Config(scale_rule=rule, **KINDS[kind])
        wanted = stock.sample(own, core2=core2)
        picked = own.core2_schedule
        picks += picked.flatten().tolist()
        with attached(pipe, head=own.weak_head, core2=core2):
            close(stock.sample(pipe), wanted)
            torch.testing.assert_close(pipe.core2_schedule, picked, atol=1e-4, rtol=1e-4)
            assert pipe.core2_plan == own.core2_plan
    assert len(picks) == 12 and len(set(picks)) > 1


TASKS = ["Img2Img", "Inpaint", "ControlNet"]
OF_TASKS = ["sdxl", "sd3", "flux"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", OF_TASKS)
def test_each_image_of_other_tasks_is_that_of_the_stock_call_at_its_scale(family, task):
    stock = STOCK[f"{NAMES[family]}{task}Pipeline"]
    pipe, seen = stock.pipe(), []
    rule = CallableScale(lambda pair: seen.append((pair.sigma, pair.sigma_next)) or PICKED)
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
        ours = stock.sample(pipe)
    for row, scale in enumerate(PICKED.tolist()):
        close(ours[row], stock.sample(pipe, scale)[row])
    assert all(here == before for (_, before), (here, _) in zip(seen, seen[1:], strict=False))
    assert seen[-1][1] == 0 and len(seen) == 3


def test_a_scale_that_a_callback_sets_holds_in_place_of_the_rule():
    def edit(pipe, i, t, tensors):
        pipe._guidance_scale = 5.0
        return tensors

    stock = STOCK["StableDiffusion3Pipeline"]
    pipe = stock.pipe()
    rule = CallableScale(lambda pair: torch.full((2,), 7.0))
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
        ours = stock.sample(pipe, callback_on_step_end=edit)
        picked = pipe.core2_schedule
    assert picked[0].tolist() == [7.0, 7.0] and picked[1:].isnan().all()
    with attached(pipe, core2=Core2Config(mode="cfg", guidance_scales=(7.0, 5.0, 5.0))):
        close(ours, stock.sample(pipe))


def test_a_head_inside_the_denoiser_leaves_its_slow_steps_to_the_rule():
    stock = STOCK["FluxPipeline"]
    pipe = stock.pipe()
    head = AdapterHead.for_denoiser(find_networks(pipe)[0].denoiser, scale_range=(2.0, 6.0))
    rule = CallableScale(lambda pair: PICKED)
    with attached(pipe, head=head, core2=Core2Config(slow_steps=(1,), scale_rule=rule)):
        stock.sample(pipe)
        assert torch.equal(pipe.core2_schedule[1], PICKED)
        assert pipe.core2_schedule[[0, 2]].isnan().all()


class Nearness:
    """Minus the distance to where each step shall lead."""

    def __init__(self, targets):
        self.targets = iter(targets)

    def check_family(self, family):
        pass

    def check_latents(self, channels):
        pass

    def __call__(self, x, sigma, conditioning):
        assert len(x) == len(conditioning.prompt_embeds) == len(conditioning.pooled)
        target = next(self.targets)
        return -(x - target.repeat(len(x) // len(target), 1, 1, 1)).flatten(1).abs().mean(1)


RULED = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "FluxKontextPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "AuraFlowPipeline",
    "CogView4Pipeline",
    "Lumina2Pipeline",
    "ChromaPipeline",
    "QwenImagePipeline",
    "WanPipeline",
    "LTXPipeline",
    "ZImagePipeline",
    "ZImageImg2ImgPipeline",
]
SCHEDULERS = {
    "v": diffusers.DDIMScheduler(
        **testing.SDXL_SCHEDULER, clip_sample=False, prediction_type="v_prediction"
    ),
    "Euler": diffusers.EulerDiscreteScheduler(**testing.SDXL_SCHEDULER),
}


@functools.cache
def measured(name, scheduler):
    """Return a stock pipeline, and what lies between its guidance scale and ours."""
    pipe = STOCK[name].pipe()
    if scheduler is not None:
        pipe.register_modules(scheduler=SCHEDULERS[scheduler])
    return pipe, find_networks(pipe)[0].layout.scale_offset


MEASURED = [(name, None) for name in RULED] + [("StableDiffusionPipeline", s) for s in SCHEDULERS]


@pytest.mark.parametrize(("name", "scheduler"), MEASURED)
def test_the_latents_move_as_a_rule_foresees(name, scheduler):
    """An Euler step from what the rule saw is the stock loop's own first step, of first order."""
    stock, (pipe, offset), pairs = STOCK[name], measured(name, scheduler), []
    rule = CallableScale(lambda pair: pairs.append(pair) or torch.full((2,), 6.0))
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
        ours = stock.sample(pipe)
    wanted = stock.sample(pipe, 6.0 - offset)
    close(ours, wanted)
    close(next_latents(pairs[0], 6.0), pairs[1].x)
    assert float((next_latents(pairs[0], 4.0) - pairs[1].x).abs().max()) > 1e-3
    targets = [next_latents(pair, 6.0) for pair in pairs]
    online = OnlineScale({"near": Nearness(targets)}, (1.0, 4.0, 6.0, 9.0))
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=online)):
        close(stock.sample(pipe), wanted)
        assert pipe.core2_schedule.tolist() == [[6.0, 6.0]] * 3


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", *RULED])
def test_a_rule_that_picks_the_scale_of_the_call_is_the_stock_call_bit_for_bit(name):
    stock, (pipe, offset) = STOCK[name], measured(name, None)
    rule = CallableScale(lambda pair: torch.full((2,), 4.3 + offset))
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
        ours = stock.sample(pipe, 4.3)
        assert pipe.core2_schedule.isfinite().all()
    assert torch.equal(ours, stock.sample(pipe, 4.3))


@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_each_image_of_other_networks_is_that_of_the_stock_call_at_its_scale(name):
    stock, (pipe, offset) = STOCK[name], measured(name, None)
    rule = CallableScale(lambda pair: PICKED)
    with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
        ours = stock.sample(pipe)
    for row, scale in enumerate(PICKED.tolist()):
        close(ours[row], stock.sample(pipe, scale - offset)[row])


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "QwenImagePipeline", "ZImagePipeline"])
def test_a_rule_sees_what_a_head_guides(name, kind):
    """One scale that a rule picks is the same scale in the plan, and leads where it foresees."""
    stock, (pipe, _), pairs = STOCK[name], measured(name, None), []
    head = AffineHead.for_denoiser(find_networks(pipe)[0])
    head.coefficients[..., 0], head.coefficients[..., 1] = 0.2, 0.1
    rule = CallableScale(lambda pair: pairs.append(pair) or torch.full((2,), 6.0))
    with attached(pipe, head=head, core2=Core2Config(scale_rule=rule, **KINDS[kind])):
        ours = stock.sample(pipe)
    known = Core2Config(guidance_scales=(6.0,) * 3, **KINDS[kind])
    with attached(pipe, head=head, core2=known):
        close(ours, stock.sample(pipe))
    close(next_latents(pairs[0], 6.0), pairs[1].x)
    assert float((next_latents(pairs[0], 4.0) - pairs[1].x).abs().max()) > 1e-3


def test_lumina_2_is_foreseen_without_its_normalisation_too():
    stock, (pipe, _), pairs = STOCK["Lumina2Pipeline"], measured("Lumina2Pipeline", None), []
    rule = CallableScale(lambda pair: pairs.append(pair) or PICKED)
    for wanted in (True, False):
        pairs.clear()
        with attached(pipe, core2=Core2Config(mode="cfg", scale_rule=rule)):
            stock.sample(pipe, cfg_normalization=wanted)
        close(next_latents(pairs[0], PICKED), pairs[1].x)


def test_where_nobody_knows_the_measure_a_rule_is_refused():
    rule = Core2Config(mode="cfg", scale_rule=CallableScale(lambda pair: PICKED))
    stock = STOCK["PixArtSigmaPipeline"]
    pipe = stock.pipe()
    with attached(pipe, core2=rule):
        pipe.scheduler = diffusers.DDIMScheduler(prediction_type="sample")
        with pytest.raises(ValueError, match="got DDIMScheduler with sample: use a rule of the"):
            stock.sample(pipe)
    with pytest.raises(ValueError, match="as dx/dsigma = d"):
        attach(pipe, core2=rule)
    stock = STOCK["ZImagePipeline"]
    pipe = stock.pipe()
    with attached(pipe, core2=rule), pytest.raises(ValueError, match="cfg_normalization must be"):
        stock.sample(pipe, cfg_normalization=True)
    stock = STOCK["WanPipeline"]
    pipe = diffusers.WanPipeline(**stock.parts(), expand_timesteps=True)
    with attached(pipe, core2=rule), pytest.raises(ValueError, match="a timestep for each token"):
        stock.sample(pipe)
    with pytest.raises(ValueError, match="got 2 images for each sample"):
        check_pass(Call((), {"timestep": torch.ones(1), "img_shapes": [[(1, 4, 4)] * 2]}))


def test_what_cannot_follow_a_rule_is_refused():
    online = Core2Config(mode="cfg", scale_rule=OnlineScale({"small": Smallness()}))
    stock = STOCK["StableDiffusionXLPipeline"]
    pipe = stock.pipe()
    with attached(pipe, core2=online):
        with pytest.raises(ValueError, match="guidance_rescale must be left out"):
            stock.sample(pipe, guidance_rescale=0.5)
        with pytest.raises(ValueError, match="must turn guidance on"):
            stock.sample(pipe, 1.0)
        pipe.scheduler = diffusers.HeunDiscreteScheduler(**testing.SDXL_SCHEDULER)
        with pytest.raises(ValueError, match="take a scheduler of first order"):
            stock.sample(pipe)
