"""`CoRe2Guidance` in modular pipelines, in miniature and of the real classes.

Truth: diffusers' own guider in the same pipeline, and the stock pipelines.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FirstBlockCacheConfig
from diffusers.configuration_utils import register_to_config

from core2_sampler import attached, testing
from core2_sampler.attachment.layouts import GUIDED_LAYOUTS
from core2_sampler.attachment.networks import find_networks, network_of
from core2_sampler.guider import CoRe2Guidance
from core2_sampler.plan import Core2Config
from core2_sampler.testing.modular import MODULAR
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


SDXL, SD3, QWEN = (MODULAR[n] for n in ("StableDiffusionXL", "StableDiffusion3", "QwenImage"))
TEXTS = SDXL.arguments
TWO = [name for name in MODULAR if name.startswith("Wan22")]
ONE = [name for name in MODULAR if name not in TWO]
"""Pipelines of two networks, and of one."""


def networks(pipe):
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [network_of(pipe, each, GUIDED_LAYOUTS) for each in found if each is not None]


def network(pipe):
    return networks(pipe)[0]


def close(ours, stock, share=1e-5):
    torch.testing.assert_close(ours, stock, atol=share * float(stock.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


@pytest.fixture
def modular(request):
    return MODULAR[request.param]


@pytest.mark.parametrize("modular", ONE, indirect=True)
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


@pytest.mark.parametrize("modular", [*ONE[:4], "ZImage", "Flux2KleinBase"], indirect=True)
def test_without_a_gap_it_is_the_prompt_alone_and_slow_steps_are_stronger_cfg(modular):
    pipe = modular.pipe()
    unguided = modular.sample(pipe, ClassifierFreeGuidance(1.0))
    stronger = modular.sample(pipe, ClassifierFreeGuidance(1 + 1.5 * (SCALE - 1)))
    close(modular.sample(pipe, CoRe2Guidance(SCALE, "fast", "cond")), unguided)
    assert len(modular.passes) == 3
    close(modular.sample(pipe, CoRe2Guidance(SCALE, "quality", "cond")), stronger)
    assert len(modular.passes) == 6 and far(stronger, unguided)


def test_krea_2_counts_its_scale_from_zero():
    krea = MODULAR["Krea2"]
    pipe = krea.pipe()
    own = ClassifierFreeGuidance(guidance_scale=4.5, use_original_formulation=True)
    close(krea.sample(pipe, CoRe2Guidance(5.5, CFG)), krea.sample(pipe, own))


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
    call = modular.arguments
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


@pytest.mark.parametrize("modular", TWO, indirect=True)
def test_two_guiders_count_for_themselves(modular):
    pipe = modular.pipe()
    heads = [Knows.for_denoiser(each) for each in networks(pipe)]
    scales = (SCALE, 2.0)

    def guide(make):
        pipe.update_components(**{name: make(i) for i, name in enumerate(("guider", "guider_2"))})
        return modular.sample(pipe)

    wanted = guide(lambda i: ClassifierFreeGuidance(scales[i]))
    assert torch.equal(guide(lambda i: CoRe2Guidance(scales[i], CFG, heads[i])), wanted)
    assert all(head.gaps for head in heads) and sum(len(head.gaps) for head in heads) == 3
    close(guide(lambda i: CoRe2Guidance(scales[i], "fast", heads[i])), wanted)
    close(modular.sample(pipe), wanted)
    assert len(modular.passes) == 3


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


# The list ----------------------------------------------------------------------------------------


def modular_pipelines():
    """Return diffusers' modular pipelines by name: the class of their network, if they guide it."""
    found = {}
    for name in dir(diffusers):
        if name.endswith("ModularPipeline") and name != "ModularPipeline":
            blocks = getattr(diffusers, getattr(diffusers, name).default_blocks_name)()
            parts = {part.name: part.type_hint.__name__ for part in blocks.expected_components}
            networks = ("unet", "transformer_2", "transformer")
            kind = next((parts[each] for each in networks if each in parts), None)
            found[name.removesuffix("ModularPipeline")] = kind if "guider" in parts else None
    return found


@pytest.mark.checkout
@pytest.mark.skipif(not diffusers.__version__.startswith("0.42"), reason="a list of diffusers 0.42")
def test_the_page_lists_every_modular_pipeline_that_takes_a_guider():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "modular.md").read_text(encoding="utf-8")
    found = modular_pipelines()
    guided = {name: kind for name, kind in found.items() if kind is not None}
    assert set(MODULAR) < set(guided)
    marks = {name: "yes" if name in MODULAR else "no" for name in guided}
    rows = [f"| {name} | {kind} | {marks[name]} |" for name, kind in guided.items()]
    assert "\n".join(["| pipeline | network | tried |", "|---|---|---|", *rows]) in page
    count = f"Of the {len(found)} modular pipelines of diffusers 0.42, {len(guided)} take a guider"
    assert f"{count}; {len(MODULAR)} of them are tried." in " ".join(page.split())
    unknown = {kind for name, kind in guided.items() if name not in MODULAR}
    assert not unknown & set(GUIDED_LAYOUTS)
