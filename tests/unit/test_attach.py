"""`attach` on stock pipelines, one contract for all. Truth: the stock class itself, unattached."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig

from core2_sampler import attach, attached, detach
from core2_sampler.attachment.networks import LAYOUTS, find_networks
from core2_sampler.plan import Core2Config
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads.base import WeakHead

CFG = Core2Config(mode="cfg")
SCALE = 4.0
W2S = 1.5


class Replay(WeakHead):
    """Keeps the true gaps of one run of CFG, and says them in the next runs: a perfect head."""

    @register_to_config
    def __init__(self, family: str, latent_channels: int) -> None:
        super().__init__()
        self.gaps = []

    def begin(self, sigmas, negative):
        self.sigmas = torch.tensor(sigmas)
        self.recording = not self.gaps

    def observe(self, gap):
        if self.recording:
            self.gaps.append(gap)

    def forward(self, cond, *, x, sigma, prompt_embeds, pooled, features=None):
        assert x.shape == cond.shape and sigma.shape == cond.shape[:1]
        self.check_latents(cond.shape[1])
        step = int((self.sigmas == sigma[0]).nonzero()[0])
        return self.gaps[step].to(cond)


@dataclass
class Rows:
    """Rows that went through the network itself, under whatever hooks."""

    each: list = field(default_factory=list)

    @property
    def total(self):
        return sum(self.each)


@functools.cache
def built(name):
    """Return a pipeline that tests share: what they attach, they detach."""
    return STOCK[name].pipe()


@functools.cache
def by_stock(name, scale):
    return STOCK[name].sample(built(name), scale)


@pytest.fixture(params=STOCK.values(), ids=lambda stock: stock.name)
def stock(request):
    return request.param


@pytest.fixture
def pipe(stock):
    return built(stock.name)


@pytest.fixture
def rows(stock, pipe, monkeypatch):
    by_stock(stock.name, SCALE)  # not counted
    by_stock(stock.name, stock.unguided)
    by_stock(stock.name, stronger(stock, SCALE))
    return count_rows(stock, monkeypatch)


def count_rows(stock, monkeypatch):
    """Count from here on; before a hook, such as offload's, has taken hold of the network."""
    counted, network = Rows(), type(stock.network(built(stock.name)))
    forward = network.forward

    @functools.wraps(forward)
    def counting(self, *args, **kwargs):
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        counted.each.append(len(x))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(network, "forward", counting)
    return counted


def head_for(pipe, head_class):
    return head_class.for_denoiser(find_networks(pipe)[0])


def close(ours, stock, share=1e-5):
    """Compare relative to the largest value."""
    torch.testing.assert_close(ours, stock, atol=share * float(stock.abs().max()), rtol=0)


def far(ours, other):
    return float((ours - other).abs().max()) > 1e-3 * float(other.abs().max())


def stronger(stock, scale):
    """Return the pipeline's scale at which CFG is a slow step whose head says nothing."""
    return stock.unguided + W2S * (scale - stock.unguided)


# What people do with a pipeline, one thing at a time ----------------------------------------------


def images_per_prompt(stock, pipe):
    given = {k: v for k, v in stock.arguments().items() if "prompt" in k and v is not None}
    video = "num_videos_per_prompt" in inspect.signature(pipe.__call__).parameters
    first = {k: v[:1] for k, v in given.items()}
    return {**first, "num_videos_per_prompt" if video else "num_images_per_prompt": 2}


def lora(stock, pipe):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        stock.network(pipe).add_adapter(config)
    return {}


def group_offload(stock, pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    return {}


def model_offload(stock, pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    return {}


def compiled_blocks(stock, pipe):
    torch._dynamo.reset()
    stock.network(pipe).compile_repeated_blocks(backend="eager")
    return {}


FEATURES = [images_per_prompt, lora, group_offload, model_offload]
GIVEN = "the stock call does not repeat given embeddings and masks"
LACKS = {
    ("ChromaPipeline", "images_per_prompt"): GIVEN,
    ("LTXPipeline", "images_per_prompt"): GIVEN,
    ("Lumina2Pipeline", "images_per_prompt"): GIVEN,
    ("PixArtSigmaPipeline", "lora"): "the stock class loads no LoRA",
}
"""What a stock class has not."""

OFFLOADED = ("StableDiffusionXLControlNet", "StableDiffusion3", "Flux", "QwenImage", "ZImage")
"""Offload knows modules, not pipelines: a few of each kind."""


def mark(name, feature):
    """Return what the table says: whether a feature is tried with a pipeline."""
    if (name, feature.__name__) in LACKS:
        return "–"
    tried = feature not in (group_offload, model_offload) or name[: -len("Pipeline")] in OFFLOADED
    return "yes" if tried else ""


TRIED = [(stock, f) for name, stock in STOCK.items() for f in FEATURES if mark(name, f) == "yes"]


def check(stock, pipe, rows, options, wanted):
    """CFG is the stock call bit for bit, and a perfect head is CFG at one pass a step."""
    head = head_for(pipe, Replay)
    rows.each.clear()
    with attached(pipe, head=head, core2=CFG):
        assert torch.equal(stock.sample(pipe, SCALE, **options), wanted)
    assert len(head.gaps) == 3 and rows.total == 2 * 2 * 3
    rows.each.clear()
    with attached(pipe, head=head, core2="fast"):
        close(stock.sample(pipe, SCALE, **options), wanted)
        assert pipe.core2_plan.nfe == 3
    assert rows.each == [2] * 3
    return head


def test_a_perfect_head_is_cfg(stock, pipe, rows):
    wanted = by_stock(stock.name, SCALE)
    head = check(stock, pipe, rows, {}, wanted)
    rows.each.clear()
    with attached(pipe, head=head, core2=Core2Config(slow_steps=(1,), w2s_scale=W2S)):
        close(stock.sample(pipe, SCALE), wanted)
        assert [step.kind for step in pipe.core2_plan.steps] == ["fast", "slow", "fast"]
    assert rows.total == 2 * (1 + 2 + 1)
    assert torch.equal(stock.sample(pipe, SCALE), wanted)


@pytest.mark.parametrize(
    ("stock", "feature"), TRIED, ids=[f"{stock.name}-{f.__name__}" for stock, f in TRIED]
)
def test_a_perfect_head_is_cfg_with(stock, feature, monkeypatch):
    rows, pipe = count_rows(stock, monkeypatch), stock.pipe()
    options = feature(stock, pipe)
    check(stock, pipe, rows, options, stock.sample(pipe, SCALE, **options))


def test_blocks_that_were_compiled(monkeypatch):
    stock = STOCK["StableDiffusionXLPipeline"]
    rows, pipe = count_rows(stock, monkeypatch), stock.pipe()
    compiled_blocks(stock, pipe)
    check(stock, pipe, rows, {}, stock.sample(pipe, SCALE))


def test_cond_is_the_stock_call_without_guidance(stock, pipe, rows):
    """Which rows are the prompt's: elsewhere the negative prompt would be heard."""
    unguided = by_stock(stock.name, stock.unguided)
    assert far(by_stock(stock.name, SCALE), unguided)
    with attached(pipe, core2=Core2Config(mode="cond")):
        close(stock.sample(pipe, SCALE), unguided)
    assert rows.each == [2] * 3


def test_a_slow_step_pushes_away_from_the_head(stock, pipe, rows):
    """Away from a head that says nothing, CFG is CFG at a higher scale."""
    with attached(pipe, head="cond", core2="quality"):
        close(stock.sample(pipe, SCALE), by_stock(stock.name, stronger(stock, SCALE)))
    assert rows.total == 2 * 2 * 3


def test_a_scale_for_each_step_is_that_of_the_stock_call(stock, pipe):
    wanted, offset = by_stock(stock.name, stronger(stock, SCALE)), 1 - stock.unguided
    scales = (stronger(stock, SCALE) + offset,) * 3
    with attached(pipe, core2=Core2Config(mode="cfg", guidance_scales=scales)):
        close(stock.sample(pipe, SCALE), wanted)


def test_a_scale_of_no_guidance_is_the_stock_call(stock, pipe, rows):
    with attached(pipe, head="last_gap", core2="fast"):
        given = stock.sample(pipe, stock.unguided)
        assert torch.equal(given, by_stock(stock.name, stock.unguided))
    assert rows.each == [2] * 3


def test_detaching_leaves_nothing_behind(stock):
    pipe = stock.pipe()
    network, stock_class = stock.network(pipe), type(pipe)
    assert attach(pipe, head="last_gap", core2="balanced") is pipe
    assert isinstance(pipe, stock_class) and type(pipe).__name__ == stock.name
    assert inspect.signature(pipe.__call__) == inspect.signature(built(stock.name).__call__)
    guided = stock.sample(pipe, SCALE)
    assert far(guided, by_stock(stock.name, SCALE))
    assert torch.equal(stock.sample(pipe, SCALE), guided)
    assert detach(pipe) is pipe
    assert type(pipe) is stock_class and "_core2_attachment" not in vars(pipe)
    assert "forward" not in vars(network) and "step" not in vars(pipe.scheduler)
    assert torch.equal(stock.sample(pipe, SCALE), by_stock(stock.name, SCALE))


# The table ----------------------------------------------------------------------------------------


def table():
    """Return the rows of docs/attach.md: what the tests above have run."""
    names = [feature.__name__ for feature in FEATURES]
    lines = ["| pipeline | network | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for name, stock in STOCK.items():
        marks = [mark(name, feature) for feature in FEATURES]
        network = type(stock.network(built(name))).__name__
        lines.append(f"| {name} | {network} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


@pytest.mark.checkout
def test_the_page_has_the_table_of_these_tests():
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "attach.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.py)::(\w+)`", page))
    assert len(named) > 15
    for file, test in named:
        assert f"\ndef {test}(" in (here / file).read_text(encoding="utf-8"), test
    assert table() in page
    assert all(reason in page for reason in LACKS.values())
    assert {type(STOCK[name].network(built(name))).__name__ for name in STOCK} == set(LAYOUTS)
