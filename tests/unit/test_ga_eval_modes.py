"""GA-Eval as it was released, and by embedded guidance: what is measured, and matched with it.

Truth: the released formulas in numpy along the trajectory; the network's own predictions at known
embedded guidances; images of the stock classes.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from core2_sampler.benchmarks.arms import Arm, build_arms
from core2_sampler.benchmarks.effective_scale import Meter, against_gap_as_released
from core2_sampler.benchmarks.embedded_guidance import GUIDANCES, nearest_guidance
from core2_sampler.benchmarks.ga_eval import measure_effective_scale, measuring
from core2_sampler.benchmarks.generate import fill_arm
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.matching import match
from core2_sampler.benchmarks.options import GenerateConfig
from core2_sampler.benchmarks.report_findings import cost_note
from core2_sampler.benchmarks.request import check_request
from core2_sampler.benchmarks.runner import arm_folder
from core2_sampler.benchmarks.runs import Run, RunArm
from core2_sampler.benchmarks.study import Study
from core2_sampler.benchmarks.suites import load
from core2_sampler.config import ConfigError
from core2_sampler.guidance import make_predict
from core2_sampler.plan import Core2Config, make_plan
from core2_sampler.samplers import euler_inverse, sample_euler, zigzag
from core2_sampler.schedules import flow_sigmas
from core2_sampler.testing import GaussianDenoiser, tiny_flux_pipeline, tiny_sd3_pipeline

CFG = Core2Config(mode="cfg")


def make_study(folder, pipe, family):
    prompts = tuple(load("shapes", limit=2))
    return Study(pipe=pipe, family=family, prompts=prompts, seeds=(0,), folder=folder, batch_size=2)


def stock_images(study, stock_class, calls):
    """Return the stock class's images of a study's cases, each by arguments of its own."""
    names = [name for name in study.pipe.components if name != "weak_head"]
    stock = stock_class(**{name: study.pipe.components[name] for name in names})
    stock.set_progress_bar_config(disable=True)
    return [
        np.asarray(stock(case.prompt.text, generator=case.generator(), **call).images[0])
        for case, call in zip(study.cases, calls, strict=True)
    ]


def assert_images(study, done, wanted):
    store = ImageStore(done.folder)
    records = store.records()
    for case, image in zip(study.cases, wanted, strict=True):
        ours = np.asarray(store.read(records[case.key])).astype(int)
        assert np.abs(ours - image).max() <= 1  # float32 sums in another order


# The released measure ----------------------------------------------------------------------------


def test_z_sampling_is_measured_as_the_released_code_measures_it():
    """Its formulas: v1 = (x_next - x) / (s_next - s), vp = <v1, v2> / <v2, v2> v2, |vp| / |D|.

    With v2 = w D, of the zigzag steps alone.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    denoiser, x, sigmas = GaussianDenoiser(), randn(2, 3, 4, 4), flow_sigmas(4)
    cond, uncond = denoiser.prompt(randn(2, 3)), denoiser.prompt(randn(2, 3))
    predict = make_predict(denoiser, sigmas, make_plan("cfg", 4, 5.5), cond, uncond)
    back = make_predict(denoiser, sigmas[1:], make_plan("cfg", 4, 0.0), cond, uncond)
    whole = zigzag(predict, euler_inverse(back, sigmas), sigmas, (0, 2).__contains__)
    meter = Meter(denoiser, sigmas, lambda _i: (cond, uncond), against_gap_as_released, (0, 2))
    path = [x]
    sample_euler(meter.watch(whole), x, sigmas, on_step=lambda _i, y: path.append(y))
    found = meter.result().official()
    assert found.scales.shape == (2, 2)
    for row, i in enumerate((0, 2)):
        for k in range(2):
            sigma = sigmas[i].expand(1)
            here, there = path[i][k : k + 1], path[i + 1][k : k + 1]
            sides = [
                denoiser.module.forward(here, sigma, p.pooled[k : k + 1]) for p in (cond, uncond)
            ]
            gap = (sides[0] - sides[1]).numpy().ravel()
            v1 = ((there - here) / (sigmas[i + 1] - sigmas[i])).numpy().ravel()
            v2 = 5.5 * gap
            vp = v1 @ v2 / (v2 @ v2) * v2
            wanted = np.linalg.norm(vp) / np.linalg.norm(gap)
            assert float(found.scales[row, k]) == pytest.approx(wanted, rel=1e-6)
            wanted = np.linalg.norm(v1 - vp) / np.linalg.norm(v1)
            assert float(found.shares[row, k]) == pytest.approx(wanted, rel=1e-6)


def test_official_leaves_cfg_alone_and_measures_only_the_zigzag_steps_of_z_sampling():
    pipe = tiny_sd3_pipeline()
    call = {
        "prompt": "a red circle",
        "num_inference_steps": 3,
        "guidance_scale": 3.5,
        "max_sequence_length": 8,
        "generator": torch.Generator().manual_seed(1),
    }
    found = measure_effective_scale(pipe, "official", **call, core2=CFG)
    torch.testing.assert_close(found.scales, torch.full((3, 1), 3.5), atol=2e-3, rtol=0)
    found = measure_effective_scale(pipe, "official", **call, core2=Core2Config(mode="zigzag"))
    assert found.scales.shape == (2, 1) and bool((found.scales >= 0).all())
    assert found.nfe == 2 * 5 + 2
    with (
        pytest.raises(ValueError, match=r"official.*signed|did you mean 'official'"),
        measuring(pipe, "offical"),
    ):
        pass


def test_official_matches_every_image_by_its_own_scale(tmp_path):
    """Truth: diffusers' own StableDiffusion3Pipeline, each image at its own scale."""
    study = make_study(tmp_path / "images", tiny_sd3_pipeline(), "sd3")
    last_gap, zig = build_arms(["last-gap", "zigzag"], 4, 3.0, {})
    images = arm_folder(study, last_gap, study.pipe.weak_head)
    found = match(study, last_gap, images, 1, mode="official")
    assert found.measured_on == 2 and list(found.image_scales) == [c.key for c in study.cases]
    assert len(set(found.image_scales.values())) == 2
    assert found.effective_scale == pytest.approx(np.mean(list(found.image_scales.values())))
    matched = found.arm(last_gap)
    assert (matched.name, matched.mode, matched.steps) == ("last-gap-matched", "cfg", 2)  # 5 NFE
    assert match(study, zig, study.folder / "zig", 1, mode="official").arm(zig).steps == 3 * 4
    scales = {case.key: scale for case, scale in zip(study.cases, (2.0, 6.0), strict=True)}
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"image_scales": scales}))
    matched = dataclasses.replace(matched, image_scales=str(file))
    wanted = stock_images(
        study,
        StableDiffusion3Pipeline,
        [{"num_inference_steps": 2, "guidance_scale": scale} for scale in (2.0, 6.0)],
    )
    assert_images(study, fill_arm(study, matched), wanted)
    before = arm_folder(study, matched, None)
    file.write_text(json.dumps({"image_scales": dict.fromkeys(scales, 2.0)}))
    assert arm_folder(study, matched, None) != before


# Embedded guidance -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    return tiny_flux_pipeline()


def test_the_nearest_embedded_guidance_is_that_which_made_the_prediction(flux):
    """Truth: the network's own predictions at guidances of the grid, and mixtures of two."""
    denoiser = flux.family.denoiser(flux)
    prompts = flux.family.encode(flux, ["a", "b"], max_sequence_length=8)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7, 0.7])

    def at(guidance):
        prompt = prompts[0]
        extra = {**prompt.extra, "guidance": torch.full((2,), guidance)}
        return denoiser(x, sigma, dataclasses.replace(prompt, extra=extra))

    with torch.no_grad():
        own, other = at(3.5), at(8.0)
        for d, guidance in ((own, 3.5), (other, 8.0)):
            best, share = nearest_guidance(denoiser, x, sigma, prompts, d)
            assert best.tolist() == [guidance] * 2 and share.tolist() == [0.0, 0.0]
        d = other + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        best, share = nearest_guidance(denoiser, x, sigma, prompts, d)
        away = torch.stack([(d - at(g)).flatten(1).norm(dim=1) for g in GUIDANCES])
    assert best.tolist() == [GUIDANCES[i] for i in away.argmin(0)]
    expected = away.min(0).values / away[GUIDANCES.index(3.5)]
    torch.testing.assert_close(share, expected, atol=1e-6, rtol=1e-5)


def test_a_run_without_true_cfg_is_at_the_guidance_that_it_embeds(flux):
    call = {
        "prompt": "a red circle",
        "num_inference_steps": 2,
        "true_cfg_scale": 3.0,
        "guidance_scale": 5.2,  # not of the grid
        "height": 16,
        "width": 16,
        "max_sequence_length": 8,
        "generator": torch.Generator().manual_seed(1),
    }
    cond = measure_effective_scale(flux, "embedded", **call, core2=Core2Config(mode="cond"))
    assert torch.equal(cond.scales, torch.full((2, 1), 5.2))
    assert (cond.orthogonal_share, cond.nfe) == (0.0, 2)
    cfg = measure_effective_scale(flux, "embedded", **call, core2=CFG)
    assert 0 < cfg.orthogonal_share <= 1 and cfg.nfe == 4


def test_a_method_is_matched_with_stock_flux_at_that_guidance(tmp_path, flux):
    """Truth: diffusers' own FluxPipeline, without true CFG, one pass for each of the method's."""
    study = make_study(tmp_path / "images", flux, "flux")
    (arm,) = build_arms(["last-gap"], 4, 3.0, {})
    found = match(study, arm, study.folder / "arm", 1, mode="embedded")
    matched = found.arm(arm)
    assert (matched.name, matched.mode, matched.steps) == ("last-gap-matched", "cond", 5)
    assert matched.embedded_guidance == round(found.effective_scale, 4)
    matched = dataclasses.replace(matched, steps=2, embedded_guidance=7.0)
    size = {"height": 16, "width": 16}
    call = {"num_inference_steps": 2, "guidance_scale": 7.0, "max_sequence_length": 256, **size}
    assert_images(study, fill_arm(study, matched), stock_images(study, FluxPipeline, [call] * 2))
    plain = dataclasses.replace(matched, embedded_guidance=None)
    assert arm_folder(study, plain, None) != arm_folder(study, matched, None)


def test_a_network_that_embeds_no_guidance_is_refused():
    pipe = tiny_flux_pipeline(guidance_embeds=False)
    call = {"prompt": "a", "num_inference_steps": 1, "true_cfg_scale": 3.0, "height": 16}
    with pytest.raises(ValueError, match="embeds one, as FLUX.1-dev does, got Flux"):
        measure_effective_scale(
            pipe, "embedded", **call, width=16, max_sequence_length=8, core2=CFG
        )


# What is asked for, and what the report says -----------------------------------------------------


def test_the_mode_is_what_is_given_else_that_of_the_preset(tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n" * 101)
    own = {"source": str(tmp_path / "list.txt"), "preset": "ga-eval", "arms": ("cfg",)}
    assert check_request(GenerateConfig(**own)).ga_eval_mode == "official"
    given = check_request(GenerateConfig(**own, ga_eval_mode="signed"))
    assert given.ga_eval_mode == "signed"
    assert "ga_eval_mode given as signed" in given.deviations
    assert check_request(GenerateConfig(arms=("cfg",))).ga_eval_mode == "signed"
    with pytest.raises(ConfigError, match="did you mean 'official'"):
        check_request(GenerateConfig(ga_eval_mode="offical"))
    with pytest.raises(ConfigError, match="with a FLUX model, got one of sd3"):
        check_request(GenerateConfig(ga_eval_mode="embedded"))


def test_a_report_says_what_its_effective_scales_are():
    arms = [
        RunArm(Arm(mode, "zigzag", 4, 3.0), 4, 3.0, mode, "", {}, 4.2, 0.1, 2, mode)
        for mode in ("signed", "official", "embedded")
    ]
    run = Run("shapes", tuple(load("shapes", limit=1)), (0,), {"family": "flux"}, tuple(arms))
    signed, official, embedded = cost_note(run)
    assert "of signed: measured on 2 evenly" in signed
    assert "of official: of all 2 images" in official and "another scale for each" in official
    assert "embedded guidance" in embedded and "it is ours" in embedded
