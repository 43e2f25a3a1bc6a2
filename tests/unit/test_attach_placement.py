"""`attach` with slow steps by the head's card. Truth: our own pipelines, errors by hand."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch

from core2_sampler import attach, attached, testing
from core2_sampler.attachment import is_attached
from core2_sampler.attachment.networks import find_networks
from core2_sampler.plan import Core2Config
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads import load_head
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import AffineHead

NAMES = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
EVEN = {"noise_bins": [0.0, 1000.0], "gap_power": [1.0], "relative_gap_error": {"any": [0.04]}}
"""A card of one error, 0.2 at scale 2, at every noise level."""


def saved(head, folder, card):
    """Return a head of some weights, loaded from a folder with a card."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    head.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card))
    return load_head(folder)


def slow(pipe):
    return [i for i, step in enumerate(pipe.core2_plan.steps) if step.kind in ("slow", "cfg")]


def close(ours, truth):
    torch.testing.assert_close(ours, truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


KINDS = {"on outputs": (AffineHead, {}), "inside": (AdapterHead, {"scale_range": (2.0, 6.0)})}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_the_steps_and_images_are_those_of_our_own_pipeline(family, kind, tmp_path):
    own = getattr(testing, f"tiny_{family}_pipeline")()
    stock = STOCK[f"{NAMES[family]}Pipeline"]
    parts = {name: part for name, part in own.components.items() if name != "weak_head"}
    pipe = getattr(diffusers, stock.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    head_class, options = KINDS[kind]
    levels = own.family.schedule(own, 6, (8, 8)).sigmas[:6].tolist()
    between = [(high + low) / 2 for high, low in zip(levels, levels[1:], strict=False)]
    card = {
        "noise_bins": [0.0, *reversed(between), 1000.0],
        "gap_power": [1.0 / (1 + s * s if family == "sdxl" else 1.0) for s in reversed(levels)],
        "relative_gap_error": {"any": [0.3, 0.1, 0.5, 0.2, 0.6, 0.4]},  # step 1 is the worst
    }
    head = saved(head_class.for_denoiser(own.family.denoiser(own), **options), tmp_path, card)
    own.register_modules(weak_head=head)
    for rule, wanted in (
        ("budget:10", [1, 3] if kind == "inside" else [0, 1, 3, 5]),
        ("gated:2.2", [1]),
    ):
        config = Core2Config(slow_steps=rule, w2s_scale=1.5)
        images = stock.sample(own, num_inference_steps=6, core2=config)
        with attached(pipe, head=tmp_path, core2=config):
            close(stock.sample(pipe, num_inference_steps=6), images)
            assert pipe.core2_plan == own.core2_plan and slow(pipe) == wanted


def test_a_loop_that_starts_late_has_them_on_its_own_noise_levels(tmp_path):
    stock = STOCK["StableDiffusionXLImg2ImgPipeline"]
    pipe = stock.pipe()
    every = pipe.scheduler
    every.set_timesteps(8)
    worst = float(every.sigmas[5])  # the loop makes the last four of eight steps
    card = {
        "noise_bins": [0.0, worst * 0.999, worst * 1.001, 1000.0],
        "gap_power": [1.0] * 3,
        "relative_gap_error": {"any": [1e-9, 1.0, 1e-9]},
    }
    saved(AffineHead("sdxl", 4), tmp_path, card)
    config = Core2Config(slow_steps="budget:5")
    with attached(pipe, head=tmp_path, core2=config):
        stock.sample(pipe, num_inference_steps=8, strength=0.5)
        assert slow(pipe) == [1] and pipe.core2_plan.nfe == 5
        with pytest.raises(ValueError, match="from 6, all fast, to 12, all slow, for 6 steps"):
            stock.sample(pipe, num_inference_steps=8, strength=0.75)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_error_of_noise_counts_as_the_velocity_that_it_makes(prediction_type, tmp_path):
    """Truth: v = (eps - sigma x0) / sqrt(1 + sigma^2), so 0.2 of eps is 0.2 sqrt(1 + sigma^2)."""
    stock = STOCK["StableDiffusionPipeline"]
    pipe = stock.pipe()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction_type
    )
    saved(AffineHead(find_networks(pipe)[0].family, 4), tmp_path, EVEN)
    with attached(pipe, head=tmp_path, core2=Core2Config(slow_steps="gated:0.5")):
        stock.sample(pipe, 2.0, num_inference_steps=8)
        found = slow(pipe)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].tolist()
    sigmas = [math.sqrt((1 - a) / a) for a in kept]
    noisy = [i for i, sigma in enumerate(sigmas) if 0.2 * math.sqrt(1 + sigma**2) > 0.5]
    assert 0 < len(noisy) < 8
    assert found == (noisy if prediction_type == "epsilon" else [])


def test_the_scale_is_counted_as_ours(tmp_path):
    """Z-Image's 3 is 4 here: its errors are three times those at scale 2."""
    stock = STOCK["ZImagePipeline"]
    pipe = stock.pipe()
    saved(AffineHead("ZImageTransformer2DModel", 4), tmp_path, EVEN)
    for limit, wanted in ((0.59, [0, 1, 2]), (0.61, [])):
        with attached(pipe, head=tmp_path, core2=Core2Config(slow_steps=f"gated:{limit}")):
            stock.sample(pipe, 3.0)
            assert slow(pipe) == wanted


def test_what_cannot_be_placed_is_refused_before_any_call(tmp_path):
    config = Core2Config(slow_steps="budget:4")
    pipe = STOCK["StableDiffusionXLPipeline"].pipe()
    AffineHead("sdxl", 4).save_pretrained(tmp_path)
    for head, error in (
        (None, "needs a weak head, got none"),
        ("cond", "folder with card.json .* an untrained one"),
        (tmp_path, "folder with card.json .* `core2 reflect` writes it"),
    ):
        with pytest.raises(ValueError, match=error):
            attach(pipe, head=head, core2=config)
    parts = STOCK["WanPipeline"].parts()
    wan = diffusers.WanPipeline(**parts, transformer_2=parts["transformer"], boundary_ratio=0.8)
    head = AffineHead(find_networks(wan)[0].family, 4)
    with pytest.raises(ValueError, match="two networks, whose scales .* got 'budget:4'"):
        attach(wan, head=head, core2=config)
    assert not is_attached(pipe) and not is_attached(wan)
