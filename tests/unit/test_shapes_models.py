"""The shipped weights of the Shapes world: stock folders, small, and good at what they are for."""

import hashlib

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from core2_sampler import CoRe2Pipeline
from core2_sampler.model_files import EMBEDDED
from core2_sampler.nfe import count_nfe
from core2_sampler.shapes import MODELS, model_path
from core2_sampler.shapes.batches import to_pixels
from core2_sampler.shapes.judge import judge
from core2_sampler.shapes.render import render
from core2_sampler.shapes.world import held_out_prompts

PROMPTS = held_out_prompts(60)
STOCK = {
    "sd3": StableDiffusion3Pipeline,
    "sdxl": StableDiffusionXLPipeline,
    "flux": FluxPipeline,
}
CALL = {"num_inference_steps": 2, "output_type": "pt"}
CALLS = {
    "sd3": CALL | {"max_sequence_length": 16},
    "sdxl": CALL,
    "flux": CALL | {"max_sequence_length": 16, "height": 64, "width": 64},
}


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    arrays = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def test_a_model_that_is_not_shipped_is_refused():
    with pytest.raises(ValueError, match="model must be one of clip, .*sd3, .*got 'sd4'"):
        model_path("sd4")


def test_the_weights_are_small_and_hold_no_pickle():
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    contents = {hashlib.sha256(path.read_bytes()).digest(): path for path in files}
    assert sum(path.stat().st_size for path in contents.values()) < 40e6  # a wheel has no links
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".png"}


@pytest.mark.parametrize("family", EMBEDDED.values())
def test_the_stock_class_loads_the_folder_and_ours_gives_its_image(family):
    images = []
    for cls in (STOCK[family], CoRe2Pipeline):
        pipe = cls.from_pretrained(model_path(family))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(PROMPTS[0].text, generator=generator, **CALLS[family]).images)
    assert torch.equal(*images)


@pytest.mark.parametrize("family", EMBEDDED.values())
def test_fast_costs_one_pass_a_step(family):
    pipe = CoRe2Pipeline.from_pretrained(model_path(family))
    pipe.set_progress_bar_config(disable=True)
    scale = {pipe.family.scale_argument: 4.5}
    with count_nfe(pipe.family.denoiser(pipe).module) as counter:
        pipe(PROMPTS[0].text, core2="fast", **scale, **CALLS[family])
    assert counter.per_sample(1) == pipe.core2_plan.nfe == CALL["num_inference_steps"]


@torch.no_grad()
def test_the_judge_accepts_what_the_vae_restores():
    vae = AutoencoderKL.from_pretrained(model_path("sd3") / "vae")
    pixels = to_pixels([render(prompt, 5) for prompt in PROMPTS])
    restored = to_images(vae.decode(vae.encode(pixels).latent_dist.mean).sample)
    right = [judge(image, prompt).correct for image, prompt in zip(restored, PROMPTS, strict=True)]
    assert sum(right) / len(right) >= 0.95


@torch.no_grad()
def test_clip_knows_the_caption_of_an_image():
    clip = CLIPModel.from_pretrained(model_path("clip"), dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(model_path("clip"))
    texts = [prompt.text for prompt in PROMPTS]
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    logits = clip(ids, to_pixels([render(prompt, 5) for prompt in PROMPTS])).logits_per_image
    contents = [prompt.content for prompt in PROMPTS]
    best = [contents[int(i)] for i in logits.argmax(1)]
    right = sum(a == b for a, b in zip(best, contents, strict=True)) / len(contents)
    assert right > 0.4  # chance is about 0.04
