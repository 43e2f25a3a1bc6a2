"""The adapter head. Truth: a copy of the network with the low-rank matrices in its weights."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from core2_sampler.pipelines.adapters.sd3 import SD3Denoiser
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.adapter import AdapterHead

SIGMA = torch.tensor([0.7, 0.3])


@pytest.fixture
def pipe():
    return tiny_sd3_pipeline()


@pytest.fixture
def denoiser(pipe):
    return pipe.family.denoiser(pipe)


@pytest.fixture
def prompt(pipe):
    return partial(pipe.family.encode, pipe, max_sequence_length=8)(["a b", "c"])[0]


def loud(head):
    """Give an untrained head weights that change the output visibly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.up.values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return head


@pytest.fixture
def head(denoiser):
    return loud(AdapterHead.for_denoiser(denoiser, reference_scale=4.0, scale_range=(2.0, 7.0)))


@torch.no_grad()
def run(denoiser, prompt):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return denoiser(x, SIGMA, prompt)


def run_with(head, denoiser, prompt, scale):
    with head.attached(denoiser.module), head.active(scale):
        return run(denoiser, prompt)


def merged(module, head, strength):
    """Return a copy of the network whose weights are ``W + strength * up @ down``."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name in head.config.layers:
            layer = module.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            down, up = head.down[name.replace(".", "/")], head.up[name.replace(".", "/")]
            layer.weight += strength * torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return module


def test_it_adapts_attention_feed_forward_and_modulation_of_both_streams(head):
    endings = {name.split("transformer_blocks.0.")[-1] for name in head.config.layers}
    wanted = {"attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out", "ff.net.0.proj"}
    assert wanted | {"ff_context.net.2", "norm1.linear", "norm1_context.linear"} <= endings


@pytest.mark.parametrize("scale", [2.0, 4.0, 7.0])
def test_active_it_is_the_network_with_merged_weights(head, denoiser, prompt, scale):
    strength = (scale - 1) / (4.0 - 1)
    wanted = run(SD3Denoiser(merged(denoiser.module, head, strength)), prompt)
    got = run_with(head, denoiser, prompt, scale)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - run(denoiser, prompt)).abs().max() > 0.1


def test_scale_one_is_cond_bit_for_bit(head, denoiser, prompt):
    assert torch.equal(run_with(head, denoiser, prompt, 1.0), run(denoiser, prompt))


def test_off_it_leaves_no_trace(head, denoiser, prompt):
    before = run(denoiser, prompt)
    hooks = [dict(m._forward_hooks) for m in denoiser.module.modules()]
    state = {name: id(m) for name, m in denoiser.module.named_modules()}
    with head.attached(denoiser.module):
        assert torch.equal(run(denoiser, prompt), before)
        with head.active(4.0):
            assert not torch.equal(run(denoiser, prompt), before)
        assert torch.equal(run(denoiser, prompt), before)
    assert [dict(m._forward_hooks) for m in denoiser.module.modules()] == hooks
    assert {name: id(m) for name, m in denoiser.module.named_modules()} == state


def test_an_error_inside_leaves_no_trace_either(head, denoiser, prompt):
    before = run(denoiser, prompt)
    with pytest.raises(RuntimeError), head.attached(denoiser.module), head.active(4.0):
        raise RuntimeError
    assert not any(m._forward_hooks for m in denoiser.module.modules())
    with head.attached(denoiser.module):
        assert torch.equal(run(denoiser, prompt), before)


def test_the_strength_of_a_layer_is_linear_in_the_scale(head, denoiser):
    layer = denoiser.module.transformer_blocks[0].attn.to_q
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(2))
    with head.attached(denoiser.module), torch.no_grad():
        plain = layer(x)
        change = {}
        for scale in (2.0, 4.0, 7.0):
            with head.active(scale):
                change[scale] = layer(x) - plain
    for scale in (2.0, 7.0):
        torch.testing.assert_close(change[scale], change[4.0] * (scale - 1) / 3)


def test_it_lives_beside_a_user_lora(head, denoiser, prompt):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser.module.add_adapter(config)
    lora_only = run(denoiser, prompt)
    wanted = run(SD3Denoiser(merged(denoiser.module, head, 1.0)), prompt)
    torch.testing.assert_close(run_with(head, denoiser, prompt, 4.0), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(run(denoiser, prompt), lora_only)
    again = AdapterHead.for_denoiser(denoiser)
    assert again.config.layers == head.config.layers


def test_a_network_wrapped_to_compile_is_hooked_itself(head, denoiser, prompt):
    wrapped = torch.compile(denoiser.module, backend="eager")
    with head.attached(wrapped), head.active(4.0):
        inside = run(denoiser, prompt)
    assert torch.equal(inside, run_with(head, denoiser, prompt, 4.0))
    assert AdapterHead.for_denoiser(SD3Denoiser(wrapped)).config.layers == head.config.layers


@pytest.mark.parametrize("scale", [0.0, 1.5, 7.1, -1.0])
def test_a_scale_it_was_not_trained_for_is_refused(head, denoiser, scale):
    with (
        pytest.raises(ValueError, match="within 2.0 to 7.0"),
        head.attached(denoiser.module),
        head.active(scale),
    ):
        pass


def test_it_must_be_attached_once_and_before_it_is_active(head, denoiser):
    with pytest.raises(ValueError, match="attached before"), head.active(4.0):
        pass
    with (
        pytest.raises(ValueError, match="once at a time"),
        head.attached(denoiser.module),
        head.attached(denoiser.module),
    ):
        pass
    with head.attached(denoiser.module):
        pass


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"num_attention_heads": 4}])
def test_another_model_is_refused(head, denoiser, change):
    config = dict(denoiser.module.config) | change
    config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    other = SD3Transformer2DModel.from_config(config)
    with (
        pytest.raises(ValueError, match="must meet a layer transformer_blocks"),
        head.attached(other),
    ):
        pass
    assert not any(m._forward_hooks for m in other.modules())


def test_fused_projections_are_refused(head, denoiser):
    denoiser.module.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv"), head.attached(denoiser.module):
        pass


def test_a_denoiser_without_the_targets_is_refused(denoiser):
    with pytest.raises(ValueError, match="got no_such_layer"):
        AdapterHead.for_denoiser(denoiser, targets=("no_such_layer",))


@pytest.mark.parametrize("scales", [(1.0, 4.0), (5.0, 4.0), (0.0, 2.0)])
def test_a_range_that_cannot_be_is_refused(denoiser, scales):
    with pytest.raises(ValueError, match="rising scales above 1"):
        AdapterHead.for_denoiser(denoiser, scale_range=scales)


class UNetDenoiser:
    """A real UNet behind the contract, as much of it as an adapter needs."""

    family, latent_channels = "unet", 4

    def __init__(self, module):
        self.module = module

    def __call__(self, x, sigma, conditioning):
        return self.module(x, sigma * 1000, conditioning.prompt_embeds).sample

    @contextmanager
    def capture_features(self):
        raise NotImplementedError
        yield


def test_convolutions_are_adapted_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=6,
            attention_head_dim=4,
            norm_num_groups=4,
        ).eval()
    denoiser = UNetDenoiser(unet)
    head = loud(AdapterHead.for_denoiser(denoiser, rank=3))
    assert any(len(shape) == 4 for shape in head.config.layers.values())
    prompt = Conditioning(torch.ones(2, 3, 6), torch.zeros(2, 1))
    wanted = run(UNetDenoiser(merged(unet, head, 1.0)), prompt)
    got = run_with(head, denoiser, prompt, 4.5)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - run(denoiser, prompt)).abs().max() > 0.01
