"""A fused run on the tiny networks of all families.

Truth: `make_predict` and the solver itself, with `sample_zigzag` for steps that are undone and
`OnlineScale` for scales that are picked on the way.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch

from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.fused.hot import Prompts, signature
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.guidance import make_predict
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters.discrete import Clock
from core2_sampler.plan import make_plan
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler, sample_zigzag
from core2_sampler.scales import OnlineScale
from core2_sampler.schedules import flow_sigmas, karras_sigmas
from core2_sampler.steps import Plan, Step
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads import HEADS

KINDS = ("cfg", "slow", "cond", "fast", "slow", "fast")
PIPELINES = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "sdxl": tiny_sdxl_pipeline,
}


@cache
def world(family):
    """Return a tiny denoiser, latents, and two prompts."""
    pipe = PIPELINES[family]()
    pipe.scheduler.set_timesteps(6, **({"mu": 1.0} if family == "flux" else {}))
    length = {} if family == "sdxl" else {"max_sequence_length": 8}
    denoiser = pipe.family.denoiser(pipe)
    cond, uncond = pipe.family.encode(pipe, ["a b", "c"], ["d", "e f g"], **length)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sigmas = karras_sigmas(6, 0.03, 14.6) if family == "sdxl" else flow_sigmas(6, 3.0)
    return denoiser, x * sigmas[0].float(), cond, uncond, sigmas


@cache
def make_head(name, family):
    options = {"scale_range": (1.5, 9.0)} if name == "adapter" else {}
    head = HEADS.get(name).for_denoiser(world(family)[0], **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # untrained heads say nothing
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point() and not tensor.any():
                tensor.normal_(0, 0.05, generator=generator)
    return head


def mixed_plan(in_model=False):
    steps = [Step(kind, 2.0 + i, (1.5, 0.3)[i % 2]) for i, kind in enumerate(KINDS)]
    return Plan(tuple(steps), in_model)


def zigzag_plan(in_model=False):
    """Return a plan of six steps, four of them undone, by every kind that can undo one."""
    undone = [("cfg", "uncond", 0.0), ("slow", "cfg", 0.5), ("fast", "cond", 1.0)]
    undone += [("cfg", "fast", 2.0), ("fast", None, 0.0), ("cfg", None, 0.0)]
    steps = (Step(kind, 3.0 + i, 1.5, *undo) for i, (kind, *undo) in enumerate(undone))
    return Plan(tuple(steps), in_model)


@torch.no_grad()
def usual(family, plan, head, solver, rule=None):
    denoiser, x, cond, uncond, sigmas = world(family)
    inside = head is not None and head.in_model
    parts = (denoiser, sigmas, plan, cond, uncond, head)
    with head.attached(denoiser.module) if inside else nullcontext():
        if plan.zigs:
            undo = make_predict(denoiser, sigmas[1:], plan.undo, cond, uncond, head)
            solver = partial(sample_zigzag, undo=undo, zigs=plan.zigs)
        return solver(make_predict(*parts, rule=rule), x, sigmas)


def fused(family, plan, head, solver, rule=None, tables=False, **options):
    denoiser, x, cond, uncond, sigmas = world(family)
    sizes = {"solver": solver, "rule": rule, "tables": tables}
    hot = make_hot(denoiser, head, x, 2 * len(plan) + 2, cond, uncond, **sizes)
    if rule is not None:
        rule.begin(denoiser, sigmas.tolist())
    with hot.hooked():
        return sample_fused(hot, x, sigmas, plan, solver=solver, **options)


def off(ours, expected):
    return (ours - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize("name", ["tap", "adapter", "last_gap", "affine"])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_fused_run_is_the_usual_run_and_costs_as_many_passes(family, name):
    head = make_head(name, family)
    plan = mixed_plan(head.in_model)
    solver = partial(sample_dpmpp_2m, path="ve") if family == "sdxl" else sample_euler
    expected = usual(family, plan, head, solver)
    with count_nfe(world(family)[0].module) as counter:
        ours = fused(family, plan, head, solver)
    assert off(ours, expected) < 2e-5
    assert counter.per_sample(2) == plan.nfe
    plain = usual(family, make_plan("cfg", 6, 4.0), None, solver)
    assert off(plain, expected) > 1e-3  # the head was heard


@pytest.mark.parametrize("name", ["tap", "adapter"])
@pytest.mark.parametrize("family", PIPELINES)
def test_zigzag_steps_are_the_usual_ones_and_cost_as_many_passes(family, name):
    head = make_head(name, family)
    plan = zigzag_plan(head.in_model)
    expected, levels, done = usual(family, plan, head, sample_euler), [], []
    with count_nfe(world(family)[0].module) as counter:
        ours = fused(
            family,
            plan,
            head,
            sample_euler,
            on_level=levels.append,
            on_step=lambda i, _x: done.append(i),
        )
    assert off(ours, expected) < 5e-5
    assert counter.per_sample(2) == plan.nfe
    assert levels == [0, 1, 0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5]
    assert done == [0, 1, 2, 3, 4, 5]


def online(family, **options):
    """Return a scale rule with two untrained networks as evaluators."""
    _, x, cond, _, _ = world(family)
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    evaluators = {
        kind: LatentEvaluator.for_model(kind, family, x[:1], cond, seed=i, **sizes).eval()
        for i, kind in enumerate(("preference", "alignment"))
    }
    return OnlineScale(evaluators, (1.0, 3.0, 4.5, 7.5), **options)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("sd3", "tap", {}),
        ("sd3", "adapter", {}),
        ("sd3", "tap", {"weights": {"preference": 0.3, "alignment": 1.0}}),
        ("sd3", "affine", {"upstream": True}),
        ("flux", "tap", {}),
        ("sdxl", "affine", {}),
    ],
)
def test_an_online_scale_picks_what_it_picks_in_the_usual_run(family, name, options):
    head = make_head(name, family)
    plan, rule = mixed_plan(head.in_model), online(family, **options)
    solver = partial(sample_dpmpp_2m, path="ve") if family == "sdxl" else sample_euler
    expected = usual(family, plan, head, solver, rule)
    picked = rule.schedule
    assert len(picked[~picked.isnan()].unique()) > 1
    ours = fused(family, plan, head, solver, rule)
    torch.testing.assert_close(rule.schedule, picked, rtol=0, atol=0, equal_nan=True)
    assert off(ours, expected) < 5e-5
    assert off(ours, usual(family, plan, head, solver)) > 1e-3  # the rule was heard


class Drifting:
    """Prefers latents of a size, and scores all of them higher or lower with the noise level."""

    def __init__(self, size, rate):
        self.size, self.rate = size, rate

    def check_family(self, family):
        pass

    check_latents = check_family

    def __call__(self, x, sigma, conditioning):
        return (self.rate * sigma).sin() - (x.flatten(1).std(1) - self.size).abs()


@pytest.mark.parametrize("upstream", [False, True])
def test_adaptive_weights_follow_the_scores_from_step_to_step(upstream):
    """Evaluators that want opposite things: what is picked tells which of them gained."""
    evaluators = {"small": Drifting(0.0, 9.0), "large": Drifting(9.0, -7.0)}
    picks = []
    for weights in ("adaptive", {"small": 1.0, "large": 1.01}):
        rule = OnlineScale(evaluators, (1.0, 4.0, 9.0), weights, upstream)
        usual("sd3", mixed_plan(), make_head("affine", "sd3"), sample_euler, rule)
        picked = rule.schedule
        fused("sd3", mixed_plan(), make_head("affine", "sd3"), sample_euler, rule)
        torch.testing.assert_close(rule.schedule, picked, rtol=0, atol=0, equal_nan=True)
        picks.append(picked.nan_to_num())
    assert not torch.equal(*picks)


def test_an_interrupted_run_tells_what_it_picked_and_no_more():
    def stop_at(last):
        def look(i, x):
            if i == last:
                raise KeyboardInterrupt

        return look

    rule = OnlineScale({"small": Drifting(0.0, 9.0)}, (1.0, 4.0, 9.0))
    run = partial(fused, "sd3", make_plan("cfg", 6, 3.0), None, sample_euler, rule)
    run()
    whole = rule.schedule
    with pytest.raises(KeyboardInterrupt):
        run(on_level=lambda i: stop_at(0)(i, None))
    assert rule.schedule is None
    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop_at(1))
    assert torch.equal(rule.schedule[:2], whole[:2])
    assert rule.schedule[2:].isnan().all()


def test_another_plan_scale_and_prompt_need_no_other_buffers():
    denoiser, x, cond, uncond, sigmas = world("sd3")
    head = make_head("tap", "sd3")
    hot = make_hot(denoiser, head, x, 6, cond, uncond)
    places = [t.data_ptr() for t in (hot.state.x, hot.state.seen, hot.prompts.both.pooled)]
    for plan, prompt in (
        (mixed_plan(), (cond, uncond)),
        (make_plan("cfg", 4, 7.0), (uncond, cond)),
    ):
        levels = sigmas if len(plan) == 6 else flow_sigmas(4)
        hot.prompts.load(*prompt)
        with hot.hooked():
            ours = sample_fused(hot, x, levels, plan)
        with torch.no_grad():
            predict = make_predict(denoiser, levels, plan, *prompt, head)
            expected = sample_euler(predict, x, levels)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    assert places == [t.data_ptr() for t in (hot.state.x, hot.state.seen, hot.prompts.both.pooled)]


def test_each_sample_has_its_own_scale():
    plan, scales = mixed_plan(), torch.tensor([[2.0, 5.0]]).repeat(6, 1)
    head = make_head("tap", "sd3")
    both = fused("sd3", plan, head, sample_euler, scales=scales)
    for i, scale in enumerate((2.0, 5.0)):
        one = Plan(tuple(Step(s.kind, scale, s.w2s_scale) for s in plan.steps))
        torch.testing.assert_close(both[i], usual("sd3", one, head, sample_euler)[i])


def test_half_networks_keep_wide_latents():
    denoiser, x, cond, uncond, sigmas = world("sd3")
    half = type(denoiser)(copy.deepcopy(denoiser.module).bfloat16())
    prompts = [
        Conditioning(side.prompt_embeds.bfloat16(), side.pooled.bfloat16())
        for side in (cond, uncond)
    ]
    plan = make_plan("cfg", 6, 4.0)
    hot = make_hot(half, None, x, 6, *prompts, input_dtype=torch.bfloat16)
    assert hot.state.seen.dtype == torch.bfloat16
    ours = sample_fused(hot, x, sigmas, plan)
    with torch.no_grad():
        expected = sample_euler(make_predict(half, sigmas, plan, *prompts), x, sigmas)
    wide = usual("sd3", plan, None, sample_euler)
    assert ours.dtype == torch.float32
    rounding = (expected - wide).abs().max()
    assert 0 < (ours - wide).abs().max() < 1.5 * rounding


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd3", n) for n in ("tap", "adapter", "last_gap")] + [("flux", "tap"), ("sdxl", "affine")],
)
@pytest.mark.parametrize("what", ["mixed", "zigzag", "z2", "online"])
def test_a_run_never_reads_from_the_device(family, name, what):
    """On the meta device every ``item``, ``bool``, ``nonzero`` or copy to the host raises."""
    denoiser, x, cond, uncond, sigmas = world(family)
    head = copy.deepcopy(make_head(name, family)).to("meta")
    module = copy.deepcopy(denoiser.module).to("meta")
    parts = {"module": module}
    if family == "sdxl":
        tables = (getattr(denoiser.clock, field).to("meta") for field in Clock.__slots__)
        parts["clock"] = Clock(*tables)
    away = type(denoiser)(**parts)
    prompts = [to_meta(side) for side in (cond, uncond)]
    plan = make_plan("z2", 6, 3.0) if what == "z2" else mixed_plan(head.in_model)
    plan = zigzag_plan(head.in_model) if what == "zigzag" else plan
    rule = online(family) if what == "online" else None
    for evaluator in rule.evaluators.values() if rule else ():
        evaluator.to("meta")
    tables = family != "sdxl"
    hot = make_hot(away, head, x.to("meta"), 14, *prompts, rule=rule, tables=tables)
    with hot.hooked(), torch.no_grad():
        out = sample_fused(hot, x.to("meta"), sigmas, plan)
    assert out.is_meta
    assert out.shape == x.shape


def test_the_meta_device_finds_reads():
    with pytest.raises(RuntimeError), torch.no_grad():
        bool(torch.isfinite(torch.empty(2, device="meta")).all())


def to_meta(side):
    extra = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in side.extra.items()}
    return Conditioning(side.prompt_embeds.to("meta"), side.pooled.to("meta"), extra)


def test_prompts_lie_in_buffers_that_are_filled_and_never_moved():
    def side(value):
        extra = {"a": {"t": torch.full((2, 3), value), "n": 3}, "l": [torch.full((2, 1), value)]}
        return Conditioning(torch.full((2, 4, 5), value), torch.full((2, 6), value), extra)

    prompts = Prompts.of(side(1.0), side(0.0))
    before = prompts.cond.extra["a"]["t"].data_ptr()
    prompts.load(side(3.0), side(2.0))
    assert prompts.cond.extra["a"]["t"].data_ptr() == before
    assert (prompts.cond.prompt_embeds == 3).all()
    assert (prompts.cond.extra["l"][0] == 3).all()
    assert prompts.both.extra["a"]["t"].unique(dim=1).flatten().tolist() == [2, 2, 3, 3]
    assert prompts.cond.extra["a"]["n"] == 3
    assert signature(side(1.0), side(0.0)) == signature(side(5.0), side(6.0))
    assert signature(side(1.0), side(0.0)) != signature(side(1.0), None)
    other = Conditioning(side(1.0).prompt_embeds, side(1.0).pooled, {"n": 4})
    assert signature(side(1.0), None) != signature(other, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": sample_zigzag}, "must have a solver with a table"),
        ({"plan": make_plan("zigzag", 6, 2.0, upstream=True)}, "undone .upstream zigzag"),
        ({"plan": make_plan("zigzag", 30, 2.0)}, "made for 88 hot steps"),
        ({"plan": make_plan("cfg", 65, 2.0)}, "made for 65 hot steps"),
        ({"solver": sample_dpmpp_2m}, "of this solver"),
        ({"plan": make_plan("core", 6, 2.0)}, "weak head"),
        ({"uncond": None}, "must get uncond"),
        ({"x": torch.zeros(1, 4, 8, 8)}, r"buffers' shape \(2, 4, 8, 8\)"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(change, message):
    denoiser, x, cond, uncond, sigmas = world("sd3")
    values = {"plan": make_plan("cfg", 6, 2.0), "solver": sample_euler, "x": x} | change
    hot = make_hot(denoiser, None, x, 6, cond, values.pop("uncond", uncond))
    with pytest.raises(ValueError, match=message):
        sample_fused(hot, sigmas=sigmas, **values)
