"""Heads on tiny real SDXL and FLUX models. Truth: merged weights, the stock pipeline's packing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from core2_sampler.pipelines.adapters.sd3 import SD3Denoiser
from core2_sampler.shapes import model_path
from core2_sampler.testing import tiny_flux_pipeline, tiny_sdxl_pipeline
from core2_sampler.testing.stock import STOCK
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads import load_head
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.patch import PatchHead
from core2_sampler.weak_heads.tap import TapHead

TINY = {"flux": tiny_flux_pipeline, "sdxl": tiny_sdxl_pipeline}
SIGMA = torch.tensor([0.7, 0.2])


@pytest.fixture(params=TINY)
def denoiser(request):
    pipe = TINY[request.param]()
    return pipe.family.denoiser(pipe)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(denoiser):
    head = TapHead.fit_config(denoiser)
    config = denoiser.module.config
    width = config.cross_attention_dim if "cross_attention_dim" in config else None
    width = width or config.joint_attention_dim
    return Conditioning(randn(2, 3, width, seed=1), randn(2, head["pooled_dim"], seed=2))


@torch.no_grad()
def run(denoiser):
    """Return a pass on two samples with 8 x 8 latents, and its last hidden state."""
    with denoiser.capture_features() as latest:
        d = denoiser(randn(2, 4, 8, 8), SIGMA, prompt(denoiser))
        return d, latest()


def test_an_adapter_is_the_network_with_merged_weights(denoiser):
    head = AdapterHead.for_denoiser(denoiser, rank=3)
    merged = copy.deepcopy(denoiser.module)
    with torch.no_grad():
        for name in head.config.layers:
            down, up = (group[name.replace(".", "/")] for group in (head.down, head.up))
            up.copy_(0.2 * randn(*up.shape, seed=3))
            change = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            merged.get_submodule(name).weight += change
    with head.attached(denoiser.module), head.active(head.config.reference_scale):
        got, _ = run(denoiser)
    wanted, _ = run(replace(denoiser, module=merged))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - run(denoiser)[0]).abs().max() > 0.01


def test_an_adapter_reaches_every_block_but_not_the_layers_around_them(denoiser):
    layers = set(AdapterHead.for_denoiser(denoiser).config.layers)
    modules = denoiser.module.named_modules()
    linears = {name for name, layer in modules if isinstance(layer, nn.Linear)}
    if denoiser.family == "flux":
        around = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
        assert layers == {name for name in linears if not name.startswith(around)}
    else:
        inner = {n for n in linears if not n.startswith(("time_embedding", "add_embedding"))}
        ends = {name for name in inner if name.endswith(("proj_in", "proj_out"))}
        assert inner - ends <= layers and not ends & layers


def test_the_layers_of_the_shipped_head_are_still_the_default():
    folder = model_path("sd3")
    network = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    shipped = load_head(folder / "weak_head", family="sd3")
    again = AdapterHead.for_denoiser(SD3Denoiser(network))
    assert again.config.layers == shipped.config.layers
    with shipped.attached(network):
        pass


def loud_tap(denoiser, num_layers):
    head = TapHead.for_denoiser(denoiser, num_layers=num_layers)
    with torch.no_grad():
        head.proj_out.weight.copy_(randn(*head.proj_out.weight.shape, seed=4))
    return head


@torch.no_grad()
def gap_of(head, features, x=None, sigma=SIGMA):
    cond = randn(2, 4, 8, 8, seed=5)
    x = cond if x is None else x
    pooled, unused = torch.ones(2, head.config.pooled_dim), torch.empty(0)
    return head(cond, x=x, sigma=sigma, prompt_embeds=unused, pooled=pooled, features=features)


def test_a_tap_reads_the_last_hidden_state(denoiser):
    _, features = run(denoiser)
    gap = gap_of(loud_tap(denoiser, 2), features)
    assert gap.shape == (2, 4, 8, 8) and gap.abs().max() > 0.1
    assert torch.equal(gap_of(TapHead.for_denoiser(denoiser), features), torch.zeros(2, 4, 8, 8))


def test_each_token_of_a_tap_lies_behind_its_own_latents(denoiser):
    _, features = run(denoiser)
    head = loud_tap(denoiser, 0)  # without attention a token tells of its own latents alone
    here = torch.zeros(2, 4, 8, 8)
    here[:, :, 2:4, 6:8] = 1
    touched = FluxPipeline._pack_latents(here, *here.shape)[..., :1]  # [B, tokens, 1]
    # noise: a layer norm would not see a constant
    change = gap_of(head, features + touched * randn(*features.shape)) - gap_of(head, features)
    assert torch.equal(change != 0, here != 0)


def test_a_tap_sees_sdxls_latents_as_the_network_does():
    pipe = tiny_sdxl_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    _, features = run(denoiser)
    head = loud_tap(denoiser, 1)
    flow = TapHead.from_config({**head.config, "family": "sd3"})
    flow.load_state_dict(head.state_dict())
    x, sigma = randn(2, 4, 8, 8, seed=6), torch.tensor([0.3, 9.0])
    grown = x * (1 + sigma**2).sqrt()[:, None, None, None]
    wanted = gap_of(flow, features, x, sigma)
    torch.testing.assert_close(gap_of(head, features, grown, sigma), wanted)
    assert (gap_of(flow, features, grown, sigma) - wanted).abs().max() > 0.01


def test_a_head_on_a_pooled_prompt_is_refused_where_there_is_none():
    pipe = tiny_sdxl_pipeline()
    config = dict(pipe.unet.config) | {"addition_embed_type": None}
    unet, pixart = UNet2DConditionModel.from_config(config), STOCK["PixArtSigmaPipeline"].pipe()
    for module in (unet, pixart.transformer):
        denoiser = replace(pipe.family.denoiser(pipe), module=module)
        for kind in (TapHead, PatchHead):
            with pytest.raises(ValueError, match="take a pooled .* use a conv or adapter head"):
                kind.for_denoiser(denoiser)
