"""`core2 shapes rebuild`. Truth: numpy's mean, what stock classes load, the times of files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from core2_sampler import CoRe2Pipeline
from core2_sampler.cli import main
from core2_sampler.shapes import MODELS, rebuild
from core2_sampler.shapes.rebuild import Stage, best_scale, chain
from core2_sampler.shapes.train import PARTS

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == code


def option_of(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_every_part_is_trained_and_the_stages_share_the_time(tmp_path: Path):
    full, short = chain(tmp_path), chain(tmp_path, 30)
    share = 30 / sum(stage.minutes for stage in full)
    assert [stage.minutes for stage in short] == pytest.approx([s.minutes * share for s in full])
    assert sum(stage.minutes for stage in short) == pytest.approx(30)
    assert [stage.name for stage in full if stage.name in PARTS] == list(PARTS)
    for stages in (full, short):
        for stage in (stage for stage in stages if stage.name in PARTS):
            [command] = stage.commands()
            assert command[:4] == ["shapes", "train", "--part", stage.name]
            assert float(option_of(command, "--minutes")) == pytest.approx(stage.minutes, rel=1e-3)
    collects = [stage.commands()[0] for stage in short if stage.name.endswith("-collect")]
    counts = {int(option_of(command, "--num-prompts")) for command in collects}
    assert counts == {round(1200 * share)}


def test_the_best_scale_is_the_lowest_of_the_best_overall_scores(tmp_path: Path):
    scores = [(7.0, "overall", 0.6), (2.0, "overall", 0.5), (3.0, "overall", 0.6)]
    others = [(2.0, "colors", 0.9), (2.0, "overall_minus_2n", 0.9)]
    keys = ("guidance_scale", "metric", "value")
    rows = [dict(zip(keys, row, strict=True)) for row in scores + others]
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    assert best_scale(tmp_path / "sweep.json") == 3.0


def test_a_chain_goes_on_at_the_command_that_failed(tmp_path: Path):
    calls: list[str] = []
    stages = [
        Stage("first", 1, lambda: [["a"]]),
        Stage("second", 1, lambda: [["b"], ["c"]]),
    ]

    def fail_once(command: list[str]) -> None:
        calls.extend(command)
        if calls == ["a", "b", "c"]:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        rebuild.rebuild(stages, tmp_path, fail_once)
    lines: list[str] = []
    rebuild.rebuild(stages, tmp_path, fail_once, log=lines.append)
    assert calls == ["a", "b", "c", "b", "c"]
    assert lines[0].startswith("stage 1 of 2, first: finished before")
    kept = json.loads((tmp_path / "rebuild.json").read_text())["stages"]
    assert {name: stage["runs"] for name, stage in kept.items()} == {"first": 1, "second": 2}
    assert kept["second"]["commands"] == [["b"], ["c"]] and kept["second"]["minutes"] >= 0


@pytest.mark.slow
def test_one_command_makes_a_model_with_its_head_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The chain of one family of three, with two trainings: the others have the same stages."""
    pytest.importorskip("scipy")
    monkeypatch.setattr(rebuild, "_DENOISERS", {"sd3": (1, 1)})
    monkeypatch.setattr(rebuild, "SCALES", (2.0, 3.0))
    folder, installed = tmp_path / "all", MODELS.stat()
    command = ["shapes", "rebuild", "-o", folder, "--minutes", "0.01", "--device", "cpu"]
    run(*command)
    capsys.readouterr()
    assert MODELS.stat() == installed  # `ship` would have put another folder there

    stages = [load_file(folder / name / WEIGHTS) for name in ("sd3", "sd3-2/sd3")]
    shipped = load_file(folder / "models" / "sd3" / WEIGHTS)
    for key, value in shipped.items():
        wanted = np.mean([each[key].numpy().astype(np.float64) for each in stages], axis=0)
        np.testing.assert_array_equal(value.numpy(), wanted.astype(np.float16), key)
    assert (folder / "models" / "clip" / "config.json").is_file()

    stock = StableDiffusion3Pipeline.from_pretrained(folder / "models" / "sd3")
    pipe = CoRe2Pipeline.from_pretrained(folder / "models" / "sd3")
    assert torch.equal(stock.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
    rows = json.loads((folder / "sd3-sweep.json").read_text())
    scores = {r["guidance_scale"]: r["value"] for r in rows if r["metric"] == "overall"}
    assert scores[pipe.weak_head.config.reference_scale] == max(scores.values())
    card = json.loads((folder / "models" / "sd3" / "weak_head" / "card.json").read_text())
    assert list(card["data"]["rounds"]) == ["000", "001"]

    file = folder / "rebuild.json"
    record = json.loads(file.read_text())
    del record["stages"]["sd3-mean"]["minutes"]  # as if killed after the mean, before the note
    file.write_text(json.dumps(record))
    made = [path for path in folder.rglob("*") if path.is_file() and path != file]
    times = {path: path.stat().st_mtime_ns for path in made}
    run(*command)
    said = capsys.readouterr().out
    assert said.count("finished before") == len(record["stages"]) - 1
    assert {path: path.stat().st_mtime_ns for path in made} == times
    again = json.loads(file.read_text())
    assert again["stages"]["sd3-mean"]["runs"] == 2
    assert again["stages"]["vae"] == record["stages"]["vae"]
    assert all(stage["minutes"] >= 0 for stage in again["stages"].values())
    run(*command[:4], "--minutes", "1", code=2)
    assert "minutes must stay 0.01" in capsys.readouterr().err
