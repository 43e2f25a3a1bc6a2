"""Guidance: the facts that any head and any plan must keep.

Truth: the Gaussian denoiser, whose guided ODE has a closed form, and the formulas in float64.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from core2_sampler.conditioning import join
from core2_sampler.guidance import make_predict, strong, weak, weak_to_strong
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Plan, Step, make_plan
from core2_sampler.samplers import sample_euler
from core2_sampler.testing import GaussianDenoiser
from core2_sampler.types import Conditioning, InModelHead, OutputHead

N, SCALE = 6, 3.5


class GapHead:
    """An output head: a multiple of the true gap, plus a constant."""

    in_model = False

    def __init__(self, denoiser, uncond, factor=1.0, offset=0.0, needs_features=False):
        self.denoiser, self.uncond = denoiser, uncond
        self.factor, self.offset, self.needs_features = factor, offset, needs_features
        self.resets, self.calls, self.seen, self.features = 0, 0, [], []

    def reset(self):
        self.resets += 1

    def observe(self, gap):
        self.seen.append(gap)

    def __call__(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        self.calls += 1
        self.features.append(features)
        # The Gaussian field is computed beside the counted module, so the head costs no pass.
        uncond = self.denoiser.module.forward(x, sigma, self.uncond.pooled)
        return self.factor * (cond - uncond) + self.offset


class ShiftHead:
    """An in-model head: while it is on, a pass returns d + (scale - 1) * shift."""

    in_model = True

    def __init__(self, shift):
        self.shift, self.on, self.scales = shift, 0.0, []

    @contextmanager
    def attached(self, module):
        handle = module.register_forward_hook(lambda _m, _i, d: d + self.on * self.shift)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def active(self, guidance_scale):
        self.on = guidance_scale - 1
        self.scales.append(guidance_scale)
        try:
            yield
        finally:
            self.on = 0.0


def run(world, plan, head=None, **options):
    denoiser, x, cond, uncond, sigmas = world
    predict = make_predict(denoiser, sigmas, plan, cond, uncond, head, **options)
    return sample_euler(predict, x, sigmas)


def cfg(world, scale=SCALE):
    return run(world, make_plan("cfg", N, scale))


def test_the_test_heads_keep_the_contracts(world):
    denoiser, _, _, uncond, _ = world
    assert isinstance(GapHead(denoiser, uncond), OutputHead)
    assert isinstance(ShiftHead(0.0), InModelHead)


def test_strong_is_the_usual_formula_and_exactly_cond_at_scale_1():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 3, 4, 4, generator=generator)
    usual = uncond.double() + SCALE * (cond.double() - uncond.double())
    torch.testing.assert_close(strong(cond, uncond, SCALE).double(), usual, atol=1e-6, rtol=1e-6)
    assert torch.equal(strong(cond, uncond, 1.0), cond)
    assert torch.equal(strong(cond, uncond, SCALE), weak(cond, cond - uncond, SCALE))


def test_weak_to_strong_is_exact_at_both_ends_and_for_a_perfect_head():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, 4, generator=generator)
    assert torch.equal(weak_to_strong(a, b, 0.0), a)
    assert torch.equal(weak_to_strong(a, b, 1.0), b)
    assert torch.equal(weak_to_strong(b, b, 1.7), b)
    torch.testing.assert_close(weak_to_strong(a, b, 1.5), a + 1.5 * (b - a))


def test_half_precision_is_combined_in_float32():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 1, 4, 64, 64, generator=generator).bfloat16()
    exact = uncond.double() + 7.5 * (cond.double() - uncond.double())
    ours = strong(cond, uncond, 7.5)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())  # one rounding, at the end


@pytest.mark.parametrize(
    ("slow_steps", "w2s_scale"), [(0, 1.5), (3, 1.5), (N, 1.5), (N, 0.0), ((1, 4), 2.5)]
)
def test_with_a_perfect_head_every_mode_is_cfg(world, slow_steps, w2s_scale):
    head = GapHead(world[0], world[3])
    plan = make_plan("core", N, SCALE, slow_steps=slow_steps, w2s_scale=w2s_scale)
    torch.testing.assert_close(run(world, plan, head), cfg(world), atol=1e-12, rtol=0)
    assert head.calls == N


def test_with_a_zero_head_slow_is_cfg_at_the_calibrated_scale(world):
    head = GapHead(world[0], world[3], factor=0.0)
    plan = make_plan("core", N, SCALE, slow_steps=N, w2s_scale=1.5)
    expected = cfg(world, 1 + 1.5 * (SCALE - 1))
    torch.testing.assert_close(run(world, plan, head), expected, atol=1e-12, rtol=0)


def test_with_a_zero_head_fast_is_cond(world):
    head = GapHead(world[0], world[3], factor=0.0)
    fast = run(world, make_plan("core", N, SCALE), head)
    assert torch.equal(fast, run(world, make_plan("cond", N, SCALE)))


def test_w2s_scale_1_is_cfg_for_any_head_and_does_not_ask_it(world):
    head = GapHead(world[0], world[3], factor=-0.7, offset=3.0)
    plan = make_plan("core", N, SCALE, slow_steps=N, w2s_scale=1.0)
    assert torch.equal(run(world, plan, head), cfg(world))
    assert head.calls == 0


def test_an_imperfect_head_does_what_the_formulas_say(world):
    denoiser, x, cond, uncond, sigmas = world
    head = GapHead(denoiser, uncond, factor=0.6, offset=0.1)
    sigma = torch.full((2,), float(sigmas[0]), dtype=torch.float64)
    c, u = denoiser(x, sigma, cond), denoiser(x, sigma, uncond)
    guess = c + (SCALE - 1) * (0.6 * (c - u) + 0.1)
    usual = u + SCALE * (c - u)
    for kind, expected in (("fast", guess), ("slow", guess + 1.5 * (usual - guess))):
        plan = Plan((Step(kind, SCALE, 1.5),) * N)
        d = make_predict(denoiser, sigmas, plan, cond, uncond, head)(x, 0)
        torch.testing.assert_close(d, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("mode", "slow_steps", "evaluations"),
    [("cond", None, N), ("cfg", None, 2 * N), ("core", 0, N), ("core", N, 2 * N), ("core", 2, 8)],
)
def test_evaluations_are_counted_and_as_planned(world, mode, slow_steps, evaluations):
    plan = make_plan(mode, N, SCALE, slow_steps=slow_steps)
    with count_nfe(world[0].module) as counter:
        run(world, plan, GapHead(world[0], world[3]))
    assert counter.per_sample(2) == plan.nfe == evaluations
    assert counter.calls == N  # a CFG pair is one batched pass


def test_an_in_model_head_needs_a_third_pass_in_slow_steps_only(world):
    denoiser, x, cond, uncond, sigmas = world
    head = ShiftHead(0.3)
    plan = make_plan("core", N, SCALE, slow_steps=2, in_model=True)
    with head.attached(denoiser.module), count_nfe(denoiser.module) as counter:
        predict = make_predict(denoiser, sigmas, plan, cond, uncond, head)
        slow, fast = predict(x, 0), predict(x, 5)
    assert counter.rows == 2 * (3 + 1)
    assert plan.nfe == 2 * 3 + 4
    assert head.scales == [SCALE, SCALE]

    def d(i, prompt):
        return denoiser(x, torch.full((2,), float(sigmas[i]), dtype=torch.float64), prompt)

    torch.testing.assert_close(fast, d(5, cond) + (SCALE - 1) * 0.3, atol=1e-12, rtol=0)
    guess = d(0, cond) + (SCALE - 1) * 0.3
    usual = d(0, uncond) + SCALE * (d(0, cond) - d(0, uncond))
    torch.testing.assert_close(slow, guess + 1.5 * (usual - guess), atol=1e-12, rtol=0)


def test_pairs_are_shown_where_both_passes_were_made(world):
    denoiser, x, cond, uncond, sigmas = world
    head, seen = GapHead(denoiser, uncond), []
    plan = make_plan("core", N, SCALE, slow_steps=(1, 4))
    predict = make_predict(
        denoiser, sigmas, plan, cond, uncond, head, on_pair=lambda *pair: seen.append(pair)
    )
    sample_euler(predict, x, sigmas)
    assert [pair[0] for pair in seen] == [1, 4]
    for (i, state, c, gap, features), observed in zip(seen, head.seen, strict=True):
        sigma = torch.full((2,), float(sigmas[i]), dtype=torch.float64)
        torch.testing.assert_close(c, denoiser(state, sigma, cond))
        torch.testing.assert_close(gap, c - denoiser(state, sigma, uncond))
        assert features is None
        assert observed is gap
    assert head.resets == 1


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_a_head_gets_the_features_of_the_cond_pass(world, kind):
    denoiser, x, cond, uncond, sigmas = world
    head, pairs = GapHead(denoiser, uncond, needs_features=True), []
    predict = make_predict(
        denoiser,
        sigmas,
        Plan((Step(kind, SCALE, 1.5),) * N),
        cond,
        uncond,
        head,
        on_pair=lambda *pair: pairs.append(pair),
    )
    predict(x, 2)
    with denoiser.capture_features() as read:
        denoiser(x, torch.full((2,), float(sigmas[2]), dtype=torch.float64), cond)
        expected = read()
    torch.testing.assert_close(head.features[0], expected)
    assert all(torch.equal(pair[4], head.features[0]) for pair in pairs)


def test_features_are_captured_for_pairs_without_a_head(world):
    seen = []
    run(
        world,
        make_plan("cfg", N, SCALE),
        on_pair=lambda *pair: seen.append(pair[4].shape),
        capture_features=True,
    )
    assert seen == [(2, 16, 3)] * N


def test_scale_overrides_the_plan_and_1_is_a_cond_step(world):
    denoiser, x, cond, uncond, sigmas = world
    scales = [5.0, 5.0, 5.0, 1.0, 0.0, 5.0]
    with count_nfe(denoiser.module) as counter:
        ours = run(world, make_plan("cfg", N, SCALE), scale=scales.__getitem__)
    assert counter.per_sample(2) == 4 * 2 + 2
    expected = run(world, make_plan("cfg", N, [max(s, 1.0) for s in scales]))
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_conditioning_overrides_the_prompts(world):
    denoiser, x, cond, uncond, sigmas = world
    plan = make_plan("cfg", N, SCALE)
    swapped = run(world, plan, conditioning=lambda _i: (uncond, cond))
    expected = run((denoiser, x, uncond, cond, sigmas), plan)
    assert torch.equal(swapped, expected)
    assert not torch.equal(swapped, cfg(world))


def test_join_puts_the_negative_prompt_first():
    def prompt(value):
        extra = {"a": {"t": torch.full((2, 1), value), "n": 3}, "none": None}
        return Conditioning(torch.full((2, 4, 5), value), torch.full((2, 6), value), extra)

    both = join(prompt(0.0), prompt(1.0))
    assert both.prompt_embeds[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert both.pooled[:, 0].tolist() == [0, 0, 1, 1]
    assert both.extra["a"]["t"].flatten().tolist() == [0, 0, 1, 1]
    assert (both.extra["a"]["n"], both.extra["none"]) == (3, None)


def test_what_does_not_fit_is_refused(world):
    denoiser, _, cond, uncond, sigmas = world
    core = make_plan("core", N, SCALE)
    with pytest.raises(ValueError, match="weak head, got None"):
        make_predict(denoiser, sigmas, core, cond, uncond)
    with pytest.raises(ValueError, match="uncond, got None"):
        make_predict(denoiser, sigmas, make_plan("cfg", N, SCALE), cond, None)
    with pytest.raises(ValueError, match="6 steps, got 4"):
        make_predict(denoiser, sigmas[:4], core, cond, uncond, GapHead(denoiser, uncond))
    with pytest.raises(ValueError, match="in_model"):
        make_predict(denoiser, sigmas, core, cond, uncond, ShiftHead(0.0))


def test_a_fast_plan_needs_no_uncond(world):
    denoiser, x, cond, uncond, sigmas = world
    head = GapHead(denoiser, uncond)
    predict = make_predict(denoiser, sigmas, make_plan("core", N, SCALE), cond, None, head)
    torch.testing.assert_close(sample_euler(predict, x, sigmas), cfg(world), atol=1e-12, rtol=0)


def test_an_edit_of_the_prompt_in_place_reaches_both_passes():
    """Truth: a closure that is made after the edit."""
    denoiser = GaussianDenoiser()
    sides = [Conditioning(torch.zeros(2, 3, 1), torch.full((2, 4), v)) for v in (1.0, 0.2)]
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    sigmas, plan = torch.tensor([0.9, 0.5, 0.0]), make_plan("cfg", 2, 3.0)
    predict = make_predict(denoiser, sigmas, plan, *sides)
    before = predict(x, 0)
    sides[0].pooled.mul_(2)
    after = predict(x, 0)
    assert torch.equal(after, make_predict(denoiser, sigmas, plan, *sides)(x, 0))
    assert not torch.allclose(after, before)
