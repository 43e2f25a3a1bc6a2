"""Training of the Shapes networks: batches, text encoding, and the chain of parts."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

from core2_sampler.shapes import models, train
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, words

TEXTS = ["a red star left of a blue ring", "three black crosses", ""]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The chain of CONTRIBUTING in a fraction of a second a part: untrained, but real."""
    folder = tmp_path_factory.mktemp("parts")
    for part in train.PARTS:
        train.train(part, folder, 1e-4, log=quiet)
    return folder


def test_the_parts_are_a_stock_pipeline(parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(parts / "sd3")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(TEXTS[0], num_inference_steps=1, max_sequence_length=MAX_TOKENS, output_type="pt")
    assert out.images.shape == (1, 3, 64, 64)


def test_text_is_encoded_as_the_stock_pipeline_does(parts):
    pipe = StableDiffusion3Pipeline.from_pretrained(parts / "sd3")
    encode = train.TextEncoders.load(parts, torch.device("cpu"))
    for length in (MAX_TOKENS, train.LONG_TOKENS):
        embeds, pooled = encode(TEXTS, length)
        wanted, _, wanted_pooled, _ = pipe.encode_prompt(
            TEXTS,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        torch.testing.assert_close(embeds, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled, wanted_pooled, atol=1e-5, rtol=1e-5)


def test_training_batches_are_functions_of_the_step(parts):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    banks = [train.LatentBank(vae, size=24, batch=8) for _ in range(2)]
    first = [banks[0].draw(step, 5) for step in range(3)]
    latents, texts = banks[1].draw(2, 5)  # as after a resume: steps 0 and 1 never drawn
    torch.testing.assert_close(latents, first[2][0])
    assert texts == first[2][1]
    assert latents.shape == (5, models.LATENT_CHANNELS, models.LATENT_SIZE, models.LATENT_SIZE)


def test_latents_have_unit_scale_after_training_the_vae(parts):
    vae = AutoencoderKL.from_pretrained(parts / "vae")
    pixels = train.sample_images(5, train.sample_prompts("test", 5, 64))
    std = vae.encode(pixels).latent_dist.mean.std() * vae.config.scaling_factor
    assert 0.8 < float(std.detach()) < 1.25


def test_long_prompts_are_a_small_share_of_the_steps():
    lengths = [train.text_length(step) for step in range(2000)]
    assert set(lengths) == {MAX_TOKENS, train.LONG_TOKENS}
    assert lengths.count(train.LONG_TOKENS) / 2000 == pytest.approx(train.LONG_SHARE, abs=0.02)


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
    with pytest.raises(ValueError, match="left out for part 'vae'"):
        train.train("vae", tmp_path, 1, start=parts / "sd3")
    with pytest.raises(ValueError, match="must be a pipeline folder"):
        train.train("sd3", tmp_path, 1, start=tmp_path / "none")


def test_parts_are_trained_in_order(tmp_path):
    with pytest.raises(ValueError, match="part must be one of vae, clip, t5, sd3, got 'unet'"):
        train.train("unet", tmp_path, 1)
    with pytest.raises(ValueError, match="vae must exist: train vae, clip and t5 first"):
        train.train("sd3", tmp_path, 1)
