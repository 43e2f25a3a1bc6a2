"""Collect from stock pipelines, and heads trained on it.

Truth: our own Collect, the latents that the stock call shows its callback, the network itself.
"""

from __future__ import annotations

import functools
import sys
from functools import partial

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from core2_sampler import attached, testing
from core2_sampler.attachment.checks import check_kind
from core2_sampler.attachment.collecting import collect_stock, replay
from core2_sampler.attachment.networks import find_networks
from core2_sampler.cli.collect import CollectOptions, run_collect
from core2_sampler.cli.reflect import ReflectOptions, run_reflect
from core2_sampler.cli.stock import StockModel, read_call
from core2_sampler.collect import CollectConfig, Job, collect, make_units
from core2_sampler.config import ConfigError, load_config
from core2_sampler.nfe import count_nfe
from core2_sampler.reflect import ReflectConfig, reflect
from core2_sampler.testing.pipelines import ready, seeded
from core2_sampler.testing.stock import STOCK
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.adapter import AdapterHead
from core2_sampler.weak_heads.conv import ConvHead
from core2_sampler.weak_heads.tap import TapHead

SCALE, SEEDS = 3.0, (1, 2)
JOBS = [Job("a red circle", "one", SEEDS[0]), Job("two blue rings", "two", SEEDS[1])]
CONFIG = {"guidance_scales": (SCALE,)}


def arguments(stock):
    """Return the call of a tiny pipeline for a unit; embeddings stand for the two prompts."""
    texts = ("prompt", "negative_prompt")

    def of(records):
        rows = [SEEDS.index(record.seed) for record in records]

        def pick(x):
            listed = isinstance(x, list)
            return [x[i] for i in rows] if listed else x[rows] if torch.is_tensor(x) else x

        call = stock.arguments().items()
        given = {n: pick(x) for n, x in call if n not in texts or x is None}
        bare = {"prompt": None} if "prompt_embeds" in given else {}
        return {**given, **bare, "num_inference_steps": stock.steps}

    return of


@functools.cache
def built(name):
    return STOCK[name].pipe()


def run(stock, pipe, store, jobs=JOBS, policy=None, **config):
    kept = CollectConfig(**{**CONFIG, **config})
    return collect_stock(pipe, arguments(stock), jobs, store, kept, policy=policy)


def rows_of(store, name):
    rows = store.rows(lambda i: i == name)
    return rows.take(torch.argsort(rows.take(torch.arange(len(rows))).step))


def close(ours, truth, share=2e-3):
    """Compare what was stored in halves, relative to the largest value."""
    torch.testing.assert_close(ours, truth, atol=share * float(truth.abs().max()), rtol=0)


def trained(head):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return head


PREFIXES = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}


@pytest.mark.parametrize("family", PREFIXES)
def test_a_stock_pipeline_stores_what_our_own_stores(family, tmp_path):
    own = getattr(testing, f"tiny_{family}_pipeline")()
    parts = {k: v for k, v in own.components.items() if k != "weak_head"}
    stock = STOCK[f"{PREFIXES[family]}Pipeline"]
    pipe = getattr(diffusers, stock.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = TrajectoryStore(tmp_path / "own"), TrajectoryStore(tmp_path / "stock")
    run(stock, pipe, theirs, features=True)
    schedule = own.family.schedule(own, stock.steps, (8, 8))
    length = {} if family == "sdxl" else {"max_sequence_length": 8}
    collect(
        own.family.denoiser(own),
        partial(own.family.encode, own, **length),
        JOBS,
        ours,
        CollectConfig(**CONFIG, features=True),
        sigmas=schedule.sigmas,
        latent_shape=(4, 8, 8),
        noise_scale=schedule.noise_scale,
    )
    assert theirs.records() == ours.records()
    torch.testing.assert_close(theirs.settings(0)["sigmas"], ours.settings(0)["sigmas"])
    for name in ("one", "two"):
        left, right = rows_of(theirs, name), rows_of(ours, name)
        for key, truth in right.tensors().items():
            close(left.tensors()[key], truth)
        assert float(right.gap.abs().max()) > 0.05 and right.features is not None
    theirs.verify()


ANEW = {
    "StableDiffusionControlNetPipeline": "down_block_additional_residuals",
    "StableDiffusionXLControlNetPipeline": "down_block_additional_residuals",
    "StableDiffusion3ControlNetPipeline": "block_controlnet_hidden_states",
    "FluxControlNetPipeline": "controlnet_block_samples",
    "FluxKontextPipeline": "these latents and nothing else",
    "ZImagePipeline": "which takes lists",
    "ZImageImg2ImgPipeline": "which takes lists",
}
"""Pipelines whose passes cannot be made again, and why."""


def led_to(network, rows, scales=SCALE):
    """Return where steps of Euler's by CFG lead from the stored states, and the next of these."""
    scales = torch.as_tensor(scales).expand(len(rows))[:-1, None, None, None]
    sigma = rows.sigma[:, None, None, None]
    x = rows.x * (1 + sigma**2).sqrt() if network.family.endswith("epsilon") else rows.x
    sign = -1 if network.layout.to_data else 1
    guided = rows.cond[:-1] + (scales - 1) * rows.gap[:-1]
    return x[:-1] + sign * sigma.diff(dim=0) * guided, x[1:]


TASKS = (
    "StableDiffusionImg2Img",
    "StableDiffusionControlNet",
    "StableDiffusionXLImg2Img",
    "StableDiffusionXLInpaint",
    "StableDiffusionXLControlNet",
    "StableDiffusion3Img2Img",
    "StableDiffusion3Inpaint",
    "StableDiffusion3ControlNet",
    "FluxImg2Img",
    "FluxInpaint",
    "FluxControlNet",
    "FluxKontext",
    "ZImageImg2Img",
)
EACH = {type(stock.network(built(name))): name for name, stock in reversed(STOCK.items())}


@pytest.mark.parametrize("name", [*EACH.values(), *(f"{task}Pipeline" for task in TASKS)])
def test_a_pass_can_be_made_again_from_what_was_stored(name, tmp_path):
    stock, store = STOCK[name], TrajectoryStore(tmp_path)
    pipe = built(name)
    assert run(stock, pipe, store) == 2
    rows = [rows_of(store, key) for key in ("one", "two")]
    assert [each.step.tolist() for each in rows] == [[0, 1, 2]] * 2

    @torch.no_grad()
    def again(each, prompt):
        record = next(iter(store.records().values()))
        return replay(pipe, arguments(stock), record)(each.x, each.sigma, prompt.conditioning())

    if name in ANEW or "Img2Img" in name:
        for each in rows:
            close(*led_to(find_networks(pipe)[0], each))
    if name in ANEW:
        with pytest.raises(ValueError, match=ANEW[name]):
            again(rows[0], rows[0])
        return
    for each in rows:
        close(again(each, each), each.cond, 1e-2)
    own, other = again(rows[0], rows[0]), again(rows[0], rows[1])
    assert float((other - own).abs().max()) > 1e-3 * float(own.abs().max())


def test_the_gap_is_that_of_the_negative_prompt(tmp_path):
    stock, store = STOCK["PixArtSigmaPipeline"], TrajectoryStore(tmp_path)
    pipe = built(stock.name)
    run(stock, pipe, store)
    rows = rows_of(store, "two")
    record = next(iter(store.records().values()))
    negative = stock.arguments()["negative_prompt_embeds"][1:].expand(len(rows), -1, -1)
    with torch.no_grad():
        uncond = replay(pipe, arguments(stock), record)(
            rows.x, rows.sigma, Conditioning(negative, rows.pooled, rows.extra)
        )
    close(rows.cond - uncond, rows.gap, 1e-2)


def visited(stock, pipe, scale):
    """Return the states of a run after its first, [steps - 1, B, ...]."""
    states = []

    def keep(_pipe, _i, _t, tensors):
        states.append(tensors["latents"].clone())
        return {}

    prompts = {"prompt": [job.prompt for job in JOBS]}
    if stock.scale != "guidance_scale":
        prompts["negative_prompt"] = [""] * 2
    else:
        prompts["negative_prompt"] = None
    stock.sample(pipe, scale, callback_on_step_end=keep, **prompts)
    return torch.stack(states[:-1])


def in_rows(stock, states):
    if stock.name == "FluxPipeline":
        return torch.stack([diffusers.FluxPipeline._unpack_latents(x, 8, 8, 1) for x in states])
    return states


DRIVEN = [
    ("StableDiffusionPipeline", "cfg"),
    ("StableDiffusionPipeline", "adapter"),
    ("FluxPipeline", "cfg"),
    ("FluxPipeline", "adapter"),
    ("FluxPipeline", "tap"),
]


@pytest.mark.parametrize(("name", "kind"), DRIVEN)
def test_the_states_are_those_of_the_run_that_drives(name, kind, tmp_path):
    stock = STOCK[name]
    pipe, store, head = built(name), TrajectoryStore(tmp_path), None
    if kind != "cfg":
        made = {"adapter": (AdapterHead, {"scale_range": (2.0, 4.0)}), "tap": (TapHead, {})}
        head_class, options = made[kind]
        network = find_networks(pipe)[0]
        head = trained(head_class.for_denoiser(network.denoiser or network, **options))
    guided = TrajectoryStore(tmp_path / "cfg")
    run(stock, pipe, guided)
    if head is None:
        store, states = guided, visited(stock, pipe, SCALE)
    else:
        run(stock, pipe, store, policy=head, round=1)
        with attached(pipe, head=head, core2="fast"):
            states = visited(stock, pipe, SCALE)
        assert float((rows_of(store, "one").x - rows_of(guided, "one").x).abs().max()) > 0.05
    for row, key in enumerate(("one", "two")):
        close(rows_of(store, key).x[1:], in_rows(stock, states)[:, row])
    first = [rows_of(each, "one").gap[:1] for each in (store, guided)]
    close(*first)


def test_a_finished_run_is_not_repeated_and_a_part_is_completed(tmp_path):
    stock, store = STOCK["StableDiffusionImg2ImgPipeline"], TrajectoryStore(tmp_path)
    pipe = built(stock.name)
    assert run(stock, pipe, store, JOBS[:1], steps_per_trajectory=2) == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    with count_nfe(pipe.unet) as counter:
        assert run(stock, pipe, store, JOBS[:1], steps_per_trajectory=2) == 0
    assert counter.calls == 0  # the pass that tells how the network is called comes to no end
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    assert run(stock, pipe, store, steps_per_trajectory=2) == 1
    assert [len(rows_of(store, key)) for key in ("one", "two")] == [2, 2]
    with pytest.raises(ValueError, match="another round"):
        run(stock, pipe, store, guidance_scales=(5.0,), steps_per_trajectory=2)
    assert "_core2_attachment" not in vars(pipe)


def test_a_head_that_was_trained_on_it_guides(tmp_path):
    """One pass a step comes nearer to CFG than the prompt alone, for prompts it never saw."""
    stock, store = STOCK["StableDiffusionPipeline"], TrajectoryStore(tmp_path)
    pipe = built(stock.name)
    jobs = [Job(f"{a} {b}", a + b, SEEDS[0]) for a in "abcd" for b in "fgh"]
    run(stock, pipe, store, jobs)
    record = next(iter(store.records().values()))
    denoiser = replay(pipe, arguments(stock), record)
    head = AdapterHead.for_denoiser(denoiser, reference_scale=SCALE, scale_range=(SCALE, SCALE))
    config = ReflectConfig(
        steps=30, batch_size=8, learning_rate=1e-2, precision="fp32", evaluations=1
    )
    report = reflect(head, store.source(0.25), config, denoiser=denoiser)
    assert report.held_out[-1][1] < 0.8
    new = {"prompt": ["k l", "m n"], "negative_prompt": None}
    wanted, unguided = (stock.sample(pipe, scale, **new) for scale in (SCALE, 1.0))
    with attached(pipe, head=head, core2="fast"):
        ours = stock.sample(pipe, SCALE, **new)
        assert pipe.core2_plan.nfe == 3
    assert float((ours - wanted).square().mean() / (unguided - wanted).square().mean()) < 0.8


def test_the_command_line_calls_it_as_its_file_says(tmp_path):
    pipe, store = built("StableDiffusionImg2ImgPipeline"), TrajectoryStore(tmp_path / "data")
    text = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    text.save_pretrained(tmp_path / "model")
    STOCK["StableDiffusionXLInpaintPipeline"].arguments()["image"].save(tmp_path / "start.png")
    file = tmp_path / "call.yaml"
    file.write_text(f"image: {tmp_path}/start.png\nstrength: 0.75\nnegative_prompt: dim\n")
    model = StockModel(
        str(tmp_path / "model"), "StableDiffusionImg2ImgPipeline", read_call("auto", file), 4
    )
    call = model.arguments()(make_units(JOBS, CollectConfig(**CONFIG))[0])
    assert call["negative_prompt"] == ["dim"] * 2 and len(call["image"]) == 2
    assert (call["strength"], call["num_inference_steps"]) == (0.75, 4)
    loaded = model.load("cpu", "fp32")
    collect_stock(
        loaded, model.arguments(), JOBS, store, CollectConfig(**CONFIG), about=model.facts()
    )
    assert StockModel.of_round(store.settings(0)) == model
    assert len(rows_of(store, "one")) == 3
    auto = StockModel(model.model, "auto", {}, 4).load("cpu", "auto")
    assert type(auto) is diffusers.StableDiffusionPipeline
    with pytest.raises(ConfigError, match="argument of StableDiffusionPipeline: got 'strength'"):
        StockModel(model.model, "auto", {"strength": 0.75}, 4).load("cpu", "auto")
    with pytest.raises(ConfigError, match="a pipeline class of diffusers, got 'DDIMScheduler'"):
        StockModel(model.model, "DDIMScheduler", {}, 4).load("cpu", "fp32")
    with pytest.raises(ConfigError, match="call has no effect without --pipeline"):
        read_call(None, file)


def test_a_call_that_could_not_be_made_is_refused_before_anything_is_loaded(tmp_path):
    file = tmp_path / "call.yaml"
    for name, option in (("prompt", "prompts"), ("num_inference_steps", "steps")):
        file.write_text(f"strength: 0.75\n{name}: 3\n")
        with pytest.raises(ConfigError, match=f"{name} must be left to --{option}, got 3"):
            read_call("auto", file)
    typo = StockModel("no/model", "StableDiffusionImg2ImgPipeline", {"strenght": 0.75}, 4)
    with pytest.raises(ConfigError, match="got 'strenght'; did you mean 'strength'?"):
        typo.load("cpu", "fp32")


def test_what_cannot_be_collected_is_refused_before_anything_is_stored(tmp_path):
    stock, store = STOCK["StableDiffusionPipeline"], TrajectoryStore(tmp_path)
    pipe = built(stock.name)
    with pytest.raises(ValueError, match="guidance_scales must be above 1"):
        run(stock, pipe, store, guidance_scales=(1.0, 3.0))
    with pytest.raises(ValueError, match="features are known of sdxl, sd3 and flux"):
        run(stock, pipe, store, features=True)
    with pytest.raises(ValueError, match="generator must be left to Collect"):
        collect_stock(pipe, lambda _: {"generator": None}, JOBS, store, CollectConfig(**CONFIG))
    parts = {
        k: v
        for k, v in testing.tiny_sdxl_pipeline(time_cond_proj_dim=8).components.items()
        if k != "weak_head"
    }
    distilled = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    with pytest.raises(ValueError, match="must ask for the negative prompt"):
        run(STOCK["StableDiffusionXLPipeline"], distilled, store)
    assert not store.records() and not list(tmp_path.iterdir())


def test_prompts_of_another_length_are_refused_before_they_are_stored(tmp_path):
    """CogView4 pads to the longest prompt of a call; its call is given embeddings, so by hand."""
    stock, store = STOCK["CogView4Pipeline"], TrajectoryStore(tmp_path)

    def padded(records):
        call, more = arguments(stock)(records), 16 * (records[0].seed == SEEDS[1])
        texts = ("prompt_embeds", "negative_prompt_embeds")
        return {**call, **{name: F.pad(call[name], (0, 0, more, 0)) for name in texts}}

    kept = CollectConfig(**CONFIG, batch_size=1)
    with pytest.raises(ValueError, match="as many tokens as the first, 8, got 24"):
        collect_stock(built(stock.name), padded, JOBS, store, kept)
    assert [key.prompt_id for key in store.records()] == ["one"]


def test_prompts_that_a_mask_tells_from_filling_may_differ_in_length(tmp_path):
    """Qwen-Image fills prompts up to the longest of a call: with junk here, for all to hear."""
    stock, lengths = STOCK["QwenImagePipeline"], dict(zip(SEEDS, (5, 8), strict=True))
    pipe = built(stock.name)

    def filled(records):
        call, size = arguments(stock)(records), [lengths[record.seed] for record in records]
        mask = torch.arange(max(size)) < torch.tensor(size)[:, None]
        told = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            told[name] = call[name][:, : max(size)].masked_fill(~mask[..., None], 7.0)
        return {**call, **told}

    stores = []
    for size in (1, 2):
        store = TrajectoryStore(tmp_path / str(size))
        collect_stock(pipe, filled, JOBS, store, CollectConfig(**CONFIG, batch_size=size))
        stores.append(store)
    record = next(iter(store.records().values()))
    for name, length in zip(("one", "two"), lengths.values(), strict=True):
        alone, beside = (rows_of(each, name) for each in stores)
        assert alone.prompt_embeds.shape[1] == beside.prompt_embeds.shape[1] == length
        for key in ("prompt_embeds", "x", "cond", "gap"):
            close(getattr(beside, key), getattr(alone, key))
    both = store.rows().take(torch.arange(6))
    assert sorted(both.extra["encoder_hidden_states_mask"].sum(1).tolist()) == [5] * 3 + [8] * 3
    with torch.no_grad():
        again = replay(pipe, filled, record)(both.x, both.sigma, both.conditioning())
    close(again, both.cond, 1e-2)


def test_a_store_without_the_mask_of_the_tokens_is_refused(tmp_path):
    """As stores of Qwen-Image were before they kept it: one prompt of the two is made such."""
    stock, store = STOCK["QwenImagePipeline"], TrajectoryStore(tmp_path)
    pipe = built(stock.name)
    run(stock, pipe, store, JOBS[:1])
    record = next(iter(store.records().values()))
    assert (
        replay(pipe, arguments(stock), record, store).network.family
        == "QwenImageTransformer2DModel"
    )
    path = tmp_path / "prompts" / record.prompt_file
    tensors = load_file(path)
    del tensors["extra.encoder_hidden_states_mask"]
    save_file(tensors, path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="without a mask, of an older version"):
        run(stock, pipe, store)
    with pytest.raises(ValueError, match="collect into another folder"):
        replay(pipe, arguments(stock), record, store)
    assert sorted(tmp_path.rglob("*")) == before


def qwen_image(folder):
    """Save Qwen-Image in miniature, with a text encoder of its own class."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    text = {
        "vocab_size": 1000,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    parts = {**STOCK["QwenImagePipeline"].parts(), "text_encoder": encoder, "vae": vae}
    parts["tokenizer"] = testing.tiny_sdxl_pipeline().tokenizer
    diffusers.QwenImagePipeline(**parts).save_pretrained(folder)


def test_the_command_line_takes_prompts_of_qwen_image_of_any_length(tmp_path):
    qwen_image(tmp_path / "model")
    texts = ["a", "a red circle", "two blue rings over a green square"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    (tmp_path / "call.yaml").write_text("height: 64\nwidth: 64\n")
    names = {"output": "data", "model": "model", "prompts": "prompts.txt", "call": "call.yaml"}
    given = {name: str(tmp_path / file) for name, file in names.items()}
    options = {"pipeline": "QwenImagePipeline", "steps": 2, "device": "cpu", "batch_size": 2}
    run_collect(load_config(CollectOptions, given={**given, **options}))
    store = TrajectoryStore(given["output"])
    rows = store.rows().take(torch.arange(6))
    lengths = rows.extra["encoder_hidden_states_mask"].sum(1).unique()
    assert len(lengths) == 3 and lengths[-1] == rows.prompt_embeds.shape[1]
    store.verify()


def test_what_is_told_of_each_token_is_refused_before_anything_is_stored(tmp_path):
    stock, store = STOCK["WanPipeline"], TrajectoryStore(tmp_path)
    pipe = diffusers.WanPipeline(**stock.parts(), expand_timesteps=True)
    with pytest.raises(ValueError, match="one timestep for each sample"):
        run(stock, pipe, store)
    assert not list(tmp_path.iterdir())


def test_the_embedded_guidance_of_flux_can_be_chosen_and_that_of_cfg_cannot(tmp_path):
    stock, store = STOCK["FluxPipeline"], TrajectoryStore(tmp_path)

    def chosen(records, **scales):
        return {**arguments(stock)(records), **scales}

    kept, pipe = CollectConfig(**CONFIG), built(stock.name)
    with pytest.raises(ValueError, match="true_cfg_scale must be left to Collect, got 2.0"):
        collect_stock(pipe, partial(chosen, true_cfg_scale=2.0), JOBS, store, kept)
    collect_stock(pipe, partial(chosen, guidance_scale=2.0), JOBS, store, kept)
    assert rows_of(store, "two").extra["guidance"].tolist() == [2.0] * 3


EIGHT = [Job(f"p{i}", f"p{i}", SEEDS[i % 2]) for i in range(8)]


def learns(stock, pipe, store, denoiser, **options):
    """Return a head on outputs, once it has come nearer to CFG than the prompt alone."""
    head = ConvHead.for_denoiser(denoiser, widths=(32, 32))
    config = ReflectConfig(
        steps=30, batch_size=8, learning_rate=1e-2, precision="fp32", evaluations=1
    )
    report = reflect(head, store.source(0.3), config, denoiser=denoiser)
    assert report.held_out[-1][1] < 0.95  # untrained it is 1
    scale = SCALE - find_networks(pipe)[0].layout.scale_offset
    wanted, unguided = (stock.sample(pipe, each, **options) for each in (scale, stock.unguided))
    with attached(pipe, head=head, core2="fast"):
        ours = stock.sample(pipe, scale, **options)
        assert pipe.core2_plan.nfe == 3
    assert float((ours - wanted).square().mean() / (unguided - wanted).square().mean()) < 0.95
    return head


@pytest.mark.parametrize("name", ["QwenImagePipeline", "ZImagePipeline", "FluxKontextPipeline"])
def test_a_head_on_outputs_needs_no_pass_to_be_made_again(name, tmp_path):
    """A trained one comes nearer to CFG than the prompt alone."""
    stock, store = STOCK[name], TrajectoryStore(tmp_path)
    pipe = built(name)
    run(stock, pipe, store, EIGHT)
    record = next(iter(store.records().values()))
    learns(stock, pipe, store, replay(pipe, arguments(stock), record))


def said_in_turn(pipe, rows):
    """Return what the two networks say of the second prompt, and of its negative."""
    networks, times = (pipe.transformer, pipe.transformer_2), rows.extra["timestep"]
    assert [int(t < 800) for t in times] == [0, 1, 1]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds = STOCK["WanPipeline"].arguments()[name][1:]
        with torch.no_grad():
            passes = [
                networks[int(t < 800)](x.view(1, 4, 2, 8, 8), t[None], embeds, return_dict=False)[0]
                for x, t in zip(rows.x, times, strict=True)
            ]
        yield torch.cat(passes).flatten(2, 3)


def test_two_networks_are_collected_in_turn(tmp_path):
    """Wan 2.2. Truth: each network, called by hand, and Euler's steps, each at its scale."""
    stock, store = STOCK["WanPipeline"], TrajectoryStore(tmp_path)
    with seeded(0):
        parts, other = stock.parts(), stock.parts()["transformer"]
        pipe = ready(diffusers.WanPipeline(**parts, transformer_2=other, boundary_ratio=0.8))

    def call(records):
        return {**arguments(stock)(records), "guidance_scale_2": 2.0}

    collect_stock(pipe, call, EIGHT, store, CollectConfig(**CONFIG))
    rows = rows_of(store, "p1")
    close(*led_to(find_networks(pipe)[0], rows, (SCALE, 2.0, 2.0)))
    denoiser = replay(pipe, call, next(iter(store.records().values())))
    head = learns(stock, pipe, store, denoiser, guidance_scale_2=2.0)
    driven = TrajectoryStore(tmp_path / "driven")
    collect_stock(pipe, call, EIGHT[:2], driven, CollectConfig(**CONFIG, round=1), policy=head)
    assert float((rows_of(driven, "p1").x - rows.x)[1:].abs().amax((1, 2, 3)).min()) > 0.01
    for each in (rows, rows_of(driven, "p1")):
        cond, uncond = said_in_turn(pipe, each)
        close(each.cond, cond, 1e-2)
        close(each.gap, cond - uncond, 1e-2)
    with pytest.raises(ValueError, match="one denoiser to be in, got two networks and AdapterHead"):
        check_kind(AdapterHead, denoiser.network)
    with pytest.raises(ValueError, match="got 2, and rows do not tell which"):
        denoiser(rows.x, rows.sigma, rows.conditioning())


def test_a_head_that_could_not_be_attached_is_not_trained(tmp_path):
    """Lumina 2's loop uses cond itself; the encoder that its folder needs is never asked."""
    stock, sd3 = STOCK["Lumina2Pipeline"], testing.tiny_sd3_pipeline()
    parts = {name: getattr(sd3, name) for name in ("vae", "text_encoder", "tokenizer")}
    pipe = diffusers.Lumina2Pipeline(**{**stock.parts(), **parts})
    pipe.save_pretrained(tmp_path / "model")
    about = StockModel(str(tmp_path / "model"), stock.name, {}, stock.steps).facts()
    kept = CollectConfig(**CONFIG)
    store = TrajectoryStore(tmp_path / "data")
    collect_stock(pipe, arguments(stock), JOBS, store, kept, about=about)
    given = {"output": tmp_path / "head", "data": store.root, "steps": 1, "device": "cpu"}
    for head, text in (("adapter", "loop uses cond itself"), ("tap", "must not read features")):
        with pytest.raises(ConfigError, match=text):
            run_reflect(load_config(ReflectOptions, given={**given, "head": head}))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "data"}


def test_a_stock_pipeline_loads_without_the_extras(monkeypatch):
    """scipy comes with `bench` and `test` only; statistics are nothing that Collect needs."""
    for name in [name for name in sys.modules if name.startswith("core2_sampler.benchmarks")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    loaded = StockModel("shapes-sd3", "StableDiffusion3Pipeline", {}, 2).load("cpu", "auto")
    assert type(loaded) is diffusers.StableDiffusion3Pipeline and loaded.dtype == torch.float32
