"""Scores whose value the formula gives. Truth: arithmetic, the models' own forward, torchvision."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from core2_sampler.benchmarks.scorers import SCORERS
from core2_sampler.benchmarks.scorers.base import AffineMlp, read_state
from core2_sampler.benchmarks.scorers.blipvqa import chunks_of_file, questions
from core2_sampler.benchmarks.scorers.imagereward import (
    MEAN,
    STD,
    ImageRewardModel,
    rename_weights,
)
from core2_sampler.benchmarks.scorers.tiny import write_tiny
from core2_sampler.shapes.render import draw, sample_scene
from core2_sampler.shapes.world import PREFIXES, held_out_prompts

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def load(name, folder, prompts=()):
    return SCORERS.get(name).load(write_tiny(name, folder, prompts))


@torch.no_grad()
def set_embeddings(model, image, text, scale=10.0):
    """Make a CLIP model answer with one vector for every image and another for every text."""
    towers = (
        (model.vision_model.post_layernorm, model.visual_projection, image),
        (model.text_model.final_layer_norm, model.text_projection, text),
    )
    for norm, projection, vector in towers:
        norm.weight.zero_()
        norm.bias.copy_(torch.tensor(vector + [0.0] * (len(norm.bias) - len(vector))))
        projection.weight.copy_(torch.eye(len(norm.bias)))
    model.logit_scale.fill_(math.log(scale))


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("clipscore", 60.0, -60.0),  # 100 cos
        ("clipscore-hessel", 1.5, 0.0),  # 2.5 max(cos, 0)
        ("clipscore-gaeval", 6.0, -6.0),  # exp(logit_scale) cos
        ("pickscore", 6.0, -6.0),
        ("t2icompbench-clip", 0.6, -0.6),
    ],
)
def test_the_scale_of_each_clip_score(name, positive, negative, tmp_path):
    scorer = load(name, tmp_path)
    set_embeddings(scorer.model, [3.0, 4.0], [2.0, 0.0])  # cos = 3/5
    assert scorer.score([IMAGE], ["a"]).item() == pytest.approx(positive, rel=1e-5)
    set_embeddings(scorer.model, [3.0, 4.0], [-2.0, 0.0])
    assert scorer.score([IMAGE], ["a"]).item() == pytest.approx(negative, rel=1e-5)


def test_a_clip_score_is_the_models_own_logit(tmp_path):
    scorer = load("pickscore", tmp_path)
    prompts = ["a red circle", "two stars"]
    inputs = scorer.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    inputs |= scorer.processor([IMAGE, IMAGE.rotate(90)], return_tensors="pt")
    with torch.no_grad():
        logits = scorer.model(**inputs).logits_per_image
    torch.testing.assert_close(scorer.score([IMAGE, IMAGE.rotate(90)], prompts), logits.diag())


def test_hessels_clip_score_puts_its_words_before_the_prompt(tmp_path):
    with_prefix, without = load("clipscore-hessel", tmp_path), load("t2icompbench-clip", tmp_path)
    expected = 2.5 * without.score([IMAGE], ["A photo depicts a star"]).clamp(min=0)
    torch.testing.assert_close(with_prefix.score([IMAGE], ["a star"]), expected)


def test_aes_is_an_affine_map_of_the_unit_image_embedding(tmp_path):
    scorer = load("aes", tmp_path)
    pixels = scorer.processor([IMAGE], return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = scorer.model(input_ids=torch.tensor([[1, 2]]), pixel_values=pixels).image_embeds
    x = embeds.double()
    for index in (0, 2, 4, 6, 7):  # the published names of its layers
        x = x @ scorer.mlp.state_dict()[f"layers.{index}.weight"].double().T
        x += scorer.mlp.state_dict()[f"layers.{index}.bias"]
    assert scorer.score([IMAGE], ["any"]).item() == pytest.approx(x.item(), rel=1e-4)


def test_imagereward_normalises_a_constant_reward(tmp_path):
    scorer = load("imagereward", tmp_path)
    with torch.no_grad():
        scorer.model.mlp.layers[7].weight.zero_()
        scorer.model.mlp.layers[7].bias.fill_(1.2)
    expected = (1.2 - 0.16717362830052426) / 1.0333394966054072
    assert scorer.score([IMAGE], ["a"]).item() == pytest.approx(expected, rel=1e-6)


def test_imagereward_does_not_see_its_padding(tmp_path):
    scorer = load("imagereward", tmp_path)
    pixels = scorer.processor([IMAGE], return_tensors="pt").pixel_values
    tokens = scorer.tokenizer(["a b c"], return_tensors="pt")  # no padding
    with torch.no_grad():
        bare = scorer.model(pixels, tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(scorer.score([IMAGE], ["a b c"]), bare)


def test_imagereward_reads_the_whole_prompt_up_to_its_35_tokens(tmp_path):
    scorer = load("imagereward", tmp_path)
    letters = [*"abcdefghijklmnopqrstuvwxyz012345"]
    whole = " ".join(letters)  # 32 tokens, [CLS] and [SEP] around them
    other_end = " ".join([*letters[:-1], "9"])
    cut = [" ".join([*letters, "6", *"789"]), " ".join([*letters, "6", *"xyz"])]
    a, b, c, d = (scorer.score([IMAGE], [text]).item() for text in (whole, other_end, *cut))
    assert a != b  # the first token sees the last: not causal
    assert c == d  # beyond the limit


def test_imagereward_takes_the_published_names(tmp_path):
    """The names are those of timm's VisionTransformer and of BLIP's med.py."""
    folder = tmp_path / "reward"
    write_tiny("imagereward", folder)
    scorer = SCORERS.get("imagereward").load(folder)
    own = scorer.model.state_dict()
    pairs = {
        "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
        "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
        "blip.visual_encoder.patch_embed.proj.weight": "vision.embeddings.patch_embedding.weight",
        "blip.visual_encoder.patch_embed.proj.bias": "vision.embeddings.patch_embedding.bias",
        "blip.visual_encoder.norm.weight": "vision.post_layernorm.weight",
        "blip.visual_encoder.norm.bias": "vision.post_layernorm.bias",
    }
    timm = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block in range(2):
        for theirs, ours in timm.items():
            for kind in ("weight", "bias"):
                name = f"blip.visual_encoder.blocks.{block}.{theirs}.{kind}"
                pairs[name] = f"vision.encoder.layers.{block}.{ours}.{kind}"
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    bert = [f"{a}.{part}" for a in ("attention", "crossattention") for part in attention]
    bert += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    names = [f"encoder.layer.{layer}.{part}" for layer in range(2) for part in bert]
    names = [f"{n}.{kind}" for n in (*names, "embeddings.LayerNorm") for kind in ("weight", "bias")]
    names += ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"]
    pairs |= {f"blip.text_encoder.{name}": f"text.{name}" for name in names}
    pairs |= {name: name for name in own if name.startswith("mlp.")}
    published = {theirs: own[ours] for theirs, ours in pairs.items()}
    published["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    published["blip.vision_proj.weight"] = published["blip.text_proj.bias"] = torch.ones(1)
    (folder / "ImageReward.safetensors").unlink()
    torch.save(published, folder / "ImageReward.pt")
    again = SCORERS.get("imagereward").load(folder)
    assert again.key == scorer.key
    del published["blip.visual_encoder.blocks.1.attn.qkv.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*self_attn.qkv.bias"):
        again.model.load_state_dict(rename_weights(published))


def test_imagereward_has_the_sizes_of_the_published_checkpoint():
    with torch.device("meta"):
        model = ImageRewardModel()
    vision = sum(p.numel() for p in model.vision.parameters())
    assert vision == 303_301_632  # timm's vit_large_patch16_224 without its classifier
    shapes = {name: tuple(p.shape) for name, p in model.text.named_parameters()}
    assert shapes["embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert len(model.vision.encoder.layers) == 24
    assert model.vision.post_layernorm.eps == 1e-6
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_blipvqa_multiplies_the_share_of_yes_over_phrases(tmp_path):
    scorer = load("blipvqa", tmp_path, ["a", "a and b", "a and b and c", ""])
    head = scorer.model.text_decoder.cls.predictions
    with torch.no_grad():
        head.transform.LayerNorm.weight.zero_()
        head.transform.LayerNorm.bias.zero_()
        head.bias.zero_()
        head.bias[scorer.answers[0]] = math.log(3)  # yes : no = 3 : 1
    scores = scorer.score([IMAGE] * 4, ["a", "a and b", "a and b and c", ""])
    assert scores.tolist() == pytest.approx([0.75, 0.75**2, 0.75**3, 1.0], rel=1e-5)


def test_blipvqa_of_two_phrases_is_the_product_of_each(tmp_path):
    scorer = load("blipvqa", tmp_path, ["a red cat", "b", "a red cat and b"])
    first, second, both = scorer.score([IMAGE] * 3, ["a red cat", "b", "a red cat and b"]).tolist()
    assert both == pytest.approx(first * second, rel=1e-4)
    assert 0 < first != second


def test_blipvqa_asks_what_upstream_asks():
    chunks = ["the left", "A Red Car.", "top", "the top", *"cdefghij"]
    assert questions(chunks) == ["a red car?", "the top?", "c?", "d?", "e?", "f?", "g?", "h?"]


def test_noun_chunks_must_be_there_for_every_prompt(tmp_path):
    path = tmp_path / "noun_chunks.json"
    path.write_text('{"a cat": ["a cat"]}')
    chunks, name = chunks_of_file(path)
    assert chunks("a cat") == ["a cat"] and name.startswith("file:")
    with pytest.raises(ValueError, match="phrases of every prompt, got no 'a dog'"):
        chunks("a dog")
    path.write_text('["a cat"]')
    with pytest.raises(ValueError, match="must map each prompt"):
        chunks_of_file(path)


def test_the_shapes_judge_accepts_what_was_drawn_and_nothing_else():
    scorer = SCORERS.get("shapes").load()
    prompts = held_out_prompts(12)
    drawn = [draw(sample_scene(prompt, random.Random(1))) for prompt in prompts]
    texts = [prompt.text for prompt in prompts]
    assert scorer.score(drawn, texts).tolist() == [1.0] * 12
    assert scorer.score([Image.new("RGB", (64, 64), "white")], texts[:1]).tolist() == [0.0]
    assert scorer.score(drawn[:1], [PREFIXES[1] + "two stars"]).tolist() == [0.0]
    with pytest.raises(ValueError, match="caption of the Shapes world to be judged, got 'a cat'"):
        scorer.score(drawn[:1], ["a cat"])


def test_only_weights_are_unpickled(tmp_path):
    state = AffineMlp(4).state_dict()
    torch.save(state, tmp_path / "good.pth")
    assert torch.equal(read_state(tmp_path / "good.pth")["layers.7.bias"], state["layers.7.bias"])
    torch.save({"x": print}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        read_state(tmp_path / "bad.pth")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (32, 32), (20, 31), (500, 20)])
def test_hpsv21_prepares_as_its_own_code_does_with_antialias(size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    from core2_sampler.benchmarks.scorers.hpsv21 import MEAN, STD, preprocess

    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    x = functional.to_tensor(image)
    new = [round(side * 32 / max(size)) for side in x.shape[1:]]
    if max(size) != 32:
        bicubic = functional.InterpolationMode.BICUBIC
        x = functional.resize(x, new, bicubic, antialias=True)
    rows, columns = 32 - new[0], 32 - new[1]
    border = [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2]
    x = functional.normalize(functional.pad(x, border), MEAN, STD)
    torch.testing.assert_close(preprocess(image, 32), x, atol=1e-5, rtol=1e-5)


def test_hpsv21_is_a_hundred_times_the_cosine_of_open_clip(tmp_path):
    pytest.importorskip("open_clip")
    from core2_sampler.benchmarks.scorers.hpsv21 import load_checkpoint, preprocess

    scorer = load("hpsv21", tmp_path)
    with torch.no_grad():
        image, text, _ = scorer.model(preprocess(IMAGE, 32)[None], scorer.tokenizer(["a star"]))
    expected = 100 * (image * text).sum(-1)  # its forward normalises
    torch.testing.assert_close(scorer.score([IMAGE], ["a star"]), expected)
    state = {name: torch.zeros_like(p) for name, p in scorer.model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "hps.pt")
    load_checkpoint(scorer.model, tmp_path / "hps.pt")
    assert not any(p.any() for p in scorer.model.parameters())
