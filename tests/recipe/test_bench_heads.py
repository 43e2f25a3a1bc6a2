"""``core2 bench heads`` end to end on the embedded model.

Truth: plans, sums of its own rows, and an untrained head, which is cond.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.head_study import CONTROLS, HeadsConfig, bench_heads, group_arms
from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.config import ConfigError
from core2_sampler.shapes import model_path
from core2_sampler.weak_heads.patch import PatchHead

STUDY = {"prompts": 4, "seeds": 1, "batch_size": 4, "device": "cpu", "max_sequence_length": 16}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Return an untrained head, whose card says that high noise levels matter."""
    folder = tmp_path_factory.mktemp("head")
    network = json.loads((model_path("sd3") / "transformer/config.json").read_text())
    PatchHead("sd3", network["in_channels"], network["pooled_projection_dim"]).save_pretrained(
        folder
    )
    card = {"noise_bins": [0.0, 0.6, 1.0], "gap_power": [0.0, 1.0]}
    card["relative_gap_error"] = {"any": [1.0, 1.0]}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def config(head, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    config = HeadsConfig(
        StudyConfig(cache=root / "cache", **STUDY),
        heads=(f"mine={head}",),
        steps=(4,),
        guidance_scales=(3.0,),
        slow_shares=(0.5,),
        ga_eval=2,
        out=root / "heads.md",
    )
    bench_heads(config)
    return config


@pytest.fixture(scope="module")
def rows(config):
    return json.loads(config.out.with_suffix(".json").read_text())


def by_arm(rows, metric):
    return {row["arm"]: row["value"] for row in rows if row["metric"] == metric}


def test_every_arm_has_its_numbers(rows):
    overall, scales = by_arm(rows, "overall"), by_arm(rows, "effective_scale")
    methods = ["last-gap", "mine", "mine-first-2", "mine-placed-2"]
    assert set(overall) == {*CONTROLS, *methods, *(f"{name}-matched" for name in methods)}
    assert sorted(scales) == methods
    assert by_arm(rows, "share_of_pass")["mine"] == pytest.approx(0.00036, abs=1e-5)
    wanted = "family arm steps guidance_scale nfe n_images metric value low high command provenance"
    assert set(rows[0]) == set(wanted.split())


def test_a_head_that_predicts_nothing_is_cond(rows):
    overall, scales = by_arm(rows, "overall"), by_arm(rows, "effective_scale")
    assert overall["mine"] == overall["mine-matched"] == overall["cond"]
    assert scales["mine"] == pytest.approx(1, abs=1e-4)
    assert scales["mine-first-2"] == pytest.approx(2, abs=0.01)  # half at 3, half at 1
    distance = by_arm(rows, "latent_distance_to_cfg")
    assert distance["mine"] == distance["cond"] > distance["mine-first-2"] > 0


def test_each_arm_costs_its_plan(rows):
    nfe = {row["arm"]: row["nfe"] for row in rows}
    assert (nfe["cfg"], nfe["cfg-half"], nfe["cond"]) == (8, 4, 4)
    assert (nfe["mine"], nfe["mine-first-2"], nfe["mine-placed-2"]) == (4, 6, 6)
    assert nfe["mine-matched"] == 4 and nfe["mine-placed-2-matched"] == 6


@pytest.mark.parametrize("against", ["cfg", "cfg_half", "matched"])
def test_differences_are_those_of_the_scores(rows, against):
    overall, differences = by_arm(rows, "overall"), by_arm(rows, f"overall_minus_{against}")
    assert {"mine", "last-gap"} <= set(differences)
    for arm, difference in differences.items():
        other = f"{arm}-matched" if against == "matched" else against.replace("_", "-")
        assert difference == pytest.approx(overall[arm] - overall[other])


def test_the_page_has_both_tables_and_a_verdict_for_each_method(config):
    page = config.out.read_text()
    assert "## N = 4, guidance scale 3" in page and "| mine-placed-2 | 4 | 3 | 6 |" in page
    assert "| last-gap | 0 | 0.000% |" in page and " | 0.036% | 1.00 | " in page
    assert "\n- mine-first-2, N = 4, scale 3: too few prompts" in page
    assert f"core2 bench heads --heads mine={config.heads[0].split('=')[1]} --steps 4" in page


def test_the_slow_mode_is_an_arm_where_it_is_asked_for():
    config = HeadsConfig(StudyConfig(), w2s_scale=1.5, slow_shares=(0.01, 1.0))
    arms = {arm.name: arm for arm in group_arms(config, {"a": "x"}, (6, 3.0))}
    assert set(arms) == {*CONTROLS, "a", "a-first-6", "a-slow"}
    assert arms["a-slow"] == Arm("a-slow", "core", 6, 3.0, "x", 6, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ("cfg={head}",)}, "other names than cond, cfg, cfg-half, last-gap, got cfg"),
        ({"heads": ("mine=nowhere",)}, "folder"),
        ({"heads": (), "guidance_scales": (9.0,)}, "guidance_scale must be from 2 to 7"),
        ({"out": Path("heads.txt")}, "ends in .md"),
    ],
)
def test_bad_input_ends_before_anything_is_loaded(head, monkeypatch, changes, message):
    monkeypatch.setattr("core2_sampler.pipelines.auto.load_pipeline", None)
    heads = tuple(text.format(head=head) for text in changes.get("heads", ("mine={head}",)))
    with pytest.raises(ConfigError, match=message):
        bench_heads(HeadsConfig(StudyConfig(**STUDY), **changes | {"heads": heads}))
