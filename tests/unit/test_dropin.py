"""What every pipeline of ours keeps of its stock class. Truth: the stock class on the same parts.

One contract for all families; what is special to one is in its own ``test_pipeline_*.py``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.loaders import FromSingleFileMixin
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from core2_sampler import testing
from core2_sampler.nfe import count_nfe
from core2_sampler.pipelines.auto import PIPELINES
from core2_sampler.plan import PRESETS, Core2Config
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.controls import CondHead
from core2_sampler.weak_heads.tap import TapHead

CFG = Core2Config(mode="cfg")
PROMPTS = ["a red circle", "two blue rings", "a cube"]
NEGATIVES = ["dark", "dim", "grey"]
SCALE = 4.0


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        name: of the family.
        stock: name of the stock class in diffusers.
        network: the denoiser's component.
        kwargs: the stock argument that goes to the attention layers.
        names: what callbacks may ask for.
        cutoff: diffusers' callback that turns guidance off, if it has one for the family.
        scale: the stock argument that is the scale of classifier-free guidance.
        negative: the negative prompt that the stock call must have to guide at all.
        own: arguments of our call beside the stock ones.
        options: arguments that keep the tiny model quick.
        missing: components that the tiny model lacks and a stock loader wants to know of.
        lacks: what the stock class has not, by feature or test, and why.
    """

    name: str
    stock: str
    network: str
    kwargs: str
    names: tuple[str, ...]
    cutoff: type | None = None
    scale: str = "guidance_scale"
    negative: str | None = None
    own: tuple[str, ...] = ("core2",)
    options: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)
    lacks: dict = field(default_factory=dict)

    def needs(self, *wanted):
        """Skip a test of what the stock class has not."""
        for name in wanted:
            if name in self.lacks:
                pytest.skip(self.lacks[name])

    @property
    def stock_class(self):
        return getattr(diffusers, self.stock)

    def pipe(self, **options):
        return getattr(testing, f"tiny_{self.name}_pipeline")(**options)

    def denoiser_of(self, pipe):
        return getattr(pipe, self.network)

    def stock_of(self, pipe):
        parts = {k: v for k, v in pipe.components.items() if k != "weak_head"}
        stock = self.stock_class(**parts)
        stock.set_progress_bar_config(disable=True)
        return stock

    def sample(self, pipe, seeds=(1, 2), guidance_scale=SCALE, **options):
        defaults = {
            "num_inference_steps": 5,
            self.scale: guidance_scale,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(s) for s in seeds],
            **self.options,
        }
        if "prompt_embeds" not in options:
            defaults["prompt"] = PROMPTS[: len(seeds)]
            if self.negative is not None:
                prompt = options.get("prompt", defaults["prompt"])
                count = 1 if isinstance(prompt, str) else len(prompt)
                defaults["negative_prompt"] = [self.negative] * count
        return pipe(**{**defaults, **options}).images

    def with_head(self, head_class, **options):
        pipe = self.pipe()
        head = head_class.for_denoiser(pipe.family.denoiser(pipe), **options)
        pipe.register_modules(weak_head=trained(head))
        return pipe

    def with_tap(self):
        return self.with_head(TapHead)

    def with_adapter(self):
        return self.with_head(AdapterHead, reference_scale=SCALE, scale_range=(2.0, 6.0))


CASES = [
    Case(
        "sd3",
        "StableDiffusion3Pipeline",
        "transformer",
        "joint_attention_kwargs",
        ("latents", "prompt_embeds", "pooled_prompt_embeds"),
        SD3CFGCutoffCallback,
        options={"max_sequence_length": 8},
        missing={"text_encoder_3": None, "tokenizer_3": None},
    ),
    Case(
        "sdxl",
        "StableDiffusionXLPipeline",
        "unet",
        "cross_attention_kwargs",
        ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids"),
        SDXLCFGCutoffCallback,
    ),
    Case(
        "flux",
        "FluxPipeline",
        "transformer",
        "joint_attention_kwargs",
        ("latents", "prompt_embeds"),
        scale="true_cfg_scale",
        negative="dark",
        own=("core2", "weak_guidance"),
        options={"max_sequence_length": 8, "height": 16, "width": 16},
        lacks={
            "clip_skip": "the stock call has no clip_skip",
            "live scale": "the stock call reads true_cfg_scale once, before its loop",
            "paired rows": "callbacks of the stock call see the rows of the prompt alone",
            "divisible size": "the stock call rounds the size down",
        },
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def close(ours, stock):
    """Compare relative to the largest value: 1e-5 of it."""
    ours, stock = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(stock))
    torch.testing.assert_close(ours, stock, atol=1e-5 * float(stock.abs().max()), rtol=0)


def far(ours, other):
    """Say whether two results differ by far more than rounding."""
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


def trained(head, seed=0):
    """Give every weight of a zero-initialised head a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return head


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


# The matrix: one feature of the stock class at a time --------------------------------------------


def plain(case, pipe):
    return {}


def embeds(case, pipe):
    length = {k: v for k, v in case.options.items() if k == "max_sequence_length"}
    cond, uncond = pipe.family.encode(pipe, PROMPTS[:2], NEGATIVES[:2], **length)
    return {
        "prompt_embeds": cond.prompt_embeds,
        "negative_prompt_embeds": uncond.prompt_embeds,
        "pooled_prompt_embeds": cond.pooled,
        "negative_pooled_prompt_embeds": uncond.pooled,
    }


def given_latents(case, pipe):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"latents": pipe.family.schedule(pipe, 5, (8, 8)).pack(x)}


def one_generator(case, pipe):
    return {"generator": torch.Generator}


def images_per_prompt(case, pipe):
    return {"seeds": (1, 2, 3), "prompt": PROMPTS[0], "num_images_per_prompt": 3}


def negative_prompts(case, pipe):
    return {"negative_prompt": NEGATIVES[:2], "negative_prompt_2": ["x", "y"]}


def second_prompts(case, pipe):
    return {"prompt_2": ["x", "y"]}


def size(case, pipe):
    return {"height": 8, "width": 24}


def no_guidance(case, pipe):
    return {"guidance_scale": 1.0}


def clip_skip(case, pipe):
    return {"clip_skip": 0}


def pil(case, pipe):
    return {"output_type": "pil"}


def arrays(case, pipe):
    return {"output_type": "np"}


def tensors(case, pipe):
    return {"output_type": "pt"}


def vae_slicing(case, pipe):
    pipe.vae.enable_slicing()
    return {"output_type": "pt"}


def vae_tiling(case, pipe):
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    pipe.vae.enable_tiling()
    return {"output_type": "pt"}


def group_offload(case, pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return {}


def lora(case, pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        network = case.denoiser_of(pipe)
        network.add_adapter(config)
        state = {
            f"{case.network}.{name}": 5 * weight
            for name, weight in get_peft_model_state_dict(network, adapter_name="default").items()
        }
        network.delete_adapters("default")
    pipe.load_lora_weights(state, adapter_name="style")
    return {}


def lora_scaled(case, pipe):
    lora(case, pipe)
    pipe.set_adapters("style", 0.5)
    return {}


def lora_scaled_in_the_call(case, pipe):
    lora(case, pipe)
    return {case.kwargs: {"scale": 0.5}}


def lora_fused(case, pipe):
    lora(case, pipe)
    pipe.fuse_lora(components=[case.network], lora_scale=0.7)
    return {}


FEATURES = [
    plain,
    embeds,
    given_latents,
    one_generator,
    images_per_prompt,
    negative_prompts,
    second_prompts,
    size,
    no_guidance,
    clip_skip,
    pil,
    arrays,
    tensors,
    vae_slicing,
    vae_tiling,
    group_offload,
    lora,
    lora_scaled,
    lora_scaled_in_the_call,
    lora_fused,
]


@pytest.fixture(params=FEATURES, ids=lambda feature: feature.__name__)
def feature(request):
    return request.param


def run(case, pipe, options, **more):
    options = {**options, **more}
    if options.get("generator") is torch.Generator:
        options["generator"] = torch.Generator().manual_seed(5)
    return case.sample(pipe, **options)


def as_numbers(images):
    if isinstance(images, list) and isinstance(images[0], Image.Image):
        return np.stack([np.asarray(image, dtype=float) for image in images])
    return np.asarray(images)


def test_without_core2_a_feature_is_that_of_the_stock_class_bit_for_bit(case, feature):
    case.needs(feature.__name__)
    pipe = case.with_tap()
    options = feature(case, pipe)
    ours, stock = run(case, pipe, options), run(case, case.stock_of(pipe), options)
    assert type(ours) is type(stock)
    assert np.array_equal(as_numbers(ours), as_numbers(stock))
    assert pipe.core2_plan is None


def test_a_feature_works_in_our_loop(case, feature, global_random_state):
    """CFG is the stock call; one pass a step with a head that says nothing is it unguided."""
    case.needs(feature.__name__)
    pipe = case.pipe(weak_head=CondHead(case.name, 4))
    options = feature(case, pipe)
    stock = case.stock_of(pipe)
    cfg, wanted = run(case, pipe, options, core2=CFG), run(case, stock, options)
    assert type(cfg) is type(wanted)
    tolerance = 1 if feature is pil else None  # of 255, where rounding goes the other way
    unguided = {"guidance_scale": 1.0}
    with count_nfe(case.denoiser_of(pipe)) as counter:
        fast = run(case, pipe, options, core2="fast")
    assert counter.per_sample(len(as_numbers(fast))) == pipe.core2_plan.nfe == 5
    for ours, theirs in ((cfg, wanted), (fast, run(case, stock, options, **unguided))):
        if tolerance:
            assert np.abs(as_numbers(ours) - as_numbers(theirs)).max() <= tolerance
        else:
            close(ours, theirs)


@pytest.mark.parametrize("lora_feature", [lora, lora_scaled, lora_scaled_in_the_call, lora_fused])
def test_the_loras_of_the_matrix_matter(case, lora_feature):
    pipe = case.pipe()
    before = case.sample(pipe)
    options = lora_feature(case, pipe)
    after = case.sample(pipe, core2=CFG, **options)
    assert far(after, before)
    if lora_feature is not lora:
        other = case.pipe()
        lora(case, other)
        assert far(after, case.sample(other))


def test_the_call_shows_the_stock_arguments_in_order_and_ours_last(case):
    ours = inspect.signature(case.pipe().__call__).parameters
    stock = [n for n in inspect.signature(case.stock_class.__call__).parameters if n != "kwargs"]
    assert [name for name in ours if name != "kwargs"] == [*stock[1:], *case.own]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in case.own)


def test_bfloat16_stays_bfloat16(case):
    pipe = case.pipe().to(torch.bfloat16)
    ours = case.sample(pipe, core2=CFG)
    assert ours.dtype == torch.bfloat16
    stock = case.sample(case.stock_of(pipe)).float()
    assert (ours.float() - stock).abs().max() < 0.04 * stock.abs().max()  # 8 bits, every step


def test_return_dict_false_gives_a_tuple(case):
    options = {**case.options, "num_inference_steps": 2, "return_dict": False}
    out = case.pipe()("a", core2=CFG, **options)
    assert isinstance(out, tuple)
    assert isinstance(out[0][0], Image.Image)


DRIFT = {
    "StableDiffusion3Pipeline": "890bad35b5680895",
    "StableDiffusionXLPipeline": "4d58fbfc599e50c2",
    "FluxPipeline": "26d9b658a88b6b3b",
}
"""Hash of each stock call's source as ours follows it: that of diffusers 0.42.1."""


@pytest.mark.parametrize("stock", DRIFT)
def test_the_stock_call_that_ours_follows_is_unchanged(stock):
    call = inspect.unwrap(getattr(diffusers, stock).__call__)
    found = hashlib.sha256(inspect.getsource(call).encode()).hexdigest()[:16]
    assert found == DRIFT[stock], (
        f"{stock}.__call__ of diffusers {diffusers.__version__} is not the one that "
        f"{PIPELINES.get(stock).__module__} follows: read what changed there, follow it in that "
        f"module, its adapter and pipelines/loop.py, then write {found} here"
    )


# Heads and plans ---------------------------------------------------------------------------------


def test_quality_with_a_silent_head_is_calibrated_cfg(case):
    pipe = case.pipe(weak_head=CondHead(case.name, 4))
    wanted = case.sample(case.stock_of(pipe), guidance_scale=1 + 1.5 * (SCALE - 1))
    close(case.sample(pipe, core2="quality"), wanted)


@pytest.mark.parametrize("make", [Case.with_tap, Case.with_adapter])
def test_all_slow_at_w2s_1_is_stock_cfg_for_any_head(case, make):
    pipe = make(case)
    stock = case.sample(case.stock_of(pipe))
    close(case.sample(pipe, core2=Core2Config(slow_steps=1.0, w2s_scale=1.0)), stock)
    assert far(case.sample(pipe, core2="quality"), stock)
    assert far(case.sample(pipe, core2="fast"), stock)


@pytest.mark.parametrize(
    ("make", "core2", "nfe"),
    [
        (Case.with_tap, "fast", 8),
        (Case.with_tap, "balanced", 10),
        (Case.with_tap, "quality", 16),
        (Case.with_adapter, "fast", 8),
        (Case.with_adapter, "balanced", 10),
        (Case.with_adapter, "quality", 24),
        (Case.pipe, CFG, 16),
        (Case.pipe, Core2Config(mode="cond"), 8),
    ],
)
def test_counted_evaluations_are_those_of_the_plan(case, make, core2, nfe):
    pipe = make(case)
    with count_nfe(case.denoiser_of(pipe)) as counter:
        images = case.sample(pipe, core2=core2, num_inference_steps=8)
    assert counter.per_sample(2) == pipe.core2_plan.nfe == nfe
    assert torch.isfinite(images).all()
    assert pipe.num_timesteps == 8


@pytest.mark.parametrize("make", [Case.with_tap, Case.with_adapter])
@pytest.mark.parametrize("core2", ["balanced", "quality"])
def test_an_image_does_not_depend_on_its_batch_mates(case, make, core2):
    pipe = make(case)
    both = case.sample(pipe, core2=core2)
    alone = [
        case.sample(pipe, seeds=(seed,), prompt=prompt, core2=core2)
        for seed, prompt in zip((1, 2), PROMPTS, strict=False)
    ]
    close(both, torch.cat(alone))


def test_no_guidance_needs_no_head_and_is_cond(case):
    pipe = case.pipe()
    ours = case.sample(pipe, core2="quality", guidance_scale=1.0)
    close(ours, case.sample(case.stock_of(pipe), guidance_scale=1.0))
    assert pipe.core2_plan.nfe == 5


def test_one_scale_a_step_is_what_a_callback_can_do_to_the_stock_pipeline(case):
    case.needs("live scale")
    pipe, scales = case.pipe(), (2.0, 6.0, 3.0, 5.0, 1.5)

    def schedule(pipe, i, t, tensors):
        pipe._guidance_scale = scales[min(i + 1, 4)]
        return tensors

    stock = case.sample(
        case.stock_of(pipe), guidance_scale=scales[0], callback_on_step_end=schedule
    )
    close(case.sample(pipe, core2=Core2Config(mode="cfg", guidance_scales=scales)), stock)


def test_guidance_may_begin_after_the_first_step(case):
    scales = (1.0, 1.0, 4.0, 4.0, 4.0)
    pipe = case.pipe()
    late = case.sample(pipe, core2=Core2Config(mode="cfg", guidance_scales=scales))
    assert pipe.core2_plan.nfe == 8
    assert far(late, case.sample(pipe, guidance_scale=1.0))


def test_no_hook_stays_on_the_denoiser_after_a_run_or_an_error(case):
    def fail(pipe, i, t, tensors):
        raise KeyError("from the callback")

    for pipe in (case.with_tap(), case.with_adapter()):
        network = case.denoiser_of(pipe)
        before = hooks(network)
        case.sample(pipe, core2="quality")
        assert hooks(network) == before
        with pytest.raises(KeyError, match="from the callback"):
            case.sample(pipe, core2="fast", callback_on_step_end=fail)
        assert hooks(network) == before
        assert torch.equal(case.sample(pipe), case.sample(case.stock_of(pipe)))


def test_a_negative_prompt_that_no_step_runs_is_reported(case, caplog):
    pipe = case.with_tap()
    with caplog.at_level(logging.WARNING):
        case.sample(pipe, core2="fast", negative_prompt=["dark", "dark"])
    assert "negative_prompt: it has no effect" in caplog.text
    caplog.clear()
    case.sample(pipe, core2="balanced", negative_prompt=["dark", "dark"])
    assert not caplog.text


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (None, {"core2": "fast"}, "weak head, got none: pass weak_head="),
        (None, {"core2": "quality"}, "weak head, got none"),
        (("", 16), {"core2": "fast"}, "channels"),
        (("other", 4), {"core2": "fast"}, "must be made for"),
        (None, {"core2": "fats"}, "did you mean 'fast'"),
        (None, {"core2": Core2Config(slow_steps=6)}, r"between 0 and the number of steps \(5\)"),
        (None, {"core2": CFG, "num_inference_steps": 0}, "at least 1, got 0"),
        (None, {"core2": CFG, "guidance_scale": float("nan")}, "finite"),
        (None, {"core2": CFG, "height": 15}, "divisible"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_encoded(case, head, options, message):
    if "height" in options:
        case.needs("divisible size")
    if head is not None:
        head = CondHead(head[0] or case.name, head[1])
    pipe = case.pipe(weak_head=head)
    with count_nfe(pipe.text_encoder) as counter, pytest.raises(ValueError, match=message):
        case.sample(pipe, **options)
    assert counter.calls == 0


def test_an_unknown_argument_is_a_type_error(case):
    with pytest.raises(TypeError, match="nonsense"):
        case.sample(case.pipe(), nonsense=1, core2=CFG)


def test_a_scale_outside_an_adapters_range_is_refused_before_anything_is_encoded(case):
    pipe = case.with_adapter()
    with (
        count_nfe(pipe.text_encoder) as counter,
        pytest.raises(ValueError, match="within 2.0 to 6"),
    ):
        case.sample(pipe, core2="fast", guidance_scale=9.0)
    assert counter.calls == 0


def test_non_finite_latents_stop_the_run_with_the_step(case):
    def poison(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * (float("nan") if i == 2 else 1)}

    with pytest.raises(RuntimeError, match=r"after step 2 of 5 \(sigma"):
        case.sample(case.pipe(), core2=CFG, callback_on_step_end=poison)


# Callbacks ---------------------------------------------------------------------------------------


def recorder(into):
    def record(pipe, i, t, tensors):
        into.append((i, float(t), {k: v.clone() for k, v in tensors.items()}))
        return tensors

    return record


@pytest.mark.parametrize("core2", [CFG, "fast"])
def test_callbacks_see_the_stock_tensors(case, core2):
    pipe, ours, stock = case.with_tap(), [], []
    options = {
        "callback_on_step_end_tensor_inputs": list(case.names),
        "negative_prompt": ["dark", "dim"],
    }
    case.sample(pipe, core2=core2, callback_on_step_end=recorder(ours), **options)
    case.sample(case.stock_of(pipe), callback_on_step_end=recorder(stock), **options)
    assert [step[:2] for step in ours] == [step[:2] for step in stock]
    for (_, _, a), (_, _, b) in zip(ours, stock, strict=True):
        assert tuple(a) == tuple(b) == case.names
        assert all(torch.equal(a[name], b[name]) for name in case.names[1:])
        if core2 is CFG:
            close(a["latents"], b["latents"])


def edit_latents(pipe, i, t, tensors):
    return {"latents": tensors["latents"] * 0.9}


def edit_embeds(pipe, i, t, tensors):
    edited = dict(tensors)
    edited["prompt_embeds"] = tensors["prompt_embeds"].flip(0)
    return edited


def edit_latents_in_place(pipe, i, t, tensors):
    tensors["latents"].mul_(0.9)
    return {}


def edit_embeds_in_place(pipe, i, t, tensors):
    tensors["prompt_embeds"].mul_(0.5 if i == 1 else 1)
    return tensors


IN_PLACE = [edit_latents_in_place, edit_embeds_in_place]


def edit_scale(pipe, i, t, tensors):
    if i == 1:
        pipe._guidance_scale = 2.0
    return tensors


def cut_off(pipe, i, t, tensors):
    if i == 2:
        pipe._guidance_scale = 0.0
        tensors = {k: v.chunk(2)[1] if k != "latents" else v for k, v in tensors.items()}
    return tensors


def stop(pipe, i, t, tensors):
    pipe._interrupt = i == 2
    return tensors


@pytest.mark.parametrize("edit", [edit_latents, edit_embeds, edit_scale, cut_off, *IN_PLACE])
def test_callbacks_that_edit_act_as_in_the_stock_pipeline(case, edit):
    if edit in (edit_scale, cut_off):
        case.needs("live scale")
    pipe = case.pipe()
    options = {
        "callback_on_step_end": edit,
        "callback_on_step_end_tensor_inputs": list(case.names),
    }
    ours = case.sample(pipe, core2=CFG, **options)
    close(ours, case.sample(case.stock_of(pipe), **options))
    assert far(ours, case.sample(pipe, core2=CFG))


@pytest.mark.parametrize("edit", IN_PLACE)
def test_edits_in_place_act_in_inference_mode_too(case, edit):
    """Tensors made in this mode do not count their edits."""
    names = {"callback_on_step_end_tensor_inputs": list(case.names)}
    with torch.inference_mode():
        ours = case.sample(case.pipe(), core2=CFG, callback_on_step_end=edit, **names)
        stock = case.sample(case.stock_of(case.pipe()), callback_on_step_end=edit, **names)
    close(ours, stock)


@pytest.mark.parametrize("edit", [edit_latents, edit_embeds, edit_scale, cut_off, stop])
def test_without_core2_callbacks_act_on_the_stock_call_bit_for_bit(case, edit):
    if edit in (edit_scale, cut_off):
        case.needs("live scale")
    pipe = case.with_tap()
    options = {
        "callback_on_step_end": edit,
        "callback_on_step_end_tensor_inputs": list(case.names),
    }
    ours = case.sample(pipe, **options)
    assert torch.equal(ours, case.sample(case.stock_of(pipe), **options))
    assert far(ours, case.sample(pipe))


def test_the_stock_cutoff_callback(case):
    case.needs("live scale")
    pipe = case.pipe()
    cutoff = {"callback_on_step_end": case.cutoff(None, cutoff_step_index=2)}
    with count_nfe(case.denoiser_of(pipe)) as counter:
        ours = case.sample(pipe, seeds=(1,), core2=CFG, **cutoff)
    assert counter.per_sample(1) == 2 * 3 + 2
    close(ours, case.sample(case.stock_of(pipe), seeds=(1,), **cutoff))


def set_scale(case, value):
    """Return a callback that changes the scale after the second step."""

    def change(pipe, i, t, tensors):
        if i == 1:
            setattr(pipe, f"_{case.scale}", value)
        return tensors

    return change


@pytest.mark.parametrize("make", [Case.with_tap, Case.with_adapter])
@pytest.mark.parametrize("core2", ["fast", "quality"])
def test_a_scale_that_a_callback_sets_is_the_heads_from_the_next_step_on(case, make, core2):
    pipe = make(case)
    changed = case.sample(pipe, core2=core2, callback_on_step_end=set_scale(case, 6.0))
    planned = replace(PRESETS[core2], guidance_scales=(SCALE, SCALE, 6.0, 6.0, 6.0))
    close(changed, case.sample(pipe, core2=planned))
    assert far(changed, case.sample(pipe, core2=core2))


@pytest.mark.parametrize("core2", ["fast", "quality"])
@pytest.mark.parametrize("scale", [1.5, 9.0])
def test_a_scale_that_an_adapter_was_not_made_for_stops_the_run(case, core2, scale):
    pipe = case.with_adapter()
    network = case.denoiser_of(pipe)
    before, plain = hooks(network), case.sample(pipe, core2=core2)
    with (
        count_nfe(network) as counter,
        pytest.raises(ValueError, match=f"within 2.0 to 6.0, .* got {scale}"),
    ):
        case.sample(pipe, core2=core2, callback_on_step_end=set_scale(case, scale))
    assert counter.calls == {"fast": 2, "quality": 5}[core2]  # the third step got no guided pass
    assert hooks(network) == before
    assert torch.equal(case.sample(pipe, core2=core2), plain)


@pytest.mark.parametrize("core2", ["fast", "quality"])
def test_leaving_only_the_prompts_embeddings_turns_guidance_off(case, core2):
    case.needs("paired rows")

    def shrink(pipe, i, t, tensors):
        rows = len(tensors["latents"])
        return {k: v[-rows:] for k, v in tensors.items()}

    pipe = case.with_tap()
    options = {
        "callback_on_step_end": shrink,
        "callback_on_step_end_tensor_inputs": list(case.names),
    }
    cut = case.sample(pipe, core2=core2, **options)
    first = pipe.core2_plan.steps[0]
    scales = (SCALE, 1.0, 1.0, 1.0, 1.0)
    slow = 1 if first.kind == "slow" else 0
    close(cut, case.sample(pipe, core2=Core2Config(slow_steps=slow, guidance_scales=scales)))


@pytest.mark.parametrize("core2", [CFG, "fast", "quality"])
def test_interrupt_ends_the_run_with_the_latents_as_they_are(case, core2):
    states = []

    def record_and_stop(pipe, i, t, tensors):
        states.append(tensors["latents"])
        return stop(pipe, i, t, tensors)

    pipe = case.with_tap()
    ours = case.sample(pipe, core2=core2, callback_on_step_end=record_and_stop)
    assert len(states) == 3
    assert torch.equal(ours, states[-1])
    if core2 is CFG:
        close(ours, case.sample(case.stock_of(pipe), callback_on_step_end=stop))


def test_a_callback_may_only_ask_for_the_stock_names(case):
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        case.sample(
            case.pipe(),
            core2=CFG,
            callback_on_step_end=edit_latents,
            callback_on_step_end_tensor_inputs=["noise_pred"],
        )


# Saving and sharing ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Case.with_tap, Case.with_adapter])
def test_save_and_load_keep_the_head_inside(case, make, tmp_path):
    pipe = make(case)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == case.stock
    assert (tmp_path / "weak_head" / "diffusion_pytorch_model.safetensors").is_file()
    again = type(pipe).from_pretrained(tmp_path)
    assert type(again.weak_head) is type(pipe.weak_head)
    assert torch.equal(case.sample(again, core2="fast"), case.sample(pipe, core2="fast"))
    for stock_class in (case.stock_class, DiffusionPipeline):
        stock = stock_class.from_pretrained(tmp_path, **case.missing)
        assert type(stock) is case.stock_class
        assert torch.equal(case.sample(stock), case.sample(pipe))


def test_an_index_that_is_uploaded_names_the_stock_class(case, tmp_path, monkeypatch):
    """The folder is what the upload would take; only the hub itself is left out."""
    sent = []
    monkeypatch.setattr(diffusers.configuration_utils, "create_repo", lambda *_a, **_k: Repo)
    pipe = case.pipe()
    pipe._upload_folder = lambda folder, *_args, **_kwargs: sent.extend(
        (file.name, json.loads(file.read_text())["_class_name"]) for file in Path(folder).iterdir()
    )
    pipe.save_config(str(tmp_path), push_to_hub=True)
    assert sent == [("model_index.json", case.stock)]


class Repo:
    repo_id = "owner/name"


def test_a_stock_folder_loads_without_and_with_a_head(case, tmp_path):
    pipe = case.pipe()
    case.stock_of(pipe).save_pretrained(tmp_path)
    assert type(pipe).from_pretrained(tmp_path).weak_head is None
    head = CondHead(case.name, 4)
    again = type(pipe).from_pretrained(tmp_path, weak_head=head)
    assert again.weak_head is head
    case.sample(again, core2="fast")


def test_from_pipe_shares_the_parts_and_keeps_each_dtype(case):
    ours = type(case.pipe())
    stock = case.stock_of(case.pipe()).to(torch.bfloat16)
    stock.vae.float()
    pipe = ours.from_pipe(stock)
    assert type(pipe) is ours
    network = case.denoiser_of(pipe)
    assert network is case.denoiser_of(stock)
    assert (network.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.weak_head is None
    pipe.to(torch.float32)
    assert network.dtype == torch.float32


def test_from_pipe_takes_a_head_or_that_of_the_other_pipeline_and_an_explicit_dtype(case):
    pipe, other = case.with_tap(), CondHead(case.name, 4)
    ours = type(pipe)
    assert ours.from_pipe(pipe).weak_head is pipe.weak_head
    assert ours.from_pipe(pipe, weak_head=other).weak_head is other
    cast = ours.from_pipe(pipe, dtype=torch.bfloat16)
    assert case.denoiser_of(cast).dtype == torch.bfloat16


def test_diffusers_auto_classes_switch_tasks_from_ours_as_from_the_stock_class(case):
    pipe = case.with_tap()
    stock = case.stock_of(pipe)
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        other = auto.from_pipe(pipe)
        assert type(other) is type(auto.from_pipe(stock))
        assert case.denoiser_of(other) is case.denoiser_of(pipe)
    again = AutoPipelineForText2Image.from_pipe(pipe)
    assert type(again) is type(pipe)
    assert again.weak_head is pipe.weak_head
    assert type(AutoPipelineForText2Image.from_pipe(stock)) is case.stock_class


def test_single_files_load_by_the_stock_method(case):
    ours = type(case.pipe())
    assert issubclass(ours, FromSingleFileMixin)
    assert ours.from_single_file.__func__ is case.stock_class.from_single_file.__func__


def test_offload_leaves_the_head_where_the_denoiser_runs(case):
    """A head in the chain would swap the denoiser out on every step."""
    for pipe in (case.with_tap(), case.with_adapter()):
        wanted = case.sample(pipe, core2="balanced")
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(case.sample(pipe, core2="balanced"), wanted)
        hooked = {id(hook.model) for hook in pipe._all_hooks}
        chain = set(case.stock_class.model_cpu_offload_seq.split("->"))
        parts = {name: part for name, part in pipe.components.items() if name in chain and part}
        assert hooked == {id(part) for part in parts.values()}
        assert not hasattr(pipe.weak_head, "_hf_hook")


def test_a_file_of_ours_is_a_custom_pipeline(case, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    pipe = case.with_tap()
    pipe.save_pretrained(tmp_path / "model")
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "model",
        custom_pipeline=inspect.getfile(type(pipe)),
        trust_remote_code=True,
        **case.missing,
    )
    assert type(again).__module__ == f"diffusers_modules.local.{case.name}"
    assert torch.equal(case.sample(again, core2="fast"), case.sample(pipe, core2="fast"))


# Adapters ----------------------------------------------------------------------------------------


def test_the_familys_noise_is_what_the_stock_call_draws(case):
    pipe = case.pipe()
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    latents = pipe.family.noise(pipe, generators)
    x = pipe.family.schedule(pipe, 5, (8, 8)).unpack(latents)
    assert tuple(x.shape[1:]) == pipe.family.latent_shape(pipe)
    given = case.sample(pipe, latents=latents, generator=None, core2=CFG)
    close(given, case.sample(pipe, core2=CFG))


def test_the_schedules_scales_lead_from_noise_to_the_pipelines_latents(case):
    """Bare parts, as Collect uses them: noise, schedule, denoiser; no pipeline call."""
    pipe = case.pipe()
    length = {k: v for k, v in case.options.items() if k == "max_sequence_length"}
    cond, _ = pipe.family.encode(pipe, PROMPTS[:2], **length)
    schedule = pipe.family.schedule(pipe, 5, (8, 8))
    denoiser = pipe.family.denoiser(pipe)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    x = schedule.noise_scale * schedule.unpack(pipe.family.noise(pipe, generators))
    sigmas = schedule.sigmas

    def predict(x, i):
        return denoiser(x, torch.full((2,), float(sigmas[i])), cond)

    latents = schedule.to_pipeline(schedule.solver(predict, x, sigmas), 5)
    close(latents, case.sample(case.stock_of(pipe), guidance_scale=1.0))
    image = pipe.family.decode(pipe, latents)
    unguided = {"guidance_scale": 1.0, "output_type": "pt"}
    wanted = case.sample(case.stock_of(pipe), **unguided)
    close((image / 2 + 0.5).clamp(0, 1).detach(), wanted)
