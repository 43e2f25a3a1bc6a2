"""``core2 bench zigzag`` on a tiny random pipeline. Truth: costs by hand, runs of the same arms."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.benchmarks.report import Row
from core2_sampler.benchmarks.zigzag_study import (
    ZigzagConfig,
    bench_zigzag,
    cheapest,
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
    """A model and a tap head that does something."""
    root = tmp_path_factory.mktemp("zigzag")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    head = HEADS.get("tap").for_denoiser(pipe.family.denoiser(pipe))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    head.save_pretrained(root / "head")
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
    heads = (f"own={folders / 'head'}",)
    config = ZigzagConfig(
        study, N, 3.0, ("zigzag", "zfast"), (1,), heads, ga_eval=2, out=tmp_path / "z.md"
    )
    bench_zigzag(config)
    rows = json.loads((tmp_path / "z.json").read_text())
    overall = {
        (r["arm"], r["steps"], r["nfe"])
        for r in rows
        if r["metric"] == "overall" and not r["arm"].endswith("-matched")
    }
    methods = {"zigzag": 17, "zfast": 10, "zigzag-first-1": 11, "zfast-first-1": 6}
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
    assert "- zfast-first-1: " in text and "in the first 1 steps" in text
    assert "effective scale" in text and "too few prompts" in text


def test_the_cheapest_is_the_one_without_a_shown_loss():
    def row(arm, nfe, low, high):
        name = "overall_minus_zigzag"
        return Row("sd3", arm, 28, 3.0, nfe, 480, name, (low + high) / 2, low, high, "c")

    rows = [
        row("zcore", 137, -0.02, 0.03),
        row("zfast", 82, -0.04, 0.01),
        row("zfast-first-2", 32, -0.09, -0.01),
        row("zfast-first-1", 30, math.nan, math.nan),
    ]
    assert "zfast, NFE 82, -1.5 [-4.0, +1.0] points" in cheapest(rows)
    assert "shown to be worse" in cheapest(rows[2:]) and "NFE" not in cheapest(rows[2:])
    assert cheapest([]) == "Nothing was compared with Z-Sampling."
