"""float8 linear layers on a GPU that multiplies in them. Truth: the same run in bfloat16."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or torch.cuda.get_device_capability() < (8, 9)
        or importlib.util.find_spec("torchao") is None,
        reason="needs a GPU of compute capability 8.9 or above, and torchao",
    ),
]
PIPELINES = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline, "sdxl": tiny_sdxl_pipeline}


def built(family, name):
    pipe = PIPELINES[family]().to("cuda", torch.bfloat16)
    head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe)).eval()
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for tensor in (t for t in head.parameters() if not t.any()):
            tensor.normal_(0, 0.05, generator=generator)
    pipe.register_modules(weak_head=head)
    return pipe


def call(pipe, prompt="a b"):
    values = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 4}
    values[pipe.family.scale_argument] = 4.5
    if pipe.family.name != "sdxl":
        values["max_sequence_length"] = 8
    config = Core2Config("core", slow_steps=2, w2s_scale=1.5)
    generator = torch.Generator("cuda").manual_seed(0)
    images = pipe(prompt, negative_prompt="c", core2=config, generator=generator, **values).images
    return images.float()


def off(ours, expected):
    return float((ours - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["tap", "adapter"])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_converted_network_says_nearly_the_same_and_is_captured(family, name):
    pipe = built(family, name)
    exact, other = call(pipe), call(pipe, "d e f")
    options = {"compile": None, "tables": family != "sdxl"}
    pipe.core2_compile(graphs=False, fp8=True, **options)
    eager = call(pipe)
    assert torch.isfinite(eager).all()
    assert 0 < off(eager, exact) < 0.5 * off(other, exact)
    pipe.core2_compile(**options)
    for _ in range(2):
        assert off(call(pipe), eager) < 2e-2
    assert pipe._core2_fused.graphs.replays == 8
    shape = next(iter(pipe._core2_fused.graphs._shapes.values()))
    assert not shape.eager
    torch._dynamo.reset()
    pipe.core2_compile(tables=options["tables"])
    assert off(call(pipe), exact) < 0.5 * off(other, exact)
