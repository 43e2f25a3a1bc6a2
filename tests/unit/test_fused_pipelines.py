"""`core2_compile` on the tiny pipelines. Truth: the same call without it."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from core2_sampler.pipelines import fused_run
from core2_sampler.plan import Core2Config
from core2_sampler.scales import CallableScale, OnlineScale
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS


def call(pipe, **options):
    size = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 4}
    flux = hasattr(pipe, "transformer") and "guidance_embeds" in pipe.transformer.config
    scale = {"true_cfg_scale": 4.5, "negative_prompt": "c"} if flux else {"guidance_scale": 4.5}
    generator = torch.Generator().manual_seed(0)
    config = Core2Config(mode="core", slow_steps=(1,))
    values = {"core2": config, "generator": generator, **size, **scale, **options}
    return pipe("a b", **values).images


def with_head(pipe, name):
    """Give the pipeline a head that says something."""
    head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe)).eval()
    with torch.no_grad():
        for tensor in (t for t in [*head.parameters(), *head.buffers()] if not t.any()):
            tensor.fill_(0.02)
    pipe.register_modules(weak_head=head)
    return pipe


def count_runs(pipe):
    """Return a list that grows with each run of hot steps."""
    runs, sample = [], pipe._core2_fused
    pipe._core2_fused = lambda *args, **kwargs: runs.append(args) or sample(*args, **kwargs)
    return runs


@pytest.mark.parametrize("name", ["tap", "adapter"])
@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_a_compiled_pipeline_gives_the_same_latents(build, name):
    pipe = with_head(build(), name)
    expected = call(pipe)
    pipe.core2_compile(compile=None)
    runs = count_runs(pipe)
    torch.testing.assert_close(call(pipe), expected, atol=1e-4, rtol=1e-4)
    assert len(runs) == 1
    seen = []

    def watch(_pipe, i, _t, tensors):
        seen.append(i)
        return tensors

    assert torch.equal(call(pipe, callback_on_step_end=watch), expected)
    assert seen == [0, 1, 2, 3]
    assert len(runs) == 1  # a callback may edit: the usual loop


def test_an_interrupt_ends_a_fused_run_with_its_latents(monkeypatch):
    pipe = tiny_sd3_pipeline()
    pipe.core2_compile(compile=None)
    whole = call(pipe, core2="fast", guidance_scale=1.0)
    monkeypatch.setattr(type(pipe), "interrupt", property(lambda self: True))
    first = call(pipe, core2="fast", guidance_scale=1.0)
    assert first.shape == whole.shape
    assert not torch.equal(first, whole)


def test_the_network_is_asked_at_the_timestep_that_the_pipeline_tells():
    pipe = tiny_sd3_pipeline()
    seen = []

    def told(_module, _args, kwargs):
        seen.append((float(pipe._current_timestep), float(kwargs["timestep"][0])))

    pipe.transformer.register_forward_pre_hook(told, with_kwargs=True)
    pipe.core2_compile(compile=None)
    call(pipe, core2="fast", guidance_scale=1.0)
    assert len(seen) == 4
    for ours, networks in seen:
        assert ours == pytest.approx(networks)
    assert pipe._current_timestep is None


@pytest.mark.parametrize(("name", "compiled"), [("tap", True), ("last_gap", False)])
def test_a_head_that_keeps_state_is_not_compiled(name, compiled):
    pipe = tiny_sd3_pipeline()
    head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe))
    pipe.register_modules(weak_head=head)
    pipe.core2_compile()
    assert (head._compiled_call_impl is not None) == compiled


@pytest.mark.parametrize("name", ["tap", "adapter"])
@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_split_pairs_are_the_pairs_and_every_pass_has_b_rows(build, name):
    pipe = with_head(build(), name)
    config = Core2Config(mode="core", slow_steps=2, w2s_scale=1.5)
    expected, rows = call(pipe, core2=config), []
    network = pipe.family.denoiser(pipe).module
    network.register_forward_hook(lambda _part, _args, out: rows.append(len(out[0])))
    pipe.core2_compile(compile=None, tables=name == "tap" and build is not tiny_sdxl_pipeline)
    call(pipe, core2=config)
    pipe._core2_fused.split_pairs = True
    before = len(rows)
    torch.testing.assert_close(call(pipe, core2=config), expected, atol=1e-4, rtol=1e-4)
    assert set(rows[:before]) == {1, 2} and set(rows[before:]) == {1}
    assert sum(rows[before:]) == sum(rows[:before]) == pipe.core2_plan.nfe


def test_a_cache_between_steps_keeps_pairs_whole():
    pipe = tiny_flux_pipeline()
    pipe.core2_compile(graphs=False, compile=None, split_pairs=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    ours = call(pipe, core2=Core2Config("cfg"))
    pipe._core2_fused.split_pairs = False
    assert torch.equal(ours, call(pipe, core2=Core2Config("cfg")))


CONFIGS = {
    "zigzag": {"mode": "zigzag", "inversion_scale": 0.5},
    "zfast": {"mode": "zfast", "zig_steps": (1, 2)},
    "z2": {"mode": "z2", "inversion_scale": 0.5},
}


@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_zigzag_steps_are_hot_and_the_same(build, mode):
    pipe = with_head(build(), "affine")
    config = Core2Config(**CONFIGS[mode])
    told, expected = times(pipe, config)
    pipe.core2_compile(compile=None)
    runs = count_runs(pipe)
    ours, latents = times(pipe, config)
    assert len(runs) == 1
    assert ours == told
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


def times(pipe, config):
    """Return the timestep that the pipeline tells in each pass, and the latents."""
    told = []
    network = pipe.family.denoiser(pipe).module
    handle = network.register_forward_pre_hook(
        lambda *_: told.append(float(pipe._current_timestep))
    )
    latents = call(pipe, core2=config)
    handle.remove()
    return told, latents


def test_zigzag_steps_as_released_run_as_before_and_one_log_line_says_why(caplog):
    fused_run._tell_once.cache_clear()
    pipe = tiny_sd3_pipeline()
    config = Core2Config(mode="zigzag", upstream=True)
    expected = call(pipe, core2=config)
    pipe.core2_compile(compile=None)
    runs = count_runs(pipe)
    with caplog.at_level(logging.WARNING, logger=fused_run.__name__):
        for _ in range(2):
            assert torch.equal(call(pipe, core2=config), expected)
    assert not runs
    told = [record.getMessage() for record in caplog.records if record.name == fused_run.__name__]
    assert len(told) == 1 and "no table of coefficients" in told[0]
    with caplog.at_level(logging.WARNING, logger=fused_run.__name__):
        call(pipe, core2="fast", guidance_scale=1.0, callback_on_step_end=lambda *_: {})
    assert "a callback may edit tensors" in caplog.text


class Size:
    """Prefers latents of a size: each candidate scores otherwise."""

    def check_family(self, family):
        pass

    check_latents = check_family

    def __call__(self, x, sigma, conditioning):
        wanted = 0.8 + conditioning.pooled.float().mean(1).sin()
        return -(x / (1 + sigma[:, None, None, None])).flatten(1).std(1).sub(wanted).abs()


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_sdxl_pipeline])
def test_an_online_scale_is_hot_and_its_schedule_told(build):
    pipe = with_head(build(), "affine")
    rule = OnlineScale({"size": Size()}, (1.0, 3.0, 7.5))
    config = Core2Config(mode="core", slow_steps=(1,), scale_rule=rule)
    expected = call(pipe, core2=config)
    picked = pipe.core2_schedule
    pipe.core2_compile(compile=None)
    runs = count_runs(pipe)
    torch.testing.assert_close(call(pipe, core2=config), expected, atol=1e-4, rtol=1e-4)
    assert len(runs) == 1
    torch.testing.assert_close(pipe.core2_schedule, picked)
    rule = CallableScale(lambda pair: torch.full((1,), 3.0))
    call(pipe, core2=Core2Config(mode="cfg", scale_rule=rule))
    assert len(runs) == 1  # any function may do anything: the usual loop


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline])
def test_tables_change_nothing_in_a_pipeline(build):
    pipe = with_head(build(), "affine")
    expected = call(pipe)
    layers = {name: id(part) for name, part in pipe.transformer.named_modules()}
    pipe.core2_compile(compile=None, tables=True)
    torch.testing.assert_close(call(pipe), expected, atol=1e-4, rtol=1e-4)
    assert {name: id(part) for name, part in pipe.transformer.named_modules()} == layers


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_a_pipeline_that_was_never_called_can_be_compiled(build):
    pipe = build()
    pipe.core2_compile()
    network = pipe.family.denoiser(pipe).module
    assert any(part._compiled_call_impl is not None for part in network.modules())


def test_what_cannot_be_compiled_leaves_nothing_behind():
    pipe = tiny_sdxl_pipeline()
    with pytest.raises(ValueError, match="AdaLN tables"):
        pipe.core2_compile(compile=None, tables=True, vae_bf16=True)
    assert pipe._core2_fused is None and not pipe._core2_vae_bf16
    pipe = tiny_flux_pipeline()
    before = [
        block.attn.processor._attention_backend for block in pipe.transformer.transformer_blocks
    ]
    with pytest.raises(ValueError, match="did you mean 'regional'"):
        pipe.core2_compile(compile="regionl", attention="_native_math")
    after = [
        block.attn.processor._attention_backend for block in pipe.transformer.transformer_blocks
    ]
    assert before == after and pipe._core2_fused is None


@torch.no_grad()
def test_images_are_decoded_under_the_autocast_of_the_caller():
    pipe = tiny_sdxl_pipeline()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        scaled = latents / pipe.vae.config.scaling_factor
        expected = pipe.vae.decode(scaled, return_dict=False)[0]
        ours = pipe.family.decode(pipe, latents)
    assert torch.equal(ours, expected) and ours.dtype == torch.bfloat16


@torch.no_grad()
def test_a_vae_that_fails_in_float16_decodes_in_bfloat16_where_asked():
    pipe = tiny_sdxl_pipeline()
    assert pipe.vae.config.force_upcast
    pipe.vae.to(torch.float16)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = [p.clone() for p in pipe.vae.parameters()]
    exact = pipe.family.decode(pipe, latents)
    pipe.core2_compile(compile=None, vae_bf16=True)
    ours = pipe.family.decode(pipe, latents)
    assert ours.dtype == exact.dtype == torch.float32
    error = float((ours - exact).square().mean().sqrt() / exact.std())
    assert 1e-4 < error < 2e-2, error
    assert pipe.vae.dtype == torch.float16
    assert all(map(torch.equal, before, pipe.vae.parameters()))  # and back without loss
    with pytest.raises(ValueError, match="vae_bf16 must be False for sd3"):
        tiny_sd3_pipeline().core2_compile(vae_bf16=True)
