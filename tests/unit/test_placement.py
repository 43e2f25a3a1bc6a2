"""Slow steps by the head's card. Truth: NFE counted by the plan, errors worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from core2_sampler.cli.generate import GenerateConfig, check, core2_config
from core2_sampler.config import ConfigError, load_config
from core2_sampler.nfe import count_nfe
from core2_sampler.placement import Placement
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS, load_head
from core2_sampler.weak_heads.card import step_errors

ERRORS = [0.1, 0.4, 0.2, 0.4, 0.0]


def slow(plan):
    return [i for i, step in enumerate(plan.steps) if step.kind in ("slow", "cfg")]


@pytest.mark.parametrize(
    ("text", "passes", "wanted"),
    [
        ("budget:5", 1, ()),
        ("budget:6", 1, (1,)),  # of equal ones the first
        ("budget:8", 1, (1, 2, 3)),
        ("budget:10", 1, (0, 1, 2, 3)),  # no error, no use
        ("budget:8", 2, (1,)),  # a second one would cost 9
        ("budget:15", 2, (0, 1, 2, 3)),
        ("gated:0.2", 1, (1, 3)),
        ("gated:0", 2, (0, 1, 2, 3)),
        ("gated:9", 1, ()),
    ],
)
def test_the_worst_steps_are_slow(text, passes, wanted):
    assert Placement.parse(text).place(ERRORS, passes) == wanted


@pytest.mark.parametrize(("in_model", "w2s"), [(False, 1.5), (True, 1.5), (True, 1.0)])
@pytest.mark.parametrize("nfe", [8, 11, 12, 16])
def test_a_budget_is_kept(nfe, in_model, w2s):
    config = Core2Config(slow_steps=f"budget:{nfe}", w2s_scale=w2s)
    plan = config.plan(8, 3.0, in_model, lambda scales: [*range(1, 9)])
    assert nfe - 1 <= plan.nfe <= nfe
    assert slow(plan) == [*range(8 - len(slow(plan)), 8)]


def test_the_errors_are_asked_for_the_scales_of_the_run():
    asked = []

    def errors(scales):
        asked.append(list(scales))
        return [scale - 1 for scale in scales]

    config = Core2Config(slow_steps="gated:1.5", guidance_scales=(1.0, 2.0, 3.0))
    assert slow(config.plan(3, 9.0, errors=errors)) == [2]
    Core2Config(slow_steps=1).plan(3, 9.0, errors=errors)  # not placed by them
    assert asked == [[1.0, 2.0, 3.0]]


def test_texts_of_numbers_are_numbers():
    for text, wanted in (("3", 3), ("0.25", 0.25), ("0,4", (0, 4)), ("[1]", (1,))):
        assert Core2Config(slow_steps=text).slow_steps == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budgt:40", "did you mean 'budget'"),
        ("budget:4.5", "budget:NFE, a whole number of at least 0, got 'budget:4.5'"),
        ("gated:", "gated:ERROR, a number"),
        ("gated:-1", "gated:ERROR, a number of at least 0"),
        ("gated:inf", "gated:ERROR"),
        ("all", "slow_steps must be an integer or a number or a list of integers, got 'all'"),
        ("1.5", "share"),
    ],
)
def test_bad_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Core2Config(slow_steps=text)


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(ValueError, match="from 5, all fast, to 10, all slow, for 5 steps, got 11"):
        Placement.parse("budget:11").place(ERRORS, 1)
    with pytest.raises(ValueError, match="from 5, all fast, to 15"):
        Placement.parse("budget:4").place(ERRORS, 2)
    with pytest.raises(ValueError, match="must be placed by a CoRe2 pipeline.*got neither"):
        Core2Config(slow_steps="budget:40").plan(28, 3.0)
    with pytest.raises(ValueError, match="slow_steps belongs to mode 'core'"):
        Core2Config(mode="cfg", slow_steps="budget:40").plan(28, 3.0)


@pytest.fixture
def saved(tmp_path):
    """Return what makes a head with a card, loaded from its folder."""
    pipe = tiny_sd3_pipeline()

    def make(name="cond", **card):
        head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe))
        head.save_pretrained(tmp_path)
        if card:
            (tmp_path / "card.json").write_text(json.dumps(card))
        return load_head(tmp_path, "sd3")

    return make


def test_errors_are_those_of_the_noise_level(saved):
    card = {"noise_bins": [0.1, 0.5, 0.9], "gap_power": [4.0, 0.25]}
    head = saved(**card, relative_gap_error={"any": [0.25, 0.09]})
    sigmas = torch.tensor([1.0, 0.5, 0.49, 0.0, 0.0])  # the last two lie below all bins
    got = step_errors(head, sigmas, [3.0, 2.0, 2.0, 1.0])
    assert got == pytest.approx([2 * 0.3 * 0.5, 0.3 * 0.5, 0.5 * 2, 0.0])


def test_an_error_of_noise_counts_as_the_velocity_that_it_makes(tmp_path):
    """Truth: v = (eps - sigma x0) / sqrt(1 + sigma^2) with x0 = x - sigma eps, at a fixed x."""
    pipe = tiny_sdxl_pipeline()
    head = HEADS.get("cond").for_denoiser(pipe.family.denoiser(pipe))
    head.save_pretrained(tmp_path)
    card = {"noise_bins": [0.0, 20.0], "gap_power": [1.0], "relative_gap_error": {"any": [0.04]}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    sigmas = torch.tensor([14.6, 2.0, 0.5, 0.0], dtype=torch.float64)

    def velocity(eps):
        return (eps - sigmas * (3.0 - sigmas * eps)) / (1 + sigmas**2).sqrt()

    wanted = velocity(torch.tensor(1.2)) - velocity(torch.tensor(1.0))  # off by 0.2
    got = step_errors(load_head(tmp_path, "sdxl"), sigmas, [2.0] * 4)
    assert got == pytest.approx(wanted.tolist(), rel=1e-6)


def test_errors_between_the_scales_of_a_card_are_interpolated(saved):
    card = {"noise_bins": [0.0, 1.0], "gap_power": [1.0]}
    head = saved(**card, relative_gap_error={"10": [0.7], "2": [0.3], "4.5": [0.4]})
    got = step_errors(head, torch.tensor([0.5] * 4), [2.0, 3.25, 7.25, 12.0])
    assert got == pytest.approx(
        [math.sqrt(0.3), 2.25 * math.sqrt(0.35), 6.25 * math.sqrt(0.55), 11 * math.sqrt(0.7)]
    )


def test_cards_that_do_not_tell_are_refused(saved):
    sigmas = torch.tensor([1.0, 0.5])
    with pytest.raises(ValueError, match="weak head is needed.*got none"):
        step_errors(None, sigmas, [3.0, 3.0])
    with pytest.raises(ValueError, match="folder with card.json"):
        step_errors(saved(), sigmas, [3.0, 3.0])
    card = {"noise_bins": [0.0, 0.5, 1.0], "relative_gap_error": {"any": [0.1, None]}}
    for more in ({}, {"gap_power": [1.0, 1.0]}):
        with pytest.raises(ValueError, match="must have gap_power and an error in every noise bin"):
            step_errors(saved(**card, **more), sigmas, [3.0, 3.0])


def test_a_pipeline_places_them_on_its_own_noise_levels(saved):
    card = {"noise_bins": [0.0, 0.6, 0.9, 1.0], "gap_power": [1.0, 1.0, 1.0]}
    head = saved("tap", **card, relative_gap_error={"any": [0.3, 0.5, 0.1]})
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(weak_head=head)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"}
    with count_nfe(pipe.transformer) as counter:
        pipe("a", **options, core2=Core2Config(slow_steps="budget:9", w2s_scale=1.0))
    sigmas = pipe.family.schedule(pipe, 6, (8, 8)).sigmas[:6]
    bins = [1 if 0.6 <= sigma < 0.9 else 0 if sigma < 0.6 else 2 for sigma in sigmas]
    assert counter.per_sample(1) == 9 and len(set(bins)) == 3
    worst = sorted(range(6), key=lambda i: ([1, 0, 2].index(bins[i]), i))[:3]
    assert slow(pipe.core2_plan) == sorted(worst)
    pipe.register_modules(weak_head=None)
    with pytest.raises(ValueError, match="weak head is needed to place slow steps.*got none"):
        pipe("a", **options, core2=Core2Config(slow_steps="gated:0.1"))


def test_the_command_line_takes_rules_and_numbers():
    given = {"prompts": ("a",), "mode": "core"}
    config = load_config(GenerateConfig, given={**given, "slow_steps": "budget:40"})
    assert core2_config(config).slow_steps == "budget:40"
    assert check(config).plan.nfe == 40 and check(config).plan.needs_uncond
    config = load_config(GenerateConfig, given={**given, "slow_steps": "0.25"})
    assert core2_config(config).slow_steps == 0.25
    with pytest.raises(ConfigError, match="from 28, all fast, to 84, all slow"):
        check(load_config(GenerateConfig, given={**given, "slow_steps": "budget:20"}))
