"""``core2 bench dynamic-cfg`` on a tiny random pipeline of the real classes.

Truth: closed forms of the Frechet distance, runs of CFG at one scale, and for the oracle its last
step, whose candidates are the images that runs of one step end with.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core2_sampler.benchmarks import ruled
from core2_sampler.benchmarks.arms import Arm, build_arms
from core2_sampler.benchmarks.dynamic_cfg import (
    TAKEN,
    DynamicCfgConfig,
    bench_dynamic_cfg,
    evaluator_folders,
    mean_arm,
)
from core2_sampler.benchmarks.dynamic_page import verdicts
from core2_sampler.benchmarks.dynamic_runs import Runs
from core2_sampler.benchmarks.frechet import frechet_distance
from core2_sampler.benchmarks.generate import judge_arm
from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.benchmarks.ruled import online, oracle, run_ruled, shuffled
from core2_sampler.benchmarks.scorers import SCORERS
from core2_sampler.benchmarks.study import ArmResult, Study
from core2_sampler.benchmarks.suites import SuitePrompt
from core2_sampler.config import ConfigError
from core2_sampler.evaluators.cost import score_flops
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.full_size import FULL_SIZE
from core2_sampler.model_files import find_model
from core2_sampler.scales import CallableScale, OnlineScale
from core2_sampler.shapes.world import held_out_prompts
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

N, LENGTH = 3, 16
KINDS = ("alignment", "fidelity")
SD35_PASS = 31.121e12
"""FLOPs of a pass for 1024 x 1024 px, see test_full_size.py."""
ARM = Arm("online", "cfg", N, 7.5)
CANDIDATES = (1.0, 3.0, 7.5)


@dataclass(frozen=True)
class Verdict:
    """Right or wrong."""

    correct: bool
    reason: str = ""


def odd(image, prompt):
    """Judge by something that differs from image to image."""
    return Verdict(int(10 * np.asarray(image, dtype=float).mean()) % 2 == 1)


@pytest.fixture
def study(tmp_path):
    return Study(
        pipe=tiny_sd3_pipeline(),
        family="sd3",
        prompts=tuple(held_out_prompts(4)),
        seeds=(0, 1),
        judge=odd,
        folder=tmp_path,
        batch_size=3,
        max_sequence_length=LENGTH,
        keep_latents=True,
    )


def evaluator(pipe, kind):
    length = {"max_sequence_length": LENGTH}
    prompt, _ = pipe.family.encode(pipe, ["a"], **length)
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    x = torch.empty(1, 4, 8, 8)
    return LatentEvaluator.for_model(kind, pipe.family.name, x, prompt, **sizes).eval()


def rule_of(study, candidates=CANDIDATES):
    return OnlineScale({"alignment": evaluator(study.pipe, "alignment")}, candidates)


def test_the_frechet_distance_is_that_of_gaussians():
    def points(means, deviations):
        """Return points of exactly these means and deviations, without correlation."""
        size = len(means)
        cross = np.concatenate([np.eye(size), -np.eye(size)]) * np.sqrt((2 * size - 1) / 2)
        return cross * deviations + means

    a = points(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    b = points(np.array([0.5, 1.0, 0.0]), np.array([2.0, 2.0, 0.5]))
    wanted = (0.25 + 4) + (1 + 0 + 6.25)  # |m - m'|^2, and (s - s')^2 of each axis
    assert frechet_distance(a, b) == pytest.approx(wanted)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(wanted)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at least two images, got 1 and 6"):
        frechet_distance(a[:1], b)


def test_an_arm_carries_its_rule_to_the_pipeline():
    rule = CallableScale(lambda pair: pair.x[:, 0, 0, 0])
    assert replace(ARM, sample_rule=rule).config().sample_rule is rule
    assert ARM.config().sample_rule is None


def test_one_candidate_is_cfg_at_that_scale_and_nothing_is_made_twice(study, monkeypatch):
    done = []
    result, scales = run_ruled(
        study, ARM, online("o", "", rule_of(study, (3.0,))), on_images=done.append
    )
    truth = judge_arm(study, replace(ARM, guidance_scale=3.0))
    torch.testing.assert_close(result.latents, truth.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(scales, torch.full((8, N), 3.0))
    assert (result.arm.name, result.nfe, done) == ("o", 2 * N, [3, 3, 2])
    assert result.correct == [odd(result.image(i), None).correct for i in range(8)]
    monkeypatch.setattr(ruled, "generate", None)
    again, same = run_ruled(study, ARM, online("o", "", rule_of(study, (3.0,))))
    assert torch.equal(again.latents, result.latents) and torch.equal(same, scales)
    with pytest.raises(TypeError):  # another list of candidates is another folder
        run_ruled(study, ARM, online("o", "", rule_of(study, (3.0, 7.5))))


def test_scales_are_picked_in_the_fast_steps_of_a_head(study, folders):
    own = study.pipe.weak_head
    arm = Arm("tap-online", "core", N, 7.5, str(folders / "tap"))
    result, scales = run_ruled(study, arm, online("o", "", rule_of(study, (3.0,))))
    truth = judge_arm(study, replace(arm, guidance_scale=3.0))
    cond = judge_arm(study, Arm("cond", "cond", N, 1.0))
    torch.testing.assert_close(result.latents, truth.latents, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result.latents, cond.latents, atol=1e-3)  # the head does something
    assert torch.equal(scales, torch.full((8, N), 3.0)) and result.nfe == N
    assert study.pipe.weak_head is own


def test_shuffled_scales_are_each_images_own_in_another_order(study):
    picked = torch.arange(8 * N).reshape(8, N) + 2.0
    _, scales = run_ruled(study, ARM, shuffled("s", "", study, picked, "key"))
    assert torch.equal(scales.sort(1).values, picked) and not torch.equal(scales, picked)
    other = replace(study, batch_size=8, folder=study.folder / "other")
    assert torch.equal(run_ruled(other, ARM, shuffled("s", "", study, picked, "key"))[1], scales)


def test_the_oracle_of_one_step_takes_the_image_that_is_judged_best(study):
    scorer = SCORERS.get("shapes-clip").load()
    one = replace(ARM, steps=1)
    ends = [judge_arm(study, replace(one, guidance_scale=s)) for s in CANDIDATES]
    texts = [case.prompt.text for case in study.cases]
    clip = [scorer.score([end.image(i) for i in range(8)], texts) for end in ends]
    right = torch.tensor([end.correct for end in ends]).double()
    assert 0 < int(right.sum()) < right.numel()
    best = (1000 * right + torch.stack(clip)).argmax(0)
    ruled = oracle("oracle", "", study, 1, CANDIDATES, scorer, judge_key="odd")
    result, scales = run_ruled(study, one, ruled)
    assert torch.equal(scales[:, 0], torch.tensor(CANDIDATES)[best])
    assert result.correct == right.max(0).values.bool().tolist()
    strict = replace(study, judge=lambda image, prompt: Verdict(False))  # in the same folder
    ruled = oracle("oracle", "", strict, 1, CANDIDATES, scorer, judge_key="strict")
    _, scales = run_ruled(strict, one, ruled)
    assert torch.equal(scales[:, 0], torch.tensor(CANDIDATES)[torch.stack(clip).argmax(0)])


def test_a_mean_schedule_is_run_as_it_is():
    arm = mean_arm("mean", ARM, [5.0, 2.5, 1.25])
    assert [step.guidance_scale for step in arm.plan(False).steps] == [5.0, 2.5, 1.25]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, heads and untrained evaluators."""
    root = tmp_path_factory.mktemp("dynamic")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    for name in ("tap", "adapter"):
        head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        head.save_pretrained(root / name)
    for kind in KINDS:
        evaluator(pipe, kind).save_pretrained(root / kind)
    evaluator(tiny_flux_pipeline(), "fidelity").save_config(root / "flux")
    evaluator(pipe, "fidelity").save_config(root / "mean")
    return root


def config_of(folders, out, kinds=KINDS, **changes):
    study = StudyConfig(
        model=str(folders / "model"),
        prompts=4,
        seeds=1,
        max_sequence_length=LENGTH,
        cache=out / "cache",
        device="cpu",
    )
    names = tuple(str(folders / kind) for kind in kinds)
    return DynamicCfgConfig(study, evaluators=names, out=out / "d.md", **changes)


def test_the_command_writes_the_table_and_the_plot(folders, tmp_path):
    heads = tuple(f"{name}={folders / name}" for name in ("tap", "adapter"))
    sizes = {"steps": N, "scales": (1.0, 3.0), "candidates": (1.0, 3.0)}
    config = config_of(folders, tmp_path, heads=heads, **sizes)
    bench_dynamic_cfg(config)
    rows = json.loads((tmp_path / "d.json").read_text())
    arms = list(dict.fromkeys((row["arm"], row["guidance_scale"]) for row in rows))
    static = [arm.name for arm in build_arms(("interval", "linear"), N, 3.0, {})]
    assert arms[:2] == [("cfg", 1.0), ("cfg", 3.0)] and arms[2][0] == static[0]
    assert [name for name, _ in arms[7:]] == [
        "online-alignment",
        "online-fidelity",
        "online-fixed",
        "online-adaptive",
        "online-mean",
        "online-shuffled",
        "tap-fast",
        "tap-online",
        "oracle",
    ]
    picked = {name for name, scale in arms if scale is None}
    assert picked == {name for name, _ in arms[7:]} - {"tap-fast"}
    assert {f"online-{name}" for name in TAKEN} < {name for name, _ in arms}
    told = {(row["arm"], row["metric"]): row["value"] for row in rows if row["arm"] != "cfg"}
    assert told["online-mean", "effective_scale"] == pytest.approx(
        told["online-adaptive", "effective_scale"], rel=1e-5
    )
    assert told["online-shuffled", "effective_scale"] == pytest.approx(
        told["online-adaptive", "effective_scale"], rel=1e-5
    )
    assert told["linear", "effective_scale"] == pytest.approx(  # falls to 1 about the best scale
        rows_of(rows, "linear")[0]["guidance_scale"]
    )
    for metric in ("counting_minus_best_constant", "clip_score", "frechet_distance"):
        assert ("oracle", metric) in told
    best = float(re.search("the best of the sweep is ([0-9.]+)", text := page(tmp_path))[1])
    constant = {r["metric"]: r["value"] for r in rows if r["arm"] == "cfg" and scale_of(r) == best}
    assert told["oracle", "clip_score_minus_best_constant"] == pytest.approx(
        told["oracle", "clip_score"] - constant["clip_score"], abs=1e-6
    )
    assert "clip_score_minus_best_constant" not in constant
    assert told["tap-online", "overall_minus_fast"] == pytest.approx(
        told["tap-online", "overall"] - told["tap-fast", "overall"]
    )
    assert {r["nfe"] for name in ("tap-fast", "tap-online") for r in rows_of(rows, name)} == {N}
    assert rows_of(rows, "oracle")[0]["command"].startswith("core2 bench dynamic-cfg --steps 3")
    assert {row["nfe"] for row in rows_of(rows, "online-adaptive")} == {2 * N}
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "d.png" in text and "| online-adaptive | 3 |  |" in text
    assert "Not asked in fast steps: adapter." in text
    assert (
        "\n- tap-online against tap-fast: " in text and "in steps that the head tap makes" in text
    )
    share = 2 * sum(score_flops(FULL_SIZE.get("sd35-large"), kind) for kind in KINDS)
    said = re.search(r"\((.*?)\) at their default size add ([0-9.]+)%", text)
    assert said[1] == ", ".join(KINDS)
    assert float(said[2]) == pytest.approx(100 * share / (2 * SD35_PASS), abs=0.005)
    assert "within the bar of 3%" in text


def result(name, correct):
    latents = torch.ones(len(correct), 1)
    return ArmResult(Arm(name, "cfg", N, 3.0), 2.0 * N, latents, latents, correct, correct)


@pytest.mark.parametrize("is_met", [True, False])
def test_the_bar_is_told_with_both_tasks_and_all_that_is_tested(is_met):
    tasks = ("counting", "position")
    prompts = tuple(SuitePrompt(f"{k}", f"prompt {k}", tasks[k % 2], {}) for k in range(40))
    study = Study(pipe=None, family="sd3", prompts=prompts, seeds=(0,), folder=Path("unused"))
    best = result("cfg", [False] * 40)
    won = result("online-adaptive", [is_met and k % 2 == 0 and k > 4 for k in range(40)])
    fast = result("tap-fast", [False] * 40)
    picking = result("tap-online", [k % 4 < 2 for k in range(40)])
    runs = Runs(best, None, [best, won, fast, picking], fast={"tap-online": fast})
    text, lines = verdicts(study, runs).split("\n\n")
    assert f"(3) by an interval that excludes 0, is {'' if is_met else 'not '}met: " in text
    assert ("counting: better, +85.0 [" in text) == is_met
    assert "position: no difference shown, +0.0" in text
    assert [line.partition(":")[0] for line in lines.splitlines()] == [
        "- online-adaptive against the best constant scale",
        "- tap-fast against the best constant scale",
        "- tap-online against the best constant scale",
        "- online-adaptive, counting against the best constant scale",
        "- online-adaptive, position against the best constant scale",
        "- tap-online against tap-fast",
    ]
    assert "p (Holm) 0.0012" in lines.splitlines()[-1]  # 6 tests, two of them at 2 / 10,000


def page(folder):
    return (folder / "d.md").read_text()


def scale_of(row):
    return row["guidance_scale"]


def rows_of(rows, arm):
    return [row for row in rows if row["arm"] == arm]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("alignment",), "at least two of different names, got .*alignment"),
        (("alignment", "alignment"), "at least two of different names"),
        (("alignment", "mean"), "other names than fixed, .*, got alignment, mean"),
        (("alignment", "flux"), "the family 'sd3' of .*, got 'flux'"),
        (("alignment", "model"), "folder that `core2 evaluators train` wrote, got"),
        (("alignment", "nothing"), "or one that is shipped for sd3"),
    ],
)
def test_evaluators_that_do_not_fit_are_refused(folders, tmp_path, kinds, message):
    config = config_of(folders, tmp_path, kinds)
    with pytest.raises(ConfigError, match=message):
        evaluator_folders(config, find_model(config.study.model))


def test_a_plot_that_nothing_could_draw_ends_before_anything_is_loaded(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    monkeypatch.setattr("core2_sampler.pipelines.auto.load_pipeline", None)
    with pytest.raises(ModuleNotFoundError, match=r"core2-sampler\[bench\]"):
        bench_dynamic_cfg(config_of(folders, tmp_path))


def test_candidates_without_guidance_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="above 1, got"):
        config_of(folders, tmp_path, candidates=(1.0,))
