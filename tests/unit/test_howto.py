"""Every page of docs/howto, run from top to bottom on tiny models of the same classes.

Truth: the assertions on the pages. docs/howto/README.md lists what is replaced.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from core2_sampler.attachment.networks import find_networks
from core2_sampler.cli import main
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads import HEADS
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.tap import TapHead

pytestmark = pytest.mark.checkout

PAGES = Path(__file__).parents[2] / "docs" / "howto"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")
MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "diffusers/controlnet-canny-sdxl-1.0": "controlnet",
}
WORDS = {
    "cuda": "cpu",
    "1024": "16",
    "ReflectConfig(steps=20000)": "ReflectConfig(steps=2, batch_size=4)",
    "source(0.1)": "source(0.4)",
}
COMMANDS = {
    "--steps 30 --batch-size 4": "--steps 3 --batch-size 4",
    "--steps 20000": "--steps 2 --batch-size 4 --held-out-share 0.4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with all that the pages read."""
    root = tmp_path_factory.mktemp("howto")
    for name in ("StableDiffusionXLPipeline", "FluxPipeline"):
        pipe = STOCK[name].pipe()
        pipe.save_pretrained(root / name)
        network = find_networks(pipe)[0]
        TapHead.for_denoiser(network.denoiser).save_pretrained(root / "heads" / network.family)
        if network.family == "sdxl":
            adapter = AdapterHead.for_denoiser(network.denoiser, scale_range=(2.0, 7.0))
            adapter.save_pretrained(root / "heads" / "adapter")
    STOCK["StableDiffusionXLControlNetPipeline"].pipe().controlnet.save_pretrained(
        root / "controlnet"
    )
    for name in ("start", "mask", "edges"):
        Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(root / f"{name}.png")
    (root / "prompts.txt").write_text("\n".join(f"{c} ring" for c in "abcdef"))
    unet = STOCK["StableDiffusionXLPipeline"].pipe().unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        root / "loras" / "style", unet_lora_layers=get_peft_model_state_dict(unet)
    )
    return root


def replaced(text, folder, table):
    for old, new in table.items():
        text = text.replace(old, new)
    for old, new in MODELS.items():
        text = text.replace(old, str(folder / new))
    return text


def run_command(line):
    with pytest.raises(SystemExit) as done:
        main(shlex.split(line)[1:])
    assert done.value.code == 0, line


@pytest.mark.parametrize("name", NAMES)
def test_a_page_does_what_it_says(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(HEADS, "_entries", dict(HEADS._entries))
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert any(kind == "python" for kind, _ in blocks)
    scope = {"__name__": f"howto_{name}"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what a user draws without a generator
        for kind, code in blocks:
            if kind == "bash":
                model = str(folder / "StableDiffusionXLPipeline")
                run_command(replaced(code, folder, {"owner/my-sdxl": model, **COMMANDS}))
            else:
                exec(compile(replaced(code, folder, WORDS), f"{name}.md", "exec"), scope)


def test_the_list_names_every_page_and_every_word_that_is_replaced():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([\w-]+)\.md\) \|", text) and set(
        re.findall(r"\(([\w-]+)\.md\) \|", text)
    ) == set(NAMES)
    for word in (*MODELS, *WORDS, *COMMANDS):
        assert f"`{word}`" in text, word


def test_the_tests_that_pages_name_exist():
    here = Path(__file__).parent
    for name in NAMES:
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        for file, test in re.findall(r"`(\w+\.py)::(\w+)`", page):
            assert f"\ndef {test}(" in (here / file).read_text(encoding="utf-8"), test
