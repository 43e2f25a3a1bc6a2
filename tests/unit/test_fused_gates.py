"""What a step may cost beside the networks: operations, tensors, compilations, all counted."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.fused.compiling import compile_network, set_attention
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.hot import ONLINE, STEPS, step_of
from core2_sampler.fused.moves import moves_of
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.fused.sampler import FusedSampler, Model
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler
from core2_sampler.scales import OnlineScale
from core2_sampler.schedules import flow_sigmas
from core2_sampler.steps import Plan, Step
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads import HEADS

N, SHAPE = 6, (2, 4, 8, 8)
PROMPTS = [Conditioning(torch.full((2, 3, 4), float(i)), torch.zeros(2, 5)) for i in range(2)]


class Still:
    """A denoiser that answers with a tensor that was there before: no operation of its own."""

    family, latent_channels = "still", 4

    def __init__(self, dtype):
        self.module = torch.nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.answers = torch.randn(4, *SHAPE[1:], generator=generator).to(dtype)

    def __call__(self, x, sigma, conditioning):
        return self.answers[: len(x)]


class StillHead:
    in_model = needs_features = False

    def __init__(self, dtype):
        self.answer = torch.ones(SHAPE, dtype=dtype)

    def reset(self):
        pass

    def observe(self, gap):
        raise AssertionError("a head that does not want to see gaps is shown one")

    def __call__(self, cond, **_):
        return self.answer


class Watch(TorchDispatchMode):
    """Count operations that are no views, and those among them that return a new tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.fresh, self.known = [], 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(a)]
        before = {t.untyped_storage().data_ptr() for t in tensors}
        out = func(*args, **(kwargs or {}))
        outs = [o for o in torch.utils._pytree.tree_leaves(out) if is_tensor(o)]
        if outs and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
            self.fresh += sum(o.untyped_storage().data_ptr() not in before for o in outs)
        return out


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def make(kind, dtype, solver=sample_euler, steps=N):
    plan = Plan((Step(kind, 4.0, 1.5),) * steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    hot = make_hot(
        Still(dtype),
        StillHead(dtype),
        x,
        N,
        *PROMPTS,
        solver=solver,
        input_dtype=dtype,
        observes=False,
    )
    return hot, x, plan


# The reference; the kernel is one. A slow step weighs three derivatives where CFG weighs two.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "ops"), [("cond", 4), ("uncond", 4), ("cfg", 6), ("fast", 5), ("slow", 8)]
)
def test_operations_beside_the_networks(kind, dtype, ops):
    hot, x, plan = make(kind, dtype)
    sample_fused(hot, x, flow_sigmas(N), plan)
    with torch.no_grad(), Watch() as watch:
        STEPS[kind](hot)
    assert len(watch.names) == ops, watch.names
    assert watch.names.count("index_select") == watch.names.count("add_") == 1


@pytest.mark.parametrize("solver", [sample_euler, sample_dpmpp_2m])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_makes_no_new_tensor(kind, solver):
    hot, x, plan = make(kind, torch.bfloat16, solver)
    with torch.no_grad():
        sample_fused(hot, x, flow_sigmas(N), plan, solver=solver)
        with Watch() as watch:
            STEPS[kind](hot)
    assert watch.names
    assert watch.fresh == 0, watch.names
    with Watch() as watch:  # and the count can fail
        torch.ones(2) + 1
    assert watch.fresh == 2


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_compiles_once_and_whole(kind):
    hot, x, plan = make(kind, torch.float32)
    check_compiles_once(hot, x, plan)


def test_a_step_of_a_real_network_and_head_compiles_once_and_whole():
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    prompts = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)
    head = HEADS.get("tap").for_denoiser(denoiser).eval()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    hot = make_hot(denoiser, head, x, N, *prompts, observes=False)
    check_compiles_once(hot, x, Plan(tuple(Step("slow", 2.0 + i, 1.5 + i) for i in range(N))))


@pytest.mark.parametrize("kind", ONLINE)
def test_an_online_step_compiles_once_and_whole(kind):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    sizes = {"patch_size": 4, "width": 64, "num_layers": 1}
    evaluator = LatentEvaluator.for_model("preference", "sd3", x, PROMPTS[0], **sizes).eval()
    rule = OnlineScale({"preference": evaluator}, (1.0, 4.0, 9.0))
    parts = (Still(torch.float32), StillHead(torch.float32))
    hot = make_hot(*parts, x, N, *PROMPTS, observes=False, rule=rule)
    check_compiles_once(hot, x, Plan((Step(kind, 4.0, 1.5),) * N))


def test_a_step_with_tables_compiles_once_and_whole():
    pipe = tiny_sd3_pipeline()
    prompts = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    hot = make_hot(pipe.family.denoiser(pipe), None, x, N, *prompts, tables=True)
    check_compiles_once(hot, x, Plan((Step("cfg", 4.0),) * N))


def check_compiles_once(hot, x, plan):
    torch._dynamo.reset()
    counter = CompileCounter()
    step = step_of(moves_of(plan, picks=hot.online is not None)[0])
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with hot.hooked():
        expected = sample_fused(hot, x, flow_sigmas(N), plan)
        for _ in range(2):
            ours = sample_fused(
                hot, x, flow_sigmas(N), plan, launch=lambda hot, _step: compiled(hot)
            )
    assert counter.frame_count == 1
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("split", "count"), [(False, 2), (True, 1)])
def test_a_compiled_network_is_compiled_once_a_batch_size(split, count):
    """FLUX's cache context keeps a whole step from being one graph; its network is one."""
    pipe = tiny_flux_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    prompts = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)
    head = HEADS.get("tap").for_denoiser(denoiser).eval()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    kinds = ("cfg", "slow", "cond", "fast", "slow", "fast")
    plan = Plan(tuple(Step(kind, 4.0, 1.5) for kind in kinds))
    hot = make_hot(denoiser, head, x, N, *prompts, observes=False, split_pairs=split)
    torch._dynamo.reset()
    counter = CompileCounter()
    with hot.hooked():
        expected = sample_fused(hot, x, flow_sigmas(N), plan)
        denoiser.module.compile(backend=counter, fullgraph=True, dynamic=False)
        for _ in range(2):
            ours = sample_fused(hot, x, flow_sigmas(N), plan)
    assert counter.frame_count == count  # B rows and 2B rows
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


BLOCKS = {
    "sd3": {"JointTransformerBlock"},
    "flux": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "sdxl": {"UNet2DConditionModel"},
}
BUILD = {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.mark.parametrize("family", BLOCKS)
def test_what_is_compiled_of_a_network(family):
    pipe = BUILD[family]()
    module = pipe.family.denoiser(pipe).module
    compile_network(module, "regional", backend=CompileCounter())
    assert compiled_parts(module) == BLOCKS[family]
    whole = copy.deepcopy(module)
    assert not compiled_parts(whole)
    compile_network(whole, "full", backend=CompileCounter())
    assert compiled_parts(whole) == {type(module).__name__}
    assert not SD3Transformer2DModel._repeated_blocks  # the class is diffusers' own


def compiled_parts(module):
    """Classes of the parts that are compiled, all of each class."""
    found = {True: set(), False: set()}
    for part in module.modules():
        found[part._compiled_call_impl is not None].add(type(part).__name__)
    assert not found[True] & found[False]
    return found[True]


def test_a_network_compiled_in_place_says_what_it_said():
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)[0]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad():
        expected = denoiser(x, torch.full((2,), 0.5), cond)
        compile_network(denoiser.module, "regional", backend=counter, dynamic=False)
        ours = denoiser(x, torch.full((2,), 0.5), cond)
    assert counter.frame_count > 1  # blocks, each by itself
    torch.testing.assert_close(ours, expected)


def test_blocks_compile_no_oftener_with_tables():
    """All blocks of a class share what is compiled, wherever in the table their rows are."""
    pipe = tiny_flux_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    prompts = pipe.family.encode(pipe, ["a b", "c"], max_sequence_length=8)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    plan, runs, counts = Plan((Step("cfg", 4.0), Step("cond")) * 3), [], []
    for tables in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()
        compile_network(denoiser.module, "regional", backend=counter, dynamic=False)
        hot = make_hot(denoiser, None, x, N, *prompts, tables=tables)
        with hot.hooked():
            runs.append(sample_fused(hot, x, flow_sigmas(N), plan))
        counts.append(counter.frame_count)
    assert 0 < counts[1] <= counts[0]
    torch.testing.assert_close(*runs, atol=2e-5, rtol=2e-5)


class Calls:
    """Counts calls of functions, also of those written in C."""

    count = 0

    def __enter__(self):
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _see(self, _frame, event, _arg):
        self.count += event in ("call", "c_call")


@pytest.mark.parametrize("kind", STEPS)
def test_a_replayed_step_calls_no_more_than_the_stock_update_alone(kind):
    """The stock loop also makes guidance and calls the network: its update is the least of it."""
    steps = 30
    graphs = Graphs(capture=lambda step, restore: lambda: None, device_type="cpu")
    model = Model(Still(torch.float32), StillHead(torch.float32), observes=False, static_head=True)
    x, counts = torch.zeros(SHAPE), []
    plan, sigmas = Plan((Step(kind, 4.0, 1.5),) * steps), flow_sigmas(steps)
    with Calls() as calls:
        FusedSampler(graphs)(
            model,
            x,
            sigmas,
            plan,
            *PROMPTS,
            solver=sample_euler,
            on_step=lambda _i, _x: counts.append(calls.count),
        )
    assert graphs.replays == steps
    ours = (counts[29] - counts[9]) / 20 - 2  # on_step and append
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    counts.clear()
    with Calls() as calls:
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x, return_dict=False)[0]
            counts.append(calls.count)
    assert 0 < ours <= (counts[29] - counts[9]) / 20 - 1


def test_a_way_to_compile_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="did you mean 'regional'"):
        compile_network(torch.nn.Identity(), "region")


def test_the_attention_backend_is_diffusers_own_switch():
    pipe = tiny_flux_pipeline()
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    pipe.core2_compile(compile=None, attention="_native_math")
    assert processor._attention_backend.value == "_native_math"
    with pytest.raises(ValueError, match="must be one of"):
        set_attention(pipe.transformer, "none such")


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_sdxl_pipeline])
def test_attention_that_calls_torch_gets_torchs_kernel_for_the_run(build):
    pipe = build()
    with pytest.raises(ValueError, match=r"one of _native_cudnn, .* got 'sage' for"):
        pipe.core2_compile(compile=None, attention="sage")
    prompt = pipe.family.encode(pipe, ["a b"])[0]
    options = {"prompt_embeds": prompt.prompt_embeds, "pooled_prompt_embeds": prompt.pooled}
    options |= {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    runs, before = [], torch.backends.cuda.flash_sdp_enabled()
    for attention in (None, "_native_math"):
        pipe.core2_compile(compile=None, attention=attention)
        generator = torch.Generator().manual_seed(0)
        with Watch() as watch:
            out = pipe(core2="fast", guidance_scale=1.0, generator=generator, **options)
        runs.append(out.images)
        assert any("flash_attention" in name for name in watch.names) == (attention is None)
    torch.testing.assert_close(*runs)
    assert torch.backends.cuda.flash_sdp_enabled() == before
