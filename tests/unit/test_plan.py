"""Plans: costs counted by hand, and every bad input refused before anything runs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from core2_sampler.plan import PRESETS, Core2Config, Plan, Step, make_plan, resolve_config
from core2_sampler.scales import CallableScale


def kinds(plan):
    return [step.kind for step in plan.steps]


@pytest.mark.parametrize(
    ("options", "nfe"),
    [
        ({"mode": "cond"}, 8),
        ({"mode": "cfg"}, 16),
        ({"mode": "core"}, 8),
        ({"mode": "core", "slow_steps": 3}, 11),
        ({"mode": "core", "slow_steps": 8}, 16),
        ({"mode": "core", "slow_steps": 3, "in_model": True}, 14),
        ({"mode": "core", "slow_steps": 3, "in_model": True, "w2s_scale": 1.0}, 11),
        ({"mode": "zigzag", "inversion_scale": 0.5}, 6 * 8 - 4),
        ({"mode": "zigzag"}, 5 * 8 - 3),
        ({"mode": "zigzag", "inversion_scale": 1.0}, 5 * 8 - 3),
        ({"mode": "zigzag", "inversion_scale": 0.5, "zig_steps": 2}, 16 + 2 * 4),
        ({"mode": "zcore", "inversion_scale": 0.5}, 5 * 8 - 3),
        ({"mode": "zfast", "inversion_scale": 0.5}, 3 * 8 - 2),
        ({"mode": "zfast", "in_model": True}, 3 * 8 - 2),
        ({"mode": "zfast", "zig_steps": (0, 6)}, 8 + 2 * 2),
        ({"mode": "z2"}, 2 * 8),
        ({"mode": "z2", "inversion_scale": 0.5, "zig_steps": (3, 6)}, 2 * 8),
    ],
)
def test_nfe(options, nfe):
    plan = make_plan(num_steps=8, guidance_scale=4.0, **options)
    assert plan.nfe == nfe
    assert len(plan) == 8


def inversions(plan):
    return [(step.inversion, step.inversion_scale) for step in plan.steps]


def test_zigzag_steps_are_all_but_the_last_or_those_asked_for():
    assert make_plan("zigzag", 4, 3.0).zigs == (0, 1, 2)
    assert make_plan("zigzag", 1, 3.0) == make_plan("cfg", 1, 3.0)
    assert make_plan("zfast", 4, 3.0, zig_steps=0) == make_plan("core", 4, 3.0)
    assert make_plan("zigzag", 4, [3.0, 1.0, 3.0, 3.0]).zigs == (0, 2)
    shares = [Core2Config(mode="zcore", zig_steps=share) for share in (0.0, 0.25, 1.0)]
    assert [len(config.plan(9, 3.0).zigs) for config in shares] == [0, 2, 8]
    assert Core2Config(mode="zcore", zig_steps=[1]).plan(4, 3.0).zigs == (1,)


def test_the_first_guided_step_has_no_gap_to_be_undone_by():
    plan = make_plan("z2", 5, [1.0, 3.0, 3.0, 1.0, 3.0], inversion_scale=0.5)
    assert plan.zigs == plan.by_gap == (2,)
    assert plan.steps[2] == Step("cfg", 3.0, inversion="gap", inversion_scale=0.5)
    assert (plan.needs_head, plan.needs_uncond) == (False, True)
    assert make_plan("z2", 4, 3.0).zigs == (1, 2)
    assert make_plan("z2", 4, 3.0, zig_steps=1) == make_plan("cfg", 4, 3.0)
    assert make_plan("z2", 4, 1.0) == make_plan("cond", 4, 1.0)
    assert make_plan("zigzag", 4, 3.0).by_gap == ()


def test_a_zigzag_step_is_undone_by_one_pass_where_one_is_enough():
    def undone(mode, scale, **options):
        return make_plan(mode, 2, 3.0, inversion_scale=scale, **options).steps[0].inversion

    assert [undone("zigzag", b) for b in (-1, 0, 0.5, 1)] == ["cfg", "uncond", "cfg", "cond"]
    assert [undone("zcore", b) for b in (-1, 0, 0.5, 1)] == ["fast", "fast", "fast", "cond"]
    assert [undone("zfast", b, in_model=True) for b in (0, 1, 3)] == ["uncond", "cond", "fast"]


def test_the_predictions_that_undo_are_a_plan():
    plan = make_plan("zcore", 3, 3.0, inversion_scale=0.5, in_model=True)
    assert [(s.kind, s.guidance_scale) for s in plan.undo.steps] == [
        ("fast", 0.5),
        ("fast", 0.5),
        ("cond", 1.0),
    ]
    assert plan.undo.in_model


def test_upstream_zcore_undoes_by_its_weight_of_the_head():
    """Identity of the released formula: cond + w (weak - cond) is scale 1 + w (s - 1)."""
    plan = make_plan("zcore", 3, [3.5, 5.0, 2.0], w2s_scale=1.5, upstream=True)
    assert inversions(plan)[:2] == [("fast", 4.75), ("fast", 7.0)]
    assert plan.upstream == "zcore"
    given = make_plan("zcore", 3, 3.5, inversion_scale=0.5, upstream=True)
    assert inversions(given)[0] == ("fast", 0.5)


def test_slow_steps_come_first_or_where_they_are_put():
    assert kinds(make_plan("core", 4, 3.0, slow_steps=2)) == ["slow", "slow", "fast", "fast"]
    plan = make_plan("core", 4, 3.0, slow_steps=(0, 3), w2s_scale=2.0)
    assert kinds(plan) == ["slow", "fast", "fast", "slow"]
    assert [step.w2s_scale for step in plan.steps] == [2.0, 1.0, 1.0, 2.0]


def test_slow_at_w2s_1_is_cfg_and_needs_no_head():
    plan = make_plan("core", 3, 3.0, slow_steps=3, w2s_scale=1.0)
    assert plan == make_plan("cfg", 3, 3.0)
    assert (plan.needs_head, plan.needs_uncond) == (False, True)
    assert kinds(Plan((Step("slow", 3.0, 1.0),))) == ["cfg"]


def test_needs():
    fast, slow = make_plan("core", 3, 3.0), make_plan("core", 3, 3.0, slow_steps=1)
    cond = make_plan("cond", 3, 3.0)
    assert [(p.needs_head, p.needs_uncond) for p in (fast, slow, cond)] == [
        (True, False),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize("mode", ["cfg", "core"])
def test_a_scale_of_1_or_less_is_a_cond_step(mode):
    plan = make_plan(mode, 3, [1.0, 4.0, 0.0])
    assert kinds(plan) == ["cond", "cfg" if mode == "cfg" else "fast", "cond"]
    assert not make_plan(mode, 3, 1.0).needs_head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cor"}, "did you mean 'core'"),
        ({"num_steps": 0}, "num_steps must be an int of at least 1, got 0"),
        ({"num_steps": 2.0}, "num_steps"),
        ({"guidance_scale": [3.0, 3.0]}, "one a step"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"w2s_scale": math.inf, "slow_steps": 1}, "finite"),
        ({"slow_steps": 5}, r"between 0 and the number of steps \(4\), got 5"),
        ({"slow_steps": -1}, "between 0"),
        ({"slow_steps": True}, "slow_steps"),
        ({"slow_steps": 0.5}, "slow_steps"),
        ({"slow_steps": (0, 4)}, r"0\.\.3"),
        ({"slow_steps": (1, 1)}, "repeat"),
        ({"slow_steps": (0.5,)}, "ints"),
        ({"mode": "cfg", "slow_steps": 2}, "belongs to mode 'core'"),
        ({"zig_steps": 2}, "belongs to mode 'zigzag' or 'zcore' or 'zfast' or 'z2', got 2"),
        ({"mode": "cfg", "inversion_scale": 0.0}, "belongs to mode 'zigzag'"),
        ({"mode": "zfast", "upstream": True}, "belongs to mode 'zigzag' or 'zcore'"),
        ({"mode": "z2", "upstream": True}, "belongs to mode 'zigzag' or 'zcore'"),
        ({"mode": "zigzag", "zig_steps": 4}, r"number of steps but the last \(3\), got 4"),
        ({"mode": "zigzag", "zig_steps": (3,)}, r"0\.\.2"),
        ({"mode": "zigzag", "inversion_scale": math.nan}, "inversion_scale must be a finite"),
    ],
)
def test_bad_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**{"mode": "core", "num_steps": 4, "guidance_scale": 3.0, **options})


def test_a_step_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        Step("fas", 3.0)
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        Step("cfg", 3.0, inversion="fas")


@pytest.mark.parametrize(
    ("name", "nfe", "needs_head"),
    [("fast", 28, True), ("balanced", 35, True), ("quality", 56, True)],
)
def test_presets(name, nfe, needs_head):
    plan = resolve_config(name).plan(28, 4.5)
    assert (plan.nfe, plan.needs_head) == (nfe, needs_head)
    assert set(PRESETS) == {"fast", "balanced", "quality"}


def test_config_shares_are_rounded_and_counts_are_taken():
    assert kinds(Core2Config(slow_steps=0.5).plan(5, 3.0)).count("slow") == 3
    assert kinds(Core2Config(slow_steps=1.0).plan(5, 3.0)).count("slow") == 5
    assert kinds(Core2Config(slow_steps=1).plan(5, 3.0)).count("slow") == 1
    assert kinds(Core2Config(slow_steps=[4]).plan(5, 3.0))[-1] == "slow"


def test_config_scales_replace_the_single_one():
    plan = Core2Config(mode="cfg", guidance_scales=(2.0, 1.0, 3.0)).plan(3, 9.0)
    assert [step.guidance_scale for step in plan.steps] == [2.0, 1.0, 3.0]
    with pytest.raises(ValueError, match="one a step"):
        Core2Config(mode="cfg", guidance_scales=(2.0,)).plan(3, 9.0)


def picks(pair):
    return pair.x.new_ones(len(pair.x))


@pytest.mark.parametrize("rule", ["linear:1,5", lambda i, n: 1 + 4 * i / (n - 1)])
def test_a_static_scale_rule_is_part_of_the_plan(rule):
    plan = Core2Config(mode="cfg", scale_rule=rule).plan(5, 9.0)
    assert plan == make_plan("cfg", 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    fast = Core2Config(scale_rule=rule).plan(5, 1.0)
    assert kinds(fast) == ["cond", "fast", "fast", "fast", "fast"]


def test_a_rule_that_sees_the_latents_needs_a_step_to_pick_for():
    rule = CallableScale(picks)

    def plan(scale=3.0, in_model=False, **options):
        return Core2Config(scale_rule=rule, **options).plan(4, scale, in_model)

    assert plan(mode="cfg").asking == plan().asking == (0, 1, 2, 3)
    assert plan(in_model=True, slow_steps=(1, 3)).asking == (1, 3)
    assert plan(in_model=True, slow_steps=(1,), w2s_scale=1.0).asking == (1,)
    with pytest.raises(ValueError, match="got only fast of a head inside the denoiser"):
        plan(in_model=True)
    with pytest.raises(ValueError, match="at a guidance scale above 1; got only cond"):
        plan(scale=1.0, mode="cfg")
    with pytest.raises(ValueError, match="got zigzag steps: use mode 'cfg' or 'core'"):
        plan(mode="zigzag")
    with pytest.raises(ValueError, match="got zigzag steps: use mode 'cfg' or 'core'"):
        plan(mode="z2")


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="scale_rule and guidance_scales both"):
        Core2Config(mode="cfg", scale_rule="constant:3", guidance_scales=(3.0,))
    with pytest.raises(ValueError, match="scale_rule has no effect in mode 'cond'"):
        Core2Config(mode="cond", scale_rule=CallableScale(picks))
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        Core2Config(mode="cfg", scale_rule="cosin:9,1")
    with pytest.raises(ValueError, match="'online', which needs evaluators: give an OnlineScale"):
        Core2Config(mode="cfg", scale_rule="online")
    with pytest.raises(TypeError, match="rule that sees the latents, got int"):
        Core2Config(mode="cfg", scale_rule=3)
    with pytest.raises(ValueError, match="share"):
        Core2Config(slow_steps=1.5)
    with pytest.raises(ValueError, match="zig_steps written with a point"):
        Core2Config(mode="zigzag", zig_steps=-0.5)
    with pytest.raises(ValueError, match="unknown mode"):
        Core2Config(mode="fast")
    with pytest.raises(ValueError, match="did you mean 'quality'"):
        resolve_config("qualty")
    with pytest.raises(TypeError, match="preset name"):
        resolve_config(3)


def test_every_field_of_the_config_has_its_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(Core2Config))
