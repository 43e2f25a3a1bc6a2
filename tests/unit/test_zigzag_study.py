"""``core2 bench zigzag`` on a tiny random pipeline. Truth: costs by hand, runs of the same arms."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from core2_sampler.benchmarks.arms import coinciding
from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.study_table import choice_note
from core2_sampler.benchmarks.zigzag_study import (
    ZigzagConfig,
    against_cfg,
    bench_zigzag,
    cheapest,
    left_out,
    study_arms,
)
from core2_sampler.config import ConfigError
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

N = 4
OWN = {"own": "heads/own"}
CONFIG = ZigzagConfig(StudyConfig(), steps=N, first=(1, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a tap head that does something, and an untrained head inside the denoiser."""
    root = tmp_path_factory.mktemp("zigzag")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    head = HEADS.get("tap").for_denoiser(pipe.family.denoiser(pipe))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    head.save_pretrained(root / "head")
    inside = HEADS.get("adapter").for_denoiser(
        pipe.family.denoiser(pipe), reference_scale=3.0, scale_range=(3.0, 3.0)
    )
    inside.save_pretrained(root / "inside")
    return root


def test_arms_cost_what_their_predictions_cost():
    """At N = 4: a CFG step is 2, a prompt pass or the negative prompt 1; a zig adds two legs."""
    nfe = {arm.name: arm.plan(in_model=False).nfe for arm in study_arms(CONFIG, 3.0, OWN)}
    assert nfe == {
        "fast": 4,
        "zigzag": 3 * (2 + 1 + 2) + 2,
        "zigzag-half": 3 * (2 + 2 + 2) + 2,
        "zcore": 3 * (2 + 1 + 2) + 2,
        "zfast": 3 * (1 + 1 + 1) + 1,
        "zfast-cond": 3 * (1 + 1 + 1) + 1,
        "z2": 4 * 2,
        "zigzag-first-1": (2 + 1 + 2) + 6,
        "zcore-first-1": (2 + 1 + 2) + 6,
        "zfast-first-1": (1 + 1 + 1) + 3,
    }  # first-3 is all but the last, which the arms themselves are
    twice = dataclasses.replace(CONFIG, first=(1, 1))
    assert [arm.name for arm in study_arms(twice, 3.0, OWN)] == list(nfe)
    assert {arm.name for arm in study_arms(CONFIG, 3.0, {})} == {
        "zigzag",
        "zigzag-half",
        "z2",
        "zigzag-first-1",
    }


def test_each_further_head_has_arms_of_its_own():
    config = dataclasses.replace(CONFIG, heads=("tap=t", "own=heads/own"), first=(1,))
    heads = {"tap": "t", **OWN}
    plain = study_arms(dataclasses.replace(config, heads=()), 3.0, heads)
    abouts = {a: text for a, text in study_arms(config, 3.0, heads).items() if a not in plain}
    costs = {arm.name: (arm.plan(in_model=False).nfe, arm.head) for arm in abouts}
    assert costs == {
        "tap-zcore": (3 * (2 + 1 + 2) + 2, "t"),
        "tap-zfast": (3 * (1 + 1 + 1) + 1, "t"),
        "tap-zcore-first-1": ((2 + 1 + 2) + 6, "t"),
        "tap-zfast-first-1": ((1 + 1 + 1) + 3, "t"),
    }
    assert all("that head is tap here" in text for text in abouts.values())


def test_arms_of_the_same_steps_are_found():
    arms = list(study_arms(CONFIG, 3.0, OWN))
    same = {"zcore": "zigzag", "zcore-first-1": "zigzag-first-1"}
    assert coinciding(arms, {OWN["own"]}) == same
    assert coinciding(arms, set()) == {}  # a head on outputs undoes steps itself
    zcore, zigzag = (next(a for a in arms if a.name == name) for name in same.popitem())
    assert coinciding([zcore, zigzag], {OWN["own"]}) == {"zcore-first-1": "zigzag-first-1"}
    other = dataclasses.replace(zigzag, name="other", guidance_scale=4.0)
    assert coinciding([zigzag, other], set()) == {}
    text = left_out({"zcore": "zigzag"}, inside=True)
    assert "zcore = zigzag. A head inside the denoiser" in text
    assert "inside" not in left_out({"a": "b"}, inside=False) and not left_out({}, inside=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": (4,)}, r"the number of steps but the last \(3\), got 4"),
        ({"arms": ("cfg", "zigzag")}, "got cfg: leave it out"),
        ({"arms": ("zigzg",)}, "did you mean 'zigzag'"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        study_arms(dataclasses.replace(CONFIG, **changes), 3.0, OWN)


def test_the_command_compares_each_arm_with_cfg_of_the_same_cost(folders, tmp_path):
    study = StudyConfig(
        model=str(folders / "model"),
        prompts=4,
        seeds=1,
        max_sequence_length=16,
        cache=tmp_path / "cache",
        device="cpu",
    )
    heads = (f"own={folders / 'inside'}", f"tap={folders / 'head'}")
    config = ZigzagConfig(
        study, N, 3.0, ("zigzag", "zcore"), (1,), heads, ga_eval=2, out=tmp_path / "z.md"
    )
    bench_zigzag(config)
    rows = json.loads((tmp_path / "z.json").read_text())
    overall = {
        (r["arm"], r["steps"], r["nfe"])
        for r in rows
        if r["metric"] == "overall" and not r["arm"].endswith("-matched")
    }
    methods = {"zigzag": 17, "zigzag-first-1": 11, "tap-zcore": 17, "tap-zfast": 10}
    methods |= {"tap-zcore-first-1": 11, "tap-zfast-first-1": 6}
    controls = {N, *(nfe // 2 for nfe in methods.values())}
    assert overall == {("cfg", n, 2 * n) for n in controls} | {
        (name, N, nfe) for name, nfe in methods.items()
    }
    told = {(r["arm"], r["metric"]): r for r in rows}
    for name, nfe in methods.items():
        for other in ("cfg", "cfg_equal_nfe", "matched"):
            assert (name, f"overall_minus_{other}") in told
        assert ((name, "overall_minus_zigzag") in told) == (name != "zigzag")
        scale = told[name, "effective_scale"]["value"]
        matched = told[f"{name}-matched", "overall"]
        assert matched["guidance_scale"] == pytest.approx(max(scale, 1), abs=1e-4)
        assert matched["nfe"] == 2 * (nfe // 2) if scale > 1 else nfe
    text = (tmp_path / "z.md").read_text()
    assert "- tap-zfast-first-1: " in text and "in the first 1 steps" in text
    assert "of the other: zcore = zigzag, zcore-first-1 = zigzag-first-1." in text
    assert "effective scale" in text and "too few prompts" in text
    assert "Z-Sampling itself (zigzag, NFE 17) against CFG" in text
    assert "chosen on the very prompts that are reported (split test)" in text


def row(arm, nfe, low, high, name="overall_minus_zigzag"):
    return Row("sd3", arm, 28, 3.0, nfe, 480, name, (low + high) / 2, low, high, "c")


def test_the_cheapest_is_the_one_that_is_shown_to_lose_less_than_a_point():
    zigzag = row("zigzag", 137, 0.7, 0.8, "overall")
    rows = [
        row("zigzag-half", 164, 0.01, 0.03),  # as good, but dearer
        row("zfast-cond", 110, -0.008, 0.03),
        row("zfast", 82, -0.04, 0.01),  # an interval about 0 is no evidence that nothing is lost
        row("zfast-first-2", 32, -0.09, -0.01),
        row("zfast-first-1", 30, math.nan, math.nan),
    ]
    assert "zfast-cond, NFE 110, +1.1 [-0.8, +3.0] points" in cheapest([zigzag, *rows])
    assert "less than 1 point against it (interval above -1 point)" in cheapest([zigzag, *rows])
    for left in (rows[2:], [rows[0], *rows[2:]]):
        assert cheapest([zigzag, *left]).startswith("No zigzag arm of fewer NFE is shown to lose")
    assert cheapest([zigzag]) == "Nothing was compared with Z-Sampling."


def test_z_sampling_itself_is_set_beside_cfg():
    ends = {"cfg": (0.01, 0.03), "cfg_equal_nfe": (-0.02, 0.01), "matched": (-0.03, -0.01)}
    rows = [row("zigzag", 137, *own, f"overall_minus_{name}") for name, own in ends.items()]
    assert against_cfg([row("zfast", 82, 0.1, 0.2), *rows]).endswith(
        "at the same N better (+2.0 [+1.0, +3.0] points), at the same NFE not told apart "
        "(-0.5 [-2.0, +1.0] points), at its effective scale and NFE worse "
        "(-2.0 [-3.0, -1.0] points)."
    )
    assert against_cfg([]) == "Z-Sampling itself (zigzag) was not run."


@pytest.mark.parametrize(("split", "text"), [("val", "no other table reports"), ("test", "very")])
def test_a_choice_is_told_by_the_prompts_that_it_is_made_on(split, text):
    assert text in choice_note(StudyConfig(split=split))
