"""The published networks on the meta device.

Truth: the architectures written down once more as lists of linear layers, published counts, and
the arguments of the stock pipelines.
"""

from __future__ import annotations

import inspect
import json
import math
from functools import cache

import pytest
import torch

from core2_sampler.benchmarks.full_size import (
    TABLE_HEADS,
    build_denoiser,
    build_head,
    measure,
    share_at_full_size,
    write_costs,
)
from core2_sampler.full_size import FULL_SIZE, build_network, example_call
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

MODELS = ["flux-dev", "flux-schnell", "sd35-large", "sd35-medium", "sdxl"]


@cache
def costs(name):
    return measure(FULL_SIZE.get(name))


def mmdit(dim, layers, dual, text):
    """Return SD3.5's linear layers (in, out, tokens, adapted), norms' weights, attention FLOPs.

    Reference: MMDiT, arXiv 2403.03206; in the first `dual` layers the image also attends alone.
    """
    image = 64 * 64
    linears = [(16 * 4, dim, image, False), (4096, dim, text, False)]
    linears += [(256, dim, 1, False), (2048, dim, 1, False), *[(dim, dim, 1, False)] * 2]
    for layer in range(layers):
        two, last = layer < dual, layer == layers - 1
        linears += [(dim, dim, image, True)] * (8 if two else 4)
        linears += [(dim, 4 * dim, image, True), (4 * dim, dim, image, True)]
        linears += [(dim, (9 if two else 6) * dim, 1, True)]
        linears += [(dim, dim, text, True)] * 3
        if last:  # nothing of the text stream follows
            linears += [(dim, 2 * dim, 1, True)]
        else:
            linears += [(dim, dim, text, True), (dim, 6 * dim, 1, True)]
            linears += [(dim, 4 * dim, text, True), (4 * dim, dim, text, True)]
    linears += [(dim, 2 * dim, 1, False), (dim, 64, image, False)]
    norms = 64 * (4 * layers + 2 * dual)
    return linears, norms, 4 * dim * (layers * (image + text) ** 2 + dual * image**2)


def flux(guidance, text):
    """Return the same of FLUX.1: 19 blocks with a stream each for image and text, 38 with one."""
    dim, image = 3072, 64 * 64
    linears = [(64, dim, image, False), (4096, dim, text, False), (768, dim, 1, False)]
    linears += [(256, dim, 1, False)] * (1 + guidance) + [(dim, dim, 1, False)] * (2 + guidance)
    for tokens in (image, text):
        block = [(dim, dim, tokens, True)] * 4 + [(dim, 6 * dim, 1, True)]
        block += [(dim, 4 * dim, tokens, True), (4 * dim, dim, tokens, True)]
        linears += 19 * block
    both = image + text
    block = [(dim, dim, both, True)] * 3 + [(dim, 3 * dim, 1, True)]
    block += [(dim, 4 * dim, both, True), (5 * dim, dim, both, True)]
    linears += 38 * block
    linears += [(dim, 2 * dim, 1, False), (dim, 64, image, False)]
    return linears, 128 * (4 * 19 + 2 * 38), 4 * dim * (19 + 38) * both**2


ARCHITECTURES = {
    "sd35-medium": mmdit(1536, 24, 13, 333),
    "sd35-large": mmdit(2432, 38, 0, 333),
    "flux-dev": flux(guidance=True, text=512),
    "flux-schnell": flux(guidance=False, text=256),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_transformer_costs_what_its_layers_do(name):
    linears, norms, attention = ARCHITECTURES[name]
    got = costs(name)["denoiser"]
    assert got.parameters == norms + sum((into + 1) * out for into, out, _, _ in linears)
    assert got.attention_flops == attention
    assert got.flops - attention == sum(2 * n * into * out for into, out, n, _ in linears)


@pytest.mark.parametrize(
    ("name", "parameters", "flops", "attention"),
    [  # an earlier count on the same classes: parameters, FLOPs a pass, share of attention
        ("sdxl", 2.5675e9, 6.761e12, 0.116),
        ("sd35-large", 8.0566e9, 31.121e12, 0.233),
        ("flux-dev", 11.9014e9, 74.385e12, 0.200),
    ],
)
def test_costs_are_those_on_record(name, parameters, flops, attention):
    got = costs(name)["denoiser"]
    assert got.parameters == pytest.approx(parameters, rel=1e-3)
    assert got.flops == pytest.approx(flops, rel=1e-3)
    assert got.attention_flops / got.flops == pytest.approx(attention, abs=5e-4)


def test_sdxl_costs_what_t_gate_published():
    # 149.438 T multiplications with addition in 25 steps of CFG, without those inside attention
    got = costs("sdxl")["denoiser"]
    assert got.flops - got.attention_flops == pytest.approx(2 * 149.438e12 / 50, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "file_size"),
    [("sd35-medium", 4_939_433_672), ("flux-dev", 23_802_816_640)],
)
def test_in_two_bytes_each_it_fills_the_published_files(name, file_size):
    # bytes of the safetensors of the transformer, which also hold SD3.5's table of positions
    state = build_network(FULL_SIZE.get(name)).state_dict()
    assert 2 * sum(t.numel() for t in state.values()) == pytest.approx(file_size, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_allocated(name):
    denoiser = build_denoiser(FULL_SIZE.get(name))
    head, network = build_head("adapter", denoiser), denoiser.module
    tensors = [*network.state_dict().values(), *network.buffers(), *head.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# What the stock pipelines hand to the networks for two images of 512 x 2048 px.
ARGUMENTS = {
    "sd3": {
        "hidden_states": (2, 16, 64, 256),
        "timestep": (2,),
        "encoder_hidden_states": (2, 333, 4096),
        "pooled_projections": (2, 2048),
    },
    "sdxl": {
        "sample": (2, 4, 64, 256),
        "timestep": (2,),
        "encoder_hidden_states": (2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": (2, 1280), "time_ids": (2, 6)},
    },
    "flux": {
        "hidden_states": (2, 4096, 64),
        "timestep": (2,),
        "pooled_projections": (2, 768),
        "txt_ids": (512, 3),
        "img_ids": (4096, 3),
        "encoder_hidden_states": (2, 512, 4096),
        "guidance": (2,),
    },
}


def shapes(arguments):
    """Return nested arguments with shapes for tensors, without those that are None."""
    if isinstance(arguments, torch.Tensor):
        return tuple(arguments.shape)
    given = {key: value for key, value in arguments.items() if value is not None}
    return {key: shapes(value) for key, value in given.items()}


@pytest.mark.parametrize("name", MODELS)
def test_our_denoiser_calls_the_network_as_the_stock_pipeline_does(name):
    model, seen = FULL_SIZE.get(name), {}
    denoiser, call = build_denoiser(model), example_call(model, 2, 512, 2048)
    signature = inspect.signature(denoiser.module.forward)

    def record(_module, args, kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)

    denoiser.module.register_forward_pre_hook(record, with_kwargs=True)
    assert denoiser.family == model.family and denoiser.latent_channels == model.latent_channels
    with torch.no_grad(), denoiser.capture_features() as features:
        d = denoiser(call.x, call.sigma, call.prompt)
    assert d.shape == call.x.shape == (2, model.latent_channels, 64, 256)
    # as many tokens as the square has that the costs are counted on
    assert features().shape == (2, *costs(name)["denoiser"].features.shape[1:])
    assert seen.pop("return_dict") is False
    wanted = dict(ARGUMENTS[model.family])
    if name == "flux-schnell":
        del wanted["guidance"]
        wanted |= {"encoder_hidden_states": (2, 256, 4096), "txt_ids": (256, 3)}
    assert shapes(seen) == wanted


def test_a_size_between_two_tokens_is_refused():
    with pytest.raises(ValueError, match="multiples of 16, got 1024 and 1000"):
        example_call(FULL_SIZE.get("sdxl"), 1, 1024, 1000)


@pytest.mark.parametrize("name", MODELS)
def test_all_heads_fit(name):
    parts = costs(name)
    for part in parts.values():
        assert part.output.shape == (1, FULL_SIZE.get(name).latent_channels, 128, 128)
    # both layers of the tap attend from 64 x 64 tokens to as many, at width 128
    assert parts["tap"].attention_flops == 2 * 4 * 128 * 4096**2
    # the four of the patch head from 32 x 32, at width 256
    assert parts["patch"].attention_flops == 4 * 4 * 256 * 1024**2
    for head in ("conv", "patch", "tap"):
        assert parts[head].flops <= 0.01 * parts["denoiser"].flops


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_a_conv_head_costs_what_its_layers_do(name):
    channels, large, middle, small = FULL_SIZE.get(name).latent_channels, 128**2, 64**2, 32**2

    def block(into, out, pixels):
        shortcut = into * out * pixels if into != out else 0
        return 9 * (into + out) * out * pixels + 256 * out + shortcut

    convolutions = [(2 * channels, 64, large), (64, channels, large)]
    convolutions += [(64, 64, middle), (128, 128, small)]  # down
    convolutions += [(128, 128, middle), (128, 128, large)]  # up
    blocks = [(64, 64, large), (64, 128, middle), *[(128, 128, small)] * 3]  # down, middle
    blocks += [(256, 128, small)] * 2 + [(256, 128, middle), (192, 128, middle)]  # up, with skips
    blocks += [(192, 64, large), (128, 64, large)]
    wanted = sum(9 * into * out * pixels for into, out, pixels in convolutions)
    wanted += sum(block(*each) for each in blocks) + 64 * 256 + 256 * 256  # noise level
    assert costs(name)["conv"].flops == 2 * wanted


def test_a_heads_own_options_count_at_full_size():
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    parts = costs("sd35-large")
    tap = HEADS.get("tap").for_denoiser(denoiser)
    assert share_at_full_size(tap, denoiser) == parts["tap"].flops / parts["denoiser"].flops
    wide = HEADS.get("adapter").for_denoiser(denoiser, rank=16)  # the table has rank 8
    wanted = 2 * parts["adapter"].flops / parts["denoiser"].flops
    assert share_at_full_size(wide, denoiser) == pytest.approx(wanted)
    few = HEADS.get("adapter").for_denoiser(denoiser, targets=("to_q",))
    assert math.isnan(share_at_full_size(few, denoiser))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_costs_two_thin_products_a_layer(name):
    adapted = [linear[:3] for linear in ARCHITECTURES[name][0] if linear[3]]
    got = costs(name)["adapter"]
    assert got.parameters == sum(8 * (into + out) for into, out, _ in adapted)
    assert got.flops == sum(2 * n * 8 * (into + out) for into, out, n in adapted)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("sdxl", 0.00950),
        ("sd35-medium", 0.00510),
        ("sd35-large", 0.00378),
        ("flux-dev", 0.00301),
        ("flux-schnell", 0.00304),
    ],
)
def test_an_adapter_costs_under_one_percent(name, share):
    parts = costs(name)
    assert parts["adapter"].flops / parts["denoiser"].flops == pytest.approx(share, abs=1e-5)


def test_the_table_has_every_model_and_head(tmp_path):
    write_costs(tmp_path / "costs.md", {name: costs(name) for name in MODELS})
    rows = json.loads((tmp_path / "costs.json").read_text())
    got = {(row["arm"], row["metric"]): row["value"] for row in rows}
    for name in MODELS:
        parts = costs(name)
        assert got[f"{name}/denoiser", "parameters"] == parts["denoiser"].parameters
        for head in TABLE_HEADS:
            share = parts[head].flops / parts["denoiser"].flops
            assert got[f"{name}/{head}", "share_of_pass"] == share
    assert all(row["provenance"]["height"] == 1024 and row["low"] is None for row in rows)
    lines = (tmp_path / "costs.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:9]] == [f"| {name}" for name in MODELS]
    assert "| 2.5675 | 6.761 | 11.6% |" in lines[8]
