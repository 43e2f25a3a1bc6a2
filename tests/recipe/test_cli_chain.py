"""Collect, Reflect and Refine through the command line, on a tiny real pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core2_sampler.cli import main
from core2_sampler.cli.collect import CollectOptions, read_prompts
from core2_sampler.cli.launch import asked_processes
from core2_sampler.cli.options import RECIPES
from core2_sampler.cli.reflect import ReflectOptions
from core2_sampler.config import ConfigError, load_config
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weak_heads import load_head

PROMPTS = [f"{color} {shape}" for color in ("red", "blue") for shape in ("ring", "star", "cross")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a file of prompts and trajectories of them at scales 3 and 5."""
    root = tmp_path_factory.mktemp("chain")
    tiny_sd3_pipeline().save_pretrained(root / "model")
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    run("collect", "-o", root / "data", *source(root), "--steps", "4", "guidance_scales=3,5")
    return root


def source(root: Path) -> list[object]:
    return ["--model", root / "model", "--prompts", root / "prompts.txt", "--batch-size", "2"]


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == code


def test_collect_stores_each_prompt_once_and_resumes(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    records = TrajectoryStore(root / "data").records()
    assert sorted(key.prompt_id for key in records) == sorted(PROMPTS)
    assert {record.guidance_scale for record in records.values()} <= {3.0, 5.0}
    run("collect", "-o", root / "data", *source(root), "--steps", "4", "guidance_scales=3,5")
    assert "added 0 trajectories" in capsys.readouterr().out
    run("collect", "-o", root / "data", *source(root), "--steps", "3", code=2)
    assert "must keep its settings" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["adapter", "tap"])
def test_reflect_trains_a_head_that_generate_uses(root: Path, tmp_path: Path, head: str):
    folder = tmp_path / head
    options = ["--held-out-share", "0.4", "--batch-size", "4", "--steps", "3"]
    run("reflect", "-o", folder, "--data", root / "data", "--head", head, *options)
    card = json.loads((folder / "card.json").read_text())
    assert card["steps"] == 3
    assert card["model"] == str(root / "model")
    if head == "adapter":
        assert json.loads((folder / "config.json").read_text())["scale_range"] == [3.0, 5.0]
    out = tmp_path / "out"
    run("generate", "red ring", "--model", root / "model", "--head", folder, "-o", out, "steps=4")
    [record] = [json.loads(file.read_text()) for file in out.glob("*.json")]
    scale = {"adapter": 5.0, "tap": 4.0}[head]  # what it was made for; the median of its data
    assert (record["nfe"], record["guidance_scale"]) == (4, scale)


def test_an_on_policy_round_is_driven_by_the_head(root: Path, tmp_path: Path):
    options = ["--held-out-share", "0.4", "--steps", "2", "batch_size=4"]
    run("reflect", "-o", tmp_path / "head", "--data", root / "data", *options)
    round_1 = ["--round", "1", "--head", tmp_path / "head", "--steps", "4", "guidance_scales=3"]
    run("collect", "-o", tmp_path / "data", *source(root), *round_1)
    store = TrajectoryStore(tmp_path / "data")
    assert {key.round for key in store.records()} == {1}
    settings = json.loads((tmp_path / "data/rounds/001.json").read_text())
    assert settings["policy"] == "AdapterHead"
    run("collect", "-o", tmp_path / "data", *source(root), *round_1, "guidance_scales=9", code=2)
    run("reflect", "-o", tmp_path / "second", "--data", tmp_path / "data", *options)
    assert load_head(tmp_path / "second").config.scale_range == [3.0, 3.0]


def test_rounds_collect_and_train_in_turns(root: Path, tmp_path: Path):
    data, head = tmp_path / "data", tmp_path / "head"
    run("collect", "-o", data, *source(root), "--steps", "4", "guidance_scales=3")
    options = ["--held-out-share", "0.4", "--steps", "2", "batch_size=4", "--rounds", "2"]
    for _ in range(2):  # the second time all is there
        run("reflect", "-o", head, "--data", data, *options)
        rounds = [key.round for key in TrajectoryStore(data).records()]
        assert sorted(rounds) == sorted([0, 1, 2] * len(PROMPTS))
    card = json.loads((head / "card.json").read_text())
    assert card["data"]["rounds"]["002"]["policy"] == "AdapterHead"
    first = json.loads((tmp_path / "head.run/round-0/card.json").read_text())
    assert set(first["data"]["rounds"]) == {"000"} and first["steps"] == 2
    run("reflect", "-o", tmp_path / "x", "--online", "--rounds", "1", "--steps", "2", code=2)
    run("reflect", "-o", tmp_path / "other", "--data", data, *options, code=2)  # driven by another
    assert not (tmp_path / "other.run").exists()


def test_online_training_stores_no_trajectory(root: Path, tmp_path: Path):
    online = ["--online", "--prompts", root / "prompts.txt", "--sampling-steps", "3"]
    options = ["--held-out-share", "0.4", "--batch-size", "4", "--steps", "2"]
    run("reflect", "-o", tmp_path / "head", "--model", root / "model", *online, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "head.run"]
    assert json.loads((tmp_path / "head/card.json").read_text())["data"]["online"] is True


@pytest.mark.slow
def test_processes_of_accelerate_share_the_work(root: Path, tmp_path: Path):
    """Without MPI accelerate starts one process on the CPU: the command starts the others."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    collect = ["-m", "core2_sampler", "collect", "-o", tmp_path / "data", *source(root)]
    environment = {k: v for k, v in os.environ.items() if k != "MASTER_PORT"}
    done = subprocess.run(
        [*map(str, command), *map(str, collect), "--steps", "2"],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    added = dict(re.findall(r"process (\d): added (\d+) trajectories", done.stdout))
    assert added == {"0": "4", "1": "2"}  # three units of two
    TrajectoryStore(tmp_path / "data").verify()
    assert len(TrajectoryStore(tmp_path / "data").records()) == len(PROMPTS)


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["python", "accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "x"], 2),
        (["accelerate", "launch", "--num-processes=3", "--cpu"], 3),
        (["accelerate", "launch", "--cpu"], None),
        (["accelerate", "launch", "--config_file", "num_processes"], None),
    ],
)
def test_the_number_of_processes_is_read_from_accelerate(command: list[str], count: int | None):
    assert asked_processes(command) == count


def test_shapes_prompts_are_training_captions_and_repeatable():
    from core2_sampler.cli.shapes import all_texts

    prompts = read_prompts("shapes", 50, seed=0)
    assert len({key for key, _ in prompts}) == 50
    assert prompts == read_prompts("shapes", 50, seed=0) != read_prompts("shapes", 50, seed=1)
    assert prompts[:20] == read_prompts("shapes", 20, seed=0)
    known = all_texts()
    assert {known[text].split for _, text in prompts} == {"train"}


def test_more_prompts_than_there_are_is_an_error(root: Path):
    with pytest.raises(ConfigError, match="must hold 7 different prompts, got 6"):
        read_prompts(str(root / "prompts.txt"), 7, seed=0)


def test_rendered_images_pass_the_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("scipy")
    run("shapes", "render", "-n", "12", "-o", tmp_path)
    lines = (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(list(tmp_path.glob("*-render.png"))) == 12
    run("shapes", "judge", tmp_path)
    table = capsys.readouterr().out
    assert re.search(r"all\W+12\W+(0\.9\d+|1\.000)", table), table


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run(file: Path):
    options = {"collect": CollectOptions, "reflect": ReflectOptions}
    [name] = re.findall(rf"^#   core2 (\w+) --config {file.stem}$", file.read_text(), re.MULTILINE)
    load_config(options[name], file=file)


def test_a_head_of_flux_remembers_which_gap_it_learned(tmp_path: Path):
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    data, head = tmp_path / "data", tmp_path / "head"
    options = ["--steps", "2", "--weak-guidance", "1.5", "guidance_scales=3"]
    run("collect", "-o", data, *source(tmp_path), *options)
    train = ["--head", "tap", "--steps", "2", "batch_size=4", "held_out_share=0.4"]
    run("reflect", "-o", head, "--data", data, *train)
    assert json.loads((head / "config.json").read_text())["weak_guidance"] == 1.5
    pipe.register_modules(weak_head=load_head(head))
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    with pytest.raises(ValueError, match="must be 1.5 for this weak head, .* got None"):
        pipe("a", core2="fast", **call)
    pipe("a", core2="fast", weak_guidance=1.5, **call)
    run("generate", "a", "--model", tmp_path / "model", "--head", head, "--mode", "fast", code=2)
    round_1 = ["--round", "1", "--head", head]
    run("collect", "-o", tmp_path / "new", *source(tmp_path), *options[:2], *round_1, code=2)
    assert not (tmp_path / "new").exists()
