"""Collect. Truth: the stock SD3 pipeline and network, and diffusers' own random latents."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file

from core2_sampler.cli import main
from core2_sampler.collect import (
    CollectConfig,
    Job,
    collect,
    initial_latents,
    kept_steps,
    make_units,
)
from core2_sampler.guidance import make_predict
from core2_sampler.online_source import OnlineSource
from core2_sampler.plan import make_plan
from core2_sampler.rows import is_held_out
from core2_sampler.samplers import sample_euler
from core2_sampler.testing import tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.trajectory import Record, TrajectoryStore
from core2_sampler.weak_heads import HEADS
from core2_sampler.weights import model_weights

STEPS, SHAPE = 4, (4, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3_pipeline()


@pytest.fixture
def setup(pipe):
    """Return the arguments of ``collect`` that follow from the model."""
    return {
        "denoiser": pipe.family.denoiser(pipe),
        "encode": partial(pipe.family.encode, pipe, max_sequence_length=8),
        "sigmas": pipe.family.schedule(pipe, STEPS, SHAPE[1:]).sigmas,
        "latent_shape": SHAPE,
    }


def jobs(count, seeds=(0,)):
    return [Job(f"a {i}", f"id-{i}", seed) for i in range(count) for seed in seeds]


def run(setup, store, count=4, **options):
    config = {"guidance_scales": (3.0,), "batch_size": 3}
    extra = {
        k: options.pop(k) for k in ("policy", "num_processes", "process_index") if k in options
    }
    todo = options.pop("jobs", None) or jobs(count)
    return collect(
        jobs=todo, store=store, config=CollectConfig(**config | options), **setup, **extra
    )


def rows_of(store, prompt_id):
    rows = store.rows(lambda i: i == prompt_id)
    return rows.take(torch.argsort(rows.take(torch.arange(len(rows))).step))


def test_latents_are_those_of_the_host_for_the_same_seeds():
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 11)]
    assert torch.equal(
        initial_latents([5, 11], SHAPE), randn_tensor((2, *SHAPE), generator=generators)
    )


def test_states_are_those_of_the_stock_pipeline(pipe, setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    run(setup, store, jobs=[Job("a b", "one", 7), Job("c", "two", 8)])
    visited = []

    def keep(_pipe, _step, _time, values):
        visited.append(values["latents"].clone())
        return {}

    StableDiffusion3Pipeline(**{k: v for k, v in pipe.components.items() if k != "weak_head"})(
        "a b",
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        height=16,
        width=16,
        max_sequence_length=8,
        callback_on_step_end=keep,
        output_type="latent",
    )
    x = rows_of(store, "one").x
    assert torch.equal(x[:1], initial_latents([7], SHAPE).half().float())
    torch.testing.assert_close(x[1:], torch.cat(visited[:-1]), atol=5e-3, rtol=2e-3)  # halves


def test_predictions_are_those_of_the_network_at_the_stored_states(pipe, setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    run(setup, store, features=True)
    rows = rows_of(store, "id-2")
    cond, uncond = setup["encode"](["a 2"])
    with torch.no_grad(), setup["denoiser"].capture_features() as latest:
        for i in range(STEPS):
            x, time = rows.x[i : i + 1], rows.sigma[i : i + 1] * 1000
            empty, d = (
                pipe.transformer(
                    hidden_states=x,
                    timestep=time,
                    encoder_hidden_states=side.prompt_embeds,
                    pooled_projections=side.pooled,
                ).sample
                for side in (uncond, cond)
            )
            torch.testing.assert_close(rows.cond[i : i + 1], d, atol=5e-3, rtol=5e-3)
            torch.testing.assert_close(rows.gap[i : i + 1], d - empty, atol=2e-2, rtol=2e-2)
            assert (d - empty).abs().max() > 0.05  # the gap that is compared is not just noise
            torch.testing.assert_close(rows.features[i : i + 1], latest(), atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(rows.prompt_embeds[0], cond.prompt_embeds[0], atol=5e-3, rtol=2e-3)
    torch.testing.assert_close(rows.sigma.double(), setup["sigmas"][:-1])


def test_a_trajectory_does_not_depend_on_its_batch_mates(setup, tmp_path):
    together, alone = TrajectoryStore(tmp_path / "a"), TrajectoryStore(tmp_path / "b")
    run(setup, together, batch_size=4)
    run(setup, alone, batch_size=1)
    for job in jobs(4):
        left, right = rows_of(together, job.prompt_id), rows_of(alone, job.prompt_id)
        torch.testing.assert_close(left.x, right.x, atol=2e-3, rtol=2e-3)  # one unit of a half


def test_a_subset_of_steps_is_drawn_for_each_trajectory(setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    run(setup, store, count=12, steps_per_trajectory=2)
    kept = {tuple(rows_of(store, f"id-{i}").step.tolist()) for i in range(12)}
    assert {len(steps) for steps in kept} == {2}
    assert len(kept) > 2
    record = Record("id-3", "a 3", 0, 0, 3.0)
    assert rows_of(store, "id-3").step.tolist() == kept_steps(record, STEPS, 2)


def test_every_scale_drives_some_trajectories():
    config = CollectConfig(guidance_scales=(2.0, 5.0), batch_size=7)
    units = make_units(jobs(100), config)
    scales = [{record.guidance_scale for record in unit} for unit in units]
    assert all(
        len(unit) <= 7 and len(found) == 1 for unit, found in zip(units, scales, strict=True)
    )
    assert sum(len(unit) for unit in units) == 100
    # binomial, 4 standard deviations of sqrt(100 / 4) = 5
    assert abs(sum(len(u) for u, s in zip(units, scales, strict=True) if s == {2.0}) - 50) < 20


def test_a_finished_run_is_not_repeated_and_more_jobs_are_added(setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    assert run(setup, store, count=4) == 4
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert run(setup, store, count=4, batch_size=2) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    assert run(setup, store, count=6, batch_size=5) == 2
    assert {key.prompt_id for key in store.records()} == {f"id-{i}" for i in range(6)}


def test_processes_share_the_jobs(setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    added = [run(setup, store, count=11, num_processes=3, process_index=i) for i in range(3)]
    assert sum(added) == len(store.records()) == 11 and all(added)


def test_other_settings_in_one_round_are_refused(setup, tmp_path):
    store = TrajectoryStore(tmp_path)
    run(setup, store)
    with pytest.raises(ValueError, match="another round"):
        run(setup, store, guidance_scales=(4.0,))
    assert run(setup, store, guidance_scales=(4.0,), round=1) == 4
    assert len(store.records()) == 8


def test_a_job_given_twice_is_refused(setup, tmp_path):
    with pytest.raises(ValueError, match="unique"):
        run(setup, TrajectoryStore(tmp_path), jobs=[Job("a", "one", 0), Job("b", "one", 0)])


def test_values_that_are_not_finite_stop_the_run(pipe, setup, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.transformer.proj_out.bias, "data", torch.full((16,), torch.inf))
    with pytest.raises(ValueError, match=r"finite.*step 0 \(sigma 1\)"):
        run(setup, TrajectoryStore(tmp_path))
    assert not TrajectoryStore(tmp_path).records()


@pytest.mark.parametrize("name", ["cond", "adapter", "tap"])
def test_an_on_policy_round_visits_the_states_of_the_fast_sampler(setup, tmp_path, name):
    denoiser = setup["denoiser"]
    options = {"scale_range": (3.0, 3.0)} if name == "adapter" else {}
    head = HEADS.get(name).for_denoiser(denoiser, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator()))
    guided, driven = TrajectoryStore(tmp_path / "cfg"), TrajectoryStore(tmp_path / "head")
    run(setup, guided)
    run(setup, driven, policy=head, round=1)

    visited = []
    plan = make_plan("core", STEPS, 3.0, in_model=head.in_model)
    cond, _ = setup["encode"](["a 1"])
    predict = make_predict(denoiser, setup["sigmas"], plan, cond, None, head)
    attached = head.attached(denoiser.module) if head.in_model else torch.no_grad()
    with attached:
        sample_euler(
            lambda x, i: visited.append(x) or predict(x, i),
            initial_latents([0], SHAPE),
            setup["sigmas"],
        )
    rows = rows_of(driven, "id-1")
    torch.testing.assert_close(rows.x, torch.cat(visited), atol=5e-3, rtol=2e-3)
    assert (rows.x[1:] - rows_of(guided, "id-1").x[1:]).abs().max() > 0.05
    first = rows_of(guided, "id-1")
    torch.testing.assert_close(rows.gap[:1], first.gap[:1], atol=2e-3, rtol=2e-3)
    assert rows.features is None  # the tap reads them, but they were not asked for


def test_online_rows_are_fresh_and_never_of_held_out_prompts(setup):
    prompts = [(f"id-{i}", f"a {i}") for i in range(12)]
    config = CollectConfig(guidance_scales=(2.0, 4.0), batch_size=4, steps_per_trajectory=3)
    source = OnlineSource(
        prompts=prompts, config=config, held_out_share=0.4, **setup, held_out_trajectories=6
    )
    held_out = [text for key, text in prompts if is_held_out(key, 0.4)]
    known = setup["encode"](held_out)[0].pooled
    batches = [source.train(step, 5, seed=0) for step in range(5)]
    pooled = torch.cat([rows.pooled for rows in batches])
    distance = torch.cdist(pooled, known).min(1).values
    assert (distance > 1e-2).all()
    x = torch.cat([rows.x for rows in batches]).flatten(1)
    assert len(x.unique(dim=0)) == 25
    evaluated = [rows.x for rows in source.held_out(4)]
    assert sum(map(len, evaluated)) == 18
    assert torch.equal(torch.cat(evaluated), torch.cat([rows.x for rows in source.held_out(4)]))
    distance = torch.cdist(torch.cat([r.pooled for r in source.held_out(4)]), known).min(1).values
    assert (distance < 1e-2).all()


def test_an_online_batch_is_a_function_of_its_step_and_seed(setup):
    """Pools of 8 rows, batches of 5: any order of steps gives the same rows, each of them once."""
    prompts = [(f"id-{i}", f"a {i}") for i in range(12)]
    config = CollectConfig(guidance_scales=(2.0, 4.0), batch_size=4, steps_per_trajectory=2)
    onward, back = (
        OnlineSource(prompts=prompts, config=config, held_out_share=0.4, **setup) for _ in "ab"
    )
    batches = [onward.train(step, 5, seed=3).x for step in range(4)]
    for step in (3, 1, 0, 2):
        assert torch.equal(back.train(step, 5, seed=3).x, batches[step])
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 20
    assert torch.equal(torch.cat(batches)[:8], onward.train(0, 8, seed=3).x)
    assert not torch.equal(onward.train(0, 5, seed=4).x, batches[0])
    renamed = [(key, text + "!") for key, text in prompts]
    other = OnlineSource(prompts=renamed, config=config, held_out_share=0.4, **setup)
    assert other.describe() != onward.describe() == back.describe()


def test_online_needs_prompts_on_both_sides(setup):
    with pytest.raises(ValueError, match="held-out"):
        OnlineSource(prompts=[("one", "a")], config=CollectConfig(), **setup)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of a model of ours; a stock one is in ``stock`` beside it."""
    folder = tmp_path_factory.mktemp("models") / "ours"
    tiny_sd3_pipeline().save_pretrained(folder)
    stock = {k: v for k, v in tiny_sdxl_pipeline().components.items() if k != "weak_head"}
    StableDiffusionXLPipeline(**stock).save_pretrained(folder.with_name("stock"))
    return folder


def change(folder, component):
    """Move one weight of a component, as if it had been trained again."""
    [file] = (path for path in (folder / component).glob("*.safetensors") if "." not in path.stem)
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def command(capsys, *arguments):
    """Run a command; return its exit status and its error."""
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return done.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "component", "options"),
    [("ours", "transformer", []), ("stock", "text_encoder", ["--pipeline", "auto"])],
)
def test_weights_that_changed_are_refused(model, tmp_path, capsys, kind, component, options):
    folder, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(model.with_name(kind), folder)
    (tmp_path / "prompts").write_text("a b\nc d\n")
    given = ["--model", folder, "--prompts", tmp_path / "prompts", "--steps", "2", *options]
    collecting = ["collect", "-o", data, *given, "--device", "cpu"]
    assert command(capsys, *collecting)[0] == 0
    assert command(capsys, *collecting)[0] == 0  # nothing to do
    rest = ["--held-out-share", "0.5", "--device", "cpu", "--head", "conv", "--steps", "1"]
    training = ["reflect", "-o", tmp_path / "head", "--data", data, *rest]
    change(folder, component)
    before = sorted(data.rglob("*"))
    driven = [*collecting, "--round", "1", "--head", "cond", "guidance_scales=3"]
    wanted = f"weights that the model has now \\({model_weights('it', str(folder))}\\), got round 0"
    for arguments in (collecting, driven, training):
        code, error = command(capsys, *arguments)
        assert code == 2 and error.count("\n") == 1
        assert error.startswith("core2: error: ") and "collect into another folder" in error
        assert re.search(wanted, error)
    file = data / "rounds" / "000.json"
    settings = json.loads(file.read_text())
    del settings["weights"]
    file.write_text(json.dumps(settings))
    for arguments in (collecting, training):
        code, error = command(capsys, *arguments)
        assert code == 2 and "with unknown ones" in error
    assert sorted(data.rglob("*")) == before and not (tmp_path / "head").exists()


def test_weights_are_those_that_are_loaded(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    before = model_weights("it", str(folder))
    assert before == model_weights("it", str(model))
    network = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(network, network.with_name("diffusion_pytorch_model.fp16.safetensors"))
    network.with_suffix(".bin").write_bytes(b"a pickle beside it")
    (folder / "weak_head").mkdir(exist_ok=True)
    (folder / "weak_head" / "model.safetensors").write_bytes(b"a head")
    (folder / "unused.safetensors").write_bytes(b"all in one")
    assert model_weights("it", str(folder)) == before
    for component in ("transformer", "text_encoder_2", "vae"):
        change(folder, component)
        after = model_weights("it", str(folder))
        assert after != before
        before = after
