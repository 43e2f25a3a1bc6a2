"""Reflect. Truth: closed forms on rows made for them; an uninterrupted run for resumed ones."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from core2_sampler.cli import main
from core2_sampler.collect import CollectConfig, Job, collect
from core2_sampler.gap_error import NoiseBins, predict_gap, relative_gap_error, scales_of
from core2_sampler.online_source import OnlineSource
from core2_sampler.reflect import ReflectConfig, reflect, resolve_precision
from core2_sampler.rows import Rows
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weak_heads import HEADS
from core2_sampler.weak_heads.card import save_head

CONFIG = {"batch_size": 16, "warmup_steps": 5, "noise_bins": 3, "precision": "fp32"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def setup(pipe):
    return {
        "denoiser": pipe.family.denoiser(pipe),
        "encode": partial(pipe.family.encode, pipe, max_sequence_length=8),
        "sigmas": pipe.family.schedule(pipe, 6, (8, 8)).sigmas,
        "latent_shape": (4, 8, 8),
    }


@pytest.fixture(scope="module")
def source(setup, tmp_path_factory):
    store = TrajectoryStore(tmp_path_factory.mktemp("store"))
    jobs = [Job(f"{a} {b}", a + b, 0) for a in "abcdefg" for b in "hijklmn"]
    collect(jobs=jobs, store=store, config=CollectConfig((3.0,)), **setup)
    return store.source(held_out_share=0.25)


def make(name, setup, **options):
    if name == "adapter":
        options = {"scale_range": (2.0, 5.0)} | options
    return HEADS.get(name).for_denoiser(setup["denoiser"], **options)


def weights(head):
    return torch.cat([p.detach().flatten() for p in head.parameters()])


def error(head, source, denoiser, bins, scale=None):
    attached = head.attached(denoiser.module) if head.in_model else torch.no_grad()
    with attached:
        return relative_gap_error(head, source.held_out(64), bins, denoiser, scale)


@pytest.mark.parametrize(("name", "bound", "rate"), [("tap", 0.5, 3e-3), ("adapter", 0.8, 1e-2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_the_gap_of_prompts_it_never_saw(setup, source, name, bound, rate, precision):
    head = make(name, setup)
    denoiser = setup["denoiser"]
    before = copy.deepcopy(denoiser.module.state_dict())
    random_state = torch.get_rng_state()
    config = ReflectConfig(**CONFIG | {"precision": precision}, steps=120, learning_rate=rate)
    report = reflect(head, source, config, denoiser=denoiser)

    bins = NoiseBins.of(source.sigmas, 3)
    scale = 5.0 if head.in_model else None
    total, by_bin = error(head, source, denoiser, bins, scale)
    assert total < bound  # 1 before: no guidance
    key = "5" if head.in_model else "any"
    assert report.errors[key] == pytest.approx(by_bin, rel=1e-4)
    assert report.held_out[-1][1] < report.held_out[0][1] < 1.05
    assert [step for step, _ in report.held_out] == [30, 60, 90, 120]

    after = denoiser.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad and p.grad is None for p in denoiser.module.parameters())
    assert not any(m._forward_hooks for m in denoiser.module.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


class Stopped(Exception):
    """The run was interrupted."""


def test_an_interrupted_run_ends_like_an_uninterrupted_one(setup, source, tmp_path):
    config = ReflectConfig(**CONFIG, steps=24, save_seconds=0.0, evaluations=8)
    whole = make("adapter", setup)
    reflect(whole, source, config, denoiser=setup["denoiser"])

    for stop in (2, 5):
        lines = []

        def log(line, stop=stop, lines=lines):
            lines.append(line) if "relative_gap_error" in line else None
            if len(lines) == stop:
                raise Stopped

        with pytest.raises(Stopped):
            reflect(
                make("adapter", setup),
                source,
                config,
                denoiser=setup["denoiser"],
                folder=tmp_path,
                log=log,
            )
    lines = []
    resumed = make("adapter", setup, seed=9)
    report = reflect(
        resumed, source, config, denoiser=setup["denoiser"], folder=tmp_path, log=lines.append
    )
    assert lines[0].startswith("resumed at step")
    assert report.progress.step == 24
    assert [step for step, _ in report.held_out] == [3 * k for k in range(1, 9)]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_run_is_not_trained_again(setup, source, tmp_path):
    config = ReflectConfig(**CONFIG, steps=6)
    first, again = make("tap", setup), make("tap", setup, seed=4)
    reflect(first, source, config, denoiser=setup["denoiser"], folder=tmp_path)
    written = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    report = reflect(again, source, config, denoiser=setup["denoiser"], folder=tmp_path)
    assert report.progress.step == 6 and report.progress.done
    assert torch.equal(weights(first), weights(again))
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == written


def test_a_checkpoint_of_other_settings_is_refused(setup, source, tmp_path):
    arguments = {"denoiser": setup["denoiser"], "folder": tmp_path}
    reflect(make("tap", setup), source, ReflectConfig(**CONFIG, steps=2), **arguments)
    with pytest.raises(ValueError, match="steps=2 in"):
        reflect(make("tap", setup), source, ReflectConfig(**CONFIG, steps=3), **arguments)
    with pytest.raises(ValueError, match="another shape"):
        reflect(make("tap", setup, width=64), source, ReflectConfig(**CONFIG, steps=2), **arguments)


def test_a_checkpoint_of_other_data_or_another_head_is_refused(setup, tmp_path):
    """The shapes of the weights and the settings are the same in each case."""

    def collected(name, **options):
        store = TrajectoryStore(tmp_path / name / "store")
        jobs = [Job(f"{a} {b}", a + b, options.pop("seed", 0)) for a in "abcde" for b in "fgh"]
        collect(jobs=jobs, store=store, config=CollectConfig((3.0,), **options), **setup)
        return store

    store, folder = collected("first"), tmp_path / "run"
    config = ReflectConfig(**CONFIG, steps=2)

    def train(source, **options):
        head = make("adapter", setup, **options)
        reflect(head, source, config, denoiser=setup["denoiser"], folder=folder)

    source = store.source(0.25)
    train(source)
    train(store.source(0.25))
    for other in (collected("second", seed=1).source(0.25), store.source(0.3)):
        with pytest.raises(ValueError, match="checkpoint with other data in .*another folder"):
            train(other)
    with pytest.raises(ValueError, match="checkpoint with other head in"):
        train(source, scale_range=(2.0, 4.0))
    with pytest.raises(ValueError, match="another shape"):
        train(source, rank=2)
    collected("first", round=1)
    with pytest.raises(ValueError, match="other data"):
        train(store.source(0.25))
    train(store.source(0.25, last_round=0))


def test_the_command_refuses_to_resume_on_other_data(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts").write_text("a b\nc d\ne f\ng h\n")

    def command(*arguments):
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in (*arguments, "--device", "cpu")])
        return done.value.code, capsys.readouterr().err

    model = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts", "--steps", "2"]
    for scale in (3, 4):
        done = command("collect", "-o", tmp_path / f"c{scale}", *model, f"guidance_scales={scale}")
        assert done[0] == 0
    options = ["--held-out-share", "0.5", "--batch-size", "2", "--head", "conv", "--steps", "1"]
    for rounds in (0, 1):
        train = ["reflect", "-o", tmp_path / f"h{rounds}", *options, "--rounds", rounds, "--data"]
        assert command(*train, tmp_path / "c3")[0] == 0
        assert command(*train, tmp_path / "c3")[0] == 0  # all is there
        code, error = command(*train, tmp_path / "c4")
        assert code == 2 and "other data" in error and error.count("\n") == 1
    assert set(TrajectoryStore(tmp_path / "c3").rounds()) == {0, 1}
    assert set(TrajectoryStore(tmp_path / "c4").rounds()) == {0}
    assert json.loads((tmp_path / "h1/card.json").read_text())["data"]["store"] == "c3"


def test_the_time_box_ends_the_training(setup, source):
    config = ReflectConfig(**CONFIG, minutes=0.02, evaluations=1)
    progress = reflect(make("tap", setup), source, config, denoiser=setup["denoiser"]).progress
    assert progress.step > 1 and 1.2 <= progress.seconds < 10


def online_source(setup, **options):
    return OnlineSource(
        prompts=[(a + b, f"{a} {b}") for a in "abcdefg" for b in "hijkl"],
        config=CollectConfig((3.0,), batch_size=16),
        held_out_share=0.25,
        **setup,
        **options,
    )


def test_online_training_that_was_killed_ends_like_one_that_was_not(setup, tmp_path):
    """The kill falls within a pool: 6 steps of 16 rows are one."""
    config = ReflectConfig(**CONFIG, steps=16, save_seconds=0.0, evaluations=1)
    whole, resumed = make("tap", setup), make("tap", setup, seed=9)
    arguments = {"denoiser": setup["denoiser"]}

    def rows():
        return online_source(setup, held_out_trajectories=4)

    reflect(whole, rows(), config, **arguments)

    def log(line):
        if line.startswith("step 9 "):
            raise Stopped

    arguments["folder"] = tmp_path
    with pytest.raises(Stopped):
        reflect(make("tap", setup), rows(), config, **arguments, log=log)
    lines = []
    report = reflect(resumed, rows(), config, **arguments, log=lines.append)
    assert lines[0].startswith("resumed at step 8")
    assert report.progress.step == 16
    assert torch.equal(weights(resumed), weights(whole))


def test_it_trains_on_rows_that_are_never_stored(setup):
    online, head = online_source(setup), make("tap", setup)
    config = ReflectConfig(**CONFIG, steps=40, learning_rate=3e-3)
    report = reflect(head, online, config, denoiser=setup["denoiser"])
    assert report.held_out[-1][1] < 0.8
    assert report.data["online"] is True


def test_the_gap_of_an_in_model_head_comes_from_its_guided_pass(setup, source):
    head, denoiser = make("adapter", setup), setup["denoiser"]
    with torch.no_grad():
        for parameter in head.up.values():
            parameter.fill_(0.05)
    rows = next(source.held_out(4))
    with torch.no_grad(), head.attached(denoiser.module):
        with head.active(3.0):
            d = denoiser(rows.x, rows.sigma, rows.conditioning())
        gap = predict_gap(head, rows, denoiser, 3.0)
    torch.testing.assert_close(rows.cond + 2 * gap, d)
    assert scales_of(head) == (2.0, 3.5, 5.0)


def test_stored_features_and_those_of_a_fresh_pass_agree(setup, source):
    head, denoiser = make("tap", setup), setup["denoiser"]
    torch.nn.init.normal_(head.proj_out.weight, generator=torch.Generator().manual_seed(0))
    rows = next(source.held_out(4))
    with torch.no_grad(), denoiser.capture_features() as latest:
        denoiser(rows.x, rows.sigma, rows.conditioning())
        stored = Rows.from_tensors(rows.tensors() | {"features": latest()})
        torch.testing.assert_close(predict_gap(head, stored), predict_gap(head, rows, denoiser))
    with pytest.raises(ValueError, match="denoiser must be given"):
        predict_gap(head, rows)


def test_the_relative_gap_error_is_a_ratio_of_squares(setup):
    x = torch.ones(4, 4, 2, 2)
    sigma = torch.tensor([0.1, 0.1, 0.9, 0.9])
    gap = x * torch.tensor([1.0, 2.0, 3.0, 0.0])[:, None, None, None]
    none = torch.zeros(4, 1)
    rows = Rows(x, x, gap, sigma, none, none, none)
    head = make("last_gap", setup)
    head.observe(torch.ones(4, 4, 2, 2))
    total, by_bin = relative_gap_error(head, [rows], NoiseBins.of(sigma, 2))
    # errors 0, 1, 2, -1 against gaps 1, 2, 3, 0
    assert total == pytest.approx(6 / 14)
    assert by_bin == pytest.approx([1 / 5, 5 / 9])
    assert relative_gap_error(make("cond", setup), [rows], NoiseBins.of(sigma, 2))[0] == 1


def test_every_noise_level_falls_into_a_bin():
    sigmas = torch.linspace(1, 0, 29)[:-1].repeat(3)
    bins = NoiseBins.of(sigmas, 4)
    counts = bins.sum(sigmas, torch.ones(len(sigmas)))
    assert counts.tolist() == [21, 21, 21, 21]
    assert bins.index(torch.tensor([-1.0, 2.0])).tolist() == [0, 3]
    assert len(NoiseBins.of(torch.tensor([0.5, 0.5]), 4)) == 1


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    config = ReflectConfig(steps=100, learning_rate=2.0, warmup_steps=10, final_share=0.1)
    assert config.rate(0, 0.0) == pytest.approx(0.2)
    assert config.rate(50, 0.5) == pytest.approx(2 * 0.55)
    assert config.rate(100, 1.0) == pytest.approx(0.2)
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert config.rate(25, 0.25) == pytest.approx(2 * quarter)


@pytest.mark.parametrize("end", [{}, {"steps": 3, "minutes": 1.0}])
def test_exactly_one_end_is_asked_for(end):
    with pytest.raises(ValueError, match="either steps or minutes"):
        ReflectConfig(**end)


def test_a_head_without_weights_cannot_be_trained(setup, source):
    with pytest.raises(ValueError, match="weights to train, got a CondHead"):
        reflect(make("cond", setup), source, ReflectConfig(steps=1))


def test_an_in_model_head_needs_its_denoiser(setup, source):
    with pytest.raises(ValueError, match="trained in a denoiser"):
        reflect(make("adapter", setup), source, ReflectConfig(steps=1))


def test_precision_is_what_was_asked_for():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("auto", torch.device("meta")) == "fp32"


def test_the_card_says_how_the_head_was_made_and_how_far_it_is_off(setup, source, tmp_path):
    head = make("adapter", setup)
    report = reflect(head, source, ReflectConfig(**CONFIG, steps=8), denoiser=setup["denoiser"])
    path = save_head(head, tmp_path, report, model="tiny")
    card = json.loads(path.read_text())
    assert card["head"] == "AdapterHead" and card["model"] == "tiny" and card["steps"] == 8
    assert card["training"]["batch_size"] == 16 and card["training"]["precision"] == "fp32"
    assert card["data"]["records"] == 49 and "0" in "".join(card["data"]["rounds"])
    assert card["parameters"] == len(weights(head))
    assert set(card["relative_gap_error"]) == {"2", "3.5", "5"}
    assert len(card["gap_power"]) == len(card["noise_bins"]) - 1 and min(card["gap_power"]) > 0
    assert all(len(e) == len(card["noise_bins"]) - 1 for e in card["relative_gap_error"].values())
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == card["parameters"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "card.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
