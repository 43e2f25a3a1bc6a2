"""`CoRe2Guidance` in modular pipelines, in miniature and of the real classes.

Truth: diffusers' own guider in the same pipeline, and the stock pipelines.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FirstBlockCacheConfig
from diffusers.configuration_utils import register_to_config

from core2_sampler import attached, testing
from core2_sampler.attachment.networks import find_networks
from core2_sampler.guider import CoRe2Guidance
from core2_sampler.plan import Core2Config
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.controls import AffineHead, CondHead

CFG = Core2Config(mode="cfg")
MIXED = Core2Config(slow_steps=(1,), w2s_scale=1.5)
SCALE = 4.0


class Knows(WeakHead):
    """Keeps the true gaps of one run of CFG, and says them in the next: a perfect head."""

    @register_to_config
    def __init__(self, family: str, latent_channels: int) -> None:
        super().__init__()
        self.gaps, self.step, self.devices = [], 0, []

    def to(self, device):
        self.devices.append(device)
        return super().to(device)

    def reset(self):
        self.step, self.records = 0, not self.gaps

    def observe(self, gap):
        if self.records:
            self.gaps.append(gap)

    def forward(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        assert x.shape == cond.shape and sigma.shape == cond.shape[:1]
        self.step += 1
        return self.gaps[self.step - 1].to(cond)


@dataclass
class Modular:
    """A modular pipeline in miniature, and what its call needs."""

    blocks: Callable
    parts: Callable
    arguments: dict
    passes: list = field(default_factory=list)

    def pipe(self):
        pipe = self.blocks().init_pipeline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = self.parts()
        known = {**pipe._component_specs, **pipe._config_specs}
        pipe.update_components(**{k: v for k, v in parts.items() if k in known and v is not None})
        for name in ("transformer", "transformer_2", "unet"):
            if (network := getattr(pipe, name, None)) is not None:
                network.eval()
                self.count(network)
        return pipe

    def count(self, network):
        """Count the rows of each pass below all hooks."""
        forward = network.forward

        @functools.wraps(forward)
        def counting(*args, **kwargs):
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            self.passes.append(len(x))
            return forward(*args, **kwargs)

        network.forward = counting

    def sample(self, pipe, guider=None, **options):
        if guider is not None:
            pipe.update_components(guider=guider)
        self.passes.clear()
        call = {"num_inference_steps": 3, "output": "latents", "output_type": "latent"}
        generator = torch.Generator().manual_seed(1)
        return pipe(**{**call, "generator": generator, **self.arguments, **options})


def parts_of(name):
    return STOCK[name].parts()


def wan(count=1):
    parts = parts_of("WanPipeline")
    kind, config = type(parts["transformer"]), parts["transformer"].config
    names = ("transformer", "transformer_2")[:count]
    made = {
        name: kind.from_config({**config, "in_channels": 16, "out_channels": 16}) for name in names
    }
    return {"scheduler": parts["scheduler"], "boundary_ratio": 0.8, **made}


def denoise(blocks, *path):
    """Return the part of a pipeline between text encoder and VAE."""

    def build():
        found = getattr(diffusers, blocks)()
        for name in ("denoise", *path):
            found = found.sub_blocks[name]
        return found

    return build


def embeds(**others):
    """Return one prompt's embeddings and the negative one's."""
    both = 3 * torch.randn(2, 1, 8, 16, generator=torch.Generator().manual_seed(5))
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1], **others}


TEXTS = {"prompt": "a red circle", "negative_prompt": "dark", "height": 16, "width": 16}
MASK = torch.ones(1, 8, dtype=torch.bool)
MASKS = {"prompt_embeds_mask": MASK, "negative_prompt_embeds_mask": MASK.clone()}
SIZE = {"height": 64, "width": 64}
LISTS = {name: list(rows) for name, rows in embeds().items()}

SDXL = Modular(
    diffusers.StableDiffusionXLAutoBlocks, lambda: parts_of("StableDiffusionXLPipeline"), TEXTS
)
SD3 = Modular(
    diffusers.StableDiffusion3AutoBlocks,
    lambda: parts_of("StableDiffusion3Pipeline"),
    {**TEXTS, "max_sequence_length": 8},
)
QWEN = Modular(
    denoise("QwenImageAutoBlocks"), lambda: parts_of("QwenImagePipeline"), embeds(**MASKS, **SIZE)
)
WAN = Modular(denoise("WanBlocks"), wan, embeds(num_frames=5, **SIZE))
WAN22 = Modular(denoise("Wan22Blocks"), lambda: wan(2), WAN.arguments)
Z_IMAGE = Modular(
    denoise("ZImageAutoBlocks"),
    lambda: parts_of("ZImagePipeline"),
    {**LISTS, "height": 128, "width": 128},
)
LTX = Modular(
    denoise("LTXAutoBlocks"),
    lambda: parts_of("LTXPipeline"),
    embeds(
        prompt_attention_mask=MASK,
        negative_prompt_attention_mask=MASK.clone(),
        num_frames=9,
        height=256,
        width=256,
    ),
)
EACH = {"sdxl": SDXL, "sd3": SD3, "qwen": QWEN, "wan": WAN, "z-image": Z_IMAGE, "ltx": LTX}


def network(pipe):
    return find_networks(pipe)[0]


def close(ours, stock, share=1e-5):
    torch.testing.assert_close(ours, stock, atol=share * float(stock.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


@pytest.fixture(params=EACH)
def modular(request):
    return EACH[request.param]


def test_a_perfect_head_is_cfg_at_half_the_passes(modular):
    pipe = modular.pipe()
    wanted = modular.sample(pipe, ClassifierFreeGuidance(SCALE))
    head = Knows.for_denoiser(network(pipe))
    assert torch.equal(modular.sample(pipe, CoRe2Guidance(SCALE, CFG, head)), wanted)
    assert modular.passes == [1] * 6 and len(head.gaps) == 3
    guider = CoRe2Guidance(SCALE, "fast", head)
    for _ in range(2):  # nothing of a run is left to the next
        close(modular.sample(pipe, guider), wanted)
        assert modular.passes == [1] * 3 and guider.core2_plan.nfe == 3
    close(modular.sample(pipe, CoRe2Guidance(SCALE, MIXED, head)), wanted)
    assert len(modular.passes) == 4
    assert "core2" not in pipe_hooks(pipe)
    assert torch.equal(modular.sample(pipe, ClassifierFreeGuidance(SCALE)), wanted)


def pipe_hooks(pipe):
    return network(pipe).module._diffusers_hook.hooks


def test_without_a_gap_it_is_the_prompt_alone_and_slow_steps_are_stronger_cfg(modular):
    pipe = modular.pipe()
    unguided = modular.sample(pipe, ClassifierFreeGuidance(1.0))
    stronger = modular.sample(pipe, ClassifierFreeGuidance(1 + 1.5 * (SCALE - 1)))
    close(modular.sample(pipe, CoRe2Guidance(SCALE, "fast", "cond")), unguided)
    assert len(modular.passes) == 3
    close(modular.sample(pipe, CoRe2Guidance(SCALE, "quality", "cond")), stronger)
    assert len(modular.passes) == 6 and far(stronger, unguided)


HEADS = {
    "affine": (AffineHead, {"num_levels": 3}),
    "adapter": (AdapterHead, {"reference_scale": 4.0, "scale_range": (2.0, 6.0)}),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd3", "affine"), ("sd3", "adapter"), ("sdxl", "affine"), ("sdxl v", "affine")],
)
def test_a_head_guides_as_under_attach(family, kind):
    """Which learns the noise levels from the scheduler itself."""
    modular, name = (SD3, "StableDiffusion3") if family == "sd3" else (SDXL, "StableDiffusionXL")
    stock, pipe = STOCK[f"{name}Pipeline"].pipe(), modular.pipe()
    if family == "sdxl v":
        config = {**testing.SDXL_SCHEDULER, "prediction_type": "v_prediction"}
        stock.scheduler = diffusers.EulerDiscreteScheduler(**config)
        pipe.update_components(scheduler=diffusers.EulerDiscreteScheduler(**config))
    head_class, options = HEADS[kind]
    head = head_class.for_denoiser(find_networks(stock)[0].denoiser, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        if kind == "affine":
            head.levels.copy_(torch.tensor([0.1, 1.0, 10.0]))
    call = {k: v for k, v in modular.arguments.items() if k != "output"}
    for config in (Core2Config(slow_steps=0), MIXED):
        with attached(stock, head=head, core2=config):
            wanted = stock(
                **call,
                num_inference_steps=3,
                guidance_scale=SCALE,
                generator=torch.Generator().manual_seed(1),
                output_type="latent",
            ).images
        guider = CoRe2Guidance(SCALE, config, head, scheduler=pipe.scheduler)
        close(modular.sample(pipe, guider), wanted)
        assert guider.core2_plan == stock_plan(config, head)


def stock_plan(config, head):
    return config.plan(3, SCALE, head.in_model)


# The traps of guiders -----------------------------------------------------------------------------


def test_encoders_hear_the_same_before_and_after_a_run():
    """They ask for the number of prompts between runs, when the latest step is long past."""
    pipe = SDXL.pipe()
    guider = CoRe2Guidance(SCALE, Core2Config(mode="cfg", scale_rule="interval:6,0,0.5"))
    assert guider.num_conditions == 2
    first = SDXL.sample(pipe, guider)
    assert len(SDXL.passes) < 6 and guider.num_conditions == 2
    assert torch.equal(SDXL.sample(pipe), first)


def test_a_guider_is_saved_with_its_head_by_folder(tmp_path):
    pipe = SD3.pipe()
    head = AffineHead.for_denoiser(network(pipe).denoiser, num_levels=1)
    head.coefficients.fill_(0.3)
    config = Core2Config(slow_steps=(1,), w2s_scale=1.2, scale_rule="linear:2,5")
    guider = CoRe2Guidance(SCALE, config, head, scheduler=pipe.scheduler)
    with pytest.raises(ValueError, match="must be in a folder"):
        guider.save_pretrained(tmp_path / "guider")
    wanted = SD3.sample(pipe, guider)
    close(SD3.sample(pipe, guider.new()), wanted)
    assert far(SD3.sample(pipe, guider.new(core2="fast")), wanted)
    head.save_pretrained(tmp_path / "head")
    saved = CoRe2Guidance(SCALE, config, tmp_path / "head", pipe.scheduler)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["head"] == str(
        tmp_path / "head"
    )
    again = CoRe2Guidance.from_pretrained(tmp_path)
    spec = diffusers.modular_pipelines.ComponentSpec.from_component("guider", saved)
    copies = (CoRe2Guidance.from_config(each.config) for each in (saved, again))
    for one in (again, again.new(), spec.create(), *copies):
        assert torch.equal(SD3.sample(pipe, one), wanted)
    assert f"{tmp_path / 'head'}" in repr(again)


def test_a_pipeline_that_is_saved_finds_its_guider_again(tmp_path):
    CoRe2Guidance(SCALE, "fast", "cond").save_pretrained(tmp_path)
    spec = diffusers.modular_pipelines.ComponentSpec(
        "guider", CoRe2Guidance, pretrained_model_name_or_path=str(tmp_path)
    )
    guider = spec.load()
    pipe = SD3.pipe()
    pipe.update_components(guider=guider)
    assert pipe.guider is guider and len(SD3.sample(pipe)) and len(SD3.passes) == 3
    assert type(CoRe2Guidance(SCALE, "fast", "cond").new(guidance_scale=2.0)) is CoRe2Guidance


def test_the_head_goes_where_the_network_runs():
    pipe = SD3.pipe()
    head = Knows.for_denoiser(network(pipe))
    head.devices.clear()
    SD3.sample(pipe, CoRe2Guidance(SCALE, CFG, head))
    assert head.devices == [torch.device("cpu")] * 3


@pytest.mark.parametrize("core2", ["cfg", "fast", "quality"])
def test_a_scheduler_of_second_order_is_guided_to_the_end(core2):
    pipe, stock = SDXL.pipe(), STOCK["StableDiffusionXLPipeline"].pipe()
    stock.scheduler = diffusers.HeunDiscreteScheduler(**testing.SDXL_SCHEDULER)
    pipe.update_components(scheduler=diffusers.HeunDiscreteScheduler(**testing.SDXL_SCHEDULER))
    config = CFG if core2 == "cfg" else core2
    call = {**TEXTS, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": SCALE}
    with attached(stock, head="cond", core2=config):
        wanted = stock(**call, generator=torch.Generator().manual_seed(1)).images
    close(SDXL.sample(pipe, CoRe2Guidance(SCALE, config, "cond")), wanted)
    assert len(SDXL.passes) == 5 * (1 if core2 == "fast" else 2)
    with pytest.raises(ValueError, match="a scale for each pass, got 3"):
        SDXL.sample(pipe, CoRe2Guidance(SCALE, Core2Config(mode="cfg", scale_rule="linear:2,5")))


def test_two_passes_of_one_prompt_are_refused():
    """SD3 makes negative embeddings only where a negative prompt is given, if the empty one."""
    pipe = SD3.pipe()
    with pytest.raises(ValueError, match="pass negative_prompt=''"):
        SD3.sample(pipe, CoRe2Guidance(SCALE, CFG), negative_prompt=None)
    head = AffineHead.for_denoiser(network(pipe).denoiser)
    fast = CoRe2Guidance(SCALE, "fast", head)
    close(SD3.sample(pipe, fast, negative_prompt=None), SD3.sample(pipe))
    assert len(SD3.passes) == 3


def test_a_cache_that_no_loop_tells_the_prompt_is_refused():
    pipe = QWEN.pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(ValueError, match=r"call disable_cache\(\)"):
        QWEN.sample(pipe, CoRe2Guidance(SCALE, "fast", "cond"))
    pipe.transformer.disable_cache()
    assert torch.isfinite(QWEN.sample(pipe)).all()


def test_two_guiders_count_for_themselves():
    pipe = WAN22.pipe()
    heads = [Knows.for_denoiser(each) for each in find_networks(pipe)]
    scales = (SCALE, 2.0)

    def guide(make):
        pipe.update_components(**{name: make(i) for i, name in enumerate(("guider", "guider_2"))})
        return WAN22.sample(pipe)

    wanted = guide(lambda i: ClassifierFreeGuidance(scales[i]))
    assert torch.equal(guide(lambda i: CoRe2Guidance(scales[i], CFG, heads[i])), wanted)
    assert all(head.gaps for head in heads) and sum(len(head.gaps) for head in heads) == 3
    close(guide(lambda i: CoRe2Guidance(scales[i], "fast", heads[i])), wanted)
    close(WAN22.sample(pipe), wanted)
    assert len(WAN22.passes) == 3


# Errors -------------------------------------------------------------------------------------------


class Fails(CondHead):
    def forward(self, cond, **others):
        raise KeyError("stop")


def test_a_run_that_ends_in_an_error_leaves_the_network_alone():
    pipe = SD3.pipe()
    wanted = SD3.sample(pipe, ClassifierFreeGuidance(SCALE))
    with pytest.raises(KeyError):
        SD3.sample(pipe, CoRe2Guidance(SCALE, "fast", Fails("sd3", 4)))
    assert "core2" not in pipe_hooks(pipe)
    assert torch.equal(SD3.sample(pipe, ClassifierFreeGuidance(SCALE)), wanted)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "head must be given"),
        ({"core2": "fastest"}, "did you mean 'fast'"),
        ({"core2": Core2Config(mode="zigzag", upstream=True)}, "act on guidance alone"),
        ({"core2": Core2Config(mode="cfg", scale_rule=lambda i, n: 2.0)}, "must be a text"),
        ({"core2": {"mode": "cfg", "scale_rule": "constant:3"}, "guidance_scale": 1.0}, "above 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, error):
    with pytest.raises(ValueError, match=error):
        CoRe2Guidance(**options)


def test_heads_and_networks_that_do_not_fit_are_refused():
    pipe = SD3.pipe()
    for head, error in ((CondHead("sdxl", 4), "must be made for sd3"), ("tap", "by its folder")):
        with pytest.raises(ValueError, match=error):
            SD3.sample(pipe, CoRe2Guidance(SCALE, "fast", head))
    begins = type("Begins", (CondHead,), {"begin": lambda self, sigmas, negative: None})
    with pytest.raises(ValueError, match="noise levels ahead"):
        SD3.sample(pipe, CoRe2Guidance(SCALE, "fast", begins("sd3", 4)))
    guider = CoRe2Guidance(SCALE, "fast", "cond")
    guider.set_state(0, 3, torch.tensor(1.0))
    with pytest.raises(ValueError, match="denoiser must be one of"):
        guider.prepare_models(torch.nn.Linear(1, 1))


def test_slow_steps_by_the_heads_card_are_refused_at_once():
    with pytest.raises(ValueError, match="not told the noise levels .* 'budget:40': use core2_"):
        CoRe2Guidance(SCALE, Core2Config(slow_steps="budget:40"), "cond")


@pytest.mark.checkout
def test_the_page_has_a_row_for_each_pipeline():
    """The rows with zigzag steps are those of test_modular_tasks.py."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "modular.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+), text \| (.+ \| .+) \|$", page, re.MULTILINE))
    names = {"sdxl": "SDXL", "sd3": "SD3", "qwen": "Qwen-Image", "wan": "Wan 2.1", "ltx": "LTX"}
    tried = [names.get(each, each.title()) for each in EACH]  # and test_two_guiders
    zigzag = {"SDXL", "SD3", "FLUX.1"}
    assert rows == {
        each: "yes | yes" if each in zigzag else "yes | –" for each in (*tried, "Wan 2.2", "FLUX.1")
    }
