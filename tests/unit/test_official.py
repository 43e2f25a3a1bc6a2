"""The authors' heads and their import.

Truth: the released network written out again below, of diffusers' own blocks on weights with the
LoRA merged in, from a checkpoint in the authors' layout, whose names, shapes and counts are listed
here too. In the pipelines: the head called by hand, step by step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.normalization import AdaLayerNormContinuous
from torch.nn import functional as F

from core2_sampler.cli import main
from core2_sampler.guidance import weak
from core2_sampler.nfe import count_nfe
from core2_sampler.testing import tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads import load_head
from core2_sampler.weak_heads.official import OfficialHead
from core2_sampler.weak_heads.official_import import official_from, read_config
from core2_sampler.weak_heads.official_release import trained_levels, upstream_slot


@dataclass(frozen=True)
class Sizes:
    channels: int
    width: int
    layers: int
    text: int
    tokens: int  # of both prompts
    rank: int
    slots: int
    pooled: int  # of both prompts

    def linears(self):
        """Return name -> (out, in, bias) of every layer that has LoRAs."""
        found = {}
        for i in range(self.layers):
            block, w = f"transformer_blocks.{i}", self.width
            for name in ("to_q", "to_k", "to_v"):
                found[f"{block}.attn1.{name}"] = (w, w, False)
            found[f"{block}.attn1.to_out.0"] = (w, w, True)
            found[f"{block}.ff.net.0.proj"] = (4 * w, w, True)
            found[f"{block}.ff.net.2"] = (w, 2 * w, True)
        found["norm_out.linear"] = (2 * self.width, self.width, True)
        found["proj_out"] = (4 * self.channels, self.width, True)
        for name in NETWORKS:
            found[f"{name}.0"] = (128, self.text, True)
            found[f"{name}.3"] = (self.width, 128, True)
        found["skip_connection2"] = (1, self.text, False)
        found["skip_connection"] = (2 * self.channels, self.tokens + 1, False)
        found["trans_linear"] = (self.width, self.tokens + 1 + self.text, False)
        if self.pooled != self.text:
            found["pool_prompt_linear"] = (self.text, self.pooled, False)
        return found

    def layout(self):
        """Return name -> shape of every tensor of the checkpoint."""
        found = {
            "pos_embed.pos_embed": (1, 192 * 192, self.width),
            "pos_embed.proj.weight": (self.width, self.channels, 2, 2),
            "pos_embed.proj.bias": (self.width,),
        }
        norms = [f"transformer_blocks.{i}.norm{n}" for i in range(self.layers) for n in (1, 3)]
        for name, size in [(n, self.width) for n in norms] + [(f"{n}.2", 128) for n in NETWORKS]:
            found |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
        for name, (out, into, bias) in self.linears().items():
            found[f"{name}.linear.weight"] = (out, into)
            if bias:
                found[f"{name}.linear.bias"] = (out,)
            for k in range(self.slots):
                found[f"{name}.lora.{k}.A"] = (into, self.rank)
                found[f"{name}.lora.{k}.B"] = (self.rank, out)
        return found

    def on_meta(self):
        return {name: torch.empty(shape, device="meta") for name, shape in self.layout().items()}

    def random(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 0.2)
            for name, shape in self.layout().items()
        }


NETWORKS = [f"pre{n}_linear{t}" for n in (8, 16, 24) for t in ("", "2")] + ["last_linear"]
RELEASED = {
    "sd3": Sizes(16, 1536, 8, 4096, 666, 64, 28, 4096),
    "sdxl": Sizes(4, 1536, 4, 2048, 154, 48, 50, 2560),
}
SMALL = {
    "sd3": Sizes(16, 64, 8, 96, 80, 2, 28, 96),
    "sdxl": Sizes(4, 64, 4, 96, 80, 3, 50, 72),
}
SCALE = {"sd3": 3.5, "sdxl": 5.5}
both_families = pytest.mark.parametrize("family", ["sd3", "sdxl"])


def merged(state, slot):
    """Return the weights of plain layers: of each linear the LoRA of one slot is part."""
    plain = {}
    for name, tensor in state.items():
        if name.endswith(".linear.weight") and f"{name[:-14]}.lora.0.A" in state:
            lora = f"{name[:-14]}.lora.{slot}"
            plain[name.replace(".linear.weight", ".weight")] = (
                tensor + (state[f"{lora}.A"] @ state[f"{lora}.B"]).T
            )
        elif ".lora." not in name:
            plain[name[:-12] + ".bias" if name.endswith(".linear.bias") else name] = tensor
    return plain


def part(weights, prefix):
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def hosted(module, weights):
    module.load_state_dict(weights)
    return module.eval()


def released_network(weights, sizes, noise, u, s, vh, pooled):
    """Return the released network's output for one sample [C, H, W]; u, s, vh are its inputs."""
    product = (u.T @ torch.diag(s) @ vh).float()
    if "pool_prompt_linear.weight" in weights:
        pooled = weights["pool_prompt_linear.weight"] @ pooled
    embedding = torch.vstack([product, pooled])
    u, s, vh = u.float(), s.float(), vh.float()

    def network(name):
        w = part(weights, f"{name}.")
        hidden = F.silu(embedding @ w["0.weight"].T + w["0.bias"])
        hidden = F.layer_norm(hidden, (128,), w["2.weight"], w["2.bias"])
        return (hidden @ w["3.weight"].T + w["3.bias"]).mean(0)

    ranks = torch.hstack([u, s[:, None], vh]) @ weights["trans_linear.weight"].T
    skip = weights["skip_connection.weight"] @ (embedding @ weights["skip_connection2.weight"].T)
    gain, offset = skip[: sizes.channels, :, None], skip[sizes.channels :, :, None]
    side = {"height": 128, "width": 128, "patch_size": 2, "pos_embed_max_size": 192}
    patch = PatchEmbed(in_channels=sizes.channels, embed_dim=sizes.width, **side)
    tokens = hosted(patch, part(weights, "pos_embed."))(noise[None])
    for i in range(-1, sizes.layers):
        if i >= 0:
            block = BasicTransformerBlock(sizes.width, 1, 64, ff_inner_dim=2 * sizes.width)
            tokens = hosted(block, part(weights, f"transformer_blocks.{i}."))(tokens)
        group = 8 if i < 0 else 16 if i < 4 else 24
        scale = 1 + network(f"pre{group}_linear2") + ranks.mean(0)
        tokens = tokens * scale + network(f"pre{group}_linear")
    norm = AdaLayerNormContinuous(sizes.width, sizes.width, elementwise_affine=False, eps=1e-6)
    tokens = hosted(norm, part(weights, "norm_out."))(tokens, network("last_linear")[None])[0]
    tokens = tokens @ weights["proj_out.weight"].T + weights["proj_out.bias"]
    h, w = noise.shape[1] // 2, noise.shape[2] // 2
    image = torch.einsum("nhwpqc->nchpwq", tokens.reshape(1, h, w, 2, 2, sizes.channels))
    return image.reshape(noise.shape) + noise * gain + offset


def network_inputs(matrix, upstream):
    """Return u, s, vh as the released code computes them, or the true ones."""
    if upstream:
        u, s, vh = torch.linalg.svd(matrix)
        return u[:64].bfloat16(), s[:64].bfloat16(), vh[:64].bfloat16()
    u, s, vh = np.linalg.svd(matrix.double().numpy())
    signs = [1 if row[np.argmax(np.abs(row))] > 0 else -1 for row in vh[:64]]
    u, vh = (u[:, :64] * signs).T, vh[:64] * np.array(signs)[:, None]
    return tuple(torch.tensor(each, dtype=torch.float32) for each in (u, s[:64], vh))


def case(family, batch=2, seed=1):
    """Return cond and the rest of a call, and the negative prompt."""
    sizes, generator = SMALL[family], torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    cond, tokens, pooled = sizes.channels, sizes.tokens // 2, sizes.pooled // 2
    call = {
        "x": draw(batch, cond, 8, 12),
        "prompt_embeds": draw(batch, tokens, sizes.text),
        "pooled": draw(batch, pooled),
    }
    return draw(batch, cond, 8, 12), call, (draw(1, tokens, sizes.text), draw(1, pooled))


def run(arguments):
    with pytest.raises(SystemExit) as done:
        main([str(each) for each in arguments])
    return done.value.code


@pytest.fixture(scope="module", params=["sd3", "sdxl"])
def checkpoint(request, tmp_path_factory):
    """Return a family, a checkpoint of it in the authors' layout, and its file."""
    file = tmp_path_factory.mktemp("official") / f"{request.param}_noise_model.pth"
    state = SMALL[request.param].random()
    torch.save(state, file)
    return request.param, state, file


@pytest.mark.parametrize("upstream", [False, True], ids=["exact", "upstream"])
@torch.no_grad()
def test_an_imported_head_is_the_released_network(checkpoint, tmp_path, upstream):
    family, state, file = checkpoint
    flags = ["--upstream"] if upstream else []
    assert run(["heads", "import", file, "--out", tmp_path / "head", *flags]) == 0
    head = load_head(tmp_path / "head", family=family)
    cond, call, (negative, negative_pooled) = case(family)
    head.set_negative(negative, negative_pooled)
    levels, slots = trained_levels(family, SMALL[family].slots), (3, 17)
    gap = head(cond, sigma=torch.tensor([levels[k] for k in slots]), **call)
    order = 1 if family == "sd3" else -1  # SD3.5 reads the prompt first, SDXL the negative prompt
    for row, slot in enumerate(slots):
        prompts = [call["prompt_embeds"][row], negative[0]][::order]
        pooled = torch.cat([call["pooled"][row], negative_pooled[0]][::order])
        inputs = network_inputs(torch.cat(prompts), upstream)
        sizes, weights = SMALL[family], merged(state, slot)
        truth = released_network(weights, sizes, cond[row], *inputs, pooled)
        got = weak(cond[row], gap[row], SCALE[family])
        close = {"rtol": 0, "atol": (1e-2 if upstream else 1e-4) * float(truth.abs().max())}
        torch.testing.assert_close(got, truth, **close)
        halfway = cond[row] + (truth - cond[row]) / 2
        half_scale = 1 + (SCALE[family] - 1) / 2
        torch.testing.assert_close(weak(cond[row], gap[row], half_scale), halfway, **close)
        assert (truth - cond[row]).abs().mean() > 0.1  # it does something


@torch.no_grad()
def test_the_two_modes_and_the_slots_differ(checkpoint):
    family, state, _ = checkpoint
    cond, call, negative = case(family, batch=1)
    exact, upstream = official_from(state), official_from(state, upstream=True)
    for head in (exact, upstream):
        head.set_negative(*negative)
    first, other = (head(cond, sigma=torch.ones(1), **call) for head in (exact, upstream))
    assert (first - other).abs().max() > 1e-2
    assert (first - exact(cond, sigma=torch.full((1,), 0.2), **call)).abs().max() > 1e-2


@torch.no_grad()
def test_the_negative_prompt(checkpoint):
    family, state, _ = checkpoint
    cond, call, negative = case(family)
    head, call["sigma"] = official_from(state), torch.ones(2)
    if family == "sd3":
        with pytest.raises(ValueError, match="must know the empty prompt.*set_negative"):
            head(cond, **call)
        head.set_negative(*negative)
        return
    without = head(cond, **call)
    head.set_negative(*(torch.zeros_like(each) for each in negative))
    assert torch.equal(head(cond, **call), without)
    head.set_negative(*negative)
    assert (head(cond, **call) - without).abs().max() > 1e-3


@both_families
def test_the_layout_has_the_published_counts(family):
    """Counts of the released networks, and what of them are LoRAs."""
    layout, lora = RELEASED[family].layout(), {"sd3": 457_187_584, "sdxl": 340_567_200}
    assert len(layout) == {"sd3": 3908, "sdxl": 4505}[family]
    assert sum(np.prod(s) for n, s in layout.items() if ".lora." in n) == lora[family]


@both_families
def test_the_released_sizes(family):
    """The layout at its real shapes makes the head that fits the real denoiser."""
    sizes = RELEASED[family]
    state = sizes.on_meta()
    head = official_from(state)
    total = {"sd3": 663_375_136, "sdxl": 451_627_528}
    assert sum(p.numel() for p in head.parameters()) == total[family]
    assert OfficialHead.fit_config(denoiser(family)) == read_config(state)
    cond, tokens = torch.empty(1, sizes.channels, 128, 128, device="meta"), sizes.tokens // 2
    embeds = torch.empty(1, tokens, sizes.text, device="meta")
    pooled = torch.empty(1, sizes.pooled // 2, device="meta")
    head.set_negative(embeds, pooled)
    sigma = torch.empty(1, device="meta")
    assert head(cond, x=cond, sigma=sigma, prompt_embeds=embeds, pooled=pooled).shape == cond.shape


def denoiser(family):
    """Return a small network with the inputs of SD3.5 or SDXL."""
    if family == "sd3":
        text = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
        size = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64}
        module = SD3Transformer2DModel(in_channels=16, pos_embed_max_size=8, **size, **text)
        return SimpleNamespace(family=family, module=module, latent_channels=16)
    module = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return SimpleNamespace(family=family, module=module, latent_channels=4)


def test_the_schedule_of_the_sd3_head():
    """Flow time from 1 to that of the last of 1000 steps, shifted by 3 as that step was."""

    def shifted(t):
        return 3 * t / (1 + 2 * t)

    truth = shifted(np.linspace(1, shifted(0.001), 28))
    np.testing.assert_allclose(trained_levels("sd3", 28), truth, rtol=1e-5)


def test_the_schedule_of_the_sdxl_head():
    """Noise per signal of every twentieth timestep."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    signal = DDIMScheduler(**betas).alphas_cumprod[torch.arange(981, 0, -20)].double()
    truth = ((1 - signal) / signal).sqrt()
    np.testing.assert_allclose(trained_levels("sdxl", 50), truth, rtol=1e-5)


def test_slots(checkpoint):
    family, state, _ = checkpoint
    count = SMALL[family].slots
    exact, upstream = official_from(state), official_from(state, upstream=True)
    levels = torch.tensor(trained_levels(family, count))
    steps = list(range(count))
    assert exact._slot(levels * 1.0001).tolist() == steps
    exact.set_schedule([1.0, 0.5])  # has no effect
    assert exact._slot(levels).tolist() == steps
    # of 50 steps the released code never takes slot 22, by float error
    never = 22 if family == "sdxl" else None
    assert upstream._slot(levels).tolist() == [21 if i == never else i for i in steps]
    grid = [20 - i for i in range(20)]
    upstream.set_schedule(grid)
    assert upstream._slot(torch.tensor(grid)).tolist() == [i * count // 20 for i in range(20)]


def test_rounding_of_the_released_slots():
    assert upstream_slot(11, 25, 50) == 21 and upstream_slot(44, 100, 50) == 21
    for n in (14, 20, 25, 28, 30, 40, 50, 56):
        assert [upstream_slot(i, n, 28) for i in range(n)] == [i * 28 // n for i in range(n)]


@both_families
def test_what_is_not_exactly_the_layout_is_refused(family):
    good = SMALL[family].on_meta()
    bad, shape = dict(good), tuple(good["proj_out.lora.5.B"].shape)
    del bad["last_linear.3.linear.bias"]
    bad["extra.weight"] = torch.empty(3, device="meta")
    bad["proj_out.lora.5.B"] = torch.empty(7, 7, device="meta")
    bad["trans_linear.linear.weight"] = good["trans_linear.linear.weight"].to(torch.int8)
    with pytest.raises(ValueError) as error:
        official_from(bad)
    for text in (
        f"of the released {family} head",
        "1 missing (last_linear.3.linear.bias)",
        "1 unknown (extra.weight)",
        f"1 of a wrong shape (proj_out.lora.5.B (7, 7) in place of {shape})",
        "1 not of floating point (trans_linear.linear.weight)",
    ):
        assert text in str(error.value)


def test_checkpoints_of_other_models_are_refused():
    flux_like = SMALL["sd3"].on_meta() | {"proj_out.linear.weight": torch.empty(32, 64)}
    with pytest.raises(ValueError, match="got 32 outputs of 64"):
        official_from(flux_like)
    with pytest.raises(ValueError, match="must have a matrix proj_out.linear.weight, got none"):
        official_from({"conv_in.weight": torch.empty(4, 4)})
    key = "proj_out.linear.weight"
    mixed = SMALL["sdxl"].on_meta() | {key: SMALL["sd3"].on_meta()[key]}
    with pytest.raises(ValueError, match="released sd3 head, got .* of a wrong shape"):
        official_from(mixed)


class Runs:
    """A pickle that would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_files_that_are_no_checkpoint_are_refused(checkpoint, tmp_path, capsys):
    _, _, good = checkpoint
    files = {name: tmp_path / f"{name}.pth" for name in ("code", "cut", "text", "list", "none")}
    torch.save({"weight": Runs(tmp_path / "ran")}, files["code"])
    files["cut"].write_bytes(good.read_bytes()[:-2000])
    files["text"].write_text("no zip file")
    torch.save([torch.zeros(1)], files["list"])
    wanted = {
        "code": "must hold tensors and nothing else, got other objects",
        "cut": "must be a complete file of torch.save",
        "text": "must be a complete file of torch.save",
        "list": "must hold tensors by name",
        "none": "must be a file that exists",
    }
    for name, text in wanted.items():
        assert run(["heads", "import", files[name], "--out", tmp_path / "head"]) == 2
        error = capsys.readouterr().err
        assert text in error and str(files[name]) in error
    assert run(["heads", "import", good, good, "--out", tmp_path / "head"]) == 2
    assert "must be one checkpoint, got 2" in capsys.readouterr().err
    assert run(["heads", "import", good, "--out", files["text"]]) == 2
    assert "got the file" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "head").exists()


def test_dtypes_are_kept_and_the_config_tells_the_rest(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in SMALL["sdxl"].random().items()}
    torch.save(state, tmp_path / "file.pth")
    assert run(["heads", "import", tmp_path / "file.pth", "-o", tmp_path / "head"]) == 0
    config = json.loads((tmp_path / "head/config.json").read_text())
    wanted = {"family": "sdxl", "latent_channels": 4, "tokens": 40, "lora_rank": 3}
    wanted |= {"reference_scale": 5.5, "released": True, "upstream": False}
    assert wanted.items() <= config.items()
    head = OfficialHead.from_pretrained(tmp_path / "head", torch_dtype=torch.bfloat16)
    assert torch.equal(head.net.proj_out.weight, state["proj_out.linear.weight"])
    assert torch.equal(head.net.shifts[2].inner.up[49], state["pre24_linear.0.lora.49.B"])


def test_bad_input_is_refused(checkpoint):
    family, state, _ = checkpoint
    head = official_from(state)
    cond, call, negative = case(family)
    head.set_negative(*negative)
    call["sigma"] = torch.ones(2)
    with pytest.raises(ValueError, match="even sides of at most 384.*got 7 x 12"):
        head(cond[:, :, :7], **call)
    with pytest.raises(ValueError, match="must have 40 tokens for this head, got 39"):
        head(cond, **call | {"prompt_embeds": call["prompt_embeds"][:, 1:]})
    head.set_negative(*(each.expand(3, *each.shape[1:]) for each in negative))
    with pytest.raises(ValueError, match="1 row or the prompt's 2, got 3"):
        head(cond, **call)
    config = {k: v for k, v in head.config.items() if not k.startswith("_")}
    for change, text in (
        ({"family": "flux"}, "exists for sd3 and sdxl, got flux"),
        ({"num_layers": 9}, "num_layers must be 1 to 8, got 9"),
        ({"reference_scale": 1.0}, "reference_scale must be above 1, got 1.0"),
        ({"released": False, "upstream": True}, "upstream must be False"),
    ):
        with pytest.raises(ValueError, match=text):
            OfficialHead(**config | change)


# In the pipelines --------------------------------------------------------------------------------

PROMPTS, NEGATIVES, GUIDANCE = ["a red circle", "two blue rings"], ["dark", "dim and grey"], 4.0
TINY = {  # the text, pooled and token sizes of the tiny pipelines
    "sd3": Sizes(16, 64, 4, 32, 48, 2, 28, 32),
    "sdxl": Sizes(4, 64, 4, 32, 32, 3, 50, 16),
}


def pipeline(family, head=None):
    """Return a tiny pipeline with a grid that is not the authors', and 16 channels for SD3."""
    if family == "sdxl":
        return tiny_sdxl_pipeline(weak_head=head, use_karras_sigmas=True)
    pipe = tiny_sd3_pipeline(weak_head=head, shift=1.0)
    config = dict(pipe.transformer.config) | {"in_channels": 16, "out_channels": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.register_modules(transformer=SD3Transformer2DModel.from_config(config).eval())
    return pipe


def length(family):
    return {"max_sequence_length": 8} if family == "sd3" else {}


def sample(pipe, **options):
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    defaults = {"prompt": PROMPTS, "generator": generator, "guidance_scale": GUIDANCE}
    defaults |= {"num_inference_steps": 4, "output_type": "latent", **length(pipe.family.name)}
    return pipe(**{**defaults, **options}).images


@torch.no_grad()
def by_hand(family, head, w2s_scale, *, negatives=NEGATIVES, steps_known=True):
    """Sample 4 fast or slow steps with what the released code gives its network."""
    pipe = pipeline(family)
    cond, uncond = pipe.family.encode(pipe, PROMPTS, negatives, **length(family))
    empty, _ = pipe.family.encode(pipe, [""], **length(family))
    denoiser, schedule = pipe.family.denoiser(pipe), pipe.family.schedule(pipe, 4, (8, 8))
    sigmas = schedule.sigmas
    read = empty if family == "sd3" else uncond
    head.set_negative(read.prompt_embeds, read.pooled)
    if steps_known:
        head.set_schedule(sigmas[:4].tolist())
    x = torch.cat([torch.randn(1, *pipe.family.latent_shape(pipe), generator=g) for g in seeds()])
    x = schedule.noise_scale * x
    for i in range(4):
        sigma = sigmas[i].float().expand(2)
        with_prompt, without = denoiser(x, sigma, cond), denoiser(x, sigma, uncond)
        values = {"x": x, "prompt_embeds": cond.prompt_embeds, "pooled": cond.pooled}
        guess = weak(with_prompt, head(with_prompt, sigma=sigma, **values), GUIDANCE)
        strong = without + GUIDANCE * (with_prompt - without)
        x = x + float(sigmas[i + 1] - sigmas[i]) * (guess + w2s_scale * (strong - guess))
    return schedule.to_pipeline(x, 4)


def seeds():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def off(ours, other):
    return float((ours - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("core2", "w2s_scale"), [("fast", 0.0), ("quality", 1.5)])
@both_families
def test_a_pipeline_gives_the_head_the_negative_prompt_of_the_release(family, core2, w2s_scale):
    state = TINY[family].random()
    pipe = pipeline(family, official_from(state))
    ours = sample(pipe, core2=core2, negative_prompt=NEGATIVES)
    assert off(ours, by_hand(family, official_from(state), w2s_scale)) < 1e-4
    without = sample(pipe, core2="fast")
    other = sample(pipe, core2="fast", negative_prompt=NEGATIVES)
    assert torch.equal(without, other) == (family == "sd3")  # which reads the empty prompt always
    if family == "sdxl":
        assert off(without, other) > 1e-3
        assert off(without, by_hand(family, official_from(state), 0.0, negatives=None)) < 1e-4


@both_families
def test_a_pipeline_gives_an_upstream_head_its_steps(family):
    state = TINY[family].random()
    pipe = pipeline(family, official_from(state, upstream=True))
    ours = sample(pipe, core2="fast", negative_prompt=NEGATIVES)
    truth = by_hand(family, official_from(state, upstream=True), 0.0)
    assert off(ours, truth) < 1e-4
    lost = by_hand(family, official_from(state, upstream=True), 0.0, steps_known=False)
    assert off(truth, lost) > 5e-3


@both_families
def test_a_head_that_is_not_released_asks_for_no_negative_prompt(family):
    pipe = pipeline(family)
    pipe.register_modules(weak_head=OfficialHead.for_denoiser(pipe.family.denoiser(pipe)))
    with count_nfe(pipe.text_encoder) as counter:
        fast = sample(pipe, core2="fast")
    assert counter.calls == 1
    assert off(fast, sample(pipe, core2="fast", guidance_scale=1.0)) < 1e-5


@both_families
def test_an_image_does_not_depend_on_its_batch_mates(family):
    pipe = pipeline(family, official_from(TINY[family].random()))
    options = {"core2": "fast", "negative_prompt": NEGATIVES}
    both = sample(pipe, **options)
    for i, generator in enumerate(seeds()):
        one = {"prompt": PROMPTS[i], "negative_prompt": NEGATIVES[i], "generator": generator}
        assert off(sample(pipe, **options | one), both[i : i + 1]) < 1e-4


@both_families
def test_generate_takes_a_released_head(family, tmp_path):
    tiny = {"sd3": tiny_sd3_pipeline, "sdxl": tiny_sdxl_pipeline}[family]()
    tiny.save_pretrained(tmp_path / "model")
    sizes = {"tokens": TINY[family].tokens // 2, "num_layers": 1, "released": True}
    fit = OfficialHead.fit_config(tiny.family.denoiser(tiny))
    OfficialHead(**fit | sizes).save_pretrained(tmp_path / "head")
    where = ["--model", tmp_path / "model", "--head", tmp_path / "head", "-o", tmp_path / "out"]
    tokens = ["--max-sequence-length", 8] if family == "sd3" else []
    for mode in ("fast", "quality"):
        assert run(["generate", "a b", *where, *tokens, "--steps", 2, "--mode", mode]) == 0
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    assert sorted(record["nfe"] for record in records) == [2, 4]
    assert {record["guidance_scale"] for record in records} == {SCALE[family]}
