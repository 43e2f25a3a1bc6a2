"""Arms: what they cost at a given N is what the paper's formulas say, and bad ones are refused."""

from __future__ import annotations

import pytest

from core2_sampler.benchmarks.arms import ARMS, FIRST_TABLE, Arm, ArmSpec, build_arms
from core2_sampler.benchmarks.matching import is_plain
from core2_sampler.plan import make_plan

HEADS = {name: f"heads/{name}" for name in ("affine", "adapter", "tap")}


def test_first_table_costs_what_its_captions_say():
    """Counted by hand at N = 28: a cond or fast step is 1, a CFG or slow step 2."""
    nfe = {
        arm.name: arm.plan(in_model=False).nfe for arm in build_arms(FIRST_TABLE, 28, 4.5, HEADS)
    }
    assert nfe == {
        "cond": 28,
        "cfg": 56,
        "cfg-half": 28,
        "last-gap": 32,
        "affine": 28,
        "adapter-fast": 28,
        "tap-fast": 28,
        "tap-quarter": 35,
        "tap-w2s": 56,
    }


def test_an_arm_makes_the_plan_of_its_settings():
    quarter, w2s = build_arms(["tap-quarter", "tap-w2s"], 10, 3.0, HEADS)
    assert (quarter.head, quarter.slow_steps, w2s.slow_steps) == ("heads/tap", 3, 10)
    assert quarter.plan(False) == make_plan("core", 10, 3.0, slow_steps=3, w2s_scale=1.0)
    assert w2s.plan(True) == make_plan("core", 10, 3.0, slow_steps=10, w2s_scale=1.5, in_model=True)
    assert build_arms(["cfg-half"], 10, 3.0, {})[0].plan(False) == make_plan("cfg", 5, 3.0)


def test_zigzag_arms_cost_what_the_formulas_say():
    """At N = 28: 6N - 4, 5N - 3, 3N - 2, 2N; in a quarter of the 27 steps 3 or 2 more each."""
    names = [name for name in ARMS.names() if name.startswith("z")]
    arms = build_arms(names, 28, 4.5, {"own": "heads/own"})
    assert {arm.name: arm.plan(in_model=False).nfe for arm in arms} == {
        "zigzag": 137,
        "zigzag-half": 164,
        "zigzag-quarter": 56 + 7 * 3,
        "zcore": 137,
        "zfast": 82,
        "zfast-cond": 82,
        "zfast-quarter": 28 + 7 * 2,
        "z2": 56,
    }


def test_arms_of_a_scale_rule_have_these_scales_and_cost():
    """At N = 5 and scale 3; half a cosine wave passes (1 +- sqrt(1/2)) / 2 at its quarters."""
    names = ["interval", "linear", "linear-up", "cosine", "cosine-up"]
    plans = {arm.name: arm.plan(in_model=False) for arm in build_arms(names, 5, 3.0, {})}
    high, low = 3 + 2 * 0.5**0.5, 3 - 2 * 0.5**0.5
    wanted = {
        "interval": ([1, 3, 3, 3, 1], 8),
        "linear": ([5, 4, 3, 2, 1], 9),
        "linear-up": ([1, 2, 3, 4, 5], 9),
        "cosine": ([5, high, 3, low, 1], 9),
        "cosine-up": ([1, low, 3, high, 5], 9),
    }
    for name, (scales, nfe) in wanted.items():
        assert [step.guidance_scale for step in plans[name].steps] == pytest.approx(scales)
        assert plans[name].nfe == nfe
    assert not is_plain(build_arms(["linear"], 5, 3.0, {})[0])


@pytest.mark.parametrize("name", ARMS.names())
@pytest.mark.parametrize("steps", [2, 3, 7, 50])
def test_every_registered_arm_runs_at_any_number_of_steps(name: str, steps: int):
    spec = ARMS.get(name)
    heads = {} if spec.head is None else {spec.head: "folder"}
    asked = "folder" if spec.is_asking else None
    plan = spec.at(name, steps, 4.5, heads, asked).plan(in_model=False)
    assert len(plan) in (steps, steps // 2)
    assert len(plan) <= plan.nfe <= (2 if spec.mode in ("cond", "cfg", "core") else 6) * len(plan)
    assert spec.about


def test_last_gap_sees_a_gap_at_any_number_of_steps():
    for steps in (1, 4, 8, 28):
        plan = build_arms(["last-gap"], steps, 4.5, {})[0].plan(in_model=False)
        assert plan.steps[0].kind == "cfg"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_arms(["cfgg"], 4, 2.0, {}), "did you mean 'cfg'"),
        (lambda: build_arms(["cfg", "cfg"], 4, 2.0, {}), "named once"),
        (lambda: build_arms(["tap-fast"], 4, 2.0, {"adapter": "a"}), "tap=FOLDER"),
        (lambda: build_arms(["cfg-half"], 1, 2.0, {}), "more steps"),
        (lambda: build_arms(["online"], 4, 2.0, {}), "--evaluators FOLDER"),
        (lambda: Arm("a", "cfg", 0, 2.0), "at least 1, got 0"),
        (lambda: Arm("a", "core", 4, 2.0), "has a head if and only if"),
        (lambda: Arm("a", "cfg", 4, 2.0, head="h"), "has a head if and only if"),
        (lambda: Arm("a", "cfg", 4, 2.0, slow_steps=2), "for mode 'core' only"),
        (lambda: Arm("a", "zfast", 4, 2.0), "has a head if and only if"),
        (lambda: Arm("a", "cfg", 4, 2.0, zig_steps=2), "for modes zigzag, zcore, zfast, z2 only"),
        (lambda: ARMS.register("cfg")(ArmSpec("cfg", "again")), "taken"),
    ],
)
def test_bad_arms_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
