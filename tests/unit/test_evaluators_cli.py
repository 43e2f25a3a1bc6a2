"""``core2 evaluators train`` on the embedded model. Truth: the renderer and the judge of Shapes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from core2_sampler.benchmarks.scorers.shapes import demand
from core2_sampler.cli import evaluator_data
from core2_sampler.cli.evaluator_data import ShapesImages, encode_pixels, rank, says
from core2_sampler.cli.evaluators import app, read_captions
from core2_sampler.cli.loading import load_model
from core2_sampler.config import ConfigError
from core2_sampler.evaluators import load_evaluator, shipped
from core2_sampler.evaluators.images import Finals
from core2_sampler.evaluators.kinds import KINDS, edits
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.evaluators.pairs import EditPairs
from core2_sampler.fitting import find_fitting_evaluator
from core2_sampler.model_files import find_model
from core2_sampler.shapes.batches import sample_scenes
from core2_sampler.shapes.world import held_out_prompts
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.trajectory import Record
from core2_sampler.types import Conditioning


def call(*args):
    return app(args=list(args), standalone_mode=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["algnment"], "did you mean 'alignment'"),
        (["fidelity"], "data must be given for fidelity and preference"),
        (["alignment", "--data", "somewhere"], "data must be given for fidelity and preference"),
        (["numeracy", "--scorers", "shapes"], "scorers has no effect for numeracy; leave it out"),
        (["preference", "--data", "a", "--images", "b"], "images has no effect for preference"),
        (["alignment", "--held-out-share", "0.1"], "has no effect for alignment on rendered"),
        (["alignment", "numeracy"], "one kind of evaluator, got alignment, numeracy"),
        (["alignment", "--model", "shapes-sd4"], "unknown model"),
    ],
)
def test_bad_input_is_refused_before_any_model_loads(args, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        call("train", *args, "--steps", "2", "-o", str(tmp_path / "out"))


def test_an_evaluator_is_trained_and_saved_with_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator_data, "_VAL_PROMPTS", 40)
    monkeypatch.setattr(evaluator_data, "_BANK", (64, 16))
    out = tmp_path / "numeracy"
    small = ["--steps", "2", "--width", "64", "--num-layers", "1", "--batch-size", "32"]
    call("train", "numeracy", *small, "--evaluations", "1", "--device", "cpu", "-o", str(out))
    evaluator = load_evaluator(out, family="sd3")
    assert evaluator.config.patch_size == 2  # 16 x 16 latents
    card = json.loads((out / "card.json").read_text())
    assert (
        card["steps"] == 2 and card["model"] == "shapes-sd3" and 0 < card["held_out_accuracy"] < 1
    )
    with pytest.raises(ConfigError, match="resume with its own settings, got .* other kind in"):
        call("train", "attribute", *small, "--evaluations", "1", "--device", "cpu", "-o", str(out))
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "shipped")
    call("ship", str(out))
    found = shipped.find_evaluator("shapes-numeracy", "sd3")
    assert json.loads((found / "card.json").read_text()) == card
    assert load_evaluator(found, "sd3").config.patch_size == 2
    with pytest.raises(ConfigError, match="folder that `core2 evaluators train` wrote"):
        call("ship", str(tmp_path))


@pytest.fixture(scope="module")
def pipe():
    return load_model(find_model("shapes-sd3"), "cpu", "fp32")


def test_latents_are_the_inverse_of_decoding_and_scorers_tell_right_from_wrong(pipe):
    prompts = held_out_prompts(12, "val")
    pixels, _ = sample_scenes(3, prompts)
    x0 = encode_pixels(pipe, pixels)
    with torch.no_grad():
        error = (pipe.family.decode(pipe, x0) - pixels).square().mean()
    assert error < 0.02  # over 23 dB
    texts = [prompt.text for prompt in prompts]
    for shift, right in ((0, True), (5, False)):
        shifted = texts[shift:] + texts[:shift]
        records = [Record(text, text, 0, 0, 4.0) for text in shifted]
        verdicts = [ranks[0] for ranks in rank(Finals(x0, records), ["shapes"], pipe)]
        assert sum(verdicts) >= 9 if right else sum(verdicts) <= 1


def test_captions_are_encoded_as_prompts_are(pipe):
    encode = partial(pipe.family.encode, pipe, max_sequence_length=16)
    for texts in (["a red star"], ["a red star", "two rings", "a cross above a ring"]):
        got, wanted = read_captions(encode, texts), encode(texts)[0]
        torch.testing.assert_close(got.prompt_embeds, wanted.prompt_embeds)
        torch.testing.assert_close(got.pooled, wanted.pooled)


def test_held_out_captions_are_not_those_of_training(pipe, monkeypatch):
    monkeypatch.setattr(evaluator_data, "_BANK", (64, 16))
    images = ShapesImages(pipe)
    x0, texts = images.draw(0, 8)
    assert len(x0) == len(texts) == 8
    assert not {prompt.text for prompt in held_out_prompts(480, "val")} & set(texts)


@pytest.mark.parametrize("kind", ["numeracy", "attribute", "binding"])
def test_a_caption_and_its_edit_are_of_one_split_and_each_shows_in_its_image(
    pipe, monkeypatch, kind
):
    monkeypatch.setattr(evaluator_data, "_BANK", (64, 16))
    monkeypatch.setattr(evaluator_data, "_VAL_PROMPTS", 40)
    asked = KINDS.get(kind)
    source = EditPairs(ShapesImages(pipe), asked.words, asked.swaps)
    training, held_out = [source.train(step, 16) for step in range(6)], list(source.held_out(16))
    assert [len(pairs.texts) for pairs in held_out] == [8, 8, 4]
    splits = [set(), set()]
    for found, batches in zip(splits, (training, held_out), strict=True):
        for pairs in batches:
            for text, other in zip(pairs.texts, pairs.other_texts, strict=True):
                assert other in edits(text, asked.words, asked.swaps)
                found |= {demand(text).split, demand(other).split}
    chosen_on = {"val", "test"} if kind == "numeracy" else {"val"}  # it has one pair in val
    assert splits == [{"train"}, chosen_on]
    pairs = held_out[0]
    for texts, right in ((pairs.texts, True), (pairs.other_texts, False)):
        records = [Record(text, text, 0, 0, 4.0) for text in texts]
        verdicts = [ranks[0] for ranks in rank(Finals(pairs.x0, records), ["shapes"], pipe)]
        assert sum(verdicts) >= 6 if right else sum(verdicts) <= 1


def test_what_a_prompt_says_does_not_depend_on_its_words():
    assert says("a star left of a ring") == says("a photo of a ring right of a star")
    assert says("a red star and a blue ring") == says("an icon of a blue ring and a red star")
    assert says("a sketch of a star") == says("a star") != says("a ring")
    assert says("two red stars") != says("three red stars")
    assert says("A  dog") == says("a dog") != says("a cat")


@pytest.mark.parametrize("make", [tiny_sd3_pipeline, tiny_sdxl_pipeline, tiny_flux_pipeline])
def test_an_evaluator_of_another_model_of_the_family_is_refused_by_its_config(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "model")
    model = find_model(str(tmp_path / "model"))
    length = {} if model.tokens is None else {"max_sequence_length": 16}
    prompt, _ = pipe.family.encode(pipe, ["a"], **length)
    x = torch.empty(1, model.channels, 8, 8)
    wider = Conditioning(prompt.prompt_embeds.repeat(1, 1, 2), prompt.pooled)
    deeper = Conditioning(prompt.prompt_embeds, prompt.pooled.repeat(1, 2))
    for name, read in (("own", prompt), ("prompt_dim", wider), ("pooled_dim", deeper)):
        other = LatentEvaluator.for_model("fidelity", model.family, x, read, width=64, num_layers=1)
        other.save_config(tmp_path / name)
    assert find_fitting_evaluator(tmp_path / "own", model) == tmp_path / "own"
    for name in ("prompt_dim", "pooled_dim"):
        with pytest.raises(ConfigError, match=f"an evaluator must have the {name} .* got"):
            find_fitting_evaluator(tmp_path / name, model)
