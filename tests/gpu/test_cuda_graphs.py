"""CUDA graphs on a GPU, on the tiny networks. Truth: the same run without graphs.

The kernel itself is checked by ``tests/unit/test_fused_step.py``, which runs it on the GPU where
there is one.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from core2_sampler.fused import hot
from core2_sampler.fused.compiling import compile_network
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.sampler import FusedSampler, Model
from core2_sampler.guidance import make_predict
from core2_sampler.samplers import sample_euler
from core2_sampler.schedules import flow_sigmas
from core2_sampler.steps import Plan, Step
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PIPELINES = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline, "sdxl": tiny_sdxl_pipeline}
N = 8


class World:
    """A tiny pipeline on the GPU in bfloat16, a head that says something, two prompts."""

    def __init__(self, family, name="tap"):
        pipe = PIPELINES[family]().to("cuda", torch.bfloat16)
        pipe.scheduler.set_timesteps(N, **({"mu": 1.0} if family == "flux" else {}))
        texts = {} if family == "sdxl" else {"max_sequence_length": 8}
        self.cond, self.uncond = pipe.family.encode(pipe, ["a b", "c"], ["d", "e"], **texts)
        self.denoiser = pipe.family.denoiser(pipe)
        if family == "sdxl":  # as the pipeline's call does: made once, outside the loop
            ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2, device="cuda").bfloat16()
            for side in ("cond", "uncond"):
                old = getattr(self, side)
                setattr(self, side, type(old)(old.prompt_embeds, old.pooled, {"time_ids": ids}))
        self.head = HEADS.get(name).for_denoiser(self.denoiser).eval()
        generator = torch.Generator("cuda").manual_seed(1)
        with torch.no_grad():
            for tensor in (t for t in [*self.head.parameters()] if not t.any()):
                tensor.normal_(0, 0.05, generator=generator)
        self.x = torch.randn(2, 4, 8, 8, generator=generator, device="cuda")
        self.model = Model(
            self.denoiser,
            self.head,
            input_dtype=torch.float32 if family == "sdxl" else torch.bfloat16,
            observes=False,
            static_head=True,
        )

    def run(self, sampler, plan, x=None, swap=False):
        prompts = (self.uncond, self.cond) if swap else (self.cond, self.uncond)
        states = []
        sampler(
            self.model,
            self.x if x is None else x,
            flow_sigmas(len(plan), 3.0),
            plan,
            *prompts,
            solver=sample_euler,
            on_step=lambda _i, x: states.append(x.clone()),
        )
        return torch.stack(states)


def plan_of(*kinds, scale=4.5, in_model=False, steps=N):
    return Plan(tuple(Step(kinds[i % len(kinds)], scale, 1.5) for i in range(steps)), in_model)


@pytest.mark.parametrize("family", PIPELINES)
def test_replays_are_the_eager_run_over_the_whole_trajectory(family):
    world, graphs = World(family), Graphs()
    captured, plain = FusedSampler(graphs), FusedSampler()
    for plan, swap in (
        (plan_of("cfg", "slow", "fast", "cond"), False),
        (plan_of("fast", "slow", scale=2.0, steps=5), True),
        (plan_of("fast"), False),
    ):
        ours, expected = world.run(captured, plan, swap=swap), world.run(plain, plan, swap=swap)
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)
    shape = next(iter(graphs._shapes.values()))
    assert len(shape.replays) == 4
    assert not shape.eager


def test_shapes_take_turns_without_touching_each_other():
    world = World("flux")  # it keeps positions of the latest shape
    captured, plain = FusedSampler(Graphs(capacity=2)), FusedSampler()
    wide = torch.cat([world.x] * 2, -1)
    plan = plan_of("cfg", "fast")
    for x in (world.x, wide, world.x, wide[..., :12].contiguous(), world.x):
        torch.cuda.empty_cache()
        another = type(world.denoiser)(world.denoiser.module)  # as each call of a pipeline has
        world.model = replace(world.model, denoiser=another)
        ours, expected = world.run(captured, plan, x=x), world.run(plain, plan, x=x)
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def test_an_adapter_is_captured_once_a_scale():
    world, graphs = World("sd3", "adapter"), Graphs()
    plan = plan_of("fast", "cfg", in_model=True)
    ours = world.run(FusedSampler(graphs), plan)
    torch.testing.assert_close(ours, world.run(FusedSampler(), plan), atol=2e-2, rtol=2e-2)


def test_what_cannot_be_captured_still_runs(caplog, monkeypatch):
    world = World("sd3")
    plan = plan_of("cond", "cfg")
    expected = world.run(FusedSampler(), plan)
    cond_step = hot.STEPS["cond"]

    def reads(this):
        float(this.state.x.sum())  # waits for the device
        cond_step(this)

    monkeypatch.setitem(hot.STEPS, "cond", reads)
    check_runs_without(world, plan, expected, caplog)


def test_a_capture_that_breaks_off_leaves_torch_as_it_was(caplog, monkeypatch):
    world = World("sd3")
    plan = plan_of("cond", "cfg")
    expected = world.run(FusedSampler(), plan)
    cond_step = hot.STEPS["cond"]

    def breaks(this):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("broken off")
        cond_step(this)

    monkeypatch.setitem(hot.STEPS, "cond", breaks)
    check_runs_without(world, plan, expected, caplog)


def check_runs_without(world, plan, expected, caplog):
    here, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    sampler = FusedSampler(Graphs())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours = world.run(sampler, plan)
            torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == here
    assert torch.cuda.get_sync_debug_mode() == mode
    torch.cuda.empty_cache()
    torch.randn(2, device="cuda").sum().item()


def test_no_step_waits_for_the_device():
    world = World("sd3")
    plan = plan_of("cfg", "slow", "fast", "cond")
    sampler = FusedSampler(Graphs())
    world.run(sampler, plan)
    x = world.x.clone()
    torch.cuda.synchronize()

    def on_step(i, _x):
        if i == 0:  # what comes before the first step may wait: the host fills the table
            torch.cuda.set_sync_debug_mode("error")

    try:
        sampler(
            world.model,
            x,
            flow_sigmas(N, 3.0),
            plan,
            world.cond,
            world.uncond,
            solver=sample_euler,
            on_step=on_step,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernel_is_what_runs_and_the_run_is_the_usual_one():
    world = World("sd3")
    assert hot.update_for(world.x.device).__module__ == "core2_sampler.fused.kernel"
    plan = plan_of("cfg", "slow", "fast", "cond")
    ours = world.run(FusedSampler(Graphs()), plan)[-1]
    sigmas = flow_sigmas(N, 3.0)
    with torch.no_grad():
        predict = make_predict(world.denoiser, sigmas, plan, world.cond, world.uncond, world.head)
        expected = sample_euler(predict, world.x, sigmas)
    torch.testing.assert_close(ours, expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("family", PIPELINES)
def test_compiled_networks_are_captured_too(family, how):
    world = World(family)
    plan = plan_of("cfg", "slow", "fast", "cond")
    expected = world.run(FusedSampler(), plan)
    torch._dynamo.reset()
    compile_network(world.denoiser.module, how)
    graphs = Graphs()
    for _ in range(2):
        ours = world.run(FusedSampler(graphs), plan)
        torch.testing.assert_close(ours, expected, atol=5e-2, rtol=5e-2)
    shape = next(iter(graphs._shapes.values()))
    assert len(shape.replays) == 4
    assert not shape.eager
