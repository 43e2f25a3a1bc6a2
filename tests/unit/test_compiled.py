"""Hooks on networks that were compiled without them. Truth: the same network, not compiled."""

from __future__ import annotations

import pytest
import torch

from core2_sampler.pipelines.adapters.sd3 import SD3Denoiser
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads.adapter import AdapterHead


@torch.no_grad()
def plain(denoiser, prompt):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return denoiser(x, torch.tensor([0.7, 0.3]), prompt)


def adapted(head):
    def run(denoiser, prompt):
        with head.attached(denoiser.module), head.active(4.5):
            return plain(denoiser, prompt)

    return run


def features(denoiser, prompt):
    with denoiser.capture_features() as read:
        plain(denoiser, prompt)
        return read()


@pytest.mark.parametrize("kind", ["adapter", "tap"])
def test_hooks_act_on_a_network_compiled_before(kind):
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    prompt = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)[0]
    head = AdapterHead.for_denoiser(denoiser)
    with torch.no_grad():
        for parameter in head.up.values():
            parameter.fill_(0.1)
    hooked = adapted(head) if kind == "adapter" else features
    wanted, other = plain(denoiser, prompt), hooked(denoiser, prompt)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default
        compiled = SD3Denoiser(torch.compile(denoiser.module, backend="eager"))
        for _ in range(2):
            torch.testing.assert_close(plain(compiled, prompt), wanted)
            torch.testing.assert_close(hooked(compiled, prompt), other)
    assert other.shape != wanted.shape or (other - wanted).abs().max() > 0.1
