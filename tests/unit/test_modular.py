"""`core2_blocks`: modular pipelines with zigzag steps, and FLUX.1 with a guider.

Truth: the stock modular pipelines, the stock FLUX pipeline's true CFG, and our own pipelines.
"""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusers.modular_pipelines import ModularPipeline
from PIL import Image

from core2_sampler import CoRe2Guidance, core2_blocks, testing
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Core2Config
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import AffineHead, LastGapHead

SCALE, BACK, STEPS = 4.0, 0.5, 4
CFG = Core2Config(mode="cfg")
TEXTS = {"prompt": ["a red circle", "two rings"], "negative_prompt": ["dark", "dim"]}
CALL = {**TEXTS, "height": 16, "width": 16, "num_inference_steps": STEPS}
SHORT = {"max_sequence_length": 8}
DDIM = {**testing.SDXL_SCHEDULER, "clip_sample": False, "set_alpha_to_one": False}
FAMILIES = {
    "sdxl": SimpleNamespace(
        blocks=diffusers.StableDiffusionXLAutoBlocks, own=testing.tiny_sdxl_pipeline, call={}
    ),
    "sd3": SimpleNamespace(
        blocks=diffusers.StableDiffusion3AutoBlocks, own=testing.tiny_sd3_pipeline, call=SHORT
    ),
    "flux": SimpleNamespace(
        blocks=diffusers.FluxAutoBlocks, own=testing.tiny_flux_pipeline, call=SHORT
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made_of(blocks, own):
    """Return a modular pipeline of the components of one of ours."""
    pipe = blocks.init_pipeline()
    parts = {name: part for name, part in own.components.items() if part is not None}
    known = pipe._component_specs
    pipe.update_components(**{name: part for name, part in parts.items() if name in known})
    return pipe


def both(family, guider=None):
    """Return our blocks' pipeline, and our own of the same components."""
    own = FAMILIES[family].own()
    return made_of(core2_blocks(family, guider), own), own


def options(family, given):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return {**CALL, "generator": generators, **FAMILIES[family].call, **given}


def sample(pipe, family, guider=None, **given):
    if guider is not None:
        pipe.update_components(guider=guider)
    return pipe(**options(family, given), output="latents", output_type="latent")


def sample_own(own, family, core2, **given):
    scale = {own.family.scale_argument: SCALE}
    call = options(family, given)
    latents = own(**call, **scale, core2=core2, output_type="latent").images
    if family != "flux":
        return latents
    return own._unpack_latents(latents, call["height"], call["width"], own.vae_scale_factor)


def count(pipe):
    """Count the network's own passes, below all hooks, by its last layer."""
    return count_nfe(pipe.unet.conv_out if hasattr(pipe, "unet") else pipe.transformer.proj_out)


def close(ours, truth, share=3e-5):
    torch.testing.assert_close(ours, truth, atol=share * float(truth.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


def affine(own):
    """Return a head of known coefficients: ``gap = 0.2 cond + 0.1 x``."""
    head = AffineHead(own.family.name, 4)
    head.coefficients[..., 0], head.coefficients[..., 1] = 0.2, 0.1
    return head


# Against the stock blocks ------------------------------------------------------------------------


def test_plain_guidance_is_that_of_the_stock_blocks_bit_for_bit(family):
    pipe, own = both(family)
    guided = family != "flux"
    stock = made_of(FAMILIES[family].blocks(), own)
    scale = SCALE if guided else 1.0  # the stock blocks of FLUX.1 have no guider
    wanted = sample(stock, family, ClassifierFreeGuidance(scale) if guided else None)
    assert torch.equal(sample(pipe, family, ClassifierFreeGuidance(scale)), wanted)
    assert torch.equal(sample(pipe, family, CoRe2Guidance(scale, CFG)), wanted)
    with count(pipe) as counter:
        sample(pipe, family, CoRe2Guidance(SCALE, "fast", "cond"))
    assert counter.per_sample(2) == STEPS


def test_the_stock_blocks_are_left_as_they_were(family):
    """diffusers shares blocks between all pipelines of a class."""

    def loops():
        return [str(loop.sub_blocks) for loop in walk(FAMILIES[family].blocks())]

    before = loops()
    core2_blocks(family)
    assert loops() == before and "ZigZag" not in str(before)
    ours = [str(loop.sub_blocks) for loop in walk(core2_blocks(family))]
    assert all("ZigZag" in each for each in ours) and len(ours) == len(before)


def walk(blocks):
    for block in blocks.sub_blocks.values():
        if isinstance(block, diffusers.modular_pipelines.LoopSequentialPipelineBlocks):
            yield block
        else:
            yield from walk(block)


# FLUX.1 with a guider ----------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2])
def test_flux_has_the_true_cfg_of_its_stock_pipeline(images):
    pipe, own = both("flux")
    stock = diffusers.FluxPipeline(**{k: v for k, v in own.components.items() if k != "weak_head"})
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2 * images, 16, 16, generator=torch.Generator().manual_seed(1))
    given = {"num_images_per_prompt": images, "latents": noise}
    call = {**CALL, **SHORT, **given, "output_type": "latent"}
    wanted = stock(**call, true_cfg_scale=SCALE).images
    ours = sample(pipe, "flux", ClassifierFreeGuidance(SCALE), **given)
    close(ours, stock._unpack_latents(wanted, 16, 16, stock.vae_scale_factor), 1e-6)
    assert torch.equal(sample(pipe, "flux", CoRe2Guidance(SCALE, CFG), **given), ours)
    assert far(ours, sample(pipe, "flux", ClassifierFreeGuidance(1.0), **given))


def test_image_to_image_of_flux_is_guided_too():
    pipe, own = both("flux")
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    given = {"image": image, "strength": 0.5, "prompt": "a ring", "negative_prompt": "dark"}

    def run(pipe, guider=None):
        return sample(pipe, "flux", guider, **given, generator=torch.Generator().manual_seed(1))

    alone = run(made_of(diffusers.FluxAutoBlocks(), own))
    assert torch.equal(run(pipe), alone)
    guided = run(pipe, ClassifierFreeGuidance(SCALE))
    assert torch.equal(run(pipe, CoRe2Guidance(SCALE, CFG)), guided) and far(guided, alone)


def test_flux_without_a_negative_prompt_has_the_empty_one():
    pipe, _ = both("flux", CoRe2Guidance(SCALE, CFG))
    empty = sample(pipe, "flux", negative_prompt="")
    assert torch.equal(sample(pipe, "flux", negative_prompt=None), empty)
    assert torch.equal(sample(pipe, "flux", negative_prompt=["", ""]), empty)
    assert far(sample(pipe, "flux"), empty)
    with pytest.raises(ValueError, match="one text or a list of 2, .* got 3"):
        sample(pipe, "flux", negative_prompt=["a", "b", "c"])


def test_a_head_guides_flux_as_in_our_pipeline():
    pipe, own = both("flux")
    head = affine(own)
    own.register_modules(weak_head=head)
    for config, nfe in ((Core2Config(slow_steps=0), 4), (Core2Config(slow_steps=(1,)), 5)):
        with count(pipe) as counter:
            ours = sample(pipe, "flux", CoRe2Guidance(SCALE, config, head))
        assert counter.per_sample(2) == pipe.guider.core2_plan.nfe == nfe
        close(ours, sample_own(own, "flux", config))


# Zigzag steps ------------------------------------------------------------------------------------

ZIGZAGS = {
    "negative alone": Core2Config(mode="zigzag"),
    "prompt alone": Core2Config(mode="zigzag", inversion_scale=1.0),
    "both": Core2Config(mode="zigzag", inversion_scale=BACK, zig_steps=(0, 2)),
    "zcore": Core2Config(mode="zcore", inversion_scale=BACK),
    "zfast": Core2Config(mode="zfast", inversion_scale=BACK),
}


def test_zigzag_steps_are_those_of_our_pipelines(family):
    pipe, own = both(family)
    head = affine(own)
    own.register_modules(weak_head=head)
    plain = sample(pipe, family, CoRe2Guidance(SCALE, CFG))
    for config in ZIGZAGS.values():
        guider = CoRe2Guidance(SCALE, config, head if config.mode != "zigzag" else None)
        with count(pipe) as counter:
            ours = sample(pipe, family, guider)
        wanted = sample_own(own, family, config)
        assert counter.per_sample(2) == guider.core2_plan.nfe == own.core2_plan.nfe
        close(ours, wanted)
        assert far(ours, plain) and guider.leg is None
    assert torch.equal(sample(pipe, family), ours)  # nothing of a run is left to the next
    assert torch.equal(sample(pipe, family, guider.new(core2=CFG)), plain)
    none = CoRe2Guidance(SCALE, Core2Config(mode="zigzag", zig_steps=0))
    assert torch.equal(sample(pipe, family, none), plain)
    alone = sample(pipe, family, CoRe2Guidance(1.0, ZIGZAGS["both"]))
    assert torch.equal(alone, sample(pipe, family, ClassifierFreeGuidance(1.0)))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LastGapHead, Core2Config(mode="zcore", inversion_scale=BACK)),
        (AdapterHead, Core2Config(mode="zfast")),
        (AdapterHead, Core2Config(mode="zcore", inversion_scale=2.5)),
    ],
)
def test_heads_that_remember_or_work_inside_make_zigzag_steps(kind, config):
    pipe, own = both("sd3")
    scales = {"reference_scale": SCALE, "scale_range": (2.0, 6.0)} if kind is AdapterHead else {}
    head = kind.for_denoiser(own.family.denoiser(own), **scales)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    own.register_modules(weak_head=head)
    with count(pipe) as counter:
        ours = sample(pipe, "sd3", CoRe2Guidance(SCALE, config, head))
    assert counter.per_sample(2) == pipe.guider.core2_plan.nfe
    close(ours, sample_own(own, "sd3", config))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**DDIM),
        EulerDiscreteScheduler(**testing.SDXL_SCHEDULER, prediction_type="v_prediction"),
        DDIMScheduler(**DDIM, prediction_type="v_prediction"),
    ],
    ids=["ddim", "v", "ddim v"],
)
def test_zigzag_steps_of_sdxl_know_latents_that_are_scaled_and_networks_that_predict_v(scheduler):
    pipe, own = both("sdxl")
    own.scheduler = scheduler
    pipe.update_components(scheduler=scheduler)
    for name in ("negative alone", "both"):
        guider = CoRe2Guidance(SCALE, ZIGZAGS[name], scheduler=scheduler)
        ours = sample(pipe, "sdxl", guider)
        close(ours, sample_own(own, "sdxl", ZIGZAGS[name]))


def test_zigzag_steps_of_image_to_image_start_where_the_loop_does():
    """Undone at its own scale a step comes back to second order; from another level it does not."""
    pipe, _ = both("sdxl")
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    given = {"image": image, "strength": 0.5, "prompt": "a ring", "negative_prompt": "dark"}

    def run(core2):
        call = {**given, "generator": torch.Generator().manual_seed(1), "num_inference_steps": 40}
        return sample(pipe, "sdxl", CoRe2Guidance(SCALE, core2), **call)

    cfg = run(CFG)
    ours = run(Core2Config(mode="zigzag", inversion_scale=SCALE))
    assert pipe.guider.core2_plan.nfe == 6 * 20 - 4
    error = float((ours - cfg).abs().max() / cfg.abs().max())
    assert 0 < error < 0.02, error


def test_another_guider_makes_plain_steps_in_the_same_blocks():
    pipe, _ = both("sd3")
    with count(pipe) as counter:
        sample(pipe, "sd3", diffusers.AdaptiveProjectedGuidance(SCALE))
    assert counter.per_sample(2) == 2 * STEPS


# Saving ------------------------------------------------------------------------------------------


def test_a_saved_pipeline_comes_back_with_its_guider_and_head(family, tmp_path):
    own = FAMILIES[family].own()
    affine(own).save_pretrained(tmp_path / "head")
    guider = CoRe2Guidance(SCALE, ZIGZAGS["zcore"], tmp_path / "head", own.scheduler)
    blocks = core2_blocks(family, guider)
    pipe = made_of(blocks, own)
    assert pipe.guider is not guider and pipe.guider.config == guider.config
    wanted = sample(pipe, family)
    folder = str(tmp_path / "pipe")
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    again = blocks.init_pipeline(folder)
    again.load_components()
    assert torch.equal(sample(again, family), wanted)
    lost = ModularPipeline.from_pretrained(folder)  # diffusers falls back to the stock blocks
    assert "ZigZag" not in str([loop.sub_blocks for loop in walk(lost.blocks)])


def test_a_guider_that_is_loaded_is_saved_with_the_pipeline(tmp_path):
    CoRe2Guidance(SCALE, "fast", "last_gap").save_pretrained(tmp_path / "guider")
    spec = diffusers.modular_pipelines.ComponentSpec(
        "guider", CoRe2Guidance, pretrained_model_name_or_path=str(tmp_path / "guider")
    )
    pipe, _ = both("sd3")
    wanted = sample(pipe, "sd3", spec.load())
    folder = str(tmp_path / "pipe")
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    again = core2_blocks("sd3").init_pipeline(folder)
    again.load_components()
    assert type(again.guider) is CoRe2Guidance
    assert torch.equal(sample(again, "sd3"), wanted)


def test_a_head_is_no_component_of_a_pipeline():
    """A modular pipeline drops it without an error: it has to be the guider's."""
    pipe, own = both("sd3")
    pipe.update_components(weak_head=affine(own))
    assert not hasattr(pipe, "weak_head")
    with pytest.raises(ValueError, match="head must be in a folder"):
        core2_blocks("sd3", CoRe2Guidance(SCALE, "fast", affine(own)))


# Refusals ----------------------------------------------------------------------------------------


def test_zigzag_steps_in_stock_blocks_or_without_euler_steps_are_refused():
    pipe, own = both("sd3")
    guider = CoRe2Guidance(SCALE, ZIGZAGS["both"])
    stock = made_of(diffusers.StableDiffusion3AutoBlocks(), own)
    with pytest.raises(ValueError, match="build the pipeline from core2_sampler.core2_blocks"):
        sample(stock, "sd3", guider)
    pipe.update_components(scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="makes Euler steps, got FlowMatchHeunDiscreteScheduler"):
        sample(pipe, "sd3", guider)
    pipe.update_components(scheduler=own.scheduler)
    assert torch.isfinite(sample(pipe, "sd3")).all() and guider.leg is None


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: core2_blocks("sdlx"), "did you mean 'sdxl'"),
        (lambda: CoRe2Guidance(SCALE, Core2Config(mode="zcore")), "for mode 'zcore', got none"),
        (lambda: CoRe2Guidance(SCALE, Core2Config(mode="z2")), "guidance alone, got mode='z2'"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, error):
    with pytest.raises(ValueError, match=error):
        make()
