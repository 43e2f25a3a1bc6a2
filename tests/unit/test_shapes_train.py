"""Training of the Shapes networks: batches, text encoding, and the chain of parts."""

import json
import random
import re
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from core2_sampler.shapes import batches, denoising, model_path, models, train
from core2_sampler.shapes.batches import LONG_SHARE, LONG_TOKENS
from core2_sampler.shapes.denoising import RECIPES, Probed
from core2_sampler.shapes.lessons import VaeLesson
from core2_sampler.shapes.probes import NOT_ASKED, WordProbe, word_answers
from core2_sampler.shapes.render import LABELS, render
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer, words
from core2_sampler.shapes.world import Object, Prompt, held_out_prompts

TEXTS = ["a red star left of a blue ring", "three black crosses", ""]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The chain of CONTRIBUTING in a fraction of a second a part, and the last line of each."""
    folder, lines = tmp_path_factory.mktemp("parts"), {}
    for part in train.PARTS:
        train.train(part, folder, 1e-4, log=partial(lines.__setitem__, part))
    return folder, lines


@pytest.fixture(scope="module")
def parts(chain):
    """The folder of that chain: untrained, but real."""
    return chain[0]


def figures(line):
    """Return what a closing line says of held-out captions."""
    said = line.partition("on held-out captions ")[2].partition(";")[0]
    return {name: float(value) for name, value in (each.split() for each in said.split(", "))}


def test_a_part_ends_with_what_it_can_do(chain):
    folder, lines = chain
    named = {"vae": {"psnr", "accepted"}, "clip": {"top1"}, "t5": {"own", "relation", "other"}}
    for part, line in lines.items():
        assert re.match(rf"{part}: \d+ steps in \d+\.\d minutes, on held-out captions", line)
        assert figures(line).keys() == named.get(part, {"error"})
        saved = line.rpartition("saved in ")[2]
        assert (folder / saved).is_dir()
    again = []
    train.train("vae", folder, 1e-4, log=again.append)  # it is finished: nothing is trained
    assert again[-1] == lines["vae"]


@torch.no_grad()
def test_the_closing_line_of_the_vae_is_that_of_its_files(chain):
    """PSNR by its formula, in numpy, on renders of the prompts that are kept for choosing."""
    folder, lines = chain
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    prompts = held_out_prompts(64, "val")
    images = np.stack([np.asarray(render(p, i), np.float64) for i, p in enumerate(prompts)]) / 255
    x = torch.from_numpy(2 * images - 1).permute(0, 3, 1, 2).float()
    restored = vae.decode(vae.encode(x).latent_dist.mean).sample.permute(0, 2, 3, 1)
    error = np.square(np.clip(restored.double().numpy() / 2 + 0.5, 0, 1) - images)
    psnr = -10 * np.log10(error.mean((1, 2, 3))).mean()
    assert figures(lines["vae"])["psnr"] == pytest.approx(psnr, abs=0.05)  # weights in half


def test_the_shipped_autoencoder_does_what_contributing_says():
    """36.4 dB, and the judge accepts 300 of 300 reconstructions."""
    vae = AutoencoderKL.from_pretrained(model_path("sd3") / "vae").float()
    found = VaeLesson(vae).report()
    assert found["accepted"] == 1
    assert found["psnr"] == pytest.approx(36.4, abs=0.5)


def test_the_probe_of_words_counts_what_is_right():
    probe = WordProbe(8)
    torch.nn.init.zeros_(probe.read.weight)
    fields = (6, 7, 3, 6, 7, 7)
    answers = word_answers(BINDING, 16, begin=0, causal=False)
    guesses = [STAR[0], RING[1], STAR[2], 0, 0, 0]  # the same of every word
    hot = [torch.eye(size)[guess] for size, guess in zip(fields, guesses, strict=True)]
    probe.read.bias.data = torch.cat(hot)
    right = probe.right(torch.randn(2, 16, 8), answers.expand(2, -1, -1))
    star, ring = 9 / 11, 2 / 11  # of the words asked; the star's color has 9, the ring's 2
    wanted = [star, ring, 1, 0, 0, star]
    torch.testing.assert_close(right, torch.tensor(wanted))


def test_the_report_of_a_denoiser_is_its_error_on_noised_images(parts):
    """A network that answers zero errs by all of the velocity: noise - x0, both of them known."""
    vae = AutoencoderKL.from_pretrained(parts / "vae").float()
    encode = batches.TextEncoders.load(parts, torch.device("cpu"))
    silent = replace(RECIPES["sd3"], call=lambda network, x, time, captions: torch.zeros_like(x))
    report = denoising.denoiser_report(silent, torch.nn.Identity(), vae, encode)
    pixels = batches.sample_scenes(0, held_out_prompts(64, "val"))[0]
    latents = batches.to_latents(vae, pixels)
    wanted = 1 + float(latents.square().mean())
    assert report()["error"] == pytest.approx(wanted, rel=0.02)
    assert report() == report()


def test_the_parts_are_a_stock_pipeline(parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(parts / "sd3")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(TEXTS[0], num_inference_steps=1, max_sequence_length=MAX_TOKENS, output_type="pt")
    assert out.images.shape == (1, 3, 64, 64)
    for path in (parts / "sd3").rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        assert not config.keys() & {"_name_or_path", "is_local"}, path


@pytest.mark.parametrize("family", RECIPES)
@torch.no_grad()
def test_the_network_is_asked_as_the_stock_pipeline_asks_it(parts, family):
    """The stock call's own inputs, caught at the network, give the answer of training's call."""
    pipe = DiffusionPipeline.from_pretrained(parts / family)
    pipe.set_progress_bar_config(disable=True)
    recipe = RECIPES[family]
    network = getattr(pipe, recipe.folder)
    stir(network)
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(dict(zip(("sample", "timestep"), args, strict=False)) | kwargs, out=output[0])

    network.register_forward_hook(keep, with_kwargs=True)
    options = {} if family == "sdxl" else {"max_sequence_length": MAX_TOKENS}
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x = FluxPipeline._pack_latents(latents, 3, 4, 16, 16) if family == "flux" else latents
    if family != "flux":
        options["guidance_scale"] = 1.0
    pipe(
        TEXTS,
        height=64,
        width=64,
        num_inference_steps=2,
        latents=x,
        output_type="latent",
        **options,
    )
    encoded = batches.TextEncoders.load(parts, torch.device("cpu"))(TEXTS, MAX_TOKENS)
    given = seen["sample"] if family == "sdxl" else seen["hidden_states"]
    if family == "flux":
        given = FluxPipeline._unpack_latents(given, 16, 16, vae_scale_factor=1)
    time = torch.as_tensor(seen["timestep"]).float().expand(3) * (1000 if family == "flux" else 1)
    answer = recipe.call(network, given, time, encoded)
    if family == "flux":
        answer = FluxPipeline._pack_latents(answer, 3, 4, 16, 16)
    torch.testing.assert_close(answer, seen["out"], atol=1e-4, rtol=1e-4)
    assert float(seen["out"].std()) > 1e-3


def stir(network):
    """Fill the weights that start at zero, so that every input is heard."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_long_prompts_are_encoded_too(parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(parts / "sd3")
    encode = batches.TextEncoders.load(parts, torch.device("cpu"))
    wanted = pipe.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=LONG_TOKENS
    )[0]
    torch.testing.assert_close(encode(TEXTS, LONG_TOKENS).t5, wanted[:, MAX_TOKENS:])


def test_training_batches_are_functions_of_the_step(parts):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    banks = [batches.LatentBank(vae, size=24, batch=8) for _ in range(2)]
    first = [banks[0].draw(step, 5) for step in range(3)]
    again = banks[1].draw(2, 5)  # as after a resume: steps 0 and 1 never drawn
    torch.testing.assert_close(again.latents, first[2].latents)
    assert torch.equal(again.labels, first[2].labels) and again.texts == first[2].texts
    side = models.LATENT_SIZE
    assert again.latents.shape == (5, models.LATENT_CHANNELS, side, side)
    assert again.labels.shape == (5, side, side)
    other = batches.LatentBank(vae, size=24, batch=8, seed="of another stage").draw(2, 5)
    assert other.texts != again.texts


def test_the_probe_is_the_cross_entropy_of_the_shares_of_a_patch():
    network = models.build_sd3()
    probed = Probed(network, *RECIPES["sd3"].probed)
    last = probed.patches.read[-1]
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.linspace(-1, 1, LABELS)
    encoded = batches.Encoded(
        torch.zeros(1, 16, 128), torch.zeros(1, 128), torch.zeros(1, 128), torch.zeros(1, 16, 256)
    )
    RECIPES["sd3"].call(network, torch.zeros(1, 4, 16, 16), torch.ones(1), encoded)
    labels = torch.zeros(1, 16, 16, dtype=torch.uint8)
    labels[:, ::2, ::2] = 7  # a quarter of every 2x2 patch
    chances = last.bias.exp() / last.bias.exp().sum()
    wanted = -(0.75 * chances[0].log() + 0.25 * chances[7].log())
    torch.testing.assert_close(probed.named(labels), wanted)


BINDING = Prompt("position", (Object("star", "red"), Object("ring")), "left of", "a photo of ")
STAR, RING = [3, 1, 0, 2, 5, 0], [4, 0, 0, 3, 4, 1]  # own shape, color, number; link; the other's


def test_every_word_of_an_object_answers_for_it():
    answers = word_answers(BINDING, 16, begin=0, causal=False)
    text = BINDING.text.split()  # a photo of a red star left of a ring
    assert [text[i] for i in range(10) if answers[i].tolist() == STAR] == ["a", "red", "star"]
    assert [text[i] for i in range(10) if answers[i].tolist() == RING] == ["a", "ring"]
    assert (answers[[0, 1, 2, 6, 7]] == NOT_ASKED).all()
    assert answers[10:].tolist() == [STAR] * 6  # end and padding: the whole caption


def test_a_causal_encoder_is_asked_what_it_has_read():
    answers = word_answers(BINDING, MAX_TOKENS, begin=1, causal=True)
    ids = build_tokenizer()(BINDING.text, padding="max_length").input_ids
    assert len(ids) == MAX_TOKENS and ids[11] == build_tokenizer().eos_token_id
    assert answers[6].tolist() == [*STAR[:3], *[NOT_ASKED] * 3]  # the second is not read yet
    assert answers[10].tolist() == RING and answers[11:].tolist() == [STAR] * 5
    assert (answers[[0, 1, 2, 3, 4, 5, 7, 8, 9]] == NOT_ASKED).all()


def test_the_probe_of_words_leaves_out_what_is_not_asked():
    probe = WordProbe(8)
    torch.nn.init.zeros_(probe.read.weight)
    torch.nn.init.zeros_(probe.read.bias)
    answers = word_answers(BINDING, 16, begin=0, causal=False)[None]
    wanted = torch.tensor([6, 7, 3, 6, 7, 7]).log().sum()  # uniform guesses
    torch.testing.assert_close(probe(torch.randn(1, 16, 8), answers), wanted)


def test_latents_have_unit_scale_after_training_the_vae(parts):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    pixels, _ = batches.sample_scenes(5, batches.sample_prompts("test", 5, 64))
    std = vae.encode(pixels).latent_dist.mean.std() * vae.config.scaling_factor
    assert 0.8 < float(std.detach()) < 1.25


def test_long_prompts_are_a_small_share_of_the_steps():
    lengths = [batches.text_length(step) for step in range(2000)]
    assert set(lengths) == {MAX_TOKENS, LONG_TOKENS}
    assert lengths.count(LONG_TOKENS) / 2000 == pytest.approx(LONG_SHARE, abs=0.02)


def test_captions_are_wrong_or_missing_now_and_then():
    captions = [f"caption {i}" for i in range(20_000)]
    read = denoising.as_read(captions, random.Random(0))
    empty = [text == "" for text in read]
    wrong = [text not in ("", own) for text, own in zip(read, captions, strict=True)]
    assert sum(empty) / 20_000 == pytest.approx(denoising.PROMPT_DROPOUT, abs=0.01)
    kept = denoising.WRONG_CAPTIONS * (1 - denoising.PROMPT_DROPOUT)
    assert sum(wrong) / 20_000 == pytest.approx(kept, abs=0.01)
    assert set(read) <= {"", *captions}


def test_an_error_of_the_noise_weighs_as_that_of_the_velocity():
    x0 = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    config = models.sdxl_scheduler().config
    scheduler = DDPMScheduler.from_config(config, clip_sample=False)
    noised = denoising.noised(scheduler.alphas_cumprod, x0, torch.Generator().manual_seed(1))
    guess = noised.target + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    # The guess as a velocity, by way of diffusers' own x0 of it.
    steps = zip(guess, noised.time, noised.x, strict=True)
    clean = torch.stack([scheduler.step(e, t, x).pred_original_sample for e, t, x in steps])
    velocity = scheduler.get_velocity(clean, guess, noised.time)
    wanted = (velocity - scheduler.get_velocity(x0, noised.target, noised.time)).square()
    error = noised.weight * (guess - noised.target).square()
    torch.testing.assert_close(error, wanted, rtol=1e-2, atol=1e-4)


def test_every_word_is_one_t5_token():
    tokenizer = build_t5_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 2 for word in words())
    assert tokenizer.unk_token_id not in tokenizer("a zebra, 3!").input_ids


def test_training_starts_from_a_trained_pipeline(parts, tmp_path):
    first = SD3Transformer2DModel.from_pretrained(parts / "sd3" / "transformer")
    train.train("sd3", tmp_path, 1e-6, start=parts / "sd3", log=quiet)  # one step of warm-up
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "sd3" / "transformer")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-2)
    train.train("sd3", tmp_path, 1e-6, start=parts / "sd3", log=quiet)  # resumes, and is done
    weights = again.state_dict() | {"proj_out.bias": again.proj_out.bias.detach() + 1}
    again.load_state_dict(weights)
    again.save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(ValueError, match="checkpoint with other sd3.start"):
        train.train("sd3", tmp_path, 1e-6, start=tmp_path / "other", log=quiet)
    with pytest.raises(ValueError, match="must be a folder that exists, got .*none"):
        train.train("sd3", tmp_path, 1, start=tmp_path / "none")
    for part, start in (("sd3", tmp_path / "sd3"), ("vae", tmp_path)):
        with pytest.raises(ValueError, match=f"start must not be where {part} is saved"):
            train.train(part, tmp_path, 1, start=start)


def test_another_family_goes_on_beside_the_encoders_of_sd3(parts, tmp_path):
    with pytest.raises(ValueError, match="SD3 pipeline, got .*sdxl: or put vae of one into"):
        train.train("sdxl", tmp_path, 1, start=parts / "sdxl")
    first = UNet2DConditionModel.from_pretrained(parts / "sdxl" / "unet").state_dict()
    for name in ("vae", "text_encoder", "text_encoder_3"):
        shutil.copytree(parts / name, tmp_path / name)
    train.train("sdxl", tmp_path, 1e-6, start=parts / "sdxl", log=quiet)
    again = UNet2DConditionModel.from_pretrained(tmp_path / "sdxl" / "unet").state_dict()
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-2)


@pytest.mark.parametrize("part, network", [("t5", "text_encoder_3"), ("clip", "clip")])
def test_encoders_start_from_trained_ones(parts, tmp_path, part, network):
    train.train(part, tmp_path, 1e-6, start=parts, log=quiet)  # one step of warm-up
    before, after = (load_file(f / network / "model.safetensors") for f in (parts, tmp_path))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-2)


def test_parts_are_trained_in_order(tmp_path):
    with pytest.raises(
        ValueError, match="part must be one of vae, clip, t5, sd3, sdxl, flux, got 'unet'"
    ):
        train.train("unet", tmp_path, 1)
    with pytest.raises(ValueError, match="vae must exist: train vae, clip and t5 first"):
        train.train("sd3", tmp_path, 1)
