"""`attach` with trained heads, callbacks, caches and errors.

Truth: our own pipelines for what a head is shown, the stock classes for everything else.
"""

from __future__ import annotations

import copy
import logging
import pickle

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

from core2_sampler import attach, attached, detach, testing
from core2_sampler.attachment.networks import Call, find_networks
from core2_sampler.plan import Core2Config
from core2_sampler.testing.pipelines import seeded
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.controls import AffineHead, CondHead, LastGapHead
from core2_sampler.weak_heads.conv import ConvHead
from core2_sampler.weak_heads.tap import TapHead

CFG = Core2Config(mode="cfg")
SDXL, SD3, FLUX = (
    STOCK[f"{name}Pipeline"] for name in ("StableDiffusionXL", "StableDiffusion3", "Flux")
)


class Given(WeakHead):
    """Keeps the true gaps of one run of CFG, and says them in the next: a perfect head.

    It counts its steps: a loop may give several of them one noise level.
    """

    @register_to_config
    def __init__(self, family: str, latent_channels: int) -> None:
        super().__init__()
        self.gaps, self.sigmas = {}, []

    def begin(self, sigmas, negative):
        self.sigmas, self.seen = list(sigmas), []

    def observe(self, gap):
        self.gaps[len(self.seen)] = gap
        self.seen.append(gap)

    def forward(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        self.seen.append(cond)
        return self.gaps[len(self.seen) - 1]


def perfect(stock, pipe, **options):
    """Return a head that knows the true gaps of a run, and the stock latents of that run."""
    wanted = stock.sample(pipe, **options)
    head = Given.for_denoiser(find_networks(pipe)[0])
    with attached(pipe, head=head, core2=CFG):
        assert torch.equal(stock.sample(pipe, **options), wanted)
    return head, wanted


def close(ours, stock, share=1e-5):
    torch.testing.assert_close(ours, stock, atol=share * float(stock.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


def trained(head):
    """Give every weight of a zero-initialised head a value, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return head


# What a head is shown: the same as in our own loops -----------------------------------------------

PLANS = {
    "fast": Core2Config(slow_steps=0),
    "mixed": Core2Config(slow_steps=(1,), w2s_scale=1.5),
    "scales": Core2Config(slow_steps=(0,), w2s_scale=0.5, guidance_scales=(2.0, 1.0, 5.0)),
}
HEADS = {
    "tap": (TapHead, {}),
    "adapter": (AdapterHead, {"reference_scale": 4.0, "scale_range": (2.0, 6.0)}),
    "affine": (AffineHead, {}),
    "last_gap": (LastGapHead, {}),
}


EACH = [(family, kind) for family in ("sdxl", "sd3", "flux") for kind in HEADS]


@pytest.mark.parametrize(("family", "kind"), [*EACH, ("sdxl v", "affine"), ("sdxl v", "last_gap")])
def test_a_head_guides_as_in_our_own_pipeline(family, kind):
    name = family.split()[0]
    options = {"prediction_type": "v_prediction"} if family == "sdxl v" else {}
    own = getattr(testing, f"tiny_{name}_pipeline")(**options)
    stock = {"sdxl": SDXL, "sd3": SD3, "flux": FLUX}[name]
    parts = {k: v for k, v in own.components.items() if k != "weak_head"}
    pipe = getattr(diffusers, stock.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    head_class, arguments = HEADS[kind]
    head = trained(head_class.for_denoiser(own.family.denoiser(own), **arguments))
    own.register_modules(weak_head=head)
    unguided = stock.sample(pipe, 1.0)
    for plan in PLANS.values():
        wanted = stock.sample(own, core2=plan)
        with attached(pipe, head=head, core2=plan):
            close(stock.sample(pipe), wanted)
            assert pipe.core2_plan == own.core2_plan
    assert far(wanted, unguided)


INSIDE = ("StableDiffusion", "PixArtSigma", "Sana", "AuraFlow", "CogView4", "Chroma", "Wan", "LTX")


@pytest.mark.parametrize("name", INSIDE)
def test_a_head_inside_a_network_of_no_family_of_ours(name):
    """Untrained it is no guidance; with weights, a fast step is what a slow one takes it for."""
    stock = STOCK[f"{name}Pipeline"]
    pipe = stock.pipe()
    head_class, options = HEADS["adapter"]
    head = head_class.for_denoiser(find_networks(pipe)[0], **options)
    unguided = stock.sample(pipe, stock.unguided)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe), unguided)
        trained(head)
        fast = stock.sample(pipe)
        assert pipe.core2_plan.nfe == 3
    assert float((fast - unguided).abs().max()) > 3e-4 * float(unguided.abs().max())
    with attached(pipe, head=head, core2=Core2Config(slow_steps=1.0, w2s_scale=0.0)):
        close(stock.sample(pipe), fast, share=3e-5)


PREFIXES = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
TASKS = [(family, task) for family in PREFIXES for task in ("Img2Img", "Inpaint", "ControlNet")]


@pytest.mark.parametrize(("family", "task"), [*TASKS, ("flux", "Kontext")])
def test_a_head_that_reads_features_works_for_the_other_tasks(family, task):
    stock = STOCK[f"{PREFIXES[family]}{task}Pipeline"]
    pipe = stock.pipe()
    network = find_networks(pipe)[0]
    assert network.family == family
    head = trained(TapHead.for_denoiser(network.denoiser))
    with attached(pipe, head=head, core2="fast"):
        guided = stock.sample(pipe)
    assert torch.isfinite(guided).all() and far(guided, stock.sample(pipe, 1.0))


# What follows cond and uncond in a stock loop keeps its meaning -----------------------------------


def heun(pipe):
    pipe.scheduler = diffusers.HeunDiscreteScheduler(**testing.SDXL_SCHEDULER)


LOOPS = {
    "guidance rescale": (SDXL, {"guidance_rescale": 0.7}, None),
    "denoising_end": (SDXL, {"denoising_end": 0.6, "num_inference_steps": 5}, None),
    "two evaluations a step": (SDXL, {}, heun),
    "skip-layer guidance": (
        SD3,
        {
            "skip_guidance_layers": [0],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 1.0,
        },
        None,
    ),
    "truncated guidance": (STOCK["Lumina2Pipeline"], {"cfg_trunc_ratio": 0.5}, None),
    "truncated batch": (STOCK["ZImagePipeline"], {"cfg_truncation": 0.1}, None),
    "normalised guidance": (STOCK["ZImagePipeline"], {"cfg_normalization": 1.0}, None),
    "one image": (FLUX, {"prompt": "a", "negative_prompt": "b", "generator": None}, None),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_perfect_head_is_cfg_in_loops_of_their_own(name):
    stock, options, change = LOOPS[name]
    pipe = stock.pipe()
    if change is not None:
        change(pipe)
    head, wanted = perfect(stock, pipe, **options)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe, **options), wanted)
    if options:
        usual = stock.sample(pipe)
        assert usual.shape != wanted.shape or far(usual, wanted)


def test_two_networks_in_turn():
    """Wan 2.2: one for the noisy steps, one for the others, each with its own scale."""
    stock = STOCK["WanPipeline"]
    parts = stock.parts()
    other = type(parts["transformer"]).from_config(parts["transformer"].config)
    pipe = diffusers.WanPipeline(**parts, transformer_2=other, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    head, wanted = perfect(stock, pipe, guidance_scale_2=2.0)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe, guidance_scale_2=2.0), wanted)
    with pytest.raises(ValueError, match="guidance_scales and scale_rule must be left out"):
        attach(pipe, core2=Core2Config(mode="cfg", guidance_scales=(2.0,) * 3))


def test_a_callback_may_change_the_scale():
    pipe = SDXL.pipe()

    def change(pipe, i, t, tensors):
        pipe._guidance_scale = 7.0
        return tensors

    head, wanted = perfect(SDXL, pipe, callback_on_step_end=change)
    assert far(wanted, SDXL.sample(pipe))
    with attached(pipe, head=head, core2="fast"):
        close(SDXL.sample(pipe, callback_on_step_end=change), wanted)


IP_ADAPTER = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
]
IP_ADAPTER_OF_SD3 = [
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "StableDiffusion3ControlNetPipeline",
]
IP_ADAPTER_OF_FLUX = [
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxControlNetPipeline",
    "FluxKontextPipeline",
    "ChromaPipeline",
]


def check_images(stock, pipe, both, given):
    """Check that each side hears its own image: the negative one first, as ``given`` has them."""
    image, half, swapped = (
        {"ip_adapter_image_embeds": given(rows)} for rows in (both, both[1:], both.flip(0))
    )
    head, wanted = perfect(stock, pipe, **image)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe, **image), wanted)
    assert far(wanted, stock.sample(pipe, **swapped))
    with attached(pipe, core2=Core2Config(mode="cond")):
        close(stock.sample(pipe, **image), stock.sample(pipe, 1.0, **half))


@pytest.mark.parametrize("name", IP_ADAPTER)
def test_an_ip_adapter(name):
    stock = STOCK[name]
    pipe = stock.pipe()
    weights, key, prompt = {}, 1, pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                random = torch.randn(width, prompt, generator=generator)
                weights[f"{key}.{part}.weight"] = random
            key += 2
    image_proj = {
        "proj.weight": torch.randn(4 * prompt, 6, generator=generator),
        "proj.bias": torch.zeros(4 * prompt),
        "norm.weight": torch.ones(prompt),
        "norm.bias": torch.zeros(prompt),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": weights}])
    check_images(stock, pipe, torch.randn(2, 1, 6, generator=generator), lambda rows: [rows])


@pytest.mark.parametrize("name", IP_ADAPTER_OF_SD3)
def test_an_ip_adapter_of_sd3(name):
    stock = STOCK[name]
    pipe = stock.pipe()
    with seeded(0):
        processors = {
            name: SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=16, scale=1.0)
            for name in pipe.transformer.attn_processors
        }
        pipe.transformer.set_attn_processor(processors)
        pipe.transformer.image_proj = IPAdapterTimeImageProjection(
            embed_dim=12, output_dim=16, hidden_dim=16, dim_head=8, heads=2, num_queries=3, depth=1
        )
        check_images(stock, pipe, 5 * torch.randn(2, 5, 12), lambda rows: rows)


OF_FLUX = [(name, "tap" if name.startswith("Flux") else "affine") for name in IP_ADAPTER_OF_FLUX]


@pytest.mark.parametrize(("name", "kind"), [*OF_FLUX, ("FluxPipeline", "adapter")])
def test_an_ip_adapter_of_flux(name, kind):
    """Its loop writes the negative image into the arguments of the pass before."""
    stock, generator = STOCK[name], torch.Generator().manual_seed(0)
    pipe = stock.pipe()
    inner, prompt = pipe.transformer.inner_dim, pipe.transformer.config.joint_attention_dim
    shapes = {
        "to_k_ip.weight": (inner, prompt),
        "to_v_ip.weight": (inner, prompt),
        "to_k_ip.bias": (inner,),
        "to_v_ip.bias": (inner,),
    }
    weights = {f"0.{n}": torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    image_proj = {
        "proj.weight": torch.randn(4 * prompt, 6, generator=generator),
        "proj.bias": torch.zeros(4 * prompt),
        "norm.weight": torch.ones(prompt),
        "norm.bias": torch.zeros(prompt),
    }
    pipe.transformer._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": weights}])
    negative, positive = torch.randn(2, 2, 1, 6, generator=generator)
    image = {"ip_adapter_image_embeds": [positive], "negative_ip_adapter_image_embeds": [negative]}
    head, wanted = perfect(stock, pipe, **image)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe, **image), wanted)
    swapped = dict(zip(image, reversed(image.values()), strict=True))
    assert far(wanted, stock.sample(pipe, **swapped))
    head_class, options = HEADS[kind]
    network = find_networks(pipe)[0]
    head = trained(head_class.for_denoiser(network.denoiser or network, **options))
    with attached(pipe, head=head, core2="fast"):
        fast = stock.sample(pipe, **image)
    with attached(pipe, head=head, core2=Core2Config(slow_steps=1.0, w2s_scale=0.0)):
        close(stock.sample(pipe, **image), fast)
    assert far(fast, stock.sample(pipe, 1.0, **image))


def test_bfloat16():
    pipe = FLUX.pipe().to(torch.bfloat16)
    head, wanted = perfect(FLUX, pipe)
    with attached(pipe, head=head, core2="fast"):
        ours = FLUX.sample(pipe)
    assert ours.dtype == torch.bfloat16
    close(ours, wanted, share=2e-2)


def test_a_network_that_is_compiled_as_a_whole():
    pipe = STOCK["WanPipeline"].pipe()
    head, wanted = perfect(STOCK["WanPipeline"], pipe)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with attached(pipe, head=head, core2="fast"):
        close(STOCK["WanPipeline"].sample(pipe), wanted)


# No call knows of another -------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [SDXL, FLUX], ids=["batched", "sequential"])
@pytest.mark.parametrize("end", ["error", "interrupt"])
def test_a_run_that_ends_early_leaves_nothing_to_the_next(stock, end):
    pipe = stock.pipe()

    def stop(pipe, i, t, tensors):
        if i == 1 and end == "error":
            raise KeyError("stop")
        pipe._interrupt = i == 1
        return tensors

    attach(pipe, head="last_gap", core2=Core2Config(slow_steps=(1,), w2s_scale=1.5))
    wanted = stock.sample(pipe)
    try:
        stock.sample(pipe, callback_on_step_end=stop)
    except KeyError:
        assert end == "error"
    assert "step" not in vars(pipe.scheduler) and "forward" not in vars(stock.network(pipe))
    assert torch.equal(stock.sample(pipe), wanted)
    assert torch.equal(stock.sample(pipe), wanted)


def test_a_network_that_another_pipeline_shares_is_left_to_it():
    pipe = SDXL.pipe()
    wanted = SDXL.sample(pipe)
    attach(pipe, head="cond", core2="fast")
    other = diffusers.StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    assert far(SDXL.sample(pipe), wanted)
    assert torch.equal(SDXL.sample(other), wanted)
    assert type(AutoPipelineForImage2Image.from_pipe(pipe)) is (
        diffusers.StableDiffusionXLImg2ImgPipeline
    )


def test_the_class_of_an_attached_pipeline_makes_stock_ones():
    pipe = SDXL.pipe()
    wanted = SDXL.sample(pipe)
    attach(pipe, head="cond", core2="fast")
    for other in (
        type(pipe)(**pipe.components, add_watermarker=False),
        type(pipe).from_pipe(pipe),
    ):
        assert type(other) is diffusers.StableDiffusionXLPipeline
        other.set_progress_bar_config(disable=True)
        assert torch.equal(SDXL.sample(other), wanted)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_of_an_attached_pipeline_are_attached(clone):
    pipe = attach(SD3.pipe(), head="cond", core2="fast")
    other = clone(pipe)
    other.set_progress_bar_config(disable=True)
    wanted = SD3.sample(pipe)
    assert torch.equal(SD3.sample(other), wanted) and other.core2_plan == pipe.core2_plan
    assert torch.equal(SD3.sample(detach(other)), SD3.sample(SD3.pipe()))
    assert torch.equal(SD3.sample(pipe), wanted)


def test_a_call_inside_the_call_of_another_is_refused():
    pipe = SDXL.pipe()
    other = diffusers.StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    attach(pipe, head="cond", core2="fast")
    attach(other, head="cond", core2="fast")
    wanted = SDXL.sample(pipe)
    with pytest.raises(ValueError, match="in one attached call at a time"):
        SDXL.sample(pipe, callback_on_step_end=lambda *_: SDXL.sample(other))
    assert torch.equal(SDXL.sample(pipe), wanted)


def test_saving_an_attached_pipeline_saves_the_stock_one(tmp_path):
    pipe = SDXL.pipe()
    wanted = SDXL.sample(pipe)
    with attached(pipe, head="cond", core2="fast"):
        pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is diffusers.StableDiffusionXLPipeline
    assert torch.equal(SDXL.sample(again), wanted)


def test_a_head_may_be_given_by_its_folder(tmp_path):
    pipe = SDXL.pipe()
    head = trained(TapHead.for_denoiser(find_networks(pipe)[0].denoiser))
    head.save_pretrained(tmp_path)
    with attached(pipe, head=head, core2="fast"):
        wanted = SDXL.sample(pipe)
    with attached(pipe, head=tmp_path, core2="fast"):
        assert torch.equal(SDXL.sample(pipe), wanted)


@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_the_head_hears_the_noise_levels_of_a_loop_that_starts_late(strength):
    """PNDM makes its second timestep twice: a loop may start at either. Truth: its own table."""
    stock = STOCK["StableDiffusionImg2ImgPipeline"]
    pipe, made = stock.pipe(), []
    pipe.scheduler = diffusers.PNDMScheduler(**testing.SDXL_SCHEDULER, skip_prk_steps=True)

    def note(pipe, i, t, tensors):
        made.append(int(t))
        return tensors

    class Hears(Given):
        def forward(self, cond, *, sigma, **others):
            self.seen.append(float(sigma[0]))
            return torch.zeros_like(cond)

    head = Hears.for_denoiser(find_networks(pipe)[0])
    with attached(pipe, head=head, core2="fast"):
        stock.sample(pipe, num_inference_steps=8, strength=strength, callback_on_step_end=note)
    kept = pipe.scheduler.alphas_cumprod[made].double()
    torch.testing.assert_close(torch.tensor(head.seen).double(), ((1 - kept) / kept).sqrt())


def test_masks_of_an_ip_adapter_are_not_rows():
    masks = torch.ones(2, 1, 8, 8)  # of two adapters, for one image
    call = Call((torch.zeros(2, 4, 8, 8),), {"cross_attention_kwargs": {"ip_adapter_masks": masks}})
    prompt = find_networks(SDXL.pipe())[0].rows(call, 1, prompt=True)
    assert prompt.args[0].shape[0] == 1
    assert prompt.kwargs["cross_attention_kwargs"]["ip_adapter_masks"] is masks


def test_a_loop_that_never_asks_for_uncond_is_left_alone_and_said_so(caplog):
    pipe = testing.tiny_sdxl_pipeline(time_cond_proj_dim=8)
    parts = {k: v for k, v in pipe.components.items() if k != "weak_head"}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    wanted = SDXL.sample(pipe)
    with attached(pipe, head="cond", core2="fast"), caplog.at_level(logging.WARNING):
        assert torch.equal(SDXL.sample(pipe), wanted)
    assert "core2 had no effect" in caplog.text
    embedded = STOCK["FluxPipeline"].pipe()
    wanted = FLUX.sample(embedded, negative_prompt=None)
    with attached(embedded, head="cond", core2="fast"), caplog.at_level(logging.WARNING):
        assert torch.equal(FLUX.sample(embedded, negative_prompt=None), wanted)
    assert "pass negative_prompt=''" in caplog.text


@pytest.mark.parametrize("own", [{"guidance_scales": (4.0,) * 3}, {"scale_rule": "constant:4"}])
def test_scales_of_its_own_are_not_dropped_where_the_loop_has_no_guidance(own):
    config = Core2Config(mode="cfg", **own)
    pipe = SDXL.pipe()
    with attached(pipe, core2=config):
        close(SDXL.sample(pipe, 7.0), SDXL.sample(SDXL.pipe(), 4.0))
        with pytest.raises(ValueError, match=r"guidance_scale must turn guidance on, got 1\.0"):
            SDXL.sample(pipe, 1.0)
    flux = FLUX.pipe()
    with (
        attached(flux, core2=config),
        pytest.raises(ValueError, match="negative prompt must be given"),
    ):
        FLUX.sample(flux, negative_prompt=None)


# Caches -------------------------------------------------------------------------------------------


def test_first_block_caching_keeps_its_contexts():
    stock = STOCK["QwenImagePipeline"]
    pipe = stock.pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    head, wanted = perfect(stock, pipe)
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe), wanted)


@pytest.mark.parametrize("name", ["FluxPipeline", "LTXPipeline"])
def test_caches_that_mixed_steps_would_confuse_are_refused(name):
    stock = STOCK[name]
    pipe = stock.pipe()
    mag = MagCacheConfig(num_inference_steps=3, mag_ratios=torch.ones(3))
    pipe.transformer.enable_cache(mag if name == "FluxPipeline" else FirstBlockCacheConfig())
    attach(pipe, head="last_gap", core2=Core2Config(slow_steps=(1,), w2s_scale=1.0))
    with pytest.raises(ValueError, match="disable_cache"):
        stock.sample(pipe)


def test_faster_cache_is_refused_whenever_it_is_turned_on():
    pipe = FLUX.pipe()
    config = FasterCacheConfig(tensor_format="BCHW", current_timestep_callback=lambda: 500)
    attach(pipe, head="cond", core2="fast")
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="FasterCache must be off"):
        FLUX.sample(pipe)
    detach(pipe)
    with pytest.raises(ValueError, match="FasterCache must be off"):
        attach(pipe, head="cond", core2="fast")


# Errors -------------------------------------------------------------------------------------------


def test_what_cannot_be_attached_is_refused_and_changes_nothing():
    sdxl = SDXL.pipe()
    before = set(vars(sdxl))
    for options, error in (
        ({"core2": "fast"}, "needs a weak head"),
        ({"core2": "fastest"}, "did you mean 'fast'"),
        ({"core2": "fast", "head": CondHead("sd3", 4)}, "must be made for sdxl"),
        ({"core2": "fast", "head": CondHead("sdxl", 16)}, "16 channels"),
        ({"core2": "fast", "head": "tap"}, "by its folder"),
        ({"core2": "fast", "head": "/nowhere"}, "not there"),
        ({"core2": Core2Config(mode="zigzag")}, "CoRe2StableDiffusionXLPipeline"),
        ({"core2": Core2Config(mode="zfast"), "head": "cond"}, "Z-Sampling"),
        ({"core2": Core2Config(mode="z2")}, "got mode='z2'"),
    ):
        with pytest.raises(ValueError, match=error):
            attach(sdxl, **options)
    with pytest.raises(TypeError, match="its folder, hub id or a name"):
        attach(sdxl, core2="fast", head=3)
    with pytest.raises(TypeError, match="preset name"):
        attach(sdxl, core2=3, head="cond")
    assert set(vars(sdxl)) == before


def test_a_head_of_another_unet_is_refused():
    """SD 1.5 and 2 share a class, and a checkpoint may predict v where another predicts noise."""
    stock = STOCK["StableDiffusionPipeline"]
    pipe, other = stock.pipe(), stock.pipe()
    head = CondHead.for_denoiser(find_networks(pipe)[0])
    attach(pipe, head=head, core2="fast")
    other.scheduler = diffusers.DDIMScheduler.from_config(
        other.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="made for .*-16-v_prediction, got one for .*-16-epsilon"):
        attach(other, head=head, core2="fast")
    other.scheduler = pipe.scheduler
    other.unet = type(other.unet).from_config({**other.unet.config, "cross_attention_dim": 24})
    with pytest.raises(ValueError, match="made for .*-24-epsilon, got one for .*-16-epsilon"):
        attach(other, head=head, core2="fast")


def test_pipelines_without_a_second_pass_are_refused():
    flux = FLUX.pipe()
    control = diffusers.FluxControlPipeline(
        **{
            k: v
            for k, v in flux.components.items()
            if k not in ("image_encoder", "feature_extractor")
        }
    )
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    unconditional = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="no second pass to save"):
        attach(control, head="cond", core2="fast")
    with pytest.raises(ValueError, match="got UNet2DModel"):
        attach(unconditional, head="cond", core2="fast")
    with pytest.raises(ValueError, match="pass core2= to its call"):
        attach(testing.tiny_flux_pipeline(), head="cond", core2="fast")


def test_attaching_twice_and_detaching_twice_are_refused():
    pipe = SDXL.pipe()
    attach(pipe, head="cond", core2="fast")
    with pytest.raises(ValueError, match="call detach"):
        attach(pipe, head="cond", core2="fast")
    detach(pipe)
    with pytest.raises(ValueError, match="must be attached"):
        detach(pipe)
    with attached(pipe, head="cond", core2="fast"):
        detach(pipe)


def test_a_head_that_learned_another_gap_is_refused():
    pipe = FLUX.pipe()
    head = ConvHead.for_denoiser(find_networks(pipe)[0], widths=(32,), weak_guidance=1.0)
    with pytest.raises(ValueError, match="must be 1.0 for this weak head, .* got None"):
        attach(pipe, head=head, core2="fast")


def test_a_plan_that_does_not_fit_the_run_is_refused():
    pipe = SDXL.pipe()
    attach(pipe, core2=Core2Config(mode="cfg", guidance_scales=(2.0, 3.0)))
    with pytest.raises(ValueError, match="one a step"):
        SDXL.sample(pipe)
    detach(pipe)
    head = AdapterHead.for_denoiser(find_networks(pipe)[0].denoiser, scale_range=(2.0, 3.0))
    with attached(pipe, head=head, core2="fast"):
        with pytest.raises(ValueError, match="within 2.0 to 3.0"):
            SDXL.sample(pipe, 5.0)
        with pytest.raises(ValueError, match="guidance_rescale must be left out"):
            SDXL.sample(pipe, 2.5, guidance_rescale=0.5)
    lumina = STOCK["Lumina2Pipeline"].pipe()
    inside = AdapterHead.for_denoiser(find_networks(lumina)[0], targets=("to_q",))
    with pytest.raises(ValueError, match="whose loop uses cond itself"):
        attach(lumina, head=inside, core2="fast")
    parts = STOCK["WanPipeline"].parts()
    wan = diffusers.WanPipeline(**parts, transformer_2=parts["transformer"], boundary_ratio=0.8)
    inside = AdapterHead.for_denoiser(find_networks(wan)[0], targets=("to_q",))
    with pytest.raises(ValueError, match="got two networks"):
        attach(wan, head=inside, core2="fast")
