"""`core2_compile` on the tiny pipelines. Truth: the same call without it."""

from __future__ import annotations

import pytest
import torch

from core2_sampler.plan import Core2Config
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


@pytest.mark.parametrize("name", ["tap", "adapter"])
@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline, tiny_sdxl_pipeline])
def test_a_compiled_pipeline_gives_the_same_latents(build, name):
    pipe = build()
    head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe)).eval()
    with torch.no_grad():
        for parameter in (p for p in head.parameters() if not p.any()):
            parameter.fill_(0.02)
    pipe.register_modules(weak_head=head)
    expected = call(pipe)
    pipe.core2_compile(compile=None)
    runs = []
    sample = pipe._core2_fused
    pipe._core2_fused = lambda *args, **kwargs: runs.append(args) or sample(*args, **kwargs)
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
