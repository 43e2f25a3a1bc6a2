"""What is captured when, kept, dropped and refused. Capture itself is given in: no GPU needed.

The given capture is a tape of the operations on their tensors, so its replay has all that a CUDA
graph has: Python is not run again, and what was a number at capture stays that number. Truth for
the latents: the same run without graphs.
"""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core2_sampler.fused import keys
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.keys import _places, obstacle
from core2_sampler.fused.sampler import FusedSampler, Model
from core2_sampler.guidance import make_predict
from core2_sampler.plan import make_plan
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler
from core2_sampler.scales import OnlineScale
from core2_sampler.schedules import flow_sigmas
from core2_sampler.steps import Plan, Step
from core2_sampler.testing import (
    GaussianDenoiser,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
)
from core2_sampler.weak_heads import HEADS

N = 6


class Tape(TorchDispatchMode):
    """Records operations with their tensors, and runs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # in which all tensors may be written
    def replay(self):
        for func, args, kwargs, out in self.calls:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """A capture without CUDA: warms up as that does, counts, and can refuse."""

    def __init__(self, refuse=()):
        self.count, self.refuse = 0, refuse

    def __call__(self, step, restore):
        for _ in range(3):
            step()
            restore()
        self.count += 1
        with Tape() as tape:
            step()
        if self.count in self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return tape.replay


def graphs_of(recorder, **options):
    return Graphs(capture=recorder, device_type="cpu", **options)


class Affine(nn.Module):
    in_model, needs_features = False, True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def reset(self):
        pass

    def observe(self, gap):
        pass

    def forward(self, cond, *, x, sigma, prompt_embeds, pooled, features):
        seen = features.mT.reshape(cond.shape)
        return self.weight * cond - 0.1 * x + 0.05 * seen


class Shift:
    in_model = True
    on = 0.0

    @contextmanager
    def attached(self, module):
        handle = module.register_forward_hook(lambda _m, _i, d: d + self.on)
        yield
        handle.remove()

    @contextmanager
    def active(self, guidance_scale):
        self.on = 0.1 * (guidance_scale - 1)
        yield
        self.on = 0.0


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    denoiser = GaussianDenoiser()
    means = torch.randn(2, 2, 4, generator=generator)
    x = torch.randn(2, 4, 6, 6, generator=generator)
    return denoiser, x, *(denoiser.prompt(mean) for mean in means)


def plan_of(*kinds, scale=3.0, in_model=False):
    steps = (Step(kinds[i % len(kinds)], scale + i, 1.5) for i in range(N))
    return Plan(tuple(steps), in_model)


def sample(sampler, world, plan, head=None, solver=sample_euler, x=None, **changes):
    denoiser, noise, cond, uncond = world
    head = head if plan.needs_head else None
    model = replace(Model(denoiser, head, static_head=True), **changes)
    x, sigmas = noise if x is None else x, flow_sigmas(len(plan), 3.0)
    uncond = uncond if plan.needs_uncond else None
    return sampler(model, x, sigmas, plan, cond, uncond, solver=solver)


@pytest.mark.parametrize("solver", [sample_euler, sample_dpmpp_2m])
def test_one_capture_a_kind_serves_every_plan_scale_grid_and_prompt(world, solver):
    recorder, head = Recorder(), Affine()
    captured, plain = FusedSampler(graphs_of(recorder)), FusedSampler()
    first = plan_of("cfg", "slow", "cond", "fast")
    assert torch.equal(
        sample(captured, world, first, head, solver), sample(plain, world, first, head, solver)
    )
    assert recorder.count == 4
    denoiser, x, cond, uncond = world
    for other in (plan_of("slow", "fast", scale=7.0), plan_of("slow", "cfg", "fast", scale=1.5)):
        for prompts in ((cond, uncond), (uncond, cond)):
            now = (denoiser, -x, *prompts)
            assert torch.equal(
                sample(captured, now, other, head, solver), sample(plain, now, other, head, solver)
            )
    assert recorder.count == 4


def test_hooks_are_only_on_while_a_graph_is_missing(world):
    sampler, head = FusedSampler(graphs_of(Recorder())), Affine()
    layer, seen = world[0].module.proj_out, []
    forward = layer.forward

    def spied(*args):
        seen.append(len(layer._forward_pre_hooks))
        return forward(*args)

    layer.forward = spied
    for _ in range(2):
        sample(sampler, world, plan_of("fast"), head)
    assert seen == [1] * 4  # warm-ups and capture; no replay runs Python
    assert len(layer._forward_pre_hooks) == 0


def test_an_in_model_head_is_captured_once_a_scale(world):
    recorder, head = Recorder(), Shift()
    sampler = FusedSampler(graphs_of(recorder))
    fast = Plan((Step("fast", 3.0), Step("fast", 4.0), Step("cond")) * 2, in_model=True)
    for _ in range(2):
        ours = sample(sampler, world, fast, head)
    assert recorder.count == 3
    assert torch.equal(ours, sample(FusedSampler(), world, fast, head))


def test_the_shape_not_used_for_longest_goes_first(world):
    recorder = Recorder()
    sampler = FusedSampler(graphs_of(recorder, capacity=2))
    plan = plan_of("cond")
    small, large = world[1][..., :4], torch.cat([world[1]] * 2, -1)
    for x, captures in (
        (None, 1),
        (small, 2),
        (None, 2),
        (large, 3),  # small goes
        (None, 3),
        (small, 4),  # large goes
        (None, 4),
    ):
        ours = sample(sampler, world, plan, x=x)
        assert torch.equal(ours, sample(FusedSampler(), world, plan, x=x))
        assert recorder.count == captures
        assert len(sampler.graphs) <= 2
    with pytest.raises(ValueError, match="capacity"):
        Graphs(0)


def test_what_cannot_be_captured_runs_eagerly_with_one_log_line(world, caplog):
    recorder, head = Recorder(refuse=(2, 3)), Affine()
    sampler = FusedSampler(graphs_of(recorder))
    plan = plan_of("cfg", "slow", "fast")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours = sample(sampler, world, plan, head)
            assert torch.equal(ours, sample(FusedSampler(), world, plan, head))
    assert recorder.count == 3
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"CUDA graphs are not used: a {kind} step cannot be captured (operation not permitted "
        "when stream is capturing)"
        for kind in ("slow", "fast")
    ]


def test_zigzag_steps_replay_the_graphs_of_their_kinds(world):
    recorder = Recorder()
    captured = FusedSampler(graphs_of(recorder))
    for plan in (make_plan("zigzag", N, 3.0), make_plan("zigzag", 30, 5.0), plan_of("cfg")):
        ours = sample(captured, world, plan)
        assert torch.equal(ours, sample(FusedSampler(), world, plan))
    assert recorder.count == 4  # cfg and uncond; for 88 hot steps other buffers
    assert captured.graphs.replays == 3 * N - 2 + 88 + N


def test_steps_by_the_gap_replay_two_graphs_and_forget_the_run_before(world):
    recorder = Recorder()
    captured = FusedSampler(graphs_of(recorder))
    lone = Plan((Step("cfg", 3.0, inversion="gap"), *make_plan("cfg", N - 1, 3.0).steps))
    for plan in (make_plan("z2", N, 3.0), make_plan("z2", N, 5.0, zig_steps=2), lone):
        ours = sample(captured, world, plan)
        assert torch.equal(ours, sample(FusedSampler(), world, plan))
    assert torch.equal(ours, sample(FusedSampler(), world, make_plan("cfg", N, 3.0)))
    assert recorder.count == 2  # the move by the gap, and the pair that keeps it
    assert captured.graphs.replays == 2 * N - 2 + N + 1 + N + 1


class Near(nn.Module):
    """An evaluator that prefers latents of a size that its weight and the prompt name."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(1.6))

    def check_family(self, family):
        pass

    check_latents = check_family

    def forward(self, x, sigma, conditioning):
        wanted = self.size + conditioning.pooled.mean(1).sin()
        return -(x.flatten(1).std(1) - wanted).abs() + 0.1 * sigma


@torch.no_grad()
def test_an_online_scale_is_captured_and_told_what_replays_picked(world):
    recorder, near = Recorder(), Near()
    captured, picks = FusedSampler(graphs_of(recorder)), []
    for i, scale in enumerate((3.0, 6.0)):  # only tells that there is guidance
        plan, now = plan_of("cfg", "cond", scale=scale), (world[0], world[1] * (1 + i), *world[2:])
        rule, usual = (OnlineScale({"near": near}, (1.0, 2.0, 5.0, 9.0)) for _ in range(2))
        levels = flow_sigmas(N, 3.0)
        rule.begin(now[0], levels.tolist())
        ours = sample(captured, now, plan, rule=rule)
        predict = make_predict(now[0], levels, plan, *now[2:], rule=usual)
        torch.testing.assert_close(ours, sample_euler(predict, now[1], levels))
        torch.testing.assert_close(rule.schedule, usual.schedule, equal_nan=True)
        picks.append(rule.schedule)
    assert recorder.count == 2
    assert len(torch.stack(picks)[:, ::2].unique()) > 1


def test_weights_belong_to_names_so_names_make_another_graph():
    one, other = Near(), Near()
    weights = {"p": 0.9, "q": 0.1}
    rules = [
        OnlineScale(dict(zip(names, (one, other), strict=True)), weights=weights)
        for names in ("pq", "qp", "pq")
    ]
    first, swapped, again = map(keys._picker, rules)
    assert first == again != swapped


def test_an_evaluator_that_is_no_module_is_not_captured(world):
    rule = OnlineScale({"near": lambda x, sigma, conditioning: x.mean((1, 2, 3))})
    assert "no module" in obstacle(world[0], None, CPU, True, rule)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny_sd3_pipeline, "tap"),
        (tiny_sd3_pipeline, "adapter"),
        (tiny_flux_pipeline, "tap"),
        (tiny_sdxl_pipeline, "affine"),
    ],
)
def test_real_networks_hold_no_number_of_the_run_they_were_captured_in(build, name):
    pipe = build()
    pipe.scheduler.set_timesteps(N, **({"mu": 1.0} if build is tiny_flux_pipeline else {}))
    texts = {} if build is tiny_sdxl_pipeline else {"max_sequence_length": 8}
    cond, uncond = pipe.family.encode(pipe, ["a b", "c"], ["d", "e"], **texts)
    denoiser = pipe.family.denoiser(pipe)
    head = HEADS.get(name).for_denoiser(denoiser).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (t for t in [*head.parameters(), *head.buffers()] if not t.any()):
            tensor.normal_(0, 0.05, generator=generator)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    recorder = Recorder()
    tables = build is not tiny_sdxl_pipeline
    captured, scale = FusedSampler(graphs_of(recorder), tables), 4.5
    kinds = ("slow", "fast", "cond") if name == "adapter" else ("cfg", "slow", "fast", "cond")
    for i, prompts in enumerate(((cond, uncond), (uncond, cond))):
        kinds = kinds[i:] + kinds[:i]
        steps = (Step(kinds[j % len(kinds)], scale, 1.5 + i) for j in range(N + i))
        plan = Plan(tuple(steps), head.in_model)
        now = (denoiser, x + i, *prompts)
        ours = sample(captured, now, plan, head, observes=False)
        expected = sample(FusedSampler(), now, plan, head, observes=False)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        scale = scale if name == "adapter" else 3.0
    assert recorder.count == len(kinds)


def moved_weights(world, head):
    head.weight.data = head.weight.data.clone()
    return {}


def longer(world, head):
    return {"plan": make_plan("core", 70, 3.0)}


def part(**settings):
    """Return a change that gives the denoiser a part with such settings, or changes them."""

    def change(world, head):
        module = world[0].module
        if not hasattr(module, "part"):
            module.part = nn.Identity()
        vars(module.part).update(settings)
        return {}

    return change


@dataclass
class Held:
    """A denoiser that holds more than its network, as those of SD3 and SDXL do."""

    module: nn.Module
    levels: torch.Tensor
    num_train_timesteps: int = 1000
    extra: dict = field(default_factory=dict)

    def __call__(self, x, sigma, conditioning):
        return self.module(x, sigma, conditioning.pooled)

    @contextmanager
    def capture_features(self):
        yield lambda: torch.zeros(2, 36, 4)


def held(module, **options):
    return Held(module, torch.arange(3.0), **options)


def math_attention(world, head):
    torch.backends.cuda.enable_flash_sdp(False)
    return {}


@pytest.fixture
def attention():
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(before)


@pytest.mark.parametrize(
    "change",
    [
        moved_weights,
        longer,
        part(scaling={"a": 1.0}, merged_adapters=[]),  # a layer of PEFT
        part(scale=[0.5]),  # a processor of an IP-Adapter
        part(b1=1.3, s1=0.9),  # FreeU
        math_attention,
        lambda *_: {"solver": sample_dpmpp_2m},
        lambda *_: {"input_dtype": torch.bfloat16},
        lambda world, _: {"x": world[1][:, :, :4]},
        lambda *_: {"head": Affine()},
    ],
)
def test_what_a_graph_has_inside_makes_another_one(world, change, attention):
    recorder, head = Recorder(), Affine()
    sampler = FusedSampler(graphs_of(recorder))
    values = {"plan": plan_of("fast"), "head": head}
    sample(sampler, world, **values)
    sample(sampler, world, **values)
    assert recorder.count == 1
    sample(sampler, world, **(values | change(world, head)))
    assert recorder.count == 2
    sample(sampler, world, **values)
    assert recorder.count <= 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"scaling": {"a": 1.0}}, {"scaling": {"a": 0.5}}),
        ({"_active_adapter": ["a"]}, {"_active_adapter": ["b"]}),
        ({"processor": AttnProcessor2_0()}, {"processor": AttnProcessor()}),
    ],
)
def test_a_part_that_is_switched_makes_another_graph(world, before, after):
    recorder = Recorder()
    sampler = FusedSampler(graphs_of(recorder))
    for settings, count in ((before, 1), (copy.deepcopy(before), 1), (after, 2), (before, 2)):
        part(**settings)(world, None)
        sample(sampler, world, plan_of("cond"))
        assert recorder.count == count


def test_what_a_denoiser_holds_counts_by_its_value(world):
    recorder, module = Recorder(), world[0].module
    sampler = FusedSampler(graphs_of(recorder))
    for denoiser, count in (
        (held(module), 1),
        (held(module), 1),  # as each call of a pipeline makes it
        (held(module, num_train_timesteps=500), 2),
        (held(module, extra={"scale": 0.5}), 3),
        (replace(held(module), levels=torch.arange(3.0) + 1), 4),
        (held(module), 4),
    ):
        sample(sampler, (denoiser, *world[1:]), plan_of("cond"))
        assert recorder.count == count


def test_weights_made_of_other_tensors_are_known_by_where_those_lie():
    def layer(weight):
        module = nn.Linear(2, 2, bias=False)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    inner = [torch.ones(2, 2) for _ in range(3)]
    found = [list(_places(layer(TwoTensor(inner[0], other)).weight)) for other in inner[1:]]
    assert found == [[inner[0].data_ptr(), other.data_ptr()] for other in inner[1:]]


def test_buffers_made_in_inference_mode_serve_later_calls(world):
    recorder = Recorder()
    sampler, plan = FusedSampler(graphs_of(recorder)), plan_of("cfg")
    with torch.inference_mode():
        sample(sampler, world, plan)
    ours = sample(sampler, world, plan)
    assert torch.equal(ours, sample(FusedSampler(), world, plan))
    assert recorder.count == 1


def test_where_nothing_can_be_captured_steps_run_eagerly(world, caplog):
    recorder, plan = Recorder(), plan_of("cfg")
    sampler = FusedSampler(Graphs(capture=recorder))  # for CUDA, the latents on the CPU
    with caplog.at_level(logging.WARNING):
        ours = sample(sampler, world, plan)
    assert torch.equal(ours, sample(FusedSampler(), world, plan))
    assert recorder.count == 0
    assert not caplog.records


CPU = torch.device("cpu")


def test_obstacles_are_named_and_logged_once(world, caplog):
    head, denoiser = Affine(), world[0]
    module = denoiser.module
    assert obstacle(denoiser, head, CPU, True) is None
    assert obstacle(denoiser, None, CPU, False) is None
    assert "Affine keeps" in obstacle(denoiser, head, CPU, False)
    with torch.autocast("cpu"):
        assert "autocast" in obstacle(denoiser, None, CPU, True)
    module._cache_config = object()
    assert "cache" in obstacle(denoiser, None, CPU, True)
    del module._cache_config
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(module.proj_out, register)(lambda *_: None)
        assert "forward hooks" in obstacle(denoiser, None, CPU, True)
        handle.remove()
    recorder = Recorder()
    sampler = FusedSampler(graphs_of(recorder))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours = sample(sampler, world, plan_of("fast"), head, static_head=False)
    assert torch.equal(ours, sample(FusedSampler(), world, plan_of("fast"), head))
    assert recorder.count == 0
    assert len(caplog.records) == 1
    module.proj_out._hf_hook = object()
    assert "accelerate" in obstacle(denoiser, None, CPU, True)


def test_offload_and_caches_of_diffusers_are_found(world):
    layer = world[0].module.proj_out
    HookRegistry.check_if_exists_or_initialize(layer)
    assert obstacle(world[0], None, CPU, True) is None
    layer._diffusers_hook.register_hook(ModelHook(), "x")
    assert "hooks of diffusers" in obstacle(world[0], None, CPU, True)
