"""``core2 generate`` as users run it, on tiny real pipelines. Truth: stock images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from core2_sampler.cli import main
from core2_sampler.cli.images import captioned, file_stem, grid
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.plan import Core2Config
from core2_sampler.scales import CallableScale
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

KEYS = {
    *("prompt", "seed", "model", "mode", "steps", "guidance_scale", "w2s_scale", "slow_steps"),
    *("nfe", "head", "seconds", "versions"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a tap and an adapter head with random weights, and a model with its own head."""
    root = tmp_path_factory.mktemp("generate")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(1)
    for name, options in (("tap", {}), ("adapter", {"scale_range": (2.0, 5.0)})):
        head = HEADS.get(name).for_denoiser(pipe.family.denoiser(pipe), **options)
        for parameter in head.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        head.save_pretrained(root / name)
    pipe.register_modules(weak_head=head)
    pipe.save_pretrained(root / "with-head")
    return root


def generate(folder: Path, *arguments: object, code: int = 0) -> list[dict[str, object]]:
    """Run the command; return the records in the order of their files."""
    with pytest.raises(SystemExit) as done:
        main(["generate", *map(str, arguments), "-o", str(folder)])
    assert done.value.code == code
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_images_records_and_grid(folders: Path, tmp_path: Path):
    model, head = folders / "model", folders / "tap"
    records = generate(
        tmp_path,
        *("a star", "two rings", "--model", model, "--head", head, "--guidance-scale", "3"),
        *("--steps", "4", "-n", "3", "--batch-size", "2", "--seed", "5"),
    )
    assert [(r["prompt"], r["seed"]) for r in records] == [
        (prompt, seed) for prompt in ("a star", "two rings") for seed in (5, 6, 7)
    ]
    for record, file in zip(records, sorted(tmp_path.glob("*-fast.png")), strict=True):
        assert record.keys() >= KEYS
        settings = ("mode", "steps", "guidance_scale", "slow_steps", "w2s_scale", "nfe", "head")
        assert [record[key] for key in settings] == ["fast", 4, 3.0, 0, None, 4, str(head)]
        assert record["versions"]["torch"] == torch.__version__
        assert record["seconds"] > 0
        with Image.open(file) as image:
            texts = image.text
            assert image.size == (16, 16)
        assert texts["prompt"] == record["prompt"]
        del texts["prompt"]
        loaded = {key: value for key, value in texts.items() if not isinstance(record[key], str)}
        assert {key: json.loads(value) for key, value in loaded.items()} == {
            key: value for key, value in record.items() if not isinstance(value, str)
        }
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (3 * 128 + 2 * 4, 2 * 128 + 4)


def test_compare_draws_stock_cfg_on_the_same_latents(folders: Path, tmp_path: Path):
    arguments = ["--model", folders / "model", "--head", folders / "adapter", "--steps", "4"]
    records = generate(tmp_path, "a star", *arguments, "guidance_scale=3.5", "--compare", "-n", "2")
    by_mode = {mode: [r for r in records if r["mode"] == mode] for mode in ("cfg", "fast")}
    assert [r["nfe"] for r in by_mode["cfg"]] == [8, 8]
    assert [r["nfe"] for r in by_mode["fast"]] == [4, 4]
    assert [r["head"] for r in by_mode["cfg"]] == [None, None]
    stock = StableDiffusion3Pipeline.from_pretrained(
        folders / "model", text_encoder_3=None, tokenizer_3=None
    )
    stock.set_progress_bar_config(disable=True)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        image = stock("a star", num_inference_steps=4, guidance_scale=3.5, generator=generator)
        drawn = pixels(tmp_path / f"a-star-seed{seed}-cfg.png")
        assert abs(drawn - np.asarray(image.images[0]).astype(int)).max() <= 1  # batch of 2 or 1
        assert abs(drawn - pixels(tmp_path / f"a-star-seed{seed}-fast.png")).max() > 3
    with Image.open(tmp_path / "compare.png") as sheet:
        assert sheet.width >= 4 * 128
        assert sheet.height == 128 + 24


def test_an_image_does_not_depend_on_its_batch_mates(folders: Path, tmp_path: Path):
    arguments = ["a star", "--model", folders / "model", "--head", folders / "tap", "--steps", "3"]
    generate(tmp_path / "many", *arguments, "-n", "3")
    generate(tmp_path / "one", *arguments, "--seed", "2")
    name = "a-star-seed2-fast.png"
    assert abs(pixels(tmp_path / "many" / name) - pixels(tmp_path / "one" / name)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--mode", "cond"], {"nfe": 8, "slow_steps": 0, "guidance_scale": 1.0, "head": None}),
        (["--mode", "cfg"], {"nfe": 16, "slow_steps": 8, "w2s_scale": 1.0, "head": None}),
        (["--mode", "balanced"], {"nfe": 10, "slow_steps": 2, "w2s_scale": 1.0}),
        (["--mode", "quality"], {"nfe": 24, "slow_steps": 8, "w2s_scale": 1.5}),
        (["--mode", "core", "--slow-steps", "0.5"], {"nfe": 16, "slow_steps": 4}),
        (["--mode", "core", "slow_steps=0,7"], {"nfe": 12, "slow_positions": [0, 7]}),
        (["--mode", "fast"], {"nfe": 8, "slow_steps": 0, "guidance_scale": 4.5}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_modes_on_a_model_with_a_head_of_its_own(
    folders: Path, tmp_path: Path, arguments: list[str], settings: dict[str, object]
):
    # an adapter works inside the denoiser: a slow step costs 3 passes, unless w2s_scale is 1
    model = folders / "with-head"
    expected = {"head": str(model / "weak_head"), **settings}
    [record] = generate(tmp_path, "a star", "--model", model, "--steps", "8", *arguments)
    assert {key: record[key] for key in expected} == expected


def test_an_online_scale_is_saved_with_its_images(folders: Path, tmp_path: Path):
    """Truth: the same images by a rule that replays the saved schedule."""
    pipe = tiny_sd3_pipeline()
    prompt, _ = pipe.family.encode(pipe, ["a star"])
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    for kind in ("alignment", "fidelity"):
        latents = torch.empty(1, 4, 8, 8)
        LatentEvaluator.for_model(kind, "sd3", latents, prompt, **sizes).save_pretrained(
            tmp_path / kind
        )
    evaluators = [str(tmp_path / kind) for kind in ("alignment", "fidelity")]
    out = tmp_path / "out"
    arguments = ["--scale-rule", "online", "--evaluators", ",".join(evaluators)]
    arguments += ["--candidates", "1,3,7.5", "--save-schedule", "--compare", "--device", "cpu"]
    generate(
        *(out, "a star", "--model", folders / "model", "--head", folders / "tap", "-n", "2"),
        *("--steps", "4", "--mode", "balanced", "--guidance-scale", "3", *arguments),
    )
    replayed = []
    for seed in (0, 1):
        stem = f"a-star-seed{seed}-balanced"
        record = json.loads((out / f"{stem}.json").read_text())
        schedule = json.loads((out / f"{stem}.schedule.json").read_text())
        assert record["schedule"] == schedule["schedule"]
        assert len(record["schedule"]) == 4 and set(record["schedule"]) <= {1.0, 3.0, 7.5}
        settings = ("scale_rule", "evaluators", "candidates", "guidance_scale", "nfe")
        assert [record[key] for key in settings] == ["online", evaluators, [1, 3, 7.5], None, 5]
        assert "</svg>" in (out / f"{stem}.schedule.svg").read_text()
        stock = json.loads((out / f"a-star-seed{seed}-cfg.json").read_text())
        assert (stock["guidance_scale"], stock["scale_rule"], stock["nfe"]) == (3.0, None, 8)
        replayed.append(record["schedule"])
    pipe.register_modules(weak_head=HEADS.get("tap").from_pretrained(folders / "tap"))
    rule = CallableScale(lambda pair: torch.tensor(replayed).T[pair.i])
    images = pipe(
        "a star",
        num_images_per_prompt=2,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        core2=Core2Config(slow_steps=1, w2s_scale=1.0, scale_rule=rule),
    ).images
    for seed, image in enumerate(images):
        drawn = pixels(out / f"a-star-seed{seed}-balanced.png")
        assert abs(drawn - np.asarray(image).astype(int)).max() <= 1


def test_a_static_rule_is_recorded_scale_by_scale(folders: Path, tmp_path: Path):
    arguments = ["--mode", "cfg", "--steps", "4", "--scale-rule", "list:5,3,1,1", "--save-schedule"]
    [record, saved] = generate(tmp_path, "a star", "--model", folders / "model", *arguments)
    assert record["schedule"] == saved["schedule"] == [5.0, 3.0, 1.0, 1.0]
    assert (record["scale_rule"], record["guidance_scale"], record["nfe"]) == (
        *("list:5,3,1,1", None),
        6,
    )


def test_a_config_file_and_overrides(folders: Path, tmp_path: Path):
    file = tmp_path / "draw.yaml"
    file.write_text(
        f"prompts: [a star]\nmodel: {folders / 'model'}\nmode: cfg\nsteps: 9\nseed: 3\n"
    )
    [record] = generate(tmp_path / "out", "--config", file, "--steps", "5", "steps=2", "height=8")
    settings = {key: record[key] for key in ("prompt", "mode", "steps", "seed", "height", "nfe")}
    expected = {"prompt": "a star", "mode": "cfg", "steps": 2, "seed": 3, "height": 8, "nfe": 4}
    assert settings == expected


def test_the_module_runs_as_the_command(folders: Path, tmp_path: Path):
    command = [sys.executable, "-m", "core2_sampler", "generate", "a star", "--mode", "cfg"]
    done = subprocess.run(
        [*command, "--model", folders / "model", "--steps", "1", "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    assert "grid.png" in done.stdout
    assert (tmp_path / "out" / "a-star-seed0-cfg.png").is_file()


def test_different_prompts_have_different_names():
    long = "a red star " * 12
    prompts = [
        "a star",
        "A star",
        "a star!",
        "一颗星",
        "一顆星",
        long,
        long + "x",
        "a-star",
        "?",
        "!",
    ]
    assert len({file_stem(prompt, 0, "fast") for prompt in prompts}) == len(prompts)
    assert file_stem("a star", 0, "fast") == "a-star-seed0-fast"
    assert all(len(file_stem(prompt, 0, "fast").encode()) < 200 for prompt in prompts)


def test_a_grid_keeps_its_images_in_order():
    colors = [["red", "lime"], ["blue"]]
    rows = [[Image.new("RGB", (64, 64), color) for color in row] for row in colors]
    sheet = grid(rows)
    assert sheet.size == (2 * 128 + 4, 2 * 128 + 4)
    assert [sheet.getpixel(at) for at in ((64, 64), (196, 64), (64, 196), (196, 196))] == [
        *((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
    ]
    both = captioned([sheet, sheet], ["left", "right"])
    assert both.height == sheet.height + 24
    assert np.asarray(both)[:24].min() < 100  # the captions are there
