"""AdaLN tables on tiny networks of the real classes. Truth: the same run without them."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

from core2_sampler.fused import modulation
from core2_sampler.fused.modulation import check_modulated
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.schedules import flow_sigmas
from core2_sampler.steps import Plan, Step
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads import HEADS

KINDS = ("cfg", "slow", "cond", "fast", "uncond", "fast")


def sd35_pipeline():
    """SD3.5's layout: a second attention in the first block, so a norm with nine parts."""
    pipe = tiny_sd3_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layout = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
        network = SD3Transformer2DModel.from_config({**pipe.transformer.config, **layout})
    pipe.register_modules(transformer=network.eval())
    return pipe


# Norms whose layer has a table: each of SD3's blocks has two, FLUX's single ones one; and the last.
BUILD = {
    "sd3": (tiny_sd3_pipeline, 5),
    "sd3.5": (sd35_pipeline, 5),
    "flux": (tiny_flux_pipeline, 5),
    "flux, no guidance": (lambda: tiny_flux_pipeline(guidance_embeds=False), 5),
}


class World:
    """A tiny network, a head, and a run that has every kind of step, some of them undone."""

    def __init__(self, build, head="affine", dtype=torch.float32):
        pipe = build()
        self.pipe, self.denoiser = pipe, pipe.family.denoiser(pipe)
        self.module = self.denoiser.module.to(dtype)
        sides = pipe.family.encode(pipe, ["a b", "c"], ["d", "e f g"], max_sequence_length=8)
        self.prompts = [
            Conditioning(side.prompt_embeds.to(dtype), side.pooled.to(dtype), side.extra)
            for side in sides
        ]
        self.head = HEADS.get(head).for_denoiser(self.denoiser).eval()
        with torch.no_grad():
            for tensor in [*self.head.parameters(), *self.head.buffers()]:
                tensor.add_(0.05)
        undo = ("uncond", 0.0)
        steps = [Step(kind, 4.5, 1.5, *(undo * (i == 1))) for i, kind in enumerate(KINDS)]
        self.plan = Plan(tuple(steps), self.head.in_model)
        self.x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def hot(self, tables):
        return make_hot(self.denoiser, self.head, self.x, 8, *self.prompts, tables=tables)

    def run(self, tables, **options):
        hot = self.hot(tables)
        with hot.hooked():
            return sample_fused(hot, self.x, flow_sigmas(6, 3.0), self.plan, **options)


@pytest.mark.parametrize("name", BUILD)
def test_a_run_with_tables_is_the_run_without(name):
    build, count = BUILD[name]
    world = World(build)
    expected, hot = world.run(tables=False), world.hot(tables=True)
    layers = hot.modulation.layers
    assert len(layers) == count
    weights = [layer.weight.clone() for layer in layers]
    assert max(weight.numel() for weight in weights) >= 16 * 6 * 16

    def spoil(level):
        """Once the tables are made, no step reads the layers."""
        for layer in layers:
            layer.weight.data.fill_(torch.nan)

    with hot.hooked():
        ours = sample_fused(hot, world.x, flow_sigmas(6, 3.0), world.plan, on_level=spoil)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError):  # nan where the layers are read
        torch.testing.assert_close(world.run(tables=False), expected)
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(weight)
    assert torch.equal(world.run(tables=False), expected)


def test_tables_are_as_wide_as_the_network():
    world = World(tiny_sd3_pipeline, dtype=torch.bfloat16)
    ours, expected = world.run(tables=True), world.run(tables=False)
    assert world.hot(tables=True).modulation.table.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def test_nothing_is_left_of_tables_not_even_after_an_error():
    world = World(tiny_flux_pipeline)
    before = {name: id(part) for name, part in world.module.named_modules()}
    names = list(world.module.state_dict())

    def stop(i, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(tables=True, on_step=stop)
    assert {name: id(part) for name, part in world.module.named_modules()} == before
    assert list(world.module.state_dict()) == names


def lora(world):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = LoraConfig(target_modules=["norm1.linear"], init_lora_weights=False)
        world.module.add_adapter(config)


def hook(world):
    norm = world.module.transformer_blocks[0].norm1
    norm.linear.register_forward_hook(lambda _m, _i, out: out * 1.5)


@pytest.mark.parametrize(("change", "left"), [(lora, 2), (hook, 1)])
def test_layers_with_something_on_them_are_left_with_one_log_line(change, left, caplog):
    modulation._tell_once.cache_clear()
    world = World(tiny_sd3_pipeline)
    change(world)
    with caplog.at_level(logging.WARNING):
        ours, _ = world.run(tables=True), world.run(tables=True)
    assert [line for line in caplog.messages if "AdaLN" in line] == [
        f"AdaLN tables: {left} of 5 layers are computed step by step, because an adapter, a hook, "
        "quantisation or offload sits on them"
    ]
    torch.testing.assert_close(ours, world.run(tables=False), atol=1e-5, rtol=1e-5)


def test_an_adapter_head_is_heard_through_tables():
    world = World(tiny_sd3_pipeline, head="adapter")
    hot = world.hot(tables=True)
    assert [type(norm).__name__ for norm in hot.modulation.norms] == ["AdaLayerNormContinuous"]
    expected = world.run(tables=False)
    torch.testing.assert_close(world.run(tables=True), expected, atol=1e-5, rtol=1e-5)


def test_a_head_on_the_embedding_is_heard_where_tables_cannot_be(caplog):
    modulation._tell_once.cache_clear()
    world = World(tiny_sd3_pipeline)
    targets = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
    world.head = HEADS.get("adapter").for_denoiser(world.denoiser, targets=targets)
    world.plan = Plan(world.plan.steps, in_model=True)
    with torch.no_grad():
        for tensor in world.head.parameters():
            tensor.add_(0.05)
    assert world.hot(tables=True).modulation is None
    assert "left out: an adapter or a hook sits on the embedding" in caplog.text
    torch.testing.assert_close(world.run(tables=True), world.run(tables=False))


def test_weights_that_are_elsewhere_have_no_table():
    world = World(tiny_sd3_pipeline)
    for block in world.module.transformer_blocks:
        block.norm1.linear.to("meta")
    assert len(world.hot(tables=True).modulation.layers) == 3
    for part in world.module.modules():
        if isinstance(part, nn.Linear):
            part.to("meta")
    assert world.hot(tables=True).modulation is None


def test_a_network_that_is_modulated_otherwise_is_refused():
    pipe = tiny_sdxl_pipeline()
    with pytest.raises(ValueError, match=r"SD3.5, FLUX.*got UNet2DConditionModel"):
        check_modulated(pipe.family.denoiser(pipe))
    with pytest.raises(ValueError, match="AdaLN tables"):
        pipe.core2_compile(compile=None, tables=True)
