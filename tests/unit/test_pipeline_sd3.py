"""The Stable Diffusion 3 pipeline. Truth: the stock class on the same components."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from peft import LoraConfig
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead

CFG = Core2Config(mode="cfg")
PROMPTS = ["a red circle", "two blue rings"]
SCALE = 4.0


def stock_of(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "weak_head"}
    stock = StableDiffusion3Pipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    return stock


def sample(pipe, seeds=(1, 2), **options):
    defaults = {
        "num_inference_steps": 5,
        "guidance_scale": SCALE,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }
    if "prompt_embeds" not in options:
        defaults["prompt"] = PROMPTS[: len(seeds)]
    return pipe(**{**defaults, **options}).images


def close(ours, stock):
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=2e-5)


def trained(head, seed=0):
    """Give every weight of a zero-initialised head a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return head


def with_head(head_class, **options):
    pipe = tiny_sd3_pipeline()
    head = head_class.for_denoiser(pipe.family.denoiser(pipe), **options)
    pipe.register_modules(weak_head=trained(head))
    return pipe


def with_adapter():
    return with_head(AdapterHead, reference_scale=SCALE, scale_range=(2.0, 6.0))


def hooks(pipe):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()
    )


# The stock class ---------------------------------------------------------------------------------


def test_positional_arguments_keep_their_places():
    pipe = tiny_sd3_pipeline()
    args = ("a red circle", None, None, 16, 16, 3, None, SCALE)
    options = {"output_type": "latent", "max_sequence_length": 8}
    ours = pipe(*args, generator=torch.Generator().manual_seed(0), core2=CFG, **options).images
    stock = stock_of(pipe)(*args, generator=torch.Generator().manual_seed(0), **options).images
    close(ours, stock)
    with pytest.raises(TypeError, match="nonsense"):
        pipe("a", nonsense=1, core2=CFG)


def embeds(pipe):
    cond, uncond = pipe.family.encode(pipe, PROMPTS, ["dark", "blurred"], max_sequence_length=8)
    return {
        "prompt_embeds": cond.prompt_embeds,
        "negative_prompt_embeds": uncond.prompt_embeds,
        "pooled_prompt_embeds": cond.pooled,
        "negative_pooled_prompt_embeds": uncond.pooled,
    }


CALLS = {
    "three prompts": {"prompt_2": ["x", "y"], "prompt_3": ["z", "w"]},
    "own sigmas": {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_cfg_by_our_loop_is_the_stock_call(name, global_random_state):
    pipe = tiny_sd3_pipeline()
    close(sample(pipe, core2=CFG, **CALLS[name]), sample(stock_of(pipe), **CALLS[name]))


def test_dynamic_shifting_and_mu():
    pipe = tiny_sd3_pipeline(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    stock = stock_of(pipe)
    plain = sample(pipe, core2=CFG)
    close(plain, sample(stock))
    close(sample(pipe, mu=1.5, core2=CFG), sample(stock, mu=1.5))
    assert not torch.allclose(plain, sample(stock, mu=1.5), atol=1e-3)


def test_lora_scale_in_joint_attention_kwargs():
    pipe = tiny_sd3_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        pipe.text_encoder.add_adapter(
            LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        with torch.no_grad():  # or the text encoder's share would drown in the tolerance
            for name, weight in pipe.text_encoder.named_parameters():
                weight.mul_(20 if "lora" in name else 1)
    stock = stock_of(pipe)
    half = {"joint_attention_kwargs": {"scale": 0.5}}
    ours = sample(pipe, core2=CFG, **half)
    close(ours, sample(stock, **half))
    assert not torch.allclose(ours, sample(stock), atol=1e-4)


# Refusals ----------------------------------------------------------------------------------------


def test_skip_layer_guidance_is_refused():
    with pytest.raises(ValueError, match="skip_guidance_layers must be None"):
        sample(tiny_sd3_pipeline(), core2=CFG, skip_guidance_layers=[1])


def test_skip_layer_guidance_without_core2_is_the_stock_class_bit_for_bit():
    pipe, options = tiny_sd3_pipeline(), {"skip_guidance_layers": [0]}
    assert torch.equal(sample(pipe, **options), sample(stock_of(pipe), **options))


def test_an_adapter_of_another_model_is_refused():
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(
        weak_head=AdapterHead(
            "sd3", 4, {"transformer_blocks.0.attn.to_q": [24, 24]}, 2, scale_range=(2.0, 6.0)
        )
    )
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.attn.to_q of shape \[24, 24\], got \[16, 16\]"
    ):
        sample(pipe, core2="fast")


def test_embeds_that_are_not_one_row_an_image_are_refused():
    pipe = tiny_sd3_pipeline()
    with pytest.raises(ValueError, match="one row for each of the 4 images, got 2"):
        sample(pipe, core2=CFG, num_images_per_prompt=2, seeds=(1, 2, 3, 4), **embeds(pipe))


def test_non_finite_latents_stop_the_run_with_step_and_sigma():
    def poison(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * (float("nan") if i == 2 else 1)}

    pipe = tiny_sd3_pipeline()
    sigma = pipe.family.schedule(pipe, 5, (8, 8)).sigmas[2].item()
    with pytest.raises(RuntimeError, match=rf"after step 2 of 5 \(sigma {sigma:.4g}\)"):
        sample(pipe, core2=CFG, callback_on_step_end=poison)


def recorder(into):
    def record(pipe, i, t, tensors):
        into.append((i, float(t), {k: v.clone() for k, v in tensors.items()}))
        return tensors

    return record


# Schedulers --------------------------------------------------------------------------------------


class Spy(FlowMatchEulerDiscreteScheduler):
    """A scheduler that is not ours to replace."""

    def step(self, *args, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(*args, **kwargs)


class HeunSpy(FlowMatchHeunDiscreteScheduler):
    """As above, of second order: more timesteps than inference steps."""

    def step(self, *args, **kwargs):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(("scheduler", "steps"), [(Spy, 5), (HeunSpy, 9)])
def test_another_scheduler_makes_its_own_steps(scheduler, steps):
    pipe = tiny_sd3_pipeline()
    pipe.scheduler = scheduler(shift=3.0)
    updates = []
    pipe.progress_bar = lambda total: Bar(total, updates)
    ours = sample(pipe, core2=CFG)
    assert pipe.scheduler.steps == steps
    assert pipe.core2_plan.nfe == 2 * steps
    assert updates == [5, "update", "update", "update", "update", "update"]
    close(ours, sample(stock_of(pipe)))


class Bar:
    def __init__(self, total, into):
        self.into = into
        into.append(total)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self):
        self.into.append("update")


def test_stochastic_euler_runs_by_the_schedulers_step_with_our_generator(global_random_state):
    pipe = tiny_sd3_pipeline(stochastic_sampling=True)
    a, b = sample(pipe, core2=CFG), sample(pipe, core2=CFG)
    assert torch.equal(a, b)
    assert not torch.allclose(a, sample(tiny_sd3_pipeline(), core2=CFG), atol=1e-2)


# Adapters ----------------------------------------------------------------------------------------


def test_the_adapters_latents_and_grid_are_those_of_the_pipeline():
    pipe, seen = tiny_sd3_pipeline(), []
    sample(pipe, num_inference_steps=3, core2=CFG, callback_on_step_end=recorder(seen))
    sigmas = pipe.family.schedule(pipe, 3, (8, 8)).sigmas
    assert [step[1] for step in seen] == pytest.approx((1000 * sigmas[:-1]).tolist())
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    latents = pipe.family.noise(pipe, generators)
    close(sample(pipe, latents=latents, generator=None, core2=CFG), sample(pipe, core2=CFG))


def test_features_are_the_input_of_the_last_layer():
    pipe = tiny_sd3_pipeline()
    denoiser = pipe.family.denoiser(pipe)
    cond, _ = pipe.family.encode(pipe, PROMPTS, max_sequence_length=8)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), denoiser.capture_features() as read:
        with pytest.raises(RuntimeError, match="after a pass"):
            read()
        d = denoiser(x, torch.full((2,), 0.5), cond)
        features = read()
        tokens = pipe.transformer.proj_out(features)
    assert features.shape == (2, 16, 16)
    # Unpatchify by hand: 4x4 tokens of 2x2 pixels of 4 channels.
    image = tokens.reshape(2, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 8)
    torch.testing.assert_close(image, d)
    assert not pipe.transformer.proj_out._forward_pre_hooks


# IP-Adapter --------------------------------------------------------------------------------------


def with_ip_adapter(pipe):
    """Put random IP-Adapter weights into the transformer, as ``load_ip_adapter`` would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.set_attn_processor(
            {
                name: SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, timesteps_emb_dim=16, scale=1.0)
                for name in pipe.transformer.attn_processors
            }
        )
        pipe.transformer.image_proj = IPAdapterTimeImageProjection(
            embed_dim=12, output_dim=16, hidden_dim=16, dim_head=8, heads=2, num_queries=3, depth=1
        )
    return pipe


def test_ip_adapter_embeddings_reach_both_halves():
    pipe = with_ip_adapter(tiny_sd3_pipeline(weak_head=CondHead("sd3", 4)))
    stock = stock_of(pipe)
    image = 5 * torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    pair, alone = {"ip_adapter_image_embeds": image}, {"ip_adapter_image_embeds": image[1:]}
    ours = sample(pipe, core2=CFG, **pair)
    close(ours, sample(stock, **pair))
    swapped = sample(pipe, core2=CFG, ip_adapter_image_embeds=image.flip(0))
    assert not torch.allclose(ours, swapped, atol=1e-3)
    close(sample(pipe, core2="fast", **pair), sample(stock, guidance_scale=1.0, **alone))


def test_an_ip_adapter_image_is_that_of_the_stock_call():
    pipe = with_ip_adapter(tiny_sd3_pipeline(weak_head=CondHead("sd3", 4)))
    vision = {"hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    extractor = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    pipe.register_modules(image_encoder=encoder, feature_extractor=extractor)
    stock, red = stock_of(pipe), {"ip_adapter_image": Image.new("RGB", (16, 16), "red")}
    assert torch.equal(sample(pipe, **red), sample(stock, **red))
    ours = sample(pipe, core2=CFG, **red)
    close(ours, sample(stock, **red))
    close(sample(pipe, core2="fast", **red), sample(stock, guidance_scale=1.0, **red))
    blue = sample(pipe, core2=CFG, ip_adapter_image=Image.new("RGB", (16, 16), "blue"))
    assert not torch.allclose(ours, blue, atol=1e-3)


def test_ip_adapter_rows_stay_apart_where_guidance_begins_later():
    """Truth: the stock call, guided from the start, whose first scale is 1 to a millionth."""
    pipe = with_ip_adapter(tiny_sd3_pipeline())
    image = 5 * torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))

    def guide(pipe, i, t, tensors):
        pipe._guidance_scale = SCALE
        return tensors

    scales = Core2Config(mode="cfg", guidance_scales=(1.0, *[SCALE] * 4))
    ours = sample(pipe, core2=scales, ip_adapter_image_embeds=image)
    stock = sample(
        stock_of(pipe),
        guidance_scale=1 + 1e-6,
        callback_on_step_end=guide,
        ip_adapter_image_embeds=image,
    )
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
