"""The web demo. Truth: the stock pipeline, ours called from Python, NFE by the table of modes."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageChops

from core2_sampler.cli import main
from core2_sampler.cli.images import grid
from core2_sampler.config import ConfigError
from core2_sampler.demo import MODES, Demo, build_page
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

PROMPT, STEPS, SCALE, SEED = "a star", 4, 3.0, 5


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A tiny model and a head with random weights, from their folders."""
    root = tmp_path_factory.mktemp("demo")
    pipe = tiny_sd3_pipeline()
    pipe.save_pretrained(root / "model")
    head = HEADS.get("tap").for_denoiser(pipe.family.denoiser(pipe))
    generator = torch.Generator().manual_seed(1)
    for parameter in head.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    head.save_pretrained(root / "tap")
    return Demo.load(str(root / "model"), str(root / "tap"), "cpu")


def expected(pipe: Any, **more: Any) -> Image.Image:
    """Draw as a user of diffusers would; small images are enlarged as everywhere."""
    generator = torch.Generator().manual_seed(SEED)
    return grid([pipe(PROMPT, num_inference_steps=STEPS, generator=generator, **more).images])


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def nfe(caption: str) -> str:
    mode_and_passes, seconds = caption.split(", ")
    assert float(seconds.removesuffix(" s")) >= 0
    return mode_and_passes


def test_both_images_are_those_of_the_pipelines(demo: Demo, global_random_state: None):
    options = {"steps": STEPS, "guidance_scale": SCALE, "seed": SEED, "slow_steps": ""}
    left, right = demo.draw(PROMPT, "fast", negative_prompt=None, **options)
    assert [nfe(left[1]), nfe(right[1])] == [f"cfg: NFE {2 * STEPS}", f"fast: NFE {STEPS}"]
    parts = demo.pipe.components
    del parts["weak_head"]
    stock = StableDiffusion3Pipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    cfg = expected(stock, guidance_scale=SCALE)
    fast = expected(demo.pipe, guidance_scale=SCALE, core2="fast")
    assert same(left[0], cfg)
    assert same(right[0], fast)
    assert not same(cfg, fast)


@pytest.mark.parametrize(
    ("mode", "slow_steps", "passes"),
    [
        ("core", "2", STEPS + 2),
        ("core", "0.25", STEPS + 1),
        ("quality", None, 2 * STEPS),
        ("zigzag", None, 5 * STEPS - 3),
        ("zcore", None, 5 * STEPS - 3),
        ("zfast", None, 3 * STEPS - 2),
        ("cond", None, STEPS),
    ],
)
def test_the_head_of_the_start_serves_the_modes_that_need_one(
    demo: Demo, mode: str, slow_steps: str | None, passes: int
):
    assert mode in MODES
    _, right = demo.draw(PROMPT, mode, steps=STEPS, slow_steps=slow_steps)
    assert nfe(right[1]) == f"{mode}: NFE {passes}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "a prompt must have words, got an empty one"),
        ({"mode": "fats"}, "unknown mode: got 'fats'; did you mean 'fast'"),
        ({"mode": "cfg"}, "--compare sets CFG beside another mode"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 3.7}, "steps must be an integer, got 3.7"),
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, got 0.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"mode": "zfast", "slow_steps": "2"}, "slow_steps has no effect in mode 'zfast'"),
        ({"mode": "core", "slow_steps": "9"}, "slow_steps must be"),
        ({"negative_prompt": "a ring"}, "negative_prompt has no effect in mode 'fast'"),
    ],
)
def test_bad_input_is_refused(demo: Demo, changes: dict[str, Any], message: str):
    asked = {"prompt": PROMPT, "mode": "fast", "steps": STEPS} | changes
    with pytest.raises(ConfigError) as error:
        demo.draw(**asked)
    assert str(error.value).startswith(message)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command; return its one line of error."""
    with pytest.raises(SystemExit) as done:
        main(["demo", *arguments])
    err = capsys.readouterr().err
    assert done.value.code == 2
    assert err.count("\n") == 1
    return err


def test_it_writes_nothing_so_no_output_folder_is_asked_for(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "out").write_text("in the place of generate's own folder")
    monkeypatch.chdir(tmp_path)
    assert len(demo.draw(PROMPT, "fast", steps=STEPS)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_gradio_the_extra_is_named_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "gradio", None)  # Python's way to say that there is none
    error = refused(["--model", "no-such-model", "--port", str(free_port())], capsys)
    assert "the demo needs gradio" in error
    assert "pip install 'core2-sampler[demo]'" in error


def test_a_port_in_use_is_refused_first(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(["--model", "no-such-model", "--port", str(port)], capsys)
    assert f"port must be free, got {port}" in error


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_the_page_draws_and_shows_errors(demo: Demo):
    pytest.importorskip("gradio")
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    page = build_page(demo)
    port = free_port()
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        asked = {"prompt": PROMPT, "steps": STEPS, "guidance_scale": SCALE, "seed": SEED}
        left, left_text, right, right_text = client.predict(**asked, api_name="/draw")
        assert [nfe(left_text), nfe(right_text)] == [f"cfg: NFE {2 * STEPS}", f"fast: NFE {STEPS}"]
        with Image.open(Path(left)) as cfg, Image.open(Path(right)) as fast:
            pairs = demo.draw(PROMPT, "fast", steps=STEPS, guidance_scale=SCALE, seed=SEED)
            assert same(cfg.convert("RGB"), pairs[0][0])
            assert same(fast.convert("RGB"), pairs[1][0])
        with pytest.raises(AppError, match="steps must be at least 1, got 0"):
            client.predict(**asked | {"steps": 0}, api_name="/draw")
    finally:
        page.close()
