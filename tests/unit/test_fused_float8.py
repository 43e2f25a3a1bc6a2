"""float8 linear layers: which ones, what is refused, and what they compute.

torchao has a path for CPUs behind a check for GPUs, which is taken away here. Truth: the
architectures' weights, written down once more; the same run in bfloat16.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig

from core2_sampler.full_size import FULL_SIZE, build_network
from core2_sampler.fused.float8 import (
    check_float8,
    check_layers,
    convert_to_float8,
    float8_layers,
)
from core2_sampler.fused.modulation import Modulation
from core2_sampler.fused.state import State
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS


def unet_block(d):
    """Attention to the image, to 2048 wide tokens, and a feed-forward gated by half of it."""
    return 4 * d**2 + (2 * d**2 + 2 * d * 2048) + (8 + 4) * d**2


WEIGHTS = {
    # Twice four projections and a feed-forward of 8 d^2; in the last block the text is only read.
    "sd35-large": (37 * 24 + 15) * 2432**2,
    # The same, then single blocks: three projections, 4 d^2 up, and 5 d^2 back.
    "flux-dev": (19 * 24 + 38 * 12) * 3072**2,
    "sdxl": 10 * unet_block(640) + 60 * unet_block(1280),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_layers_are_those_that_see_tokens(name):
    module = build_network(FULL_SIZE.get(name))
    layers = float8_layers(module)
    assert len(set(layers)) == len(layers)
    assert sum(module.get_submodule(each).weight.numel() for each in layers) == WEIGHTS[name]


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline])
def test_no_layer_that_has_a_table_is_converted(build):
    pipe = build()
    denoiser = pipe.family.denoiser(pipe)
    state = State.allocate(torch.zeros(1, 4, 8, 8), 4, pairs=True)
    tables = Modulation.allocate(denoiser, state)
    names = {id(part): name for name, part in denoiser.module.named_modules()}
    of_tables = {names[id(layer)] for layer in tables.layers}
    assert of_tables and not of_tables & set(float8_layers(denoiser.module))


def test_sides_that_no_product_takes_are_left():
    module = tiny_sd3_pipeline().transformer
    before = float8_layers(module)
    odd = module.transformer_blocks[0].ff.net[2]
    module.transformer_blocks[0].ff.net[2] = torch.nn.Linear(odd.in_features, 17)
    assert set(before) - set(float8_layers(module)) == {"transformer_blocks.0.ff.net.2"}


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_off_a_gpu_that_multiplies_in_float8_it_is_refused(build):
    pipe = build()
    network = pipe.family.denoiser(pipe).module
    before = {name: type(weight) for name, weight in network.named_parameters()}
    with pytest.raises(ValueError, match=r"compute capability 8.9 or above .* got cpu"):
        pipe.core2_compile(fp8=True, keep_negative=True)
    assert pipe._core2_fused is None and pipe._core2_negatives is None
    assert {name: type(weight) for name, weight in network.named_parameters()} == before
    assert all(part._compiled_call_impl is None for part in network.modules())


def test_networks_that_cannot_be_converted_are_refused():
    module = tiny_sd3_pipeline().transformer.bfloat16()
    check_layers(module, torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 weights, got torch.float32"):
        check_layers(module, torch.float32)
    with pytest.raises(ValueError, match="none in Linear: leave it off"):
        check_layers(torch.nn.Linear(16, 16), torch.bfloat16)
    adapted = copy.deepcopy(module)
    adapted.add_adapter(LoraConfig(r=16, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="without adapters, got some: fuse_lora"):
        check_layers(adapted, torch.bfloat16)
    with pytest.raises(ValueError, match="compute capability"):
        check_float8(module)


def call(pipe, prompt="a b"):
    values = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 2}
    values[pipe.family.scale_argument] = 4.5
    if pipe.family.name != "sdxl":
        values["max_sequence_length"] = 8
    config = Core2Config("core", slow_steps=1, w2s_scale=1.5)
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompt, negative_prompt="c", core2=config, generator=generator, **values).images
    return images.float()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize(
    ("build", "name", "tables"),
    [
        (tiny_sd3_pipeline, "adapter", True),
        (tiny_flux_pipeline, "tap", True),
        (tiny_sdxl_pipeline, "tap", False),
    ],
)
def test_a_converted_network_says_nearly_the_same(build, name, tables, monkeypatch):
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda _granularity: None)
    pipe = build().to(torch.bfloat16)
    head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe)).eval()
    with torch.no_grad():
        for tensor in (t for t in head.parameters() if not t.any()):
            tensor.fill_(0.02)
    pipe.register_modules(weak_head=head)
    exact, other = call(pipe), call(pipe, "d e f")
    network = pipe.family.denoiser(pipe).module
    wanted = float8_layers(network)
    convert_to_float8(network)
    kinds = {name: type(weight).__name__ for name, weight in network.named_parameters()}
    assert [key.removesuffix(".weight") for key in kinds if kinds[key] == "Float8Tensor"] == wanted
    with pytest.raises(ValueError, match="converted already"):
        check_layers(network, torch.bfloat16)
    usual = call(pipe)
    size = (other - exact).norm()
    assert 0 < (usual - exact).norm() < 0.5 * size
    pipe.core2_compile(graphs=False, compile=None, tables=tables)
    assert (call(pipe) - exact).norm() < 0.5 * size
