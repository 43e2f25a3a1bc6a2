"""``core2_compile(keep_negative=True)``. Truth: the same call of the same pipeline without it."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from transformers import CLIPTextModel

from core2_sampler.pipelines import negatives
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline

BUILD = {"sd3": tiny_sd3_pipeline, "sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}


def built(family):
    pipe = BUILD[family]()
    pipe.core2_compile(graphs=False, compile=None, keep_negative=True)
    return pipe


def call(pipe, **options):
    family = pipe.family.name
    values = {"prompt": "a b", "negative_prompt": "c", "core2": Core2Config("cfg"), **SIZE}
    values[pipe.family.scale_argument] = 4.5
    if family != "sdxl":
        values["max_sequence_length"] = 8
    generator = torch.Generator().manual_seed(0)
    return pipe(**(values | options), generator=generator).images


SIZE = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 2}


def without(pipe, **options):
    """Return what the same pipeline says if it keeps nothing."""
    kept, pipe._core2_negatives = pipe._core2_negatives, None
    try:
        return call(pipe, **options)
    finally:
        pipe._core2_negatives = kept


@pytest.fixture
def encodes(monkeypatch):
    """One entry for each text that a CLIP encoder is given; a hook would switch keeping off."""
    seen, plain = [], CLIPTextModel.forward

    def forward(self, *args, **kwargs):
        seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModel, "forward", forward)
    return seen


def count(encodes, run):
    encodes.clear()
    result = run()
    return len(encodes), result


@pytest.mark.parametrize("family", BUILD)
def test_an_unchanged_negative_prompt_is_encoded_once(family, encodes):
    pipe = built(family)
    encoders = 1 if family == "flux" else 2  # FLUX's other one is a T5
    assert count(encodes, lambda: call(pipe))[0] == 2 * encoders
    for options in ({}, {"prompt": "d e f"}, {"guidance_scale": 3.0}):
        found, ours = count(encodes, partial(call, pipe, **options))
        assert found == encoders
        assert torch.equal(ours, without(pipe, **options))
    for options in ({"negative_prompt": "g"}, {"num_images_per_prompt": 2}):
        found, ours = count(encodes, partial(call, pipe, **options))
        assert found == 2 * encoders
        assert torch.equal(ours, without(pipe, **options))
    assert count(encodes, lambda: call(pipe))[0] == encoders  # kept beside the others


def edit(pipe):
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.5)


def edit_unseen(pipe):
    """As PEFT merges: neither place nor count of edits tells."""
    weight = next(p for p in pipe.text_encoder.parameters() if p.ndim > 1)
    before = weight.data_ptr(), weight._version
    weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert (weight.data_ptr(), weight._version) == before


def add_lora(pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        pipe.text_encoder.add_adapter(config)


def fuse_and_unload_lora(pipe):
    add_lora(pipe)
    for part in pipe.text_encoder.modules():
        if "merged_adapters" in vars(part):
            part.merge()
    recurse_remove_peft_layers(pipe.text_encoder)
    assert not any("merged_adapters" in vars(part) for part in pipe.text_encoder.modules())


def load_words(pipe):
    pairs = [(pipe.text_encoder, pipe.tokenizer)]
    if pipe.family.name == "sdxl":
        pairs.append((pipe.text_encoder_2, pipe.tokenizer_2))
    generator = torch.Generator().manual_seed(0)
    for encoder, tokenizer in pairs:
        word = {"<thing>": 3 * torch.randn(16, generator=generator)}
        pipe.load_textual_inversion(
            word, token="<thing>", text_encoder=encoder, tokenizer=tokenizer
        )


def swap_encoder(pipe):
    pipe.text_encoder = tiny_sd3_pipeline().text_encoder_2


CHANGES = {
    "weights in place": ("sd3", edit),
    "weights unseen": ("sd3", edit_unseen),
    "a LoRA fused and unloaded": ("sdxl", fuse_and_unload_lora),
    "a word": ("sdxl", load_words),
    "a word of FLUX": ("flux", load_words),
    "an encoder": ("sd3", swap_encoder),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_embeddings_is_noticed(name, encodes):
    family, change = CHANGES[name]
    pipe = built(family)
    texts = {"negative_prompt": "c <thing>"}
    before = call(pipe, **texts)
    change(pipe)
    found, ours = count(encodes, lambda: call(pipe, **texts))
    assert found == (2 if family == "flux" else 4)
    assert torch.equal(ours, without(pipe, **texts))
    assert not torch.equal(ours, before)
    found, again = count(encodes, lambda: call(pipe, **texts))
    assert found == (1 if family == "flux" else 2)
    assert torch.equal(again, ours)


@pytest.mark.parametrize(
    ("family", "options"),
    [("sd3", {"clip_skip": 1}), ("sdxl", {"clip_skip": 0}), ("flux", {"max_sequence_length": 9})],
)
def test_arguments_of_the_encoding_are_part_of_it(family, options, encodes):
    pipe = built(family)
    call(pipe)
    found, ours = count(encodes, lambda: call(pipe, **options))
    assert found == (2 if family == "flux" else 4)
    assert torch.equal(ours, without(pipe, **options))


def test_a_word_of_the_same_numbers_is_another_word(encodes):
    """Its weights may lie where the other's lay."""
    pipe = built("flux")
    word = torch.randn(16, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<one>": word}, token="<one>")
    call(pipe, negative_prompt="<two>")
    pipe.unload_textual_inversion("<one>")
    pipe.load_textual_inversion({"<two>": word}, token="<two>")
    found, ours = count(encodes, lambda: call(pipe, negative_prompt="<two>"))
    assert found == 2
    assert torch.equal(ours, without(pipe, negative_prompt="<two>"))


@pytest.mark.parametrize("family", BUILD)
def test_with_adapters_or_hooks_nothing_is_kept(family, encodes, caplog):
    negatives._tell_once.cache_clear()
    encoders = 1 if family == "flux" else 2
    for change in (add_lora, lambda pipe: pipe.text_encoder.register_forward_hook(lambda *_: None)):
        pipe = built(family)
        call(pipe)
        change(pipe)
        with caplog.at_level(logging.WARNING, logger=negatives.__name__):
            for _ in range(2):
                found, ours = count(encodes, lambda pipe=pipe: call(pipe))
                assert found == 2 * encoders
                assert torch.equal(ours, without(pipe))
    told = [record.getMessage() for record in caplog.records if record.name == negatives.__name__]
    assert [line.rpartition("text_encoder ")[2] for line in told] == [
        "carries adapters",
        "has forward hooks",
    ]


def test_embeddings_and_zeros_are_not_kept():
    pipe = built("sdxl")
    assert pipe.config.force_zeros_for_empty_prompt
    call(pipe, negative_prompt=None)
    given = torch.zeros(1, 16, 32), torch.zeros(1, 8)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    embeds = {f"negative_{name}": value for name, value in zip(names, given, strict=True)}
    call(pipe, negative_prompt=None, **embeds)
    assert not pipe._core2_negatives


def test_few_are_kept():
    pipe = built("sd3")
    for text in "cdefg":
        call(pipe, negative_prompt=text)
    texts = [key[0][0] for key in pipe._core2_negatives]
    assert texts == ["'d'", "'e'", "'f'", "'g'"]
