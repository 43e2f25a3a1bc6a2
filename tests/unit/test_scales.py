"""Scale rules. Truth: tables by hand, the minimum of a quadratic, and each sample on its own."""

from __future__ import annotations

import math

import pytest
import torch

from core2_sampler.evaluators.mixing import adaptive_weights, normalised
from core2_sampler.guidance import make_predict, strong
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import make_plan
from core2_sampler.samplers import sample_euler
from core2_sampler.scale_rules import (
    constant,
    cosine,
    interval,
    linear,
    listed,
    parse_rule,
    static_scales,
)
from core2_sampler.scales import CallableScale, OnlineScale, Pair, next_latents
from core2_sampler.schedules import flow_sigmas
from core2_sampler.testing import GaussianDenoiser
from core2_sampler.types import Conditioning

CANDIDATES = (1.0, 3.0, 7.5, 11.0, 15.0)


class Nearness:
    """Minus the squared distance to a target that the prompt names, [C] for each row."""

    def check_family(self, family):
        if family != "gaussian":
            raise ValueError(f"made for gaussian, got {family}")

    def check_latents(self, channels):
        pass

    def __call__(self, x, sigma, conditioning):
        return -(x - conditioning.pooled[:, :, None, None]).square().flatten(1).sum(1)


class Calm(Nearness):
    """Minus the squared size of the latents, in another unit."""

    def __call__(self, x, sigma, conditioning):
        return -0.01 * x.square().flatten(1).sum(1)


class Farness(Nearness):
    """The opposite of nearness, in another unit."""

    def __call__(self, x, sigma, conditioning):
        return -0.01 * super().__call__(x, sigma, conditioning)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(x, cond, gap, targets, i=0, sigma=0.8, sigma_next=0.6):
    def guided(scale):
        if isinstance(scale, torch.Tensor):
            scale = scale[:, None, None, None]
        return cond + (scale - 1) * gap

    prompt = Conditioning(targets[:, None], targets)
    return Pair(i, x, cond, gap, sigma, sigma_next, prompt, guided)


LEVELS = [0.8, 0.6, 0.4, 0.2, 0.0]


def begun(rule):
    rule.begin(GaussianDenoiser(), LEVELS)
    return rule


@pytest.mark.parametrize(
    ("rule", "scales"),
    [
        (constant(4.5), [4.5] * 5),
        (interval(6, 0.2, 0.6), [1, 6, 6, 1, 1]),
        (linear(1, 9), [1, 3, 5, 7, 9]),
        (cosine(9, 1), [9, 5 + 4 * math.sqrt(0.5), 5, 5 - 4 * math.sqrt(0.5), 1]),
        (listed(1, 2, 3, 4, 5), [1, 2, 3, 4, 5]),
        (lambda i, n: 2 + i / n, [2, 2.2, 2.4, 2.6, 2.8]),
        (parse_rule("linear:9,1"), [9, 7, 5, 3, 1]),
        (parse_rule("list:2,3,4,5,6"), [2, 3, 4, 5, 6]),
    ],
)
def test_a_static_rule_gives_these_scales(rule, scales):
    assert static_scales(rule, 5) == pytest.approx(scales)


def test_one_step_is_the_first():
    assert static_scales(linear(3, 9), 1) == static_scales(cosine(3, 9), 1) == (3,)


def test_outside_an_interval_a_step_costs_one_pass():
    plan = make_plan("cfg", 10, static_scales(interval(6, 0.2, 0.8), 10))
    assert [step.kind for step in plan.steps] == ["cond"] * 2 + ["cfg"] * 6 + ["cond"] * 2
    assert plan.nfe == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: static_scales(listed(1, 2), 3), r"one a step \(3\), got 2"),
        (lambda: static_scales(lambda i, n: math.nan, 3), "finite"),
        (lambda: interval(3, 0.5, 0.5), "0 <= start < stop <= 1"),
        (lambda: parse_rule("cosin:9,1"), "did you mean 'cosine'"),
        (lambda: parse_rule("cosine:9"), "got 'cosine:9'"),
        (lambda: parse_rule("cosine:9,high"), "got 'cosine:9,high'"),
        (lambda: OnlineScale({}), "at least one evaluator"),
        (lambda: OnlineScale({"a": Nearness()}, candidates=(0.5,)), "at least 1"),
        (lambda: OnlineScale({"a": Nearness()}, weights={"b": 1.0}), r"each of \['a'\]"),
        (lambda: parse_rule("constant:inf"), "numbers must be finite"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_evaluator_of_another_family_is_refused_before_the_run():
    class Other(GaussianDenoiser):
        family = "flux"

    with pytest.raises(ValueError, match="made for gaussian, got flux"):
        OnlineScale({"near": Nearness()}).begin(Other(), LEVELS)


def test_online_needs_lower_and_lower_noise_levels():
    with pytest.raises(ValueError, match="lower noise level, got 0.6 after 0.6 at step 1"):
        OnlineScale({"near": Nearness()}).begin(GaussianDenoiser(), [0.8, 0.6, 0.6, 0.0])


def test_there_is_no_schedule_before_a_step_asked():
    assert begun(OnlineScale({"near": Nearness()})).schedule is None


def test_an_interval_begins_and_ends_at_its_steps():
    # 0.14 * 50 is 7.000000000000001, 0.58 * 50 is 28.999999999999996
    scales = static_scales(interval(6, 0.14, 0.58), 50)
    assert [i for i, scale in enumerate(scales) if scale == 6] == list(range(7, 29))


def test_online_picks_the_candidate_nearest_to_the_minimum_of_a_quadratic():
    # |x + dt (cond + (s - 1) gap) - target|^2 is a parabola in s: the nearest candidate wins.
    batch, dt = 64, 0.6 - 0.8
    x, cond, gap, off = (random(batch, 4, 1, 1, seed=s) for s in range(4))
    wanted = 1 + 15 * torch.rand(batch, generator=torch.Generator().manual_seed(4))
    ahead = x + dt * (cond + (wanted - 1)[:, None, None, None] * gap)
    targets = (ahead + 0.1 * off)[:, :, 0, 0]
    residual = x + dt * cond - targets[:, :, None, None]
    slope = (residual * gap).flatten(1).sum(1) / (dt * gap.square().flatten(1).sum(1))
    best = 1 - slope  # where the derivative in s is 0
    nearest = (best[:, None] - torch.tensor(CANDIDATES)).abs().argmin(1)
    got = begun(OnlineScale({"near": Nearness()}))(pair_of(x, cond, gap, targets))
    assert torch.equal(got, torch.tensor(CANDIDATES)[nearest])
    assert len(set(got.tolist())) == 5  # or nothing was told apart


def run(rule, seeds):
    """Sample with a rule as the engine asks it; return latents, schedule, NFE."""
    denoiser, sigmas = GaussianDenoiser(), flow_sigmas(6)
    x = torch.stack([random(4, 4, 4, seed=seed) for seed in seeds])
    means = torch.stack([random(4, seed=100 + seed) for seed in seeds])
    # What the evaluator wants lies further out than the prompt's mean, so guidance pays.
    prompt, target = denoiser.prompt(means), 3 * means
    rule.begin(denoiser, sigmas.tolist())

    def predict(x, i):
        sigma = sigmas[i].float().expand(len(x))
        cond, uncond = denoiser(x, sigma, prompt), denoiser(x, sigma, denoiser.prompt(0 * means))
        pair = pair_of(x, cond, cond - uncond, target, i, float(sigmas[i]), float(sigmas[i + 1]))
        return strong(cond, uncond, 1.0) if i == 0 else pair.guided(rule(pair))

    with count_nfe(denoiser.module) as counter:
        x = sample_euler(predict, x, sigmas)
    return x, rule.schedule, counter.per_sample(len(seeds))


@pytest.mark.parametrize("weights", ["adaptive", {"near": 1.0, "calm": 0.5}])
def test_a_sample_does_not_depend_on_its_batch_mates(weights):
    def rule():
        return OnlineScale({"near": Nearness(), "calm": Calm()}, weights=weights)

    latents, schedule, nfe = run(rule(), [0, 1, 2, 3])
    assert nfe == 12 and schedule.shape == (6, 4)
    assert schedule[0].isnan().all()  # the step that did not ask
    assert len(set(schedule[1:].flatten().tolist())) > 1
    for row in range(4):
        alone, picks, _ = run(rule(), [row])
        torch.testing.assert_close(alone[0], latents[row])
        assert torch.equal(picks[1:, 0], schedule[1:, row])


def test_a_second_run_knows_nothing_of_the_first():
    rule = OnlineScale({"near": Nearness(), "calm": Calm()})
    _, first, _ = run(rule, [0, 1])
    run(rule, [7])
    assert torch.equal(run(rule, [0, 1])[1][1:], first[1:])


def test_a_schedule_can_be_replayed():
    latents, schedule, _ = run(OnlineScale({"near": Nearness()}), [0, 1])
    again, same, _ = run(CallableScale(lambda pair: schedule[pair.i]), [0, 1])
    assert torch.equal(again, latents) and torch.equal(same[1:], schedule[1:])
    with pytest.raises(ValueError, match=r"one scale a sample \[2\], got the shape \(3,\)"):
        run(CallableScale(lambda pair: torch.ones(3)), [0, 1])


@pytest.mark.parametrize("nominal", [1.0001, 3.0])
def test_the_engine_guides_each_sample_at_the_scale_picked_for_it(nominal):
    """Whatever scale the plan has; where it is not the plan's, the caller's own holds."""
    denoiser, sigmas = GaussianDenoiser(), flow_sigmas(4)
    x, mean = random(3, 4, 4, 4), random(3, 4, seed=1)
    cond, uncond, picked = denoiser.prompt(mean), denoiser.prompt(0 * mean), [2.0, 7.5, 11.0]
    rule = CallableScale(lambda pair: torch.tensor(picked))
    plan = make_plan("cfg", 4, nominal)
    scales = [nominal, nominal, 5.0, 1.0]
    for given in (None, scales.__getitem__):
        predict = make_predict(denoiser, sigmas, plan, cond, uncond, scale=given, rule=rule)
        for i in range(4):
            sigma = sigmas[i].float().expand(3)
            both = denoiser(x, sigma, cond), denoiser(x, sigma, uncond)
            edited = given is not None and scales[i] != nominal
            rows = [scales[i]] * 3 if edited else picked
            wanted = [strong(*both, scale)[row] for row, scale in enumerate(rows)]
            torch.testing.assert_close(predict(x, i), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert rule.schedule[:2].tolist() == [picked] * 2 and rule.schedule[2:].isnan().all()


def test_it_steers_to_what_the_evaluator_wants():
    # The Gaussian denoiser leads to a mean s times the prompt's; three times is wanted.
    _, schedule, _ = run(OnlineScale({"near": Nearness()}, candidates=(1.0, 3.0, 15.0)), [5])
    latents, _, _ = run(OnlineScale({"near": Nearness()}, candidates=(1.0, 3.0, 15.0)), [5])
    plain, _, _ = run(CallableScale(lambda pair: torch.ones(1)), [5])
    target = 3 * random(4, seed=105)[:, None, None]
    assert (latents - target).square().sum() < (plain - target).square().sum()
    assert 3.0 in schedule[1:]


def test_next_latents_are_an_euler_step():
    x, cond, gap = (random(2, 4, 2, 2, seed=s) for s in range(3))
    pair = pair_of(x, cond, gap, random(2, 4))
    wanted = x - 0.2 * (cond + torch.tensor([2.0, 6.5])[:, None, None, None] * gap)
    torch.testing.assert_close(next_latents(pair, torch.tensor([3.0, 7.5])), wanted)


def test_normalised_scores_have_no_unit():
    scores = torch.tensor([[[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]])  # one evaluator, 3 candidates
    wanted = torch.tensor([[[-(1.5**0.5), 0.0], [0.0, 0.0], [1.5**0.5, 0.0]]])
    torch.testing.assert_close(normalised(scores), wanted)
    torch.testing.assert_close(normalised(100 * scores - 7), wanted)


def test_rounding_errors_of_large_scores_have_no_say():
    # Neighbours of 90 in float32 are 8e-6 apart: no evaluator means anything by that.
    scores = torch.tensor([[[90.0], [90.00001], [90.0]]])
    assert scores.unique().numel() == 2
    assert torch.equal(normalised(scores), torch.zeros(1, 3, 1))


def test_fixed_weights_count_as_often_as_they_say():
    # Candidates 1 and 3: near prefers 1, far prefers 3, each by the same normalised margin.
    x, gap = torch.zeros(1, 1, 1, 1), -torch.ones(1, 1, 1, 1)
    pair = pair_of(x, x, gap, torch.zeros(1, 1))
    for weights, pick in [({"near": 2.0, "far": 1.0}, 1.0), ({"near": 1.0, "far": 2.0}, 3.0)]:
        evaluators = {"far": Farness(), "near": Nearness()}
        rule = begun(OnlineScale(evaluators, candidates=(1.0, 3.0), weights=weights))
        assert rule(pair).tolist() == [pick]


# Two evaluators by five samples, two candidates each at `NOW` -+ `SPREAD`, worked out by hand:
#   gains (now - before) / sqrt((now - before)^2 + spread^2)
#   sample 0: 3 / 5 = 6 / 10                               -> equal shares
#   sample 1: 4 / 5, and a loss                            -> a gain below 0 counts, a loss is 0
#   sample 2: two losses                                   -> nothing gained: equal
#   sample 3: 4 / 5 from 0, 3 / 5                          -> no division by 0
#   sample 4: nothing moved, 3 / 5                         -> nor here
BEFORE = torch.tensor([[2.0, -2.0, 2.0, 0.0, 1.0], [8.0, 8.0, 8.0, 8.0, 1.0]])
NOW = torch.tensor([[5.0, 2.0, 1.0, 4.0, 1.0], [14.0, 4.0, 7.0, 11.0, 4.0]])
SPREAD = torch.tensor([[4.0, 3.0, 1.0, 3.0, 0.0], [8.0, 3.0, 1.0, 4.0, 4.0]])
SCORES = torch.stack([NOW - SPREAD, NOW + SPREAD], 1)


def test_adaptive_weights_are_those_worked_out_by_hand():
    wanted = torch.tensor([[0.5, 1.0, 0.5, 4 / 7, 0.0], [0.5, 0.0, 0.5, 3 / 7, 1.0]])
    torch.testing.assert_close(adaptive_weights(SCORES, BEFORE), wanted)
    assert torch.equal(adaptive_weights(SCORES, None), torch.full((2, 5), 0.5))
    # as printed: signed, not scaled to 1
    printed = torch.tensor([[1.5, -2.0, -0.5, 40.0, 0.0], [0.75, -0.5, -0.125, 0.375, 3.0]])
    torch.testing.assert_close(adaptive_weights(SCORES, BEFORE, upstream=True), printed)


@pytest.mark.parametrize("zero", [-50.0, -2.0, 10.0])
@pytest.mark.parametrize("unit", [0.01, 1.0, 100.0])
def test_adaptive_weights_know_neither_zero_nor_unit_of_a_score(zero, unit):
    scores, before = random(2, 5, 64).double(), random(2, 64, seed=1).double()
    a, b = torch.tensor([[unit], [1.0]]), torch.tensor([[zero], [0.0]])
    other = adaptive_weights(a[:, None] * scores + b[:, None], a * before + b)
    torch.testing.assert_close(other, adaptive_weights(scores, before))
    assert len(other.unique()) > 20


def test_adaptive_weights_listen_to_the_evaluator_that_gains():
    # Both steps offer the candidates 1 and 3 at distances 0 and 0.4 of what `near` wants.
    rule = begun(OnlineScale({"near": Nearness(), "far": Farness()}, candidates=(1.0, 3.0)))
    gap, zero = -torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    far, close = torch.tensor([[9.0]]), torch.tensor([[-9.0]])
    rule(pair_of(zero, zero, gap, far, i=0))  # distances 9 and 8.6
    # now 0.5 and 0.1: `near` gained, `far` lost, so 3 is right, which is nearer
    assert rule(pair_of(zero + 8.5, zero, gap, far, i=1)).tolist() == [3.0]
    rule.begin(GaussianDenoiser(), LEVELS)
    rule(pair_of(zero, zero, gap, -close * 0, i=0))  # distances 0 and 0.4
    # now 9 and 9.4: `far` gained, so 3 is right, which is farther
    assert rule(pair_of(zero, zero, gap, close, i=1)).tolist() == [3.0]
    assert rule.schedule[1].tolist() == [3.0]


def test_no_step_waits_for_the_device():
    # On the meta device any read of a value raises.
    x = torch.empty(3, 4, 8, 8, device="meta")
    rule = begun(OnlineScale({"near": Nearness(), "far": Farness()}))
    for i in range(2):
        pair = pair_of(x, x, x, torch.empty(3, 4, device="meta"), i=i)
        assert rule(pair).shape == (3,)
    rule.upstream = True
    assert rule(pair).is_meta
