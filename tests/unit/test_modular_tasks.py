"""`core2_blocks` for the other tasks: image to image, inpainting, ControlNet.

Truth: the stock blocks, and the steps of Z-Sampling written down here for each network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from PIL import Image

from core2_sampler import CoRe2Guidance, core2_blocks, testing
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters.packing import unpack
from core2_sampler.plan import Core2Config
from core2_sampler.samplers import sample_zigzag
from core2_sampler.testing.stock import STOCK

SCALE, BACK = 4.0, 0.5
CFG = Core2Config(mode="cfg")
ZIGZAGS = {
    BACK: Core2Config(mode="zigzag", inversion_scale=BACK),
    0.0: Core2Config(mode="zigzag", zig_steps=(1,)),
}
RAMP = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
MASK = Image.new("L", (16, 16), 0)
MASK.paste(255, (0, 0, 8, 16))
TEXTS = {"prompt": ["a red circle", "two rings"], "negative_prompt": ["dark", "dim"]}
FAMILIES = {
    "sdxl": (diffusers.StableDiffusionXLAutoBlocks, testing.tiny_sdxl_pipeline),
    "sd3": (diffusers.StableDiffusion3AutoBlocks, testing.tiny_sd3_pipeline),
    "flux": (diffusers.FluxAutoBlocks, testing.tiny_flux_pipeline),
}
IMAGE = {"image": [RAMP, RAMP.rotate(90)], "strength": 0.75}
INPAINT = {**IMAGE, "mask_image": MASK}
CONTROL = {"control_image": RAMP.rotate(45)}
GUESS = {**CONTROL, "guess_mode": True}


@dataclass(frozen=True)
class Task:
    """A family, what a call is given beside the prompts, and what channels its network takes."""

    family: str
    given: dict = field(default_factory=dict)
    channels: int = 4


TASKS = {
    "SDXL, text": Task("sdxl"),
    "SDXL, image to image": Task("sdxl", IMAGE),
    "SDXL, inpainting": Task("sdxl", INPAINT),
    "SDXL, inpainting network of 9 channels": Task("sdxl", INPAINT, 9),
    "SDXL, ControlNet": Task("sdxl", CONTROL),
    "SDXL, ControlNet in guess mode": Task("sdxl", GUESS),
    "SDXL, ControlNet and image to image": Task("sdxl", {**IMAGE, **CONTROL}),
    "SDXL, ControlNet and inpainting": Task("sdxl", {**INPAINT, **CONTROL}),
    "SD3, text": Task("sd3"),
    "SD3, image to image": Task("sd3", IMAGE),
    "FLUX.1, text": Task("flux"),
    "FLUX.1, image to image": Task("flux", IMAGE),
}


@pytest.fixture(params=TASKS, scope="module")
def made(request):
    """Return a task with the pipelines of our blocks and of the stock ones, and their parts."""
    task = TASKS[request.param]
    blocks, build = FAMILIES[task.family]
    own = build()
    parts = {name: part for name, part in own.components.items() if part is not None}
    if task.channels == 9:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = {**own.unet.config, "in_channels": 9}
            parts["unet"] = diffusers.UNet2DConditionModel.from_config(config).eval()
    if "control_image" in task.given:
        stock = STOCK["StableDiffusionXLControlNetPipeline"].pipe()
        parts |= {"unet": stock.unet, "controlnet": stock.controlnet}
    pipes = []
    for each in (core2_blocks(task.family), blocks()):
        pipe = each.init_pipeline()
        known = pipe._component_specs
        pipe.update_components(**{name: part for name, part in parts.items() if name in known})
        pipes.append(pipe)
    return SimpleNamespace(task=task, own=own, ours=pipes[0], stock=pipes[1])


def network(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def sample(made, pipe, guider=None):
    """Return the state at the end of a call, and the final latents in it."""
    if guider is not None:
        pipe.update_components(guider=guider)
    short = {} if made.task.family == "sdxl" else {"max_sequence_length": 8}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    state = pipe(
        **{**TEXTS, **short, **made.task.given},
        height=16,
        width=16,
        num_inference_steps=4 if "strength" in made.task.given else 3,  # 3 are made
        generator=generators,
        output_type="latent",
    )
    return state, state.get("latents")


def close(ours, truth, share=3e-5):
    torch.testing.assert_close(ours, truth, atol=share * float(truth.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


# Guidance ----------------------------------------------------------------------------------------


def test_guidance_is_that_of_the_stock_blocks(made):
    """The stock blocks with our guider are in test_guider.py."""
    stock = made.stock if made.task.family != "flux" else made.ours  # which has no guider there
    _, wanted = sample(made, stock, ClassifierFreeGuidance(SCALE))
    _, alone = sample(made, stock, ClassifierFreeGuidance(1.0))
    assert torch.equal(sample(made, made.ours, CoRe2Guidance(SCALE, CFG))[1], wanted)
    with count_nfe(last_layer(made.ours)) as counter:
        close(sample(made, made.ours, CoRe2Guidance(SCALE, "fast", "cond"))[1], alone)
    assert counter.per_sample(2) == 3
    assert far(wanted, alone)


def last_layer(pipe):
    return pipe.unet.conv_out if hasattr(pipe, "unet") else pipe.transformer.proj_out


# Zigzag steps ------------------------------------------------------------------------------------


def test_zigzag_steps_are_those_of_z_sampling(made):
    _, plain = sample(made, made.ours, CoRe2Guidance(SCALE, CFG))
    for back, config in ZIGZAGS.items():
        seen = []
        hook = network(made.ours).register_forward_pre_hook(
            lambda _m, args, kwargs, seen=seen: seen.append(args or (kwargs["hidden_states"],)),
            with_kwargs=True,
        )
        with count_nfe(last_layer(made.ours)) as counter:
            state, ours = sample(made, made.ours, CoRe2Guidance(SCALE, config))
        hook.remove()
        plan, first = made.ours.guider.core2_plan, seen[0][0]
        assert counter.per_sample(2) == plan.nfe and far(ours, plain)
        first = unpack(first, (8, 8)) if first.ndim == 3 else first
        close(ours, by_hand(made, state, first[:, :4], back, plan.zigs))


@torch.no_grad()
def by_hand(made, state, first, back, zigs):
    """Return where Z-Sampling takes the latents that the network was given first."""
    ve = made.task.family == "sdxl"
    scheduler, times = made.ours.scheduler, state.get("timesteps")
    levels = scheduler.sigmas[len(scheduler.timesteps) - len(times) :].double()
    said = says_unet(made, state) if ve else says_flow(made, levels)

    def guided(x, i, scale):
        seen = x / (1 + levels[i] ** 2).sqrt().float() if ve else x
        uncond = said(seen, i, 1)
        return uncond if scale == 0 else uncond + scale * (said(seen, i, 0) - uncond)

    def keep(i, x):
        """Put the image back outside the mask, as a network of 4 channels needs it."""
        if "mask_image" not in made.task.given or made.task.channels == 9:
            return x
        image, mask, noise = (state.get(name) for name in ("image_latents", "mask", "noise"))
        return mask * x + (1 - mask) * (image + levels[i + 1].float() * noise)

    return sample_zigzag(
        lambda x, i: guided(x, i, SCALE),
        first * (1 + levels[0] ** 2).sqrt().float() if ve else first,
        levels,
        undo=lambda y, i: guided(y, i + 1, back),
        zigs=zigs,
        on_step=keep,
    )


def says_unet(made, state):
    """Return what a UNet says of one side, with what the task tells it."""
    pipe, times, sides = made.ours, state.get("timesteps"), []
    for side in ("", "negative_"):
        added = {
            "text_embeds": state.get(f"{side}pooled_prompt_embeds"),
            "time_ids": state.get(f"{side}add_time_ids"),
        }
        sides.append((state.get(f"{side}prompt_embeds"), added))

    def said(seen, i, side):
        embeds, added = sides[side]
        told = {"encoder_hidden_states": embeds, "added_cond_kwargs": added, "return_dict": False}
        residuals, guess = {}, "guess_mode" in made.task.given
        if "control_image" in made.task.given and not (guess and side == 1):
            condition = state.get("controlnet_cond")
            down, mid = pipe.controlnet(
                seen, times[i], controlnet_cond=condition, guess_mode=guess, **told
            )
            residuals = {
                "down_block_additional_residuals": down,
                "mid_block_additional_residual": mid,
            }
        if made.task.channels == 9:
            seen = torch.cat([seen, state.get("mask"), state.get("masked_image_latents")], 1)
        return pipe.unet(seen, times[i], **residuals, **told)[0]

    return said


def says_flow(made, levels):
    """Return what a transformer says of one side."""
    own = made.own
    sides = own.family.encode(own, TEXTS["prompt"], TEXTS["negative_prompt"], max_sequence_length=8)
    denoiser = own.family.denoiser(own)
    return lambda x, i, side: denoiser(x, levels[i].float().expand(2), sides[side])


# The table ---------------------------------------------------------------------------------------


@pytest.mark.checkout
def test_the_page_has_the_table_of_these_tests():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "modular.md").read_text(encoding="utf-8")
    table = "\n".join(f"| {name} | yes | yes |" for name in TASKS)
    assert table in page
