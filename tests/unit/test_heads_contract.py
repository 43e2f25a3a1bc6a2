"""The contract of weak heads; a head joins by being registered. Truth: the network without it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import SD3Transformer2DModel

from core2_sampler.guidance import make_predict
from core2_sampler.pipelines.adapters.sd3 import SD3Denoiser
from core2_sampler.plan import make_plan
from core2_sampler.rows import Rows
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.types import Conditioning, InModelHead, OutputHead
from core2_sampler.weak_heads import HEADS, load_head

SCALE = 4.5


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def encode(pipe):
    return partial(pipe.family.encode, pipe, max_sequence_length=8)


@pytest.fixture(params=HEADS.names())
def head(request, pipe):
    """Return each registered head, untrained."""
    return HEADS.get(request.param).for_denoiser(pipe.family.denoiser(pipe))


def trained(head, shape=(4, 8, 8), batch=3):
    """Return the head with weights, coefficients or a memory that make it predict something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if hasattr(head, "fit"):
        x, cond, gap = torch.randn(3, 6, *shape, generator=generator)
        sigma = torch.tensor([0.2, 0.8]).repeat(3)
        none = torch.zeros(6, 1)
        head.fit([Rows(x, cond, gap, sigma, none, none, none)])
    return head


def guided(head, denoiser, x, prompt, gap=None, sigma=0.7):
    """Return ``d`` of one fast step, by the closure that every sampler uses."""
    plan = make_plan("core", 1, SCALE, in_model=head.in_model)
    predict = make_predict(denoiser, torch.tensor([sigma, 0.0]), plan, prompt, None, head)
    if gap is not None:
        head.observe(gap)
    attached = head.attached(denoiser.module) if head.in_model else nullcontext()
    with torch.no_grad(), attached:
        return predict(x, 0)


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_has_one_of_the_two_interfaces(head):
    assert isinstance(head, InModelHead if head.in_model else OutputHead)


def test_untrained_it_is_cond_bit_for_bit(head, pipe, encode):
    cond, _ = encode(["a", "b c", "d"])
    x, denoiser = latents(3, 4, 8, 8), pipe.family.denoiser(pipe)
    with torch.no_grad():
        plain = denoiser(x, torch.full((3,), 0.7), cond)
    assert torch.equal(guided(head, denoiser, x, cond), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 8, 12), (2, 4, 16, 6)])
def test_any_batch_any_resolution_any_dtype(head, encode, shape, dtype):
    pipe = tiny_sd3_pipeline().to(dtype)
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = encode(["a"] * shape[0])
    prompt = type(cond)(cond.prompt_embeds.to(dtype), cond.pooled.to(dtype))
    head = trained(head).to(dtype)
    d = guided(head, denoiser, latents(*shape).to(dtype), prompt)
    assert d.shape == shape and d.dtype == dtype and torch.isfinite(d).all()


def test_it_is_the_same_after_saving_and_loading(head, pipe, encode, tmp_path):
    head = trained(head)
    head.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.iterdir()}
    assert kinds == {".json", ".safetensors"}
    again = load_head(tmp_path, family="sd3")
    assert type(again) is type(head) and not again.training
    cond, _ = encode(["a", "b", "c"])
    x, gap = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    first, second = (guided(h, pipe.family.denoiser(pipe), x, cond, gap) for h in (head, again))
    assert torch.equal(first, second)
    untrained = type(head).for_denoiser(pipe.family.denoiser(pipe))
    silent = type(head).__name__ == "CondHead"
    assert silent or not torch.equal(first, guided(untrained, pipe.family.denoiser(pipe), x, cond))


def test_it_leaves_the_global_random_state_alone(head, pipe, encode):
    cond, _ = encode(["a"])
    before = torch.get_rng_state()
    type(head).for_denoiser(pipe.family.denoiser(pipe))
    guided(trained(head), pipe.family.denoiser(pipe), latents(1, 4, 8, 8), cond)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_initial_weights(head, pipe):
    make = type(head).for_denoiser
    same, again, other = (make(pipe.family.denoiser(pipe), seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(same[name], again[name]) for name in same)
    if list(head.parameters()):
        assert not all(torch.equal(same[name], other[name]) for name in same)


def test_a_sample_does_not_depend_on_its_batch_mates(head, pipe, encode):
    # in float64: in float32 convolutions of another batch size round differently
    head, denoiser = trained(head).double(), pipe.family.denoiser(pipe)
    x, gap = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    together = guided(head, denoiser, x, encode(["a", "b c", "d"])[0], gap)
    alone = guided(head, denoiser, x[1:2], encode(["b c"])[0], gap[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


def test_the_noise_level_of_each_row_is_its_own(head, pipe, encode):
    if head.in_model or type(head).__name__ in ("CondHead", "LastGapHead"):
        pytest.skip("reads no noise level itself")
    head, denoiser = trained(head), pipe.family.denoiser(pipe)
    cond, _ = encode(["a", "b"])
    x, sigma = latents(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    with torch.no_grad(), denoiser.capture_features() as latest:
        d = denoiser(x, sigma, cond)
        values = {"prompt_embeds": cond.prompt_embeds, "pooled": cond.pooled}
        gap = head(d, x=x, sigma=sigma, features=latest(), **values)
        other = head(d, x=x, sigma=sigma.flip(0), features=latest(), **values)
    for row in range(2):
        assert (gap[row] - other[row]).abs().max() > 1e-4


def test_latents_of_other_channels_are_refused(head):
    config = dict(tiny_sd3_pipeline().transformer.config) | {"in_channels": 6, "out_channels": 6}
    denoiser = SD3Denoiser(SD3Transformer2DModel.from_config(config))
    prompt_embeds, pooled = torch.zeros(1, 5, 32), torch.zeros(1, 16)
    with pytest.raises(ValueError, match="4 channels.*got 6"):
        guided(head, denoiser, latents(1, 6, 8, 8), Conditioning(prompt_embeds, pooled))


def test_a_head_of_another_family_is_refused(head, tmp_path):
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for flux, got one for sd3"):
        load_head(tmp_path, family="flux")


def test_only_safetensors_are_loaded(head, tmp_path):
    head.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    torch.save(head.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_head(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must be a folder"),
        ("", "it has no config.json"),
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        (json.dumps({"_class_name": "UNet2DModel"}), "'UNet2DModel': known are .*TapHead"),
    ],
)
def test_what_is_not_a_head_is_refused(tmp_path, config, message):
    folder = tmp_path / "head"
    if config is not None:
        folder.mkdir()
    if config:
        (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_head(folder)
