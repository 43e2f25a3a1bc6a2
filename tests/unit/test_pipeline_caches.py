"""Caches of diffusers under our loop: right, or refused with a reason before anything is encoded.

First-block caching on FLUX is checked against the stock pipeline in ``test_pipeline_flux.py``.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks import HookRegistry, SeaCacheConfig

from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline

STEPS = 5
COND = Core2Config(mode="cond")
EVERY = torch.ones(STEPS)


def sample(pipe, **options):
    texts = {} if pipe.family.name == "sdxl" else {"max_sequence_length": 8}
    values = {
        "prompt": "a b",
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        **texts,
    }
    return pipe(**(values | options)).images


MAKE = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=1e9),
    "mag": lambda pipe: MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=EVERY, retention_ratio=0.2
    ),
    "taylor seer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: float(pipe._current_timestep),
    ),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("hot", [False, True])
def test_a_cache_in_steps_of_one_pass_is_that_of_the_stock_pipeline(name, hot):
    """FLUX without true CFG makes one pass a step: so does our loop, with the same reuse."""
    runs, calls = [], []
    for core2 in (None, COND):
        pipe = tiny_flux_pipeline()
        plain = sample(pipe)
        if hot:
            pipe.core2_compile(graphs=False, compile=None)
        pipe.transformer.enable_cache(MAKE[name](pipe))
        last = pipe.transformer.single_transformer_blocks[-1].attn.to_q
        with count_nfe(last) as counter:
            runs.append(sample(pipe, core2=core2))
        calls.append(counter.rows)
        assert not torch.equal(runs[-1], plain)
    assert calls[0] == calls[1] < STEPS
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SeaCacheConfig(),
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
    ],
)
def test_caches_that_must_be_told_more_are_refused(config):
    pipe = tiny_flux_pipeline()
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=f"rows alone, got {type(config).__name__}"):
        sample(pipe, core2=COND)


APPLY = {
    "FBCHeadBlockHook": lambda network: apply_first_block_cache(
        network, FirstBlockCacheConfig(threshold=0.1)
    ),
    "MagCacheHeadHook": lambda network: apply_mag_cache(
        network, MagCacheConfig(num_inference_steps=STEPS, mag_ratios=EVERY)
    ),
    "TaylorSeerCacheHook": lambda network: apply_taylorseer_cache(network, TaylorSeerCacheConfig()),
}


@pytest.mark.parametrize("hook", APPLY)
def test_a_network_that_cannot_be_told_the_pass_is_refused_with_a_cache(hook):
    pipe = tiny_sd3_pipeline()
    APPLY[hook](pipe.transformer)
    with pytest.raises(ValueError, match=f"SD3Transformer2DModel must have no cache.*got {hook}"):
        sample(pipe, core2=COND)


@pytest.mark.parametrize("hook", APPLY)
def test_a_cache_that_flux_does_not_know_of_is_refused(hook):
    pipe = tiny_flux_pipeline()
    APPLY[hook](pipe.transformer)
    with pytest.raises(ValueError, match=f"got {hook}: take it off .* and use enable_cache"):
        sample(pipe, core2=Core2Config(mode="cfg"), true_cfg_scale=3.0)


def test_a_cache_on_a_unet_is_refused_until_it_is_taken_off():
    pipe = tiny_sdxl_pipeline()
    expected = sample(pipe, core2=COND)
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*remove_hook\('pyramid") as error:
        sample(pipe, core2=COND)
    name = str(error.value).split("'")[1]
    HookRegistry.check_if_exists_or_initialize(pipe.unet).remove_hook(name, recurse=True)
    assert torch.equal(sample(pipe, core2=COND), expected)
