"""``core2 bench run`` as users run it, on a tiny real pipeline: killed, run again, reported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from core2_sampler.benchmarks import doctor
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.lines import read_lines
from core2_sampler.benchmarks.options import GenerateConfig, Judging, RunConfig, command_line
from core2_sampler.benchmarks.runs import read_runs, store_of
from core2_sampler.cli import main
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

GENEVAL = (
    '{"tag": "counting", "include": [{"class": "kite", "count": 2}], "prompt": "two kites"}\n'
    '{"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}\n'
    '{"tag": "counting", "include": [{"class": "cow", "count": 3}], "prompt": "three cows"}\n'
    '{"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a kite"}\n'
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own."""
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(weak_head=HEADS.get("tap").for_denoiser(pipe.family.denoiser(pipe)))
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def bench(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as done:
        main(["bench", *map(str, arguments)])
    assert done.value.code == code


def options(model: Path, out: Path) -> list[str]:
    given = {
        **{"--model": model, "--out": out, "--limit": 6, "--steps": 2, "--guidance-scale": 3},
        **{"--arms": "cfg,fast", "--batch-size": 1, "--device": "cpu"},
        "--max-sequence-length": 16,
    }
    return [str(word) for pair in given.items() for word in pair]


def images(out: Path) -> dict[str, dict[str, str]]:
    """Return the sha256 of every image, by arm and case."""
    (run,) = read_runs(out)
    stores = {entry.arm.name: store_of(out, entry) for entry in run.arms}
    return {
        name: {key: record.sha256 for key, record in store.records().items()}
        for name, store in stores.items()
    }


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(model, tmp_path, capsys):
    """A real SIGKILL on the real command line, between the first and the last image."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-m", "core2_sampler", "bench", "run", *options(model, killed)]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    while not list(killed.glob("images/*/manifest.*.jsonl")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    folders = {path.parent for path in killed.glob("images/*/manifest.*.jsonl")}
    there = sum(len(ImageStore(folder).records()) for folder in folders)
    assert 1 <= there < 36  # twelve images of three arms
    bench("run", *options(model, killed))
    assert f"{36 - there} images generated" in capsys.readouterr().out
    bench("run", *options(model, whole))
    capsys.readouterr()
    assert images(killed) == images(whole)
    for manifest in killed.glob("images/*/manifest.*.jsonl"):
        counts = Counter(line["key"] for line in read_lines(manifest))
        assert len(counts) == 12 and set(counts.values()) == {1}
        assert len(list(manifest.parent.glob("*.png"))) == 12
    bench("generate", *options(model, killed))
    bench("score", "--out", killed)
    out = capsys.readouterr().out
    assert "0 images generated" in out and "shapes: 0 images scored" in out
    numbers = [
        [[row[k] for k in ("arm", "metric", "nfe", "value", "low")] for row in rows]
        for rows in (json.loads((o / "report/report.json").read_text()) for o in (killed, whole))
    ]
    assert numbers[0] == numbers[1]
    assert {row[0]: row[2] for row in numbers[0]} == {"cfg": 4.0, "fast": 2.0, "fast-matched": 2.0}


def test_shares_of_several_processes_are_one_run(model, tmp_path, capsys):
    for share in ("0/2", "1/2"):
        bench("generate", *options(model, tmp_path), "--shard", share)
    assert {name: len(found) for name, found in images(tmp_path).items()} == {
        "cfg": 12,
        "fast": 12,
        "fast-matched": 12,
    }
    bench("score", "--out", tmp_path, "--scorers", "shapes,clipscore=tiny")
    bench("report", "--out", tmp_path)
    page = (tmp_path / "report/report.md").read_text()
    assert "shapes % (decides)" in page and "clipscore-tiny (MEANINGLESS)" in page
    assert "Apache-2.0" in page and "random models" in page
    bench("run", *options(model, tmp_path), "--shard", "0/2", code=2)
    assert "shard is for `core2 bench generate`" in capsys.readouterr().err


def test_geneval_runs_on_a_prompt_file_is_exported_and_comes_back(model, tmp_path, capsys):
    source = tmp_path / "metadata.jsonl"
    source.write_text(GENEVAL)
    given = [*options(model, tmp_path / "out"), "--suite", "geneval", "--source", source]
    given[given.index("--limit") + 1] = "4"
    bench("run", *given, "--seeds", "5", "--ga-eval", "0", "--scorers", "geneval=tiny")
    page = (tmp_path / "out/report/report.md").read_text()
    assert "geneval-tiny (HF port) % (decides, MEANINGLESS)" in page and "GenEval (HF port)" in page
    bench("export", "--out", tmp_path / "out", "--layout", "geneval", "--to", tmp_path / "to")
    ((images),) = tmp_path.glob("to/*/cfg-2-3-*")
    assert len(list(images.glob("0000?/samples/00000.png"))) == 4
    rows = []
    for path in sorted(images.glob("0*/samples/*.png")):
        record = json.loads((path.parents[1] / "metadata.jsonl").read_text())
        row = {"filename": str(path), "reason": "", "correct": True, "details": "{}"}
        row |= {"tag": record["tag"], "prompt": record["prompt"], "metadata": json.dumps(record)}
        rows.append(json.dumps(row))
    (tmp_path / "results.jsonl").write_text("\n".join(rows))
    given = ["--results", tmp_path / "results.jsonl", "--images", images]
    bench("import", *given, "--out", tmp_path / "out")
    assert "official overall 100.0 % (mean of the tasks: counting" in capsys.readouterr().out
    bench("report", "--out", tmp_path / "out")
    assert "export and judge the other arms too" in capsys.readouterr().out


def test_labels_calibrate_a_tiny_judge(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text(GENEVAL)
    columns = ["prompt_id", "image_id", "caption", "object_0_name", "object_1_name"]
    head = [f"Input.{name}" for name in columns]
    head += [f"Answer.task-{name}" for name in ["count-0", "count-1", "color-0", "color-1"]]
    head += ["Answer.task-position-x", "Answer.task-position-y"]
    values = ["1", "0", "a cow", "cow", "", "1", "", "", "", "", ""]
    (tmp_path / "annotations_a.csv").write_text(f"{','.join(head)}\n{','.join(values)}\n")
    image = tmp_path / "images/00001/samples/00000.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(image)
    given = {"--labels": "annotations_a.csv", "--images": "images", "--source": "prompts.jsonl"}
    words = [str(word) for flag, name in given.items() for word in (flag, tmp_path / name)]
    for _ in range(2):  # the second time from the verdicts that were kept
        bench("calibrate-geneval", *words, "--detector", "tiny", "--out", tmp_path / "out")
        out = capsys.readouterr().out
        assert "GenEval (HF port): detector random@" in out
        assert re.search(r"\| all +\| +1 \| +(0|100).0 \|", out)
    image.unlink()
    bench("calibrate-geneval", *words, "--detector", "tiny", "--out", tmp_path / "out", code=2)
    assert "every labelled image must be there" in capsys.readouterr().err


def test_doctor_lists_what_it_found(capsys, monkeypatch):
    bench("doctor")
    out = capsys.readouterr().out
    assert re.search("^ok +CLIP preprocessing: ", out, re.MULTILINE)
    assert re.search("^not checked +activation of openai/clip", out, re.MULTILINE)
    monkeypatch.setattr(doctor, "_PIXELS", -1)  # nothing is as exact as that
    bench("doctor", code=1)
    assert re.search("^WRONG +CLIP preprocessing: ", capsys.readouterr().out, re.MULTILINE)


def test_a_list_that_no_judge_is_for_ends_before_anything_is_generated(model, tmp_path, capsys):
    (tmp_path / "spatial_val.txt").write_text("a cat on a mat\n")
    given = ["--suite", "t2icompbench", "--source", tmp_path / "spatial_val.txt"]
    words = options(model, tmp_path / "out")
    words[words.index("--limit") + 1] = "1"
    bench("run", *words, *given, code=2)
    assert "'spatial' of T2I-CompBench is not supported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plugin_that_fails_is_one_line(model, tmp_path, capsys):
    (tmp_path / "judge.py").write_text("raise SystemExit('no weights')")
    words = options(model, tmp_path / "out")
    words[words.index("--limit") + 1] = "1"
    bench("generate", *words, "--ga-eval", "0", "--arms", "cfg", "--seeds", "0")
    capsys.readouterr()
    plugin = f"plugin={sys.executable} {tmp_path / 'judge.py'}"
    bench("score", "--out", tmp_path / "out", "--scorers", plugin, code=2)
    error = capsys.readouterr().err
    assert "no weights" in error and error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("generate --suite shape", "did you mean 'shapes'"),
        ("generate --preset xielab", "did you mean 'xielab-pick101'"),
        ("generate --shard 2/2", "a shard must be i/n"),
        ("generate --limit 1000000", "n must be"),
        ("generate --seeds 3,0,3", "seeds must be distinct"),
        ("generate --arms fst", "did you mean 'fast'"),
        ("generate --arms tap-fast,adapter-fast", "adapter=FOLDER"),
        ("run --scorers pikscore", "did you mean 'pickscore'"),
        ("score --scorers shapes=folder", "core2 bench generate"),
        ("report", "core2 bench generate"),
        ("export --layout geneval --to x", "core2 bench generate"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, given, message):
    command, *rest = given.split()
    if command in ("generate", "run"):
        rest += ["--model", str(model)]
    bench(command, *rest, "--out", tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert error.startswith("core2: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_of_a_run_names_its_options():
    own = GenerateConfig(limit=4, seeds=(0,), skip_nsfw=True, guidance_scale=3.1415927)
    assert command_line(RunConfig(own, Judging(("aes=tiny",)))) == (
        "core2 bench run --limit 4 --skip-nsfw --guidance-scale 3.1415927 --seeds 0 "
        "--scorers aes=tiny"
    )
