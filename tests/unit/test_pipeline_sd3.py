"""The Stable Diffusion 3 pipeline. Truth: the stock class on the same components."""

from __future__ import annotations

import inspect
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from peft import LoraConfig
from PIL import Image

from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.adapters import sd3_denoiser, sd3_encode, sd3_latents, sd3_sigmas
from core2_sampler.pipelines.sd3 import CoRe2StableDiffusion3Pipeline
from core2_sampler.plan import Core2Config
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead
from core2_sampler.weak_heads.tap import TapHead

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
    head = head_class.for_denoiser(sd3_denoiser(pipe), **options)
    pipe.register_modules(weak_head=trained(head))
    return pipe


def with_adapter():
    return with_head(AdapterHead, reference_scale=SCALE, scale_range=(2.0, 6.0))


def hooks(pipe):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules()
    )


# The stock class ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"skip_guidance_layers": [0]}, {"guidance_scale": 1.0}])
def test_without_core2_it_is_the_stock_class_bit_for_bit(options):
    pipe = with_head(TapHead)
    assert torch.equal(sample(pipe, **options), sample(stock_of(pipe), **options))
    assert pipe.core2_plan is None


def test_the_call_shows_the_stock_arguments_in_order_and_core2_last():
    ours = inspect.signature(tiny_sd3_pipeline().__call__).parameters
    stock = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    assert list(ours) == [*list(stock)[1:], "core2"]
    assert ours["core2"].kind is inspect.Parameter.KEYWORD_ONLY


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
    cond, uncond = sd3_encode(pipe, PROMPTS, ["dark", "blurred"], max_sequence_length=8)
    return {
        "prompt_embeds": cond.prompt_embeds,
        "negative_prompt_embeds": uncond.prompt_embeds,
        "pooled_prompt_embeds": cond.pooled,
        "negative_pooled_prompt_embeds": uncond.pooled,
    }


CALLS = {
    "plain": {},
    "negative prompts": {"negative_prompt": ["dark", "blurred"]},
    "three prompts": {"prompt_2": ["x", "y"], "prompt_3": ["z", "w"]},
    "images per prompt": {"num_images_per_prompt": 2, "seeds": (1, 2, 3, 4), "prompt": PROMPTS},
    "one generator": {"generator": 5},
    "size": {"height": 8, "width": 12},
    "own sigmas": {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": 3},
    "no guidance": {"guidance_scale": 1.0},
    "clip skip": {"clip_skip": 0},
}


@pytest.mark.parametrize("name", CALLS)
def test_cfg_by_our_loop_is_the_stock_call(name, global_random_state):
    def run(pipe, **more):
        options = {**CALLS[name], **more}
        if isinstance(options.get("generator"), int):
            options["generator"] = torch.Generator().manual_seed(options["generator"])
        return sample(pipe, **options)

    pipe = tiny_sd3_pipeline()
    close(run(pipe, core2=CFG), run(stock_of(pipe)))


def test_embeds_given_directly_are_the_prompts_that_they_encode():
    pipe = tiny_sd3_pipeline()
    stock = sample(stock_of(pipe), negative_prompt=["dark", "blurred"])
    close(sample(pipe, core2=CFG, **embeds(pipe)), stock)


def test_latents_given_directly():
    pipe = tiny_sd3_pipeline()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    close(sample(pipe, latents=latents, core2=CFG), sample(stock_of(pipe), latents=latents))


def test_dynamic_shifting_and_mu():
    pipe = tiny_sd3_pipeline(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    stock = stock_of(pipe)
    plain = sample(pipe, core2=CFG)
    close(plain, sample(stock))
    close(sample(pipe, mu=1.5, core2=CFG), sample(stock, mu=1.5))
    assert not torch.allclose(plain, sample(stock, mu=1.5), atol=1e-3)


def test_bfloat16_stays_bfloat16():
    pipe = tiny_sd3_pipeline().to(torch.bfloat16)
    ours = sample(pipe, core2=CFG)
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - sample(stock_of(pipe)).float()).abs().max()
    assert error < 0.1  # both round to 8 bits at every step


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(output_type):
    pipe = tiny_sd3_pipeline()
    ours = sample(pipe, output_type=output_type, core2=CFG)
    stock = sample(stock_of(pipe), output_type=output_type)
    assert type(ours) is type(stock)
    if output_type == "pil":
        assert isinstance(ours[0], Image.Image)
        ours, stock = (np.stack([np.asarray(i, dtype=float) for i in x]) for x in (ours, stock))
        assert np.abs(ours - stock).max() <= 1
    else:
        np.testing.assert_allclose(np.asarray(ours), np.asarray(stock), atol=2e-5)


def test_return_dict_false_gives_a_tuple():
    out = tiny_sd3_pipeline()(
        "a", num_inference_steps=2, max_sequence_length=4, return_dict=False, core2=CFG
    )
    assert isinstance(out, tuple)
    assert isinstance(out[0][0], Image.Image)


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


# Heads and plans ---------------------------------------------------------------------------------


def test_with_a_zero_head_fast_is_cond_and_quality_is_calibrated_cfg():
    pipe = tiny_sd3_pipeline(weak_head=CondHead("sd3", 4))
    stock = stock_of(pipe)
    close(sample(pipe, core2="fast"), sample(stock, guidance_scale=1.0))
    close(sample(pipe, core2="quality"), sample(stock, guidance_scale=1 + 1.5 * (SCALE - 1)))


@pytest.mark.parametrize("make", [lambda: with_head(TapHead), with_adapter])
def test_all_slow_at_w2s_1_is_stock_cfg_for_any_head(make):
    pipe = make()
    stock = sample(stock_of(pipe))
    ours = sample(pipe, core2=Core2Config(slow_steps=1.0, w2s_scale=1.0))
    close(ours, stock)
    assert not torch.allclose(sample(pipe, core2="quality"), stock, atol=1e-3)
    assert not torch.allclose(sample(pipe, core2="fast"), stock, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "core2", "nfe"),
    [
        (lambda: with_head(TapHead), "fast", 8),
        (lambda: with_head(TapHead), "balanced", 10),
        (lambda: with_head(TapHead), "quality", 16),
        (with_adapter, "fast", 8),
        (with_adapter, "balanced", 10),
        (with_adapter, "quality", 24),
        (tiny_sd3_pipeline, CFG, 16),
        (tiny_sd3_pipeline, Core2Config(mode="cond"), 8),
    ],
)
def test_counted_evaluations_are_those_of_the_plan(make, core2, nfe):
    pipe = make()
    with count_nfe(pipe.transformer) as counter:
        images = sample(pipe, core2=core2, num_inference_steps=8)
    assert counter.per_sample(2) == pipe.core2_plan.nfe == nfe
    assert torch.isfinite(images).all()
    assert pipe.num_timesteps == 8


@pytest.mark.parametrize("make", [lambda: with_head(TapHead), with_adapter])
@pytest.mark.parametrize("core2", ["balanced", "quality"])
def test_an_image_does_not_depend_on_its_batch_mates(make, core2):
    pipe = make()
    both = sample(pipe, core2=core2)
    alone = [
        sample(pipe, seeds=(seed,), prompt=prompt, core2=core2)
        for seed, prompt in zip((1, 2), PROMPTS, strict=True)
    ]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_no_guidance_needs_no_head_and_is_cond():
    pipe = tiny_sd3_pipeline()
    ours = sample(pipe, core2="quality", guidance_scale=1.0)
    close(ours, sample(stock_of(pipe), guidance_scale=1.0))
    assert pipe.core2_plan.nfe == 5


def test_one_scale_a_step_is_what_a_callback_can_do_to_the_stock_pipeline():
    pipe, scales = tiny_sd3_pipeline(), (2.0, 6.0, 3.0, 5.0, 1.5)

    def schedule(pipe, i, t, tensors):
        pipe._guidance_scale = scales[min(i + 1, 4)]
        return tensors

    stock = sample(stock_of(pipe), guidance_scale=scales[0], callback_on_step_end=schedule)
    close(sample(pipe, core2=Core2Config(mode="cfg", guidance_scales=scales)), stock)


def test_no_hook_stays_on_the_transformer_after_a_run_or_an_error():
    def fail(pipe, i, t, tensors):
        raise KeyError("from the callback")

    for pipe in (with_head(TapHead), with_adapter()):
        before = hooks(pipe)
        sample(pipe, core2="quality")
        assert hooks(pipe) == before
        with pytest.raises(KeyError, match="from the callback"):
            sample(pipe, core2="fast", callback_on_step_end=fail)
        assert hooks(pipe) == before
        assert torch.equal(sample(pipe), sample(stock_of(pipe)))


def test_a_negative_prompt_that_no_step_runs_is_reported(caplog):
    pipe = with_head(TapHead)
    with caplog.at_level(logging.WARNING):
        sample(pipe, core2="fast", negative_prompt=["dark", "dark"])
    assert "negative_prompt: it has no effect" in caplog.text
    caplog.clear()
    sample(pipe, core2="balanced", negative_prompt=["dark", "dark"])
    assert not caplog.text


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (None, {"core2": "fast"}, "weak head, got none: pass weak_head="),
        (None, {"core2": "quality"}, "weak head, got none"),
        (CondHead("sd3", 16), {"core2": "fast"}, "channels"),
        (CondHead("flux", 4), {"core2": "fast"}, "sd3"),
        (None, {"core2": "fats"}, "did you mean 'fast'"),
        (None, {"core2": Core2Config(slow_steps=6)}, r"between 0 and the number of steps \(5\)"),
        (None, {"core2": CFG, "num_inference_steps": 0}, "at least 1, got 0"),
        (None, {"core2": CFG, "skip_guidance_layers": [1]}, "skip_guidance_layers"),
        (None, {"core2": CFG, "guidance_scale": float("nan")}, "finite"),
        (None, {"core2": CFG, "height": 15}, "divisible"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_encoded(head, options, message):
    pipe = tiny_sd3_pipeline(weak_head=head)
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        sample(pipe, **options)
    assert counter.calls == 0


def test_a_scale_outside_an_adapters_range_is_refused_before_anything_is_encoded():
    pipe = with_adapter()
    with (
        count_nfe(pipe.text_encoder) as counter,
        pytest.raises(ValueError, match="within 2.0 to 6"),
    ):
        sample(pipe, core2="fast", guidance_scale=9.0)
    assert counter.calls == 0


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
    sigma = sd3_sigmas(pipe, 5, (8, 8))[2].item()
    with pytest.raises(RuntimeError, match=rf"after step 2 of 5 \(sigma {sigma:.4g}\)"):
        sample(pipe, core2=CFG, callback_on_step_end=poison)


# Callbacks ---------------------------------------------------------------------------------------

NAMES = ["latents", "prompt_embeds", "pooled_prompt_embeds"]


def recorder(into):
    def record(pipe, i, t, tensors):
        into.append((i, float(t), {k: v.clone() for k, v in tensors.items()}))
        return tensors

    return record


@pytest.mark.parametrize("core2", [CFG, "fast"])
def test_callbacks_see_the_stock_tensors(core2):
    pipe, ours, stock = with_head(TapHead), [], []
    options = {"callback_on_step_end_tensor_inputs": NAMES, "negative_prompt": ["dark", "dim"]}
    sample(pipe, core2=core2, callback_on_step_end=recorder(ours), **options)
    sample(stock_of(pipe), callback_on_step_end=recorder(stock), **options)
    assert [step[:2] for step in ours] == [step[:2] for step in stock]
    for (_, _, a), (_, _, b) in zip(ours, stock, strict=True):
        assert list(a) == list(b) == NAMES
        assert torch.equal(a["prompt_embeds"], b["prompt_embeds"])
        assert torch.equal(a["pooled_prompt_embeds"], b["pooled_prompt_embeds"])
        if core2 is CFG:
            close(a["latents"], b["latents"])


def edit_latents(pipe, i, t, tensors):
    return {"latents": tensors["latents"] * 0.9}


def edit_embeds(pipe, i, t, tensors):
    return {
        "prompt_embeds": tensors["prompt_embeds"].flip(0),
        "pooled_prompt_embeds": tensors["pooled_prompt_embeds"] * (1.5 if i == 1 else 1),
    }


def edit_scale(pipe, i, t, tensors):
    if i == 1:
        pipe._guidance_scale = 2.0
    return tensors


def cut_off(pipe, i, t, tensors):
    if i == 2:
        pipe._guidance_scale = 0.0
        tensors = {k: v.chunk(2)[1] if k != "latents" else v for k, v in tensors.items()}
    return tensors


@pytest.mark.parametrize("edit", [edit_latents, edit_embeds, edit_scale, cut_off])
def test_callbacks_that_edit_act_as_in_the_stock_pipeline(edit):
    pipe = tiny_sd3_pipeline()
    options = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": NAMES}
    ours = sample(pipe, core2=CFG, **options)
    close(ours, sample(stock_of(pipe), **options))
    assert not torch.allclose(ours, sample(pipe, core2=CFG), atol=1e-4)


def test_the_stock_cutoff_callback():
    pipe = tiny_sd3_pipeline()
    cutoff = {"callback_on_step_end": SD3CFGCutoffCallback(None, cutoff_step_index=2)}
    with count_nfe(pipe.transformer) as counter:
        ours = sample(pipe, seeds=(1,), core2=CFG, **cutoff)
    assert counter.per_sample(1) == 2 * 3 + 2
    close(ours, sample(stock_of(pipe), seeds=(1,), **cutoff))


@pytest.mark.parametrize("core2", ["fast", "quality"])
def test_leaving_only_the_prompts_embeddings_turns_guidance_off(core2):
    def shrink(pipe, i, t, tensors):
        rows = len(tensors["latents"])
        return {k: v[-rows:] for k, v in tensors.items()}

    pipe = with_head(TapHead)
    options = {"callback_on_step_end": shrink, "callback_on_step_end_tensor_inputs": NAMES}
    cut = sample(pipe, core2=core2, **options)
    first = pipe.core2_plan.steps[0]
    scales = (SCALE, 1.0, 1.0, 1.0, 1.0)
    slow = 1 if first.kind == "slow" else 0
    expected = sample(pipe, core2=Core2Config(slow_steps=slow, guidance_scales=scales))
    close(cut, expected)


@pytest.mark.parametrize("core2", [CFG, "fast", "quality"])
def test_interrupt_ends_the_run_with_the_latents_as_they_are(core2):
    states = []

    def stop(pipe, i, t, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = i == 2
        return tensors

    pipe = with_head(TapHead)
    ours = sample(pipe, core2=core2, callback_on_step_end=stop)
    assert len(states) == 3
    assert torch.equal(ours, states[-1])
    if core2 is CFG:
        close(ours, sample(stock_of(pipe), callback_on_step_end=stop))


def test_a_callback_may_only_ask_for_the_stock_names():
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        sample(
            tiny_sd3_pipeline(),
            core2=CFG,
            callback_on_step_end=edit_latents,
            callback_on_step_end_tensor_inputs=["noise_pred"],
        )


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


# Saving and sharing ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: with_head(TapHead), with_adapter])
def test_save_and_load_keep_the_head_inside(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert (tmp_path / "weak_head" / "diffusion_pytorch_model.safetensors").is_file()
    again = CoRe2StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert type(again.weak_head) is type(pipe.weak_head)
    assert torch.equal(sample(again, core2="fast"), sample(pipe, core2="fast"))
    for stock_class in (StableDiffusion3Pipeline, DiffusionPipeline):
        stock = stock_class.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
        assert type(stock) is StableDiffusion3Pipeline
        assert torch.equal(sample(stock), sample(pipe))


def test_a_stock_folder_loads_without_and_with_a_head(tmp_path):
    stock_of(tiny_sd3_pipeline()).save_pretrained(tmp_path)
    assert CoRe2StableDiffusion3Pipeline.from_pretrained(tmp_path).weak_head is None
    head = CondHead("sd3", 4)
    pipe = CoRe2StableDiffusion3Pipeline.from_pretrained(tmp_path, weak_head=head)
    assert pipe.weak_head is head
    sample(pipe, core2="fast")


def test_from_pipe_shares_the_parts_and_keeps_each_dtype():
    stock = stock_of(tiny_sd3_pipeline()).to(torch.bfloat16)
    stock.vae.float()
    pipe = CoRe2StableDiffusion3Pipeline.from_pipe(stock)
    assert type(pipe) is CoRe2StableDiffusion3Pipeline
    assert pipe.transformer is stock.transformer
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.weak_head is None
    pipe.to(torch.float32)
    assert pipe.transformer.dtype == torch.float32


def test_from_pipe_takes_a_head_or_that_of_the_other_pipeline_and_an_explicit_dtype():
    pipe, other = with_head(TapHead), CondHead("sd3", 4)
    assert CoRe2StableDiffusion3Pipeline.from_pipe(pipe).weak_head is pipe.weak_head
    assert CoRe2StableDiffusion3Pipeline.from_pipe(pipe, weak_head=other).weak_head is other
    cast = CoRe2StableDiffusion3Pipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert cast.transformer.dtype == torch.bfloat16


def test_offload_leaves_the_head_where_the_denoiser_runs():
    """A head in the chain would swap the transformer out on every step."""
    pipe = with_adapter()
    assert pipe.model_cpu_offload_seq == StableDiffusion3Pipeline.model_cpu_offload_seq
    assert pipe._exclude_from_cpu_offload == ["weak_head"]


# Adapters ----------------------------------------------------------------------------------------


def test_the_adapters_latents_and_grid_are_those_of_the_pipeline():
    pipe, seen = tiny_sd3_pipeline(), []
    sample(pipe, num_inference_steps=3, core2=CFG, callback_on_step_end=recorder(seen))
    sigmas = sd3_sigmas(pipe, 3, (8, 8))
    assert [step[1] for step in seen] == pytest.approx((1000 * sigmas[:-1]).tolist())
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    latents = sd3_latents(pipe, generators)
    close(sample(pipe, latents=latents, generator=None, core2=CFG), sample(pipe, core2=CFG))


def test_features_are_the_input_of_the_last_layer():
    pipe = tiny_sd3_pipeline()
    denoiser = sd3_denoiser(pipe)
    cond, _ = sd3_encode(pipe, PROMPTS, max_sequence_length=8)
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
