"""`attach` under regional ``torch.compile``: how many graphs are made, and what the images are.

Truth: the same call without compiling, the count of the stock call without guidance.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from core2_sampler import attach, attached
from core2_sampler.attachment.networks import find_networks
from core2_sampler.nfe import count_nfe
from core2_sampler.plan import Core2Config
from core2_sampler.testing.stock import STOCK
from core2_sampler.weak_heads.adapter import AdapterHead

MIXED = Core2Config(slow_steps=(1,), w2s_scale=1.5)
BLOCKS = {
    "PixArtSigmaPipeline": ["BasicTransformerBlock"],
    "StableDiffusion3Pipeline": ["JointTransformerBlock"],
}
"""Repeated blocks of networks whose class does not name them."""

BATCHED = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "PixArtSigmaPipeline")
SEQUENTIAL = ("FluxPipeline",)


def close(ours, truth):
    torch.testing.assert_close(ours, truth, atol=1e-5 * float(truth.abs().max()), rtol=0)


class Graphs:
    """A compiler that only counts; each graph runs as it is."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, inputs):
        self.made += 1
        return graph.forward

    def since(self, call):
        """Return what a call returns, and how many graphs it made."""
        before = self.made
        return call(), self.made - before


def compile_blocks(stock, pipe, **options):
    torch._dynamo.reset()
    network = stock.network(pipe)
    if stock.name in BLOCKS:
        network._repeated_blocks = BLOCKS[stock.name]
    network.compile_repeated_blocks(**options)


@pytest.mark.parametrize("name", [*BATCHED, *SEQUENTIAL])
def test_a_plan_of_fast_and_slow_steps_makes_the_graphs_of_one_shape(name):
    stock, graphs = STOCK[name], Graphs()
    pipe = stock.pipe()
    with attached(pipe, head="last_gap", core2=MIXED):
        wanted = stock.sample(pipe)
    compile_blocks(stock, pipe, backend=graphs)
    _, one_shape = graphs.since(lambda: stock.sample(pipe, stock.unguided))
    assert one_shape > 0
    torch._dynamo.reset()
    attach(pipe, head="last_gap", core2=MIXED)
    ours, made = graphs.since(lambda: stock.sample(pipe))
    close(ours, wanted)
    assert [step.kind for step in pipe.core2_plan.steps] == ["fast", "slow", "fast"]
    assert made == one_shape
    _, again = graphs.since(lambda: stock.sample(pipe))
    assert again == 0


def test_a_head_inside_a_compiled_network_makes_graphs_in_the_first_call_alone():
    stock, graphs = STOCK["StableDiffusionXLPipeline"], Graphs()
    pipe = stock.pipe()
    head = AdapterHead.for_denoiser(find_networks(pipe)[0].denoiser, scale_range=(2.0, 6.0))
    with torch.no_grad():
        for parameter in head.up.values():
            parameter.fill_(0.1)
    with attached(pipe, head=head, core2=MIXED):
        wanted = stock.sample(pipe)
    compile_blocks(stock, pipe, backend=graphs)
    _, one_shape = graphs.since(lambda: stock.sample(pipe, stock.unguided))
    torch._dynamo.reset()
    attach(pipe, head=head, core2=MIXED)
    for made in (2 * one_shape, 0, 0):  # with the head on, and without
        ours, count = graphs.since(lambda: stock.sample(pipe))
        close(ours, wanted)
        assert count == made


def test_plain_guidance_keeps_the_passes_of_the_stock_loop():
    stock = STOCK["StableDiffusionXLPipeline"]
    pipe = stock.pipe()
    compile_blocks(stock, pipe, backend="eager")
    wanted = stock.sample(pipe)
    with attached(pipe, core2=Core2Config(mode="cfg")), count_nfe(pipe.unet.conv_out) as counter:
        assert torch.equal(stock.sample(pipe), wanted)
    assert counter.calls == 3 and counter.rows == 12
    with attached(pipe, head="cond", core2=MIXED), count_nfe(pipe.unet.conv_out) as counter:
        stock.sample(pipe)
    assert counter.calls == 4 and counter.rows == 8


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_with_inductor_the_images_are_the_same():
    stock = STOCK["PixArtSigmaPipeline"]
    pipe = stock.pipe()
    with attached(pipe, head="last_gap", core2=MIXED):
        wanted = stock.sample(pipe)
    compile_blocks(stock, pipe, fullgraph=True)
    with attached(pipe, head="last_gap", core2=MIXED):
        torch.testing.assert_close(stock.sample(pipe), wanted, atol=1e-3, rtol=1e-3)
