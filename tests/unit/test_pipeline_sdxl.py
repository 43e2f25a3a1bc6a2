"""What is special to Stable Diffusion XL. Truth: the stock class on the same components."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters.discrete import Clock, eps_from_v, v_from_eps
from core2_sampler.plan import Core2Config
from core2_sampler.testing import SDXL_SCHEDULER, tiny_sdxl_pipeline
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead
from core2_sampler.weak_heads.tap import TapHead

CFG = Core2Config(mode="cfg")
PROMPTS = ["a red circle", "two blue rings"]
SCALE = 4.0


def stock_of(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "weak_head"}
    config = {"force_zeros_for_empty_prompt": pipe.config.force_zeros_for_empty_prompt}
    stock = StableDiffusionXLPipeline(**parts, **config, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def sample(pipe, seeds=(1, 2), **options):
    defaults = {
        "prompt": PROMPTS[: len(seeds)],
        "num_inference_steps": 5,
        "guidance_scale": SCALE,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }
    return pipe(**{**defaults, **options}).images


def error(ours, stock):
    return float((ours - stock).abs().max() / stock.abs().max())


def scheduler_of(kind, **options):
    known = inspect.signature(kind.__init__).parameters
    options = {**SDXL_SCHEDULER, **options}
    return kind(**{name: value for name, value in options.items() if name in known})


def compare(kind, config, **options):
    """Return how far our CFG is from the stock call under a scheduler, and the run's schedule."""
    pipe = tiny_sdxl_pipeline()
    pipe.scheduler = scheduler_of(kind, **config)
    stock = sample(stock_of(pipe), **options)
    with count_nfe(pipe.unet) as counter:
        ours = sample(pipe, core2=CFG, **options)
    assert counter.per_sample(2) == pipe.core2_plan.nfe
    grid = {k: options[k] for k in ("timesteps", "sigmas", "denoising_end", "eta") if k in options}
    steps = options.get("num_inference_steps", 5)
    return error(ours, stock), pipe.family.schedule(pipe, steps, (8, 8), **grid)


# Schedulers --------------------------------------------------------------------------------------

DDIM = {"clip_sample": False}
CLOSED = [
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min"}),
    (EulerDiscreteScheduler, {"timestep_type": "continuous"}),
    (DDIMScheduler, DDIM),
    (DDIMScheduler, {**DDIM, "set_alpha_to_one": False}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
]
STEPPED = [
    (DDIMScheduler, {**DDIM, "timestep_spacing": "linspace"}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"solver_order": 3}),
    (DPMSolverMultistepScheduler, {"solver_type": "heun"}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverSinglestepScheduler, {}),
    (DEISMultistepScheduler, {}),
    (UniPCMultistepScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (LMSDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
    (KDPM2AncestralDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}),
    (DDPMScheduler, DDIM),
    (LCMScheduler, {}),
    (TCDScheduler, {}),
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "config"), CLOSED)
def test_closed_forms_are_the_schedulers_own_update(kind, config, prediction_type):
    off, schedule = compare(kind, {**config, "prediction_type": prediction_type})
    assert off < 1e-5
    assert schedule.solver is not None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "config"), STEPPED)
def test_every_other_scheduler_makes_its_own_steps(kind, config, prediction_type):
    off, schedule = compare(kind, {**config, "prediction_type": prediction_type})
    assert off < 1e-5
    assert schedule.solver is None


@pytest.mark.parametrize("config", [{"clip_sample": True}, {**DDIM, "thresholding": True}])
def test_clipping_is_the_schedulers_own(config):
    off, schedule = compare(DDIMScheduler, config)
    assert off < 1e-4  # a random network overshoots 10 times what the clip lets through
    assert schedule.solver is None


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_a_long_dpm_solver_run_is_closed(final):
    config = {"final_sigmas_type": final}
    off, schedule = compare(DPMSolverMultistepScheduler, config, num_inference_steps=16)
    assert off < 1e-5
    assert schedule.solver is not None


def test_noise_in_the_ddim_step():
    off, schedule = compare(DDIMScheduler, DDIM, eta=0.7)
    assert off < 1e-5
    assert schedule.solver is None


GRIDS = [
    (EulerDiscreteScheduler, {"denoising_end": 0.6}),
    (DDIMScheduler, {"denoising_end": 0.6}),
    (DPMSolverMultistepScheduler, {"denoising_end": 0.6}),
    (UniPCMultistepScheduler, {"denoising_end": 0.6}),
    (EulerDiscreteScheduler, {"timesteps": [900, 700, 300, 20]}),
    (EulerDiscreteScheduler, {"sigmas": [12.0, 6.0, 2.0, 0.5, 0.0]}),
]


@pytest.mark.parametrize(("kind", "grid"), GRIDS)
def test_grids_of_ones_own(kind, grid):
    off, schedule = compare(kind, DDIM, **grid)
    assert off < 1e-5
    assert len(schedule.timesteps) == (3 if "denoising_end" in grid else 4)


def test_a_scheduler_that_is_not_ours_to_replace_makes_its_own_steps():
    class Spy(EulerDiscreteScheduler):
        steps = 0

        def step(self, *args, **kwargs):
            Spy.steps += 1
            return super().step(*args, **kwargs)

    pipe = tiny_sdxl_pipeline()
    wanted = sample(stock_of(pipe))
    pipe.scheduler = Spy(**SDXL_SCHEDULER)
    assert error(sample(pipe, core2=CFG), wanted) < 1e-5
    assert Spy.steps == 5


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (EulerDiscreteScheduler, {"prediction_type": "sample"}, "epsilon or v_prediction"),
        (EDMEulerScheduler, {}, "training table"),
        (
            DDIMScheduler,
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "must be finite with core2",
        ),
    ],
)
def test_what_has_no_meaning_in_our_coordinates_is_refused(kind, config, message):
    pipe = tiny_sdxl_pipeline()
    pipe.scheduler = scheduler_of(kind, **config)
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        sample(pipe, core2=CFG)
    assert counter.calls == 0


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_callbacks_see_and_edit_the_schedulers_latents_not_ours(kind):
    def run(pipe, **options):
        seen = []

        def edit(pipe, i, t, tensors):
            seen.append(tensors["latents"].clone())
            return {"latents": tensors["latents"] * 0.9}

        return [*seen, sample(pipe, callback_on_step_end=edit, **options)]

    pipe = tiny_sdxl_pipeline()
    pipe.scheduler = scheduler_of(kind, **DDIM)
    for ours, theirs in zip(run(pipe, core2=CFG), run(stock_of(pipe)), strict=True):
        assert error(ours, theirs) < 1e-5


# The clock ---------------------------------------------------------------------------------------


def test_v_and_eps_are_one_prediction_in_two_forms():
    """By hand in variance-preserving terms: eps = alpha v + sigma_vp z, z = x / s."""
    generator = torch.Generator().manual_seed(0)
    v, x = (torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in "vx")
    sigma = torch.tensor([0.3, 9.0], dtype=torch.float64)[:, None, None, None]
    alpha = 1 / (1 + sigma**2).sqrt()
    eps = eps_from_v(v, x, sigma)
    torch.testing.assert_close(eps, alpha * v + sigma * alpha * (x * alpha))
    torch.testing.assert_close(v_from_eps(eps, x, sigma), v)


def test_the_clock_is_exact_on_both_grids_and_rises_in_between():
    scheduler = scheduler_of(EulerDiscreteScheduler, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    clock = Clock.of(scheduler, torch.device("cpu"))
    assert torch.equal(clock.timestep(scheduler.sigmas[:-1]), scheduler.timesteps)
    signal = scheduler.alphas_cumprod.double()
    trained = ((1 - signal) / signal).sqrt()
    assert torch.equal(clock.timestep(trained), torch.arange(1000.0))
    between = clock.timestep((trained[:-1] * trained[1:]).sqrt())
    torch.testing.assert_close(between, torch.arange(999.0) + 0.5, atol=2e-3, rtol=0)
    assert clock.timestep(torch.tensor([0.0, 1e6])).tolist() == [0.0, 999.0]


# Guidance rescale --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_guidance_rescale_is_that_of_the_networks_output(kind, prediction_type):
    config = {"prediction_type": prediction_type}
    assert compare(kind, config, guidance_rescale=0.7)[0] < 1e-5


def test_guidance_rescale_matters_and_a_callback_may_change_it():
    def relax(pipe, i, t, tensors):
        pipe._guidance_rescale = 0.2
        return tensors

    pipe = tiny_sdxl_pipeline()
    options = {"guidance_rescale": 0.9, "callback_on_step_end": relax}
    ours = sample(pipe, core2=CFG, **options)
    assert error(ours, sample(stock_of(pipe), **options)) < 1e-5
    assert error(ours, sample(pipe, core2=CFG)) > 1e-3


def test_guidance_rescale_holds_for_what_a_head_says_too():
    """A head that says nothing guides nowhere, so there is nothing to rescale."""
    pipe = tiny_sdxl_pipeline(weak_head=CondHead("sdxl", 4))
    fast = sample(pipe, core2="fast", guidance_rescale=0.7)
    assert error(fast, sample(stock_of(pipe), guidance_scale=1.0)) < 1e-5
    quality = sample(pipe, core2="quality", guidance_rescale=0.7)
    calibrated = {"guidance_scale": 1 + 1.5 * (SCALE - 1), "guidance_rescale": 0.7}
    assert error(quality, sample(stock_of(pipe), **calibrated)) < 1e-5


def test_guidance_rescale_cannot_be_had_from_a_head_inside_the_denoiser():
    pipe = tiny_sdxl_pipeline()
    head = AdapterHead.for_denoiser(pipe.family.denoiser(pipe), scale_range=(2.0, 6.0))
    pipe.register_modules(weak_head=head)
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match="must be 0 in"):
        sample(pipe, core2="fast", guidance_rescale=0.7)
    assert counter.calls == 0
    sample(pipe, core2="quality", guidance_rescale=0.7)


# Prompts and sizes -------------------------------------------------------------------------------

SIZES = {
    "original_size": (64, 32),
    "crops_coords_top_left": (4, 2),
    "target_size": (16, 24),
}


def test_micro_conditioning_reaches_the_network():
    pipe = tiny_sdxl_pipeline()
    ours = sample(pipe, core2=CFG, **SIZES)
    assert error(ours, sample(stock_of(pipe), **SIZES)) < 1e-5
    assert error(ours, sample(pipe, core2=CFG)) > 1e-3


def test_the_negative_prompt_has_sizes_of_its_own_in_any_batch():
    """The stock call mixes the two up for two images, so it is asked for one at a time."""
    sizes = {**SIZES, **{f"negative_{k}": tuple(2 * v for v in SIZES[k]) for k in SIZES}}
    pipe = tiny_sdxl_pipeline()
    ours = sample(pipe, core2=CFG, **sizes)
    for i, seed in enumerate((1, 2)):
        alone = sample(stock_of(pipe), seeds=(seed,), prompt=PROMPTS[i], **sizes)
        assert error(ours[i : i + 1], alone) < 1e-5
    assert error(ours, sample(pipe, core2=CFG, **SIZES)) > 1e-3


@pytest.mark.parametrize("zeros", [True, False])
def test_no_negative_prompt_is_what_the_config_says(zeros):
    pipe = tiny_sdxl_pipeline()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    ours = sample(pipe, core2=CFG)
    assert error(ours, sample(stock_of(pipe))) < 1e-5
    _, uncond = pipe.family.encode(pipe, PROMPTS)
    assert (uncond.prompt_embeds.abs().max() == 0) == zeros


def test_a_textual_inversion_token():
    pipe = tiny_sdxl_pipeline()
    generator = torch.Generator().manual_seed(0)
    for encoder, tokenizer in (
        (pipe.text_encoder, pipe.tokenizer),
        (pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(
            {"<thing>": torch.randn(16, generator=generator)},
            token="<thing>",
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    options = {"prompt": ["a <thing>", "a red <thing>"]}
    ours = sample(pipe, core2=CFG, **options)
    assert torch.equal(sample(pipe, **options), sample(stock_of(pipe), **options))
    assert error(ours, sample(stock_of(pipe), **options)) < 1e-5
    assert error(ours, sample(pipe, core2=CFG, prompt=["a x", "a red x"])) > 1e-4


def test_a_network_with_an_embedded_scale_runs_one_pass_a_step():
    pipe = tiny_sdxl_pipeline(time_cond_proj_dim=8)
    for core2 in (CFG, "fast"):
        with count_nfe(pipe.unet) as counter:
            ours = sample(pipe, core2=core2)
        assert counter.per_sample(2) == pipe.core2_plan.nfe == 5
        assert error(ours, sample(stock_of(pipe))) < 1e-5
    assert error(ours, sample(pipe, core2=CFG, guidance_scale=9.0)) > 1e-4


@pytest.mark.parametrize("names", [["callback_steps"], ["callback", "callback_steps"]])
def test_the_deprecated_callback_is_refused(names):
    known = {"callback": lambda i, t, latents: latents.mul_(0.9), "callback_steps": 2}
    pipe, old = tiny_sdxl_pipeline(), {name: known[name] for name in names}
    assert torch.equal(sample(pipe, **old), sample(stock_of(pipe), **old))
    with pytest.raises(ValueError, match="use callback_on_step_end"):
        sample(pipe, core2=CFG, **old)


# Decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
def test_the_vae_runs_in_float32_where_float16_would_overflow(statistics):
    pipe = tiny_sdxl_pipeline().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    if statistics:
        given = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
        pipe.vae.register_to_config(**given)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    image = pipe.family.decode(pipe, latents)
    assert image.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
    options = {"seeds": (1,), "num_inference_steps": 1, "output_type": "pt"}
    assert error(sample(pipe, core2=CFG, **options), sample(stock_of(pipe), **options)) < 1e-2


def test_a_watermark_is_applied_to_the_decoded_image():
    class Stripes:
        def apply_watermark(self, images):
            images = images.clone()
            images[..., ::2] = 1
            return images

    pipe = tiny_sdxl_pipeline()
    pipe.watermark = Stripes()
    images = sample(pipe, core2=CFG, output_type="pt")
    assert (images[..., ::2] == 1).all()
    assert not (images[..., 1::2] == 1).all()


# IP-Adapter --------------------------------------------------------------------------------------


def load_ip_adapter(pipe):
    """Load a random IP-Adapter by the stock method: four image tokens from 6 numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    weights, key = {}, 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            weights[f"{key}.to_k_ip.weight"] = random(width, 32)
            weights[f"{key}.to_v_ip.weight"] = random(width, 32)
            key += 2
    image_proj = {
        "proj.weight": random(4 * 32, 6),
        "proj.bias": random(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": weights}])
    return pipe


def test_ip_adapter_embeddings_reach_both_halves():
    pipe = load_ip_adapter(tiny_sdxl_pipeline(weak_head=CondHead("sdxl", 4)))
    stock = stock_of(pipe)
    image = 3 * torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    pair, alone = {"ip_adapter_image_embeds": [image]}, {"ip_adapter_image_embeds": [image[1:]]}
    ours = sample(pipe, core2=CFG, **pair)
    assert torch.equal(sample(pipe, **pair), sample(stock, **pair))
    assert error(ours, sample(stock, **pair)) < 1e-5
    assert error(ours, sample(pipe, core2=CFG, ip_adapter_image_embeds=[image.flip(0)])) > 1e-3
    fast = sample(pipe, core2="fast", **pair)
    assert error(fast, sample(stock, guidance_scale=1.0, **alone)) < 1e-5


def test_an_ip_adapter_image_is_that_of_the_stock_call():
    pipe = load_ip_adapter(tiny_sdxl_pipeline(weak_head=CondHead("sdxl", 4)))
    vision = {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 6}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).eval()
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(**size))
    stock, red = stock_of(pipe), {"ip_adapter_image": Image.new("RGB", (16, 16), "red")}
    assert torch.equal(sample(pipe, **red), sample(stock, **red))
    ours = sample(pipe, core2=CFG, **red)
    assert error(ours, sample(stock, **red)) < 1e-5
    assert error(sample(pipe, core2="fast", **red), sample(stock, guidance_scale=1.0, **red)) < 1e-5
    blue = sample(pipe, core2=CFG, ip_adapter_image=Image.new("RGB", (16, 16), "blue"))
    assert error(ours, blue) > 1e-3


def test_ip_adapter_masks_in_the_attention_arguments_go_through_untouched():
    pipe = load_ip_adapter(tiny_sdxl_pipeline())
    image = 3 * torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    options = {
        "ip_adapter_image_embeds": [image.squeeze(1)],
        "cross_attention_kwargs": {"ip_adapter_masks": [mask]},
    }
    for seeds in ((1,), (1, 2)):
        ours = sample(pipe, seeds=seeds, core2=CFG, **options)
        assert error(ours, sample(stock_of(pipe), seeds=seeds, **options)) < 1e-5


# Features ----------------------------------------------------------------------------------------


def test_features_are_the_input_of_the_last_convolution_in_squares_of_four():
    pipe = tiny_sdxl_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = pipe.family.encode(pipe, PROMPTS)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), denoiser.capture_features() as read:
        d = denoiser(x, torch.full((2,), 0.5), cond)
        features = read()
        assert features.shape == (2, 4 * 6, 4 * 8)
        # Each token holds 8 channels of 2x2 pixels, as a patch of the latents would.
        hidden = features.reshape(2, 4, 6, 8, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 8, 8, 12)
        torch.testing.assert_close(pipe.unet.conv_out(hidden), d)
    assert not pipe.unet.conv_out._forward_pre_hooks


def test_features_of_an_odd_size_are_refused():
    pipe = tiny_sdxl_pipeline()
    head = TapHead.for_denoiser(pipe.family.denoiser(pipe))
    pipe.register_modules(weak_head=head)
    pipe.vae_scale_factor = 8  # 24 px are 3 latents then
    with pytest.raises(ValueError, match="multiples of 16 px, got|even sides"):
        sample(pipe, core2="fast", height=24, width=16)


def test_sizes_not_given_are_those_of_the_latents():
    """Collect and training have no call to take them from."""
    pipe = tiny_sdxl_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = pipe.family.encode(pipe, PROMPTS)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[16, 24, 0, 0, 16, 24.0]]).repeat(2, 1)
    given = type(cond)(cond.prompt_embeds, cond.pooled, {"time_ids": ids})
    with torch.no_grad():
        assert torch.equal(
            denoiser(x, torch.full((2,), 0.5), cond), denoiser(x, torch.full((2,), 0.5), given)
        )


def test_scaled_latents_edited_in_place_are_those_of_the_stock_call():
    def shrink(pipe, i, t, tensors):
        tensors["latents"].mul_(0.9)
        return tensors

    off, schedule = compare(DDIMScheduler, DDIM, callback_on_step_end=shrink)
    assert off < 1e-5
    assert schedule.latent_scale is not None
