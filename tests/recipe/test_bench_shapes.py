"""``core2 bench`` end to end on a tiny random pipeline of the real classes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from core2_sampler.benchmarks import cli, generate, runner
from core2_sampler.benchmarks.arms import FIRST_TABLE, Arm, build_arms
from core2_sampler.benchmarks.cache import read_latents
from core2_sampler.benchmarks.generate import judge_arm
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.options import (
    KneeConfig,
    ShapesConfig,
    StudyConfig,
    SweepConfig,
    command_line,
)
from core2_sampler.benchmarks.runner import arm_folder
from core2_sampler.benchmarks.study import Study, latent_distance, result_rows, worst_and_best
from core2_sampler.collect import CollectConfig, Job, collect
from core2_sampler.config import ConfigError, load_config
from core2_sampler.plan import make_plan
from core2_sampler.shapes.judge import judge
from core2_sampler.shapes.world import held_out_prompts
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weak_heads import HEADS

CFG = Arm("cfg", "cfg", 4, 3.0)


def make_study(folder: Path, *, batch_size: int = 5, prompts: int = 6, **changes: object) -> Study:
    pipe = tiny_sd3_pipeline()
    settings = {
        "pipe": pipe,
        "family": "sd3",
        "seeds": (0, 1),
        "judge": judge,
        "keep_latents": True,
    } | changes
    chosen = tuple(held_out_prompts(prompts))
    return Study(prompts=chosen, folder=folder, batch_size=batch_size, **settings)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Heads that do something: their zero-initialised weights are filled."""
    root = tmp_path_factory.mktemp("heads")
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    folders = {}
    for name in ("adapter", "affine", "tap"):
        options = {"scale_range": (2.0, 5.0)} if name == "adapter" else {}
        head = HEADS.get(name).for_denoiser(denoiser, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in [*head.parameters(), *head.buffers()]:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        head.save_pretrained(root / name)
        folders[name] = str(root / name)
    return folders


def first_latents(study: Study, arm: Arm) -> torch.Tensor:
    """Run an arm and return the latents of the first denoiser call of each batch, row by row."""
    seen: list[torch.Tensor] = []
    begin: list[bool] = []

    def look(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if begin:
            begin.clear()
            seen.append(kwargs["hidden_states"].clone())

    handle = study.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        judge_arm(study, arm, on_images=lambda count: begin.append(True))
    finally:
        handle.remove()
    rows = []
    for k, latents in enumerate(seen):
        size = min(study.batch_size, len(study.cases) - k * study.batch_size)
        assert torch.equal(latents[:size], latents[-size:])  # a CFG pair runs on the same latents
        rows.append(latents[:size])
    return torch.cat(rows)


def test_all_arms_start_from_the_same_latents_whatever_the_batch(tmp_path, heads):
    arms = build_arms(FIRST_TABLE, 4, 3.0, heads)
    study = make_study(tmp_path / "a")
    wanted = torch.stack([torch.randn(4, 8, 8, generator=c.generator()) for c in study.cases])
    assert len({tuple(row.flatten().tolist()) for row in wanted}) == len(study.cases)
    for arm in arms:
        assert torch.equal(first_latents(study, arm), wanted), arm.name
    assert torch.equal(first_latents(make_study(tmp_path / "b", batch_size=12), CFG), wanted)


def test_cfg_arm_is_the_stock_pipeline(tmp_path):
    """Truth: diffusers' own StableDiffusion3Pipeline, prompt by prompt, output_type pil."""
    study = make_study(tmp_path, prompts=3)
    result = judge_arm(study, CFG)
    stock = StableDiffusion3Pipeline(
        **{name: part for name, part in study.pipe.components.items() if name != "weak_head"}
    )
    stock.set_progress_bar_config(disable=True)
    for k, case in enumerate(study.cases):
        image = stock(
            case.prompt.text,
            generator=case.generator(),
            num_inference_steps=4,
            guidance_scale=3.0,
        ).images[0]
        difference = np.asarray(image).astype(int) - np.asarray(result.image(k)).astype(int)
        assert np.abs(difference).max() <= 1  # float32 sums in another order
    assert result.nfe == 8


@pytest.mark.parametrize("name", FIRST_TABLE)
def test_every_arm_costs_its_plan_and_moves_the_image(tmp_path, heads, name):
    study = make_study(tmp_path, prompts=1)
    (arm,) = build_arms([name], 4, 3.0, heads)
    result = judge_arm(study, arm)
    assert result.nfe == arm.plan(in_model=name.startswith("adapter")).nfe
    distance = latent_distance(result, judge_arm(study, CFG))
    assert bool((distance == 0).all()) == (name == "cfg")
    assert study.pipe.weak_head is None  # put back


def test_a_plan_that_lies_is_caught_and_nothing_is_kept(tmp_path, monkeypatch):
    study = make_study(tmp_path)
    monkeypatch.setattr(Arm, "plan", lambda self, in_model: make_plan("cfg", 3, 3.0))
    with pytest.raises(RuntimeError, match="must cost the 6 denoiser evaluations.* got 8"):
        judge_arm(study, CFG)
    folder = arm_folder(study, CFG, None)
    assert read_latents(folder) == ImageStore(folder).records() == {}


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """SIGKILL after the second of three batches, with half a file of the third left behind."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from core2_sampler.benchmarks.generate import judge_arm
        from test_bench_shapes import CFG, make_study
        settled = []
        def on_images(count):
            settled.append(count)
            if sum(settled) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
        judge_arm(make_study(Path({str(tmp_path / "killed")!r})), CFG, on_images=on_images)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    study, whole = make_study(tmp_path / "killed"), make_study(tmp_path / "whole")
    folder = arm_folder(study, CFG, None)
    assert len(read_latents(folder)) == len(ImageStore(folder).records()) == 10
    (folder / "abc.safetensors.tmp").write_bytes(b"half")
    rows: list[int] = []
    hook = study.pipe.transformer.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
    resumed, again, straight = judge_arm(study, CFG), judge_arm(study, CFG), judge_arm(whole, CFG)
    hook.remove()
    assert rows == [4] * 4  # the two images that were missing, as pairs, 4 steps, once
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert torch.equal(resumed.images, straight.images)
    assert torch.equal(again.latents, resumed.latents)
    assert result_rows(study, resumed, command="c") == result_rows(whole, straight, command="c")


def test_another_batch_size_or_fewer_prompts_reuse_what_is_there(tmp_path, monkeypatch):
    full = judge_arm(make_study(tmp_path, batch_size=5), CFG)
    monkeypatch.setattr(generate, "generate", None)
    part = judge_arm(make_study(tmp_path, batch_size=7, seeds=(1,)), CFG)
    assert torch.equal(part.latents, full.latents[1::2])


def test_the_folder_is_decided_by_all_that_decides_the_images(tmp_path, heads):
    study = make_study(tmp_path)
    arms = {arm.name: arm for arm in build_arms(FIRST_TABLE, 4, 3.0, heads)}
    folders = {
        name: arm_folder(study, arm, runner.resolve_head(study, arm.head))
        for name, arm in arms.items()
    }
    assert len(set(folders.values())) == len(FIRST_TABLE)
    base = folders["cfg"]
    renamed = dataclasses.replace(CFG, name="another name")
    assert arm_folder(study, renamed, None) == base
    assert arm_folder(study, dataclasses.replace(CFG, guidance_scale=3.5), None) != base
    cond = dataclasses.replace(arms["cond"], guidance_scale=7.0)  # the scale does nothing there
    assert arm_folder(study, cond, None) == folders["cond"]
    for change in ({"dtype": "bf16"}, {"max_sequence_length": 16}):
        assert arm_folder(dataclasses.replace(study, **change), CFG, None) != base
    for part in ("transformer", "vae", "text_encoder"):
        other = make_study(tmp_path)
        with torch.no_grad():
            next(getattr(other.pipe, part).parameters()).view(-1)[0] += 1
        assert arm_folder(other, CFG, None) != base, part
    assert arm_folder(make_study(tmp_path, pipe=tiny_sd3_pipeline(shift=1.0)), CFG, None) != base
    changed = runner.resolve_head(study, heads["tap"])
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    assert arm_folder(study, arms["tap-fast"], changed) != folders["tap-fast"]


def test_rows_of_a_result_are_its_means_and_paired_differences(tmp_path):
    study = make_study(tmp_path, prompts=12)
    cfg = dataclasses.replace(judge_arm(study, CFG), correct=[True, True, False, False] * 6)
    arm = dataclasses.replace(cfg, correct=[True, False] * 12, latents=1.5 * cfg.latents)
    rows = {row.metric: row for row in result_rows(study, arm, cfg, command="c")}
    assert list(rows) == ["overall", *study.tasks, "overall_minus_cfg", "latent_distance_to_cfg"]
    assert rows["overall"].value == 0.5 and rows["overall"].n_images == 24
    assert rows["counting"].value == 0.5 and rows["counting"].n_images == 4
    assert rows["overall_minus_cfg"].value == 0.0
    assert rows["overall_minus_cfg"].low < 0 < rows["overall_minus_cfg"].high
    assert rows["latent_distance_to_cfg"].value == pytest.approx(0.5, rel=1e-6)
    worst, best = worst_and_best(arm, cfg, 3)
    assert all(cfg.correct[i] and not arm.correct[i] for i in worst) and len(worst) == 3
    assert all(arm.correct[i] and not cfg.correct[i] for i in best) and len(best) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_sd3_pipeline().save_pretrained(folder)
    return str(folder)


def study_config(model: str, root: Path) -> StudyConfig:
    return StudyConfig(
        model=model,
        prompts=6,
        seeds=2,
        batch_size=8,
        max_sequence_length=16,
        cache=root,
        device="cpu",
    )


def read(path: Path) -> list[dict[str, object]]:
    return json.loads(path.with_suffix(".json").read_text())


def test_bench_shapes_writes_the_table_and_runs_nothing_twice(tmp_path, heads, model, monkeypatch):
    pipe = tiny_sd3_pipeline()
    store = TrajectoryStore(tmp_path / "store")
    collect(
        pipe.family.denoiser(pipe),
        lambda texts: pipe.family.encode(pipe, texts, max_sequence_length=16),
        [Job("a red star", "p0", 0), Job("a ring", "p1", 1)],
        store,
        CollectConfig(),
        sigmas=pipe.family.schedule(pipe, 4, (8, 8)).sigmas,
        latent_shape=(4, 8, 8),
    )
    config = ShapesConfig(
        study_config(model, tmp_path / "cache"),
        steps=(4, 2),
        guidance_scale=3.0,
        heads=tuple(f"{name}={heads[name]}" for name in ("adapter", "tap")),
        trajectories=store.root,
        out=tmp_path / "table.md",
        sheets=True,
    )
    cli.bench_shapes(config)
    rows = read(config.out)
    assert [(r["arm"], r["steps"]) for r in rows if r["metric"] == "overall"] == [
        (name, n // 2 if name == "cfg-half" else n) for n in (4, 2) for name in FIRST_TABLE
    ]
    by_arm = {r["arm"]: r["nfe"] for r in rows if r["provenance"] and r["steps"] == 4}
    assert by_arm == {
        "cond": 4,
        "cfg": 8,
        "last-gap": 5,
        "affine": 4,
        "adapter-fast": 4,
        "tap-fast": 4,
        "tap-quarter": 5,
        "tap-w2s": 8,
    }
    assert sum(r["metric"] == "overall_minus_cfg" for r in rows) == 2 * (len(FIRST_TABLE) - 1)
    first = rows[0]
    assert first["n_images"] == 12 and first["family"] == "sd3"
    assert str(first["command"]).startswith("core2 bench shapes --steps 4,2 --guidance-scale 3 ")
    assert first["provenance"]["dtype"] == "fp32" and first["provenance"]["seeds"] == [0, 1]
    text = config.out.read_text()
    assert "| sd3 | tap-w2s | 4 | 3 | 8 | 12 |" in text and "- tap-w2s: tap head" in text
    monkeypatch.setattr(generate, "generate", None)
    cli.bench_shapes(config)
    assert read(config.out) == rows


def test_bench_sweep_names_the_best_scale_and_costs_cond_at_scale_1(tmp_path, model, capsys):
    config = SweepConfig(
        study_config(model, tmp_path), steps=3, scales=(1.0, 2.0), out=tmp_path / "s.md"
    )
    cli.bench_sweep(config)
    overall = [r for r in read(config.out) if r["metric"] == "overall"]
    assert [(r["guidance_scale"], r["nfe"]) for r in overall] == [(1.0, 3), (2.0, 6)]
    assert "Best guidance scale: " in capsys.readouterr().out


def test_bench_knee_compares_each_n_with_twice_it(tmp_path, model):
    config = KneeConfig(
        study_config(model, tmp_path), steps=(1, 2, 3), guidance_scale=2.0, out=tmp_path / "k.md"
    )
    cli.bench_knee(config)
    rows = read(config.out)
    assert [r["steps"] for r in rows if r["metric"] == "overall"] == [1, 2, 3, 4, 6]
    assert [r["steps"] for r in rows if r["metric"] == "overall_minus_2n"] == [1, 2, 3]


def test_the_knee_is_the_smallest_n_that_loses_less_than_a_point(tmp_path):
    study = make_study(tmp_path, prompts=1)
    row = result_rows(study, judge_arm(study, CFG), command="c")[0]

    def loses(n: int, points: float) -> object:
        value = -points / 100
        return dataclasses.replace(row, steps=n, metric="overall_minus_2n", value=value)

    assert cli.find_knee([loses(4, 5), loses(10, 0.2), loses(8, 0.9), loses(6, 1.1), row]) == 8
    assert cli.find_knee([loses(4, 5), row]) is None


def test_the_command_of_a_table_gives_its_config_again(tmp_path, model):
    config = ShapesConfig(
        dataclasses.replace(study_config(model, tmp_path), threads=1, dtype="bf16"),
        steps=(4, 2),
        guidance_scale=4.5,
        arms=("cond", "cfg"),
        heads=("tap=a b",),
        out=Path("x.md"),
    )
    words = shlex.split(command_line(config))
    assert words[:3] == ["core2", "bench", "shapes"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    options = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()}
    assert load_config(ShapesConfig, given=options) == config


def test_each_store_has_an_affine_control_of_its_own(tmp_path):
    places = set()
    for family in ("sd3", "flux"):
        store = tmp_path / family
        store.mkdir()
        config = ShapesConfig(study_config("shapes-sd3", tmp_path), trajectories=store)
        places.add(cli.with_affine({}, config)["affine"])
    assert len(places) == 2  # an old one of another family would be refused before the new is made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("cnd",)}, "did you mean 'cond'"),
        ({"arms": ("tap-fast",)}, "tap=FOLDER"),
        ({"heads": ("tap",)}, "name=FOLDER"),
        ({"heads": ("tap=nowhere",)}, "folder"),
        ({"trajectories": Path("nowhere")}, "trajectories must be a folder"),
        ({"out": Path("table.txt")}, "ends in .md"),
        ({"study": StudyConfig(model="nope")}, "unknown model"),
        ({"study": {"prompts": 10**6}}, "n must be"),
        ({"study": {"device": "gpu"}}, "device must be"),
    ],
)
def test_bad_input_ends_before_anything_is_loaded(tmp_path, model, monkeypatch, changes, message):
    monkeypatch.setattr("core2_sampler.pipelines.auto.load_pipeline", None)
    study = changes.get("study", {})
    if isinstance(study, dict):
        study = dataclasses.replace(study_config(model, tmp_path), **study)
    config = ShapesConfig(**{"guidance_scale": 3.0, **changes, "study": study})
    with pytest.raises(ConfigError, match=message):
        cli.bench_shapes(config)


def test_a_head_is_refused_at_a_scale_it_was_not_made_for(tmp_path, heads, model):
    folder = (f"adapter={heads['adapter']}",)
    config = ShapesConfig(study_config(model, tmp_path), guidance_scale=7.0, heads=folder)
    with pytest.raises(ConfigError, match="guidance_scale must be from 2 to 5"):
        cli.bench_shapes(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be"),
        ({"batch_size": 0}, "at least 1"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"prompts": ()}, "not empty"),
    ],
)
def test_bad_studies_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_study(tmp_path), **changes)


def test_bf16_runs_under_autocast(tmp_path):
    study = make_study(tmp_path, prompts=1)
    wide, narrow = (judge_arm(dataclasses.replace(study, dtype=d), CFG) for d in ("fp32", "bf16"))
    distance = latent_distance(narrow, wide)
    assert bool((distance > 1e-5).all()) and bool((distance < 0.2).all())
