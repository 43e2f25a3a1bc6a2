"""Bad input ends in one clear line on stderr and exit code 2, before anything is loaded.

The model and head folders here hold no weights, so that anything that tried to load them would
fail with another message.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from core2_sampler.cli import COMMANDS, main
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import HEADS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and heads without weights: `model`, `tap`, `adapter` (scales 2 to 5), and wrong."""
    root = tmp_path_factory.mktemp("cli")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    tiny_flux_pipeline().save_pretrained(root / "flux")
    denoiser = pipe.family.denoiser(pipe)
    HEADS.get("tap").for_denoiser(denoiser).save_pretrained(root / "tap")
    adapter = HEADS.get("adapter").for_denoiser(denoiser, scale_range=(2.0, 5.0))
    adapter.save_pretrained(root / "adapter")
    for file in root.rglob("*.safetensors"):
        file.unlink()
    (root / "empty").mkdir()
    edited_copy(root / "tap" / "config.json", root / "sdxl-head", family="sdxl")
    edited_copy(root / "tap" / "config.json", root / "wide-head", latent_channels=16)
    edited_copy(root / "tap" / "config.json", root / "no-head", _class_name="UNet2DModel")
    shutil.copytree(root / "model", root / "video")
    edited_copy(root / "model/model_index.json", root / "video", _class_name="WanPipeline")
    (root / "file").write_text("x")
    (root / "nameless").mkdir()
    (root / "nameless/a.json").write_text("{}")
    (root / "nameless/a.png").touch()
    save_sdxl(root)
    driven = {"model": str(root / "model"), "guidance_scales": [3.0]}
    (root / "driven" / "rounds").mkdir(parents=True)
    (root / "driven" / "rounds" / "001.json").write_text(json.dumps(driven))
    return root


def save_sdxl(root: Path) -> None:
    """Write the configs of a model of 8 px to a latent, and of heads that do and do not pair."""
    pipe = tiny_sdxl_pipeline()
    pipe.save_config(root / "sdxl")
    pipe.unet.save_config(root / "sdxl/unet")
    pipe.vae.save_config(root / "sdxl/vae")
    edited_copy(root / "sdxl/vae/config.json", root / "sdxl/vae", block_out_channels=[8] * 4)
    denoiser = pipe.family.denoiser(pipe)
    HEADS.get("tap").for_denoiser(denoiser).save_config(root / "sdxl-tap")
    HEADS.get("cond").for_denoiser(denoiser).save_config(root / "sdxl-cond")


def edited_copy(file: Path, folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    content = json.loads(file.read_text()) | changes
    (folder / file.name).write_text(json.dumps(content))


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command line; return its error after checking its form."""
    with pytest.raises(SystemExit) as done:
        main(arguments)
    out, err = capsys.readouterr()
    assert done.value.code == 2
    assert out == ""
    assert err.startswith("core2: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def name_of(value: list[str] | str) -> str:
    return " ".join(value) if isinstance(value, list) else ""


GENERATE = [
    (["--mode", "fats"], "did you mean 'fast'?"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--steps", "x"], "steps must be an integer, got 'x'"),
    (["--stepz", "3"], "--stepz"),
    (["stepz=3"], "did you mean 'steps'?"),
    (["--mode", "core", "--slow-steps", "7", "--steps", "6"], "number of steps (6), got 7"),
    (["--mode", "core", "--slow-steps", "1.5"], "must lie in 0..1, got 1.5"),
    (["--slow-steps", "0,9", "--steps", "6"], "ints in 0..5, got [0, 9]"),
    (["--mode", "cfg", "--slow-steps", "2"], "slow_steps has no effect in mode 'cfg'"),
    (["--mode", "cond", "--guidance-scale", "3"], "guidance_scale has no effect in mode 'cond'"),
    (["--guidance-scale", "0.5"], "guidance_scale must be at least 1, got 0.5"),
    (["--width", "-64"], "width must be at least 1, got -64"),
    (["--width", "17"], "width must be a multiple of 4 from 4 to 32"),
    (["--height", "64"], "height must be a multiple of 4 from 4 to 32"),
    (["--num-images", "0"], "num_images must be at least 1, got 0"),
    (["--seed", "-1"], "seed must be at least 0, got -1"),
    (["--model", "{0}/nowhere"], "{0}/nowhere"),
    (["--model", "shapes-sd4"], "did you mean 'shapes-sd3'?"),
    (["--model", "{0}/empty"], "model_index.json"),
    (["--model", "{0}/video"], "WanPipeline"),
    (["--model", "{0}/file"], "{0}/file"),
    ([], "needs a weak head"),
    (["--head", "{0}/nowhere"], "head must be a folder that exists, a hub id owner/name or one"),
    (["--head", "{0}/empty"], "is not a weak head: it has no config.json"),
    (["--head", "{0}/no-head"], "is not a weak head: its class must be one of"),
    (["--head", "{0}/sdxl-head"], "head must have the family 'sd3'"),
    (["--head", "{0}/wide-head"], "head must have the latent_channels 4"),
    (["--head", "{0}/adapter", "--guidance-scale", "9"], "must be from 2 to 5"),
    (["--model", "{0}/flux"], "guidance_scale must be given for {0}/flux"),
    (["--model", "{0}/flux", "--mode", "cfg"], "guidance_scale must be given for {0}/flux"),
    (
        ["--model", "{0}/sdxl", "--head", "{0}/sdxl-tap", "--height", "72"],
        "height and width must be multiples of 16 for the head {0}/sdxl-tap, got 72 and 64",
    ),
    (["--head", "{0}/tap", "--mode", "cfg"], "head has no effect in mode 'cfg'"),
    (["--head", "{0}/tap", "--negative-prompt", "x"], "negative_prompt has no effect"),
    (["--head", "{0}/tap", "--w2s-scale", "2"], "w2s_scale has no effect without slow steps"),
    (["--head", "{0}/tap", "--device", "cuda:99"], "device must be one of this machine"),
    (["--head", "{0}/tap", "--device", "gpu"], "device must be one of this machine, got 'gpu'"),
    (["--head", "{0}/tap", "--output", "{0}/file"], "output must be a folder, got the file"),
    (["--mode", "cfg", "--output", "{0}/file/x"], "got {0}/file/x: {0}/file is not a folder"),
    (["--mode", "cfg", "--compare"], "--compare sets CFG beside another mode"),
    (["--config", "nowhere.yaml"], "unknown recipe: got 'nowhere.yaml'"),
    (["--dtype", "int8"], "unknown dtype: got 'int8'"),
]


@pytest.mark.parametrize(("arguments", "text"), GENERATE, ids=name_of)
def test_generate(
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    text: str,
):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(folders) for argument in arguments]
    model = [] if "--model" in given else ["--model", str(folders / "model")]
    error = error_of(["generate", "a star", *model, *given], capsys)
    assert text.format(folders) in error
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_needed(capsys: pytest.CaptureFixture[str]):
    assert "prompts must be given" in error_of(["generate"], capsys)
    assert "must have words" in error_of(["generate", "  "], capsys)


OTHERS = [
    (["collect"], "output must be given"),
    (["collect", "-o", "{0}/x", "--model", "{0}/empty"], "model_index.json"),
    (["collect", "-o", "{0}/x", "--model", "{0}/model", "--prompts", "{0}/none"], "text file"),
    (["collect", "-o", "{0}/x", "--model", "{0}/model", "--num-prompts", "0"], "at least 1, got 0"),
    (["collect", "-o", "{0}/x", "--model", "{0}/model", "--round", "1"], "any later one by a head"),
    (["collect", "-o", "{0}/x", "--model", "{0}/model", "--head", "{0}/tap"], "round 0 is driven"),
    (
        ["collect", "-o", "{0}/x", "--model", "{0}/model", "--head", "{0}/sdxl-head", "round=1"],
        "head must have the family 'sd3'",
    ),
    (["collect", "-o", "{0}/file", "--model", "{0}/model"], "output must be a folder"),
    (["reflect", "-o", "{0}/h"], "either steps or minutes must be given"),
    (["reflect", "-o", "{0}/h", "--steps", "1"], "either --data FOLDER or --online"),
    (["reflect", "-o", "{0}/h", "--steps", "1", "--data", "{0}/empty"], "`core2 collect` filled"),
    (
        ["reflect", "-o", "{0}/h", "--steps", "1", "--online", "--head", "tap", "--rank", "4"],
        "rank is an option of the adapter, got head 'tap'",
    ),
    (
        ["reflect", "-o", "{0}/h", "--steps", "1", "--online", "--scale-range", "5,2"],
        "scale_range must be two rising scales above 1, got (5.0, 2.0)",
    ),
    (["reflect", "-o", "{0}/h", "--steps", "1", "--online", "--head", "tab"], "'tap'"),
    (
        ["reflect", "-o", "{0}/h", "--steps", "1", "--data", "{0}/driven", "--rounds", "1"],
        "rounds must go on from round 0, got only [1] in {0}/driven",
    ),
    (["shapes", "train", "--part", "unet", "--minutes", "1"], "unknown part: got 'unet'"),
    (["shapes", "train", "--part", "vae", "--minutes", "0"], "minutes must be at least"),
    (["shapes", "train", "--part", "sd3", "--minutes", "1", "--out", "{0}/empty"], "must exist"),
    (
        ["shapes", "train", "--part", "vae", "--minutes", "1", "--out", "{0}/file/x"],
        "{0}/file is not a folder",
    ),
    (["shapes", "render", "-o", "{0}/file/x"], "{0}/file is not a folder"),
    (["shapes", "judge", "{0}/nameless"], "must be a caption of Shapes, got None in {0}/nameless"),
    (["shapes", "average", "{0}/model"], "out must be given"),
    (["shapes", "average", "{0}/model", "--out", "{0}/file/x"], "must be a folder, got the file"),
    (["bench", "sweep", "--out", "{0}/file/x.md"], "the folder of out must be a folder, got the"),
    (["bench", "knee", "--out", "{0}/file/x/y.md"], "{0}/file is not a folder"),
    (["bench", "generate", "--out", "{0}/file/x"], "{0}/file is not a folder"),
    (["bench", "run", "--out", "{0}/file/x"], "{0}/file is not a folder"),
    (["shapes", "render", "-n", "0"], "num_images must be at least 1, got 0"),
    (["shapes", "judge", "{0}/empty"], "a folder must hold PNG files with their JSON"),
    (["shapes", "ship", "{0}/empty"], "a pipeline or the CLIP pair, got {0}/empty"),
    (["shapes", "paint"], "paint"),
    (["genrate"], "'generate'"),
]


@pytest.mark.parametrize(("arguments", "text"), OTHERS, ids=name_of)
def test_other_commands(
    folders: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
):
    error = error_of([argument.format(folders) for argument in arguments], capsys)
    assert text.format(folders) in error


def test_a_damaged_config_file_is_named(folders: Path, capsys: pytest.CaptureFixture[str]):
    damaged = folders / "damaged"
    shutil.copytree(folders / "model", damaged, dirs_exist_ok=True)
    (damaged / "vae/config.json").write_text("{")
    error = error_of(["generate", "a", "--model", str(damaged), "--mode", "cfg"], capsys)
    assert "damaged/vae/config.json must be a JSON file" in error


def test_a_hub_that_cannot_be_reached_is_named_soon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Nobody listens at this address; a download would try for 23 s of waiting alone."""
    address = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    began = time.monotonic()
    error = error_of(["generate", "a", "--model", "owner/model", "--mode", "cfg"], capsys)
    assert time.monotonic() - began < 10
    assert "owner/model is no folder and not in the local cache, and the hub could not" in error


def test_statistics_without_scipy_name_their_extra(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("study", "stats"):
        monkeypatch.delitem(sys.modules, f"core2_sampler.benchmarks.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    error = error_of(["bench", "sweep", "--model", str(folders / "model")], capsys)
    assert "need scipy: pip install 'core2-sampler[bench]'" in error


@pytest.mark.parametrize(
    ("broken", "code", "text"),
    [
        ("weights", 1, "latents must stay finite, got nan or inf after step 0 of 2"),
        ("scheduler", 2, "prediction_type"),
    ],
)
def test_what_a_pipeline_refuses_or_fails_on_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str, code: int, text: str
):
    pipe = tiny_sdxl_pipeline(**{"prediction_type": "sample"} if broken == "scheduler" else {})
    if broken == "weights":
        torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.nan)
    pipe.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(
            ["generate", "a", "--model", str(tmp_path / "model"), "--mode", "cfg", "--steps", "2"]
            + ["-o", str(tmp_path / "out")]
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("core2: error: ")
    assert text in error
    assert done.value.code == code


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_exists(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "Usage: " + " ".join(["core2", *command]) in out


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("generate", ["[PROMPT]..."]),
        ("collect", ["--output"]),
        ("shapes train", ["--part", "--minu"]),
    ],
)
def test_help_marks_what_must_be_given(
    command: str, required: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert out.count("(required)") == len(required)
    for name in required:  # between its own name and the next option's
        assert "(required)" in out.rpartition(name)[2].split(" --")[0], name


def test_help_of_generate_names_every_choice(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    words = capsys.readouterr().out.split()
    for choice in ("fast:", "balanced:", "quality:", "core:", "cfg:", "cond:", "fp32,", "bf16"):
        assert choice in words or choice + ";" in words, choice
