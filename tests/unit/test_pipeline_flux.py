"""What is special to FLUX. Truth: the stock class on the same parts, or its network by hand."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    MagCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters.flux import pack, unpack
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_flux_pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead
from core2_sampler.weak_heads.tap import TapHead

CFG = Core2Config(mode="cfg")
PROMPTS = ["a red circle", "two blue rings"]
NEGATIVES = ["dark", "dim and grey"]
SCALE = 4.0


def stock_of(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "weak_head"}
    stock = FluxPipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    return stock


def sample(pipe, seeds=(1, 2), **options):
    defaults = {
        "num_inference_steps": 5,
        "true_cfg_scale": SCALE,
        "height": 16,
        "width": 16,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }
    if "prompt_embeds" not in options:
        defaults |= {"prompt": PROMPTS[: len(seeds)], "negative_prompt": NEGATIVES[: len(seeds)]}
    if "weak_guidance" in options:
        defaults.pop("negative_prompt")
    return pipe(**{**defaults, **options}).images


def close(ours, stock):
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


def trained(head, seed=0):
    """Give every weight of a zero-initialised head a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return head


def with_head(head_class, **options):
    pipe = tiny_flux_pipeline()
    head = head_class.for_denoiser(pipe.family.denoiser(pipe), **options)
    pipe.register_modules(weak_head=trained(head))
    return pipe


def with_tap():
    return with_head(TapHead)


def with_adapter():
    return with_head(AdapterHead, reference_scale=SCALE, scale_range=(2.0, 6.0))


# The stock class ---------------------------------------------------------------------------------


def embeds(pipe):
    cond, uncond = pipe.family.encode(pipe, PROMPTS, NEGATIVES, max_sequence_length=8)
    return {
        "prompt_embeds": cond.prompt_embeds,
        "negative_prompt_embeds": uncond.prompt_embeds,
        "pooled_prompt_embeds": cond.pooled,
        "negative_pooled_prompt_embeds": uncond.pooled,
    }


CALLS = {
    "embedded guidance": {"guidance_scale": 1.5},
    "images per prompt": {"num_images_per_prompt": 2, "seeds": (1, 2, 3, 4)},
    "odd size": {"height": 14, "width": 21},
    "own sigmas": {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_cfg_by_our_loop_is_the_stock_call(name, global_random_state):
    two = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, **CALLS[name]}
    pipe = tiny_flux_pipeline()
    close(sample(pipe, core2=CFG, **two), sample(stock_of(pipe), **two))


def test_a_network_without_an_embedded_guidance():
    pipe = tiny_flux_pipeline(guidance_embeds=False)
    close(sample(pipe, core2=CFG), sample(stock_of(pipe)))


def test_guidance_and_prompts_matter_to_the_tiny_network():
    pipe = stock_of(tiny_flux_pipeline())
    plain = sample(pipe)
    for change in ({"guidance_scale": 1.5}, {"true_cfg_scale": 1.0}, {"prompt": PROMPTS[::-1]}):
        assert not torch.allclose(sample(pipe, **change), plain, atol=1e-2)


def test_latents_are_packed_and_tell_the_size_of_a_square():
    pipe = tiny_flux_pipeline()
    latents = pipe.family.noise(pipe, [torch.Generator().manual_seed(s) for s in (1, 2)], 16, 16)
    assert latents.shape == (2, 16, 16)
    stock = sample(stock_of(pipe))
    for size in ({}, {"height": None, "width": None}):
        close(sample(pipe, latents=latents, generator=None, core2=CFG, **size), stock)
    own = pipe.family.noise(pipe, [torch.Generator().manual_seed(s) for s in (1, 2)])
    assert torch.equal(own, latents)  # the VAE's images are 16 px


def test_without_dynamic_shifting():
    pipe = tiny_flux_pipeline(use_dynamic_shifting=False)
    close(sample(pipe, core2=CFG), sample(stock_of(pipe)))


def test_images_that_are_not_square():
    pipe, options = tiny_flux_pipeline(), {"output_type": "pt", "width": 20}
    ours = sample(pipe, core2=CFG, **options)
    assert ours.shape == (2, 3, 16, 20)
    torch.testing.assert_close(ours, sample(stock_of(pipe), **options), atol=2e-5, rtol=0)


def test_textual_inversion_by_the_clip_encoder():
    pipe = tiny_flux_pipeline()
    learned = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    pipe.load_textual_inversion(
        {"<s>": learned}, token="<s>", text_encoder=encoder, tokenizer=tokenizer
    )
    options = {"prompt": ["a <s>", "b <s>"]}
    ours = sample(pipe, core2=CFG, **options)
    assert torch.equal(sample(pipe, **options), sample(stock_of(pipe), **options))
    close(ours, sample(stock_of(pipe), **options))
    assert not torch.allclose(ours, sample(tiny_flux_pipeline(), core2=CFG, **options), atol=1e-3)


# Negative prompts --------------------------------------------------------------------------------


def test_without_a_negative_prompt_it_is_the_empty_one():
    pipe = tiny_flux_pipeline()
    ours = sample(pipe, core2=CFG, negative_prompt=None)
    close(ours, sample(stock_of(pipe), negative_prompt=["", ""]))
    assert not torch.allclose(ours, sample(pipe, core2=CFG), atol=1e-3)


def test_one_negative_prompt_serves_every_prompt():
    pipe = tiny_flux_pipeline()
    ours = sample(pipe, core2=CFG, negative_prompt="dark")
    close(ours, sample(stock_of(pipe), negative_prompt=["dark", "dark"]))


def test_a_negative_side_that_no_step_runs_is_reported_and_not_encoded(caplog):
    pipe = with_tap()
    with caplog.at_level(logging.WARNING), count_nfe(pipe.text_encoder_2) as counter:
        sample(pipe, core2="fast")
    assert "negative_prompt: it has no effect" in caplog.text
    assert counter.calls == 1
    caplog.clear()
    sample(pipe, core2=Core2Config(mode="cond"), weak_guidance=1.0, guidance_scale=3.0)
    assert "weak_guidance: it has no effect" in caplog.text
    caplog.clear()
    sample(pipe, core2="balanced")
    assert "no effect" not in caplog.text


# The gap between two guidances -------------------------------------------------------------------


@torch.no_grad()
def two_guidances_by_hand(pipe, high, low, scale):
    """Run the network and the scheduler themselves, 5 steps at 16 px."""
    tokens, pooled, text_ids = pipe.encode_prompt(PROMPTS, max_sequence_length=8)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    x, image_ids = pipe.prepare_latents(2, 4, 16, 16, torch.float32, "cpu", generators)
    schedule = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    schedule.set_timesteps(sigmas=np.linspace(1, 0.2, 5), mu=0.5 + 0.65 * (16 - 256) / (4096 - 256))

    def velocity(guidance, t):
        return pipe.transformer(
            hidden_states=x,
            timestep=t.expand(2) / 1000,
            guidance=torch.full((2,), guidance),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample

    for t in schedule.timesteps:
        strong, weak = velocity(high, t), velocity(low, t)
        x = schedule.step(weak + scale * (strong - weak), t, x).prev_sample
    return x


def test_weak_guidance_is_guidance_by_the_gap_between_two_embedded_ones():
    pipe = tiny_flux_pipeline()
    for scale in (SCALE, 1.5):
        options = {"weak_guidance": 1.0, "guidance_scale": 3.0, "true_cfg_scale": scale}
        ours = sample(pipe, core2=CFG, **options)
        close(ours, two_guidances_by_hand(pipe, 3.0, 1.0, scale))
        assert pipe.core2_plan.nfe == 10
    assert not torch.allclose(ours, sample(pipe, core2=CFG, guidance_scale=3.0), atol=1e-2)


def test_weak_guidance_at_scale_1_is_one_pass_at_the_guidance_scale():
    pipe = tiny_flux_pipeline()
    options = {"guidance_scale": 3.0, "true_cfg_scale": 1.0}
    ours = sample(pipe, core2=CFG, weak_guidance=1.0, **options)
    close(ours, sample(stock_of(pipe), **options))
    assert pipe.core2_plan.nfe == 5


def test_a_head_works_on_the_gap_between_two_guidances():
    pipe = tiny_flux_pipeline(weak_head=CondHead("flux", 4))
    options = {"weak_guidance": 1.0, "guidance_scale": 3.0}
    ours = sample(pipe, core2="quality", **options)
    close(ours, two_guidances_by_hand(pipe, 3.0, 1.0, 1 + 1.5 * (SCALE - 1)))


def test_a_head_serves_the_gap_that_it_learned(caplog):
    pipe = tiny_flux_pipeline()
    head = TapHead.for_denoiser(pipe.family.denoiser(pipe), weak_guidance=1.0)
    pipe.register_modules(weak_head=head)
    with caplog.at_level(logging.WARNING):
        sample(pipe, core2="fast", weak_guidance=1.0, guidance_scale=3.0, negative_prompt=None)
    assert "no effect" not in caplog.text
    for other in (None, 1.5):
        with pytest.raises(ValueError, match=f"must be 1.0 for this weak head, .* got {other}"):
            sample(pipe, core2="fast", weak_guidance=other, guidance_scale=3.0)


def test_encode_gives_both_ways_their_two_sides():
    pipe = tiny_flux_pipeline()
    cond, uncond = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8)
    empty, _ = pipe.family.encode(pipe, ["", ""], max_sequence_length=8)
    assert torch.equal(uncond.prompt_embeds, empty.prompt_embeds)
    assert cond.extra["guidance"].tolist() == uncond.extra["guidance"].tolist() == [3.5, 3.5]
    cond, weak = pipe.family.encode(
        pipe, PROMPTS, max_sequence_length=8, guidance_scale=3.0, weak_guidance=1.0
    )
    assert torch.equal(cond.prompt_embeds, weak.prompt_embeds)
    assert (cond.extra["guidance"][0], weak.extra["guidance"][0]) == (3.0, 1.0)


# Heads and plans ---------------------------------------------------------------------------------


@pytest.mark.parametrize("core2", ["balanced", "quality"])
def test_an_image_does_not_depend_on_its_batch_mates_negative_prompts(core2):
    pipe = with_tap()
    both = sample(pipe, core2=core2)
    alone = [
        sample(pipe, seeds=(seed,), prompt=[prompt], negative_prompt=[negative], core2=core2)
        for seed, prompt, negative in zip((1, 2), PROMPTS, NEGATIVES, strict=True)
    ]
    close(both, torch.cat(alone))


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core2": CFG, "height": 3}, "at least 4, got 3 and 16"),
        ({"core2": CFG, "latents": torch.zeros(2, 9, 16)}, "16 tokens .* got 9"),
        ({"core2": CFG, "negative_prompt": ["a"]}, "each of the 2 prompts, got 1"),
        ({"weak_guidance": 1.0}, "must come with core2, got 1.0"),
        ({"core2": CFG, "weak_guidance": 3.5}, r"below guidance_scale \(3.5\), got 3.5"),
        ({"core2": CFG, "weak_guidance": float("nan")}, "got nan"),
        (
            {"core2": CFG, "weak_guidance": 1.0, "negative_prompt": ["a", "b"]},
            "got negative_prompt too",
        ),
    ],
)
def test_bad_calls_are_refused_before_anything_is_encoded(options, message):
    pipe = tiny_flux_pipeline()
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        sample(pipe, **options)
    assert counter.calls == 0


def test_weak_guidance_needs_an_embedded_one():
    with pytest.raises(ValueError, match="embeds a guidance"):
        sample(tiny_flux_pipeline(guidance_embeds=False), core2=CFG, weak_guidance=1.0)


def test_embeds_that_do_not_fit_are_refused():
    pipe = tiny_flux_pipeline()
    given = embeds(pipe)
    with pytest.raises(ValueError, match="one row for each of the 4 images, got 2"):
        sample(pipe, core2=CFG, num_images_per_prompt=2, seeds=(1, 2, 3, 4), **given)
    prompt = {name: given[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    with pytest.raises(ValueError, match="give both, or max_sequence_length=8"):
        sample(pipe, core2=CFG, **prompt, max_sequence_length=10)
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match="must come with negative_prompt_embeds"):
        sample(pipe, core2=CFG, **prompt)


# Callbacks ---------------------------------------------------------------------------------------

NAMES = ["latents", "prompt_embeds"]


def test_a_callback_cannot_change_the_embedded_guidance():
    def edit(pipe, i, t, tensors):
        pipe._guidance_scale = 1.0  # the stock call has made its guidance before the loop
        return tensors

    pipe = tiny_flux_pipeline()
    ours = sample(pipe, core2=CFG, callback_on_step_end=edit)
    close(ours, sample(stock_of(pipe), callback_on_step_end=edit))


def test_edited_embeds_reach_both_guidances():
    pipe = tiny_flux_pipeline()
    swapped = embeds(pipe)["prompt_embeds"].flip(0)
    options = {"callback_on_step_end_tensor_inputs": NAMES, "weak_guidance": 1.0}
    two = {"num_inference_steps": 2, "core2": CFG, **options}
    edited = sample(pipe, callback_on_step_end=lambda *_: {"prompt_embeds": swapped}, **two)
    states = []
    sample(pipe, callback_on_step_end=lambda p, i, t, x: states.append(x["latents"]) or x, **two)
    denoiser = pipe.family.denoiser(pipe)
    cond, weak = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8, weak_guidance=1.0)
    sigmas = pipe.family.schedule(pipe, 2, (8, 8)).sigmas
    x = unpack(states[0], (8, 8))
    with torch.no_grad():
        d = [
            denoiser(x, sigmas[1].float().expand(2), Conditioning(swapped, c.pooled, c.extra))
            for c in (cond, weak)
        ]
    guided = d[1] + SCALE * (d[0] - d[1])
    close(edited, pack(x + float(sigmas[2] - sigmas[1]) * guided))


def test_a_callback_may_set_the_true_scale():
    def schedule(pipe, i, t, tensors):
        if i == 1:
            pipe._true_cfg_scale = 2.0
        return tensors

    pipe = tiny_flux_pipeline()
    ours = sample(pipe, core2=CFG, callback_on_step_end=schedule)
    scales = (SCALE, SCALE, 2.0, 2.0, 2.0)
    close(ours, sample(pipe, core2=Core2Config(mode="cfg", guidance_scales=scales)))
    assert pipe.guidance_scale == 3.5


def test_the_current_timestep_is_known_in_every_pass():
    def watch(pipe, into):
        hook = pipe.transformer.register_forward_pre_hook(
            lambda *_: into.append(float(pipe.current_timestep))
        )
        return hook.remove

    pipe, ours, stock = tiny_flux_pipeline(), [], []
    remove = watch(pipe, ours)
    sample(pipe, core2=CFG)
    remove()
    assert pipe.current_timestep is None
    other = stock_of(pipe)
    remove = watch(other, stock)
    sample(other)
    remove()
    assert ours == stock[::2]  # stock runs a pair as two passes
    assert len(ours) == 5


# Schedulers --------------------------------------------------------------------------------------


def test_another_scheduler_makes_its_own_steps():
    pipe = tiny_flux_pipeline()
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    close(sample(pipe, core2=CFG), sample(stock_of(pipe)))


# Caches between steps ----------------------------------------------------------------------------


def cached(pipe, **options):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # reuse all it can
    last = pipe.transformer.single_transformer_blocks[-1].attn
    with count_nfe(last) as counter:
        images = sample(pipe, **options)
    return images, counter.rows


def test_first_block_cache_is_that_of_the_stock_pipeline():
    """Each of the two compares pairs with pairs: one full pass of each side, then none."""
    pipe, other = tiny_flux_pipeline(), stock_of(tiny_flux_pipeline())
    plain = sample(pipe, core2=CFG)
    ours, rows = cached(pipe, core2=CFG)
    stock, stock_rows = cached(other)
    assert rows == stock_rows == 4
    close(ours, stock)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_first_block_cache_keeps_passes_of_other_rows_apart(seeds):
    """One row of a pair would broadcast, unnoticed, into a pass of one row."""
    pipe = tiny_flux_pipeline(weak_head=CondHead("flux", 4))
    images, rows = cached(pipe, seeds=seeds, core2=Core2Config(slow_steps=2, w2s_scale=1.0))
    assert rows == 3 * len(seeds)  # one full pair, one full pass
    assert images.shape == (len(seeds), 16, 16)


def test_caches_that_pairs_or_adapters_would_confuse_are_refused():
    pipe = with_tap()
    ratios = torch.ones(5)
    pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=5, mag_ratios=ratios))
    with pytest.raises(ValueError, match="first-block caching, .* got MagCacheConfig"):
        sample(pipe, core2="balanced")
    sample(pipe, core2="fast")
    pipe = with_adapter()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="got FirstBlockCacheConfig"):
        sample(pipe, core2="balanced")
    sample(pipe, core2="fast")


# Adapters ----------------------------------------------------------------------------------------


def test_packing_is_undone_and_odd_latents_are_refused():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())  # row 1, column 1 of 2x3 tokens
    assert torch.equal(unpack(tokens, (4, 6)), x)
    with pytest.raises(ValueError, match=r"even height and width, got \(4, 5\)"):
        pack(x[..., :5])


def test_features_are_the_image_tokens_before_the_last_layer():
    pipe = tiny_flux_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8)
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), denoiser.capture_features() as read:
        d = denoiser(x, torch.full((2,), 0.5), cond)
        features = read()
        tokens = pipe.transformer.proj_out(features)
    assert features.shape == (2, 24, 16)
    assert denoiser.latent_channels == 4
    # Unpack by hand: 4x6 tokens of 4 channels of 2x2 latents.
    image = tokens.reshape(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 12)
    torch.testing.assert_close(image, d)


def test_a_prompt_that_names_no_guidance_gets_the_stock_calls():
    pipe = tiny_flux_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8)
    x, sigma = torch.ones(2, 4, 8, 8), torch.full((2,), 0.5)
    with torch.no_grad():
        bare = denoiser(x, sigma, Conditioning(cond.prompt_embeds, cond.pooled))
        assert torch.equal(bare, denoiser(x, sigma, cond))


def test_decode_is_the_stock_decoding():
    pipe = tiny_flux_pipeline()
    latents = sample(pipe, width=20)
    with torch.no_grad():
        image = pipe.family.decode(pipe, latents, (8, 10))
        square = pipe.family.decode(pipe, sample(pipe))
    close((image / 2 + 0.5).clamp(0, 1), sample(pipe, width=20, output_type="pt"))
    assert square.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="square where no size is given, got 20 tokens"):
        pipe.family.decode(pipe, latents)


# IP-Adapter --------------------------------------------------------------------------------------


def with_ip_adapter(pipe):
    """Put random IP-Adapter weights into the transformer, as ``load_ip_adapter`` would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.set_attn_processor(
            {
                name: FluxAttnProcessor()
                if name.startswith("single")
                else FluxIPAdapterAttnProcessor(16, 16, num_tokens=(3,), scale=3.0)
                for name in pipe.transformer.attn_processors
            }
        )
        pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(12, 16, num_image_text_embeds=3)]
        )
        vision = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            projection_dim=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        encoder = CLIPVisionModelWithProjection(vision).eval()
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(**size))
    return pipe


def image(value):
    return torch.full((1, 1, 12), 1.0).cumsum(-1) * value


IMAGES = {
    "both embeds": {
        "ip_adapter_image_embeds": [image(0.5)],
        "negative_ip_adapter_image_embeds": [image(-2.0)],
    },
    "image against black": {"ip_adapter_image": Image.new("RGB", (16, 16), "red")},
    "black against image": {"negative_ip_adapter_image": Image.new("RGB", (16, 16), "red")},
}


@pytest.mark.parametrize("name", IMAGES)
def test_ip_adapter_images_reach_their_own_side(name):
    pipe = with_ip_adapter(tiny_flux_pipeline(weak_head=CondHead("flux", 4)))
    stock = stock_of(pipe)
    assert torch.equal(sample(pipe, **IMAGES[name]), sample(stock, **IMAGES[name]))
    ours = sample(pipe, core2=CFG, **IMAGES[name])
    close(ours, sample(stock, **IMAGES[name]))
    assert not torch.allclose(
        ours, sample(pipe, core2=CFG, ip_adapter_image_embeds=[image(1.0)]), atol=1e-3
    )
    close(
        sample(pipe, core2="fast", **IMAGES[name]),
        sample(stock, true_cfg_scale=1.0, **IMAGES[name]),
    )


def test_ip_adapter_images_leave_the_callers_arguments_alone():
    pipe = with_ip_adapter(tiny_flux_pipeline())
    mine = {"scale": 1.0}
    sample(pipe, core2=CFG, joint_attention_kwargs=mine, **IMAGES["both embeds"])
    assert mine == {"scale": 1.0}


@pytest.mark.parametrize(
    ("scale", "mode", "warned"), [(1.0, "cfg", 1), (1.0, "cond", 0), (4.0, "cfg", 0)]
)
def test_a_scale_that_turns_guidance_off_is_reported(scale, mode, warned, caplog):
    with caplog.at_level(logging.WARNING):
        sample(tiny_flux_pipeline(), core2=Core2Config(mode=mode), true_cfg_scale=scale)
    assert sum("true_cfg_scale must be above 1" in text for text in caplog.messages) == warned
