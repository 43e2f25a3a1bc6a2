"""Zigzag steps, online scales and AdaLN tables in CUDA graphs. Truth: the same run without them."""

from __future__ import annotations

import pytest
import torch

from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.sampler import FusedSampler, Model
from core2_sampler.plan import make_plan
from core2_sampler.samplers import sample_euler
from core2_sampler.scales import OnlineScale
from core2_sampler.schedules import flow_sigmas
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, DEVICE = 6, "cuda"


@pytest.fixture(params=[tiny_sd3_pipeline, tiny_flux_pipeline])
def world(request):
    """A tiny network on the GPU, latents and two prompts."""
    pipe = request.param().to(DEVICE)
    prompts = pipe.family.encode(pipe, ["a b", "c"], ["d", "e"], max_sequence_length=8)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return pipe.family.denoiser(pipe), x, *prompts


def run(sampler, world, plan, rule=None):
    denoiser, x, *prompts = world
    sigmas = flow_sigmas(N, 3.0)
    if rule is not None:
        rule.begin(denoiser, sigmas.tolist())
    return sampler(Model(denoiser, rule=rule), x, sigmas, plan, *prompts, solver=sample_euler)


def check(world, plan, kinds, rule=None, **options):
    """Capture, then replay; each run is the eager one."""
    graphs = Graphs()
    expected, picked = run(FusedSampler(), world, plan, rule), rule and rule.schedule
    for _ in range(2):
        ours = run(FusedSampler(graphs, **options), world, plan, rule)
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
        if rule is not None:
            torch.testing.assert_close(rule.schedule, picked)
    shape = next(iter(graphs._shapes.values()))
    assert len(shape.replays) == kinds
    assert not shape.eager


@pytest.mark.parametrize("mode", ["zigzag", "z2"])
def test_zigzag_steps(world, mode):
    check(world, make_plan(mode, N, 4.5), 2)


def test_an_online_scale(world):
    denoiser, x, cond, _ = world
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    made = LatentEvaluator.for_model("preference", denoiser.family, x[:1], cond, **sizes)
    rule = OnlineScale({"preference": made.eval()}, (1.0, 4.0, 9.0))
    check(world, make_plan("cfg", N, 4.5), 1, rule)


def test_tables(world):
    check(world, make_plan("cfg", N, 4.5), 1, tables=True)
