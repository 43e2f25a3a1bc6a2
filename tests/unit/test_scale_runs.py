"""Scale rules in the pipelines and on the command line.

Truth: runs of CFG and of the head at one scale, image by image; the look-ahead written out on bare
networks.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from core2_sampler.benchmarks.ga_eval import measure_effective_scale
from core2_sampler.cli.generate import GenerateConfig, check
from core2_sampler.config import ConfigError
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Core2Config
from core2_sampler.scales import CallableScale, OnlineScale
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import AffineHead

PROMPTS, STEPS, SCALE = ["a red circle", "two blue rings"], 4, 3.0
CANDIDATES = (1.0, 3.0, 7.5)
PIPES = {"sd3": tiny_sd3_pipeline, "sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}


@pytest.fixture(params=PIPES)
def pipe(request):
    return affine(PIPES[request.param]())


def affine(pipe):
    """Give the pipeline a head of known coefficients: ``gap = 0.2 cond + 0.1 x``."""
    head = AffineHead(pipe.family.name, 4)
    head.coefficients[..., 0], head.coefficients[..., 1] = 0.2, 0.1
    pipe.register_modules(weak_head=head)
    return pipe


def lengths(pipe):
    return {} if pipe.family.name == "sdxl" else {"max_sequence_length": 8}


def sample(pipe, rows=(0, 1), scale=SCALE, **options):
    defaults = {
        "prompt": [PROMPTS[row] for row in rows],
        "num_inference_steps": STEPS,
        pipe.family.scale_argument: scale,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(row) for row in rows],
        **lengths(pipe),
    }
    return pipe(**{**defaults, **options}).images


def close(ours, truth):
    torch.testing.assert_close(ours, truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


class Smallness:
    """Minus the distance of the latents' size to one that the prompt names: a clear winner."""

    def check_family(self, family):
        if family not in PIPES:
            raise ValueError(f"made for {', '.join(PIPES)}, got {family}")

    def check_latents(self, channels):
        pass

    def __call__(self, x, sigma, conditioning):
        wanted = 0.8 + conditioning.pooled.float().mean(1).sin()
        return -(x / (1 + sigma[:, None, None, None])).flatten(1).std(1).sub(wanted).abs()


def evaluator(pipe, kind):
    """Return an untrained evaluator of the pipeline's family."""
    prompt, _ = pipe.family.encode(pipe, PROMPTS[:1], **lengths(pipe))
    x = torch.empty(1, 4, 8, 8)
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    return LatentEvaluator.for_model(kind, pipe.family.name, x, prompt, **sizes).eval()


MODES = {
    "cfg": ({"mode": "cfg"}, 2 * STEPS),
    "fast": ({"slow_steps": 0}, STEPS),
    "slow": ({"slow_steps": (0, 2), "w2s_scale": 1.5}, STEPS + 2),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_image_is_that_of_a_run_at_the_scale_picked_for_it(pipe, mode):
    options, nfe = MODES[mode]
    picked = torch.tensor([2.0, 6.0])
    core2 = Core2Config(scale_rule=CallableScale(lambda pair: picked), **options)
    extra = {"guidance_rescale": 0.5} if pipe.family.name == "sdxl" else {}
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        ours = sample(pipe, core2=core2, **extra)
    assert counter.per_sample(2) == pipe.core2_plan.nfe == nfe
    assert torch.equal(pipe.core2_schedule, picked.expand(STEPS, 2))
    for row, scale in enumerate(picked.tolist()):
        truth = sample(pipe, scale=scale, core2=Core2Config(**options), **extra)
        assert pipe.core2_schedule is None
        close(ours[row], truth[row])


def test_a_static_rule_is_a_run_with_these_scales(pipe):
    ours = sample(pipe, scale=1.0, core2=Core2Config(mode="cfg", scale_rule="linear:1,7"))
    scales = Core2Config(mode="cfg", guidance_scales=(1.0, 3.0, 5.0, 7.0))
    assert pipe.core2_plan.nfe == 2 * STEPS - 1
    assert torch.equal(ours, sample(pipe, core2=scales))


@torch.no_grad()
def test_online_is_the_greedy_search_written_out(pipe):
    rule = OnlineScale({"small": Smallness()}, CANDIDATES)
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        ours = sample(pipe, core2=Core2Config(mode="cfg", scale_rule=rule))
    assert counter.per_sample(2) == 2 * STEPS  # looking ahead asks the denoiser nothing
    cond, uncond = pipe.family.encode(pipe, PROMPTS, **lengths(pipe))
    schedule = pipe.family.schedule(pipe, STEPS, (8, 8))
    denoiser, judge, picks = pipe.family.denoiser(pipe), Smallness(), []
    noise = pipe.family.noise(pipe, [torch.Generator().manual_seed(row) for row in (0, 1)], 16, 16)
    x = schedule.noise_scale * schedule.unpack(noise)
    for s, t in zip(schedule.sigmas.tolist(), schedule.sigmas.tolist()[1:], strict=False):
        level = torch.full((2,), s)
        c, u = denoiser(x, level, cond), denoiser(x, level, uncond)
        ahead = [x + (t - s) * (u + scale * (c - u)) for scale in CANDIDATES]
        scores = torch.stack([judge(each, torch.full((2,), t), cond) for each in ahead])
        best = scores.argmax(0).tolist()
        x = torch.stack([ahead[k][row] for row, k in enumerate(best)])
        picks.append([CANDIDATES[k] for k in best])
    close(ours, schedule.to_pipeline(x, STEPS))
    assert pipe.core2_schedule.tolist() == picks
    assert len({scale for row in picks for scale in row}) > 1


@pytest.mark.parametrize("slow_steps", [None, 0])
def test_an_image_does_not_depend_on_its_batch_mates(pipe, slow_steps):
    evaluators = {"alignment": evaluator(pipe, "alignment"), "small": Smallness()}
    rule = OnlineScale(evaluators, CANDIDATES)
    mode = "cfg" if slow_steps is None else "core"
    core2 = Core2Config(mode=mode, slow_steps=slow_steps, scale_rule=rule)
    together = sample(pipe, core2=core2)
    picked = pipe.core2_schedule
    for row in (0, 1):
        alone = sample(pipe, rows=(row,), core2=core2)
        assert torch.equal(pipe.core2_schedule[:, 0], picked[:, row])
        close(alone[0], together[row])


def test_a_head_inside_the_denoiser_leaves_its_slow_steps_to_the_rule():
    pipe = tiny_sd3_pipeline()
    head = AdapterHead.for_denoiser(pipe.family.denoiser(pipe), scale_range=(2.0, 6.0))
    pipe.register_modules(weak_head=head)
    rule = CallableScale(lambda pair: torch.tensor([4.0, 5.0]))
    sample(pipe, core2=Core2Config(slow_steps=(1,), scale_rule=rule))
    schedule = pipe.core2_schedule
    assert schedule[1].tolist() == [4.0, 5.0] and schedule[[0, 2, 3]].isnan().all()


def test_a_scale_that_a_callback_sets_holds_in_place_of_the_rule(pipe):
    name = f"_{pipe.family.scale_argument}"

    def edit(pipe, i, t, tensors):
        if i in (0, 2):
            setattr(pipe, name, 5.0 if i == 0 else 1.0)
        return tensors

    rule = CallableScale(lambda pair: torch.full((2,), 7.0))
    core2 = Core2Config(mode="cfg", scale_rule=rule)
    ours = sample(pipe, core2=core2, callback_on_step_end=edit)
    assert pipe.core2_schedule[0].tolist() == [7.0, 7.0] and pipe.core2_schedule[1:].isnan().all()
    scales = Core2Config(mode="cfg", guidance_scales=(7.0, 5.0, 5.0, 1.0))
    close(ours, sample(pipe, core2=scales))


def test_an_interrupted_run_tells_what_was_picked_until_then(pipe):
    def stop(pipe, i, t, tensors):
        pipe._interrupt = i == 1
        return tensors

    core2 = Core2Config(mode="cfg", scale_rule=OnlineScale({"small": Smallness()}, CANDIDATES))
    sample(pipe, core2=core2, callback_on_step_end=stop)
    assert not pipe.core2_schedule[:2].isnan().any() and pipe.core2_schedule[2:].isnan().all()


def test_the_stock_call_forgets_the_schedule_and_is_the_stock_call():
    pipe = tiny_sd3_pipeline()
    stock = sample(pipe)
    sample(pipe, core2=Core2Config(mode="cfg", scale_rule=CallableScale(lambda p: p.x[:, 0, 0, 0])))
    assert pipe.core2_schedule is not None
    assert torch.equal(sample(pipe), stock) and pipe.core2_schedule is None


def test_the_measured_scale_is_the_one_that_was_picked():
    pipe, picked = tiny_sd3_pipeline(), torch.tensor([2.0, 6.0])
    core2 = Core2Config(mode="cfg", scale_rule=CallableScale(lambda pair: picked))
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "max_sequence_length": 8}
    found = measure_effective_scale(pipe, prompt=PROMPTS, core2=core2, **options)
    torch.testing.assert_close(found.scales, picked.expand(STEPS, 2), atol=1e-3, rtol=0)
    assert found.nfe == 2 * STEPS


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_flux_pipeline, {"mode": "cfg"}, "must be made for flux, got one for sd3"),
        (
            lambda: with_heun(tiny_sd3_pipeline()),
            {"mode": "cfg"},
            "lower noise level, .* take a scheduler of first order",
        ),
        (tiny_sd3_pipeline, {"mode": "cfg", "scale": 1.0}, "at a guidance scale above 1; got only"),
        (tiny_sd3_pipeline, {"mode": "zigzag"}, "got zigzag steps"),
        (tiny_sd3_pipeline, {"mode": "core"}, "weak head, got none"),
        (
            lambda: tiny_sdxl_pipeline(time_cond_proj_dim=8),
            {"mode": "cfg"},
            "scale_rule must be left out for a network that takes the scale",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_encoded(make, options, message):
    pipe = make()
    rule = OnlineScale({"fidelity": evaluator(tiny_sd3_pipeline(), "fidelity")})
    core2 = Core2Config(scale_rule=rule, mode=options["mode"])
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        sample(pipe, scale=options.get("scale", SCALE), core2=core2)
    assert counter.calls == 0


def with_heun(pipe):
    pipe.register_modules(scheduler=FlowMatchHeunDiscreteScheduler())
    return pipe


# The command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configs of a model, of an adapter (scales 2 to 5), and of evaluators; no weights."""
    root = tmp_path_factory.mktemp("rule")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    tiny_flux_pipeline().save_pretrained(root / "flux")
    denoiser = pipe.family.denoiser(pipe)
    AdapterHead.for_denoiser(denoiser, scale_range=(2.0, 5.0)).save_config(root / "adapter")
    evaluator(pipe, "fidelity").save_config(root / "fidelity")
    evaluator(tiny_flux_pipeline(), "fidelity").save_config(root / "other")
    return root


def job(folders, model="model", **options):
    defaults = {"prompts": ("a",), "model": str(folders / model), "steps": 4, "mode": "cfg"}
    return check(GenerateConfig(**{**defaults, "output": folders / "out", **options}))


def test_a_rule_reaches_the_plan(folders):
    made = job(folders, scale_rule="list:4,3,1,1")
    assert [step.guidance_scale for step in made.plan.steps] == [4.0, 3.0, 1.0, 1.0]
    assert made.plan.nfe == 6
    assert job(folders, scale_rule="online", evaluators=(folders / "fidelity",)).plan.nfe == 8
    assert job(folders, "flux", scale_rule="cosine:5,2").plan.nfe == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rule": "cosin:9,1"}, "did you mean 'cosine'"),
        ({"scale_rule": "list:1,2"}, r"one a step \(4\), got 2"),
        ({"scale_rule": "online"}, "needs --evaluators, .* got none"),
        ({"scale_rule": "online", "evaluators": ["model"]}, "must be a folder that .* wrote, got"),
        ({"scale_rule": "online", "evaluators": ["other"]}, "the family 'sd3' of .*, got 'flux'"),
        ({"scale_rule": "online", "evaluators": ["fidelity"] * 2}, "of different names"),
        (
            {"scale_rule": "online", "evaluators": ["fidelity"], "mode": "fast", "head": "adapter"},
            "got only fast of a head inside the denoiser",
        ),
        (
            {"scale_rule": "online", "evaluators": ["fidelity"], "mode": "zigzag"},
            "got zigzag steps",
        ),
        ({"scale_rule": "online", "evaluators": ["fidelity"], "mode": "cond"}, "no effect in mode"),
        ({"evaluators": ["fidelity"]}, "evaluators has no effect without --scale-rule online"),
        ({"candidates": (1.0, 3.0)}, "candidates has no effect without --scale-rule online"),
        ({"scale_rule": "constant:3", "guidance_scale": 4.0}, "guidance_scale has no effect with"),
    ],
)
def test_what_makes_no_sense_is_refused_before_weights_are_loaded(folders, options, message):
    given = dict(options)
    if "evaluators" in given:
        given["evaluators"] = tuple(folders / name for name in given["evaluators"])
    if "head" in given:
        given["head"] = str(folders / given["head"])
    with pytest.raises(ConfigError, match=message):
        job(folders, **given)
