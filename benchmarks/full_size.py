"""What a pass of the published networks costs, and what a weak head adds: counted, not timed.

python -m core2_sampler.benchmarks.full_size
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.report import Row, markdown_lines, provenance, write_rows
from core2_sampler.full_size import FULL_SIZE, Call, FullSize, build_network, example_call
from core2_sampler.pipelines.adapters.discrete import Clock
from core2_sampler.pipelines.adapters.flux import FluxDenoiser
from core2_sampler.pipelines.adapters.sd3 import SD3Denoiser
from core2_sampler.pipelines.adapters.sdxl import SDXLDenoiser
from core2_sampler.types import Denoiser
from core2_sampler.weak_heads import HEADS
from core2_sampler.weak_heads.base import WeakHead

COMMAND = "python -m core2_sampler.benchmarks.full_size"
TABLE = Path("docs/results/full-size.md")
TABLE_HEADS = ("adapter", "conv", "patch", "tap")

OF_FAMILY = {"sdxl": "sdxl", "sd3": "sd35-large", "flux": "flux-dev"}
"""The published network that a family's heads are measured on."""

TEXT = """\
One pass of the denoiser for one image of 1024 x 1024 px, on the real configurations without their
weights. A FLOP is a multiplication or an addition in a matrix product or a convolution; nothing
else is counted. Attention is the products of queries, keys and values. The prompt has 77 tokens
for SDXL, 77 + 256 for SD3.5, 512 for FLUX.1-dev and 256 for FLUX.1-schnell.

A head's share is what it adds to a pass, with the head's defaults: an adapter of rank 8 beside the
weights (merged into them it adds nothing), a conv head of widths 64, 128 and 128, a patch head of
width 256 with 4 layers on 4 x 4 latents a token, a tap head of width 128 with 2 layers. Counted on
untrained heads: the table says what they cost, not what they are worth."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one pass gives and costs.

    Attributes:
        parameters: trained numbers; tables that are computed do not count.
        flops: two for each multiplication with addition, of matrix products and convolutions only.
        attention_flops: those among them of the products of queries, keys and values.
        output: on the meta device, [B, C, H, W].
        features: of a denoiser: its last hidden state, on the meta device, [B, T, D].
    """

    parameters: int
    flops: int
    attention_flops: int
    output: Tensor
    features: Tensor | None = None


def build_denoiser(model: FullSize) -> Denoiser:
    """Return the model's denoiser on the meta device.

    Args:
        model: an entry of `FULL_SIZE`.
    """
    network = build_network(model)
    if model.family == "sd3":
        return SD3Denoiser(network)
    if model.family == "flux":
        return FluxDenoiser(network)
    # Which timesteps the network is told does not change what it costs: any noise schedule will do.
    return SDXLDenoiser(network, Clock.of(EulerDiscreteScheduler(), torch.device("meta")))


def build_head(kind: str | type[WeakHead], denoiser: Denoiser, **options: Any) -> WeakHead:
    """Return an untrained weak head that fits the denoiser, on the meta device.

    Args:
        kind: of the head; or its name in `core2_sampler.weak_heads.HEADS`.
        denoiser: from `build_denoiser`.
        options: of the head, which do not follow from the denoiser.
    """
    made = HEADS.get(kind) if isinstance(kind, str) else kind
    with torch.device("meta"):
        return made.for_denoiser(denoiser, **options)


def denoiser_cost(denoiser: Denoiser, call: Call) -> Cost:
    """Count a pass of the denoiser.

    Args:
        denoiser: from `build_denoiser`.
        call: from `example_call`.
    """
    with denoiser.capture_features() as latest:
        flops, attention, d = _count(lambda: denoiser(call.x, call.sigma, call.prompt))
        return Cost(_parameters(denoiser.module), flops, attention, d, latest())


def head_cost(head: WeakHead, denoiser: Denoiser, call: Call, plain: Cost) -> Cost:
    """Count what a weak head adds to a pass of the denoiser.

    Args:
        head: from `build_head`.
        denoiser: from `build_denoiser`.
        call: from `example_call`.
        plain: the pass without the head.

    Returns:
        The cost of the head alone; its output is the gap, or what an in-model head makes of d.
    """
    if head.in_model:
        inside = cast(Any, head)
        with inside.attached(denoiser.module), inside.active(head.config.reference_scale):
            guided = denoiser_cost(denoiser, call)
        flops = guided.flops - plain.flops
        attention = guided.attention_flops - plain.attention_flops
        return Cost(_parameters(head), flops, attention, guided.output)
    prompt = {"prompt_embeds": call.prompt.prompt_embeds, "pooled": call.prompt.pooled}
    values = {"x": call.x, "sigma": call.sigma, "features": plain.features, **prompt}
    flops, attention, gap = _count(lambda: head(plain.output, **values))
    return Cost(_parameters(head), flops, attention, gap)


def measure(model: FullSize, heads: tuple[str, ...] = TABLE_HEADS) -> dict[str, Cost]:
    """Return the cost of a pass for one image of 1024 x 1024 px, and of each head.

    Args:
        model: an entry of `FULL_SIZE`.
        heads: names of weak heads.

    Returns:
        Costs by name, the network under ``denoiser``.
    """
    denoiser, call = build_denoiser(model), example_call(model)
    plain = denoiser_cost(denoiser, call)
    added = {name: head_cost(build_head(name, denoiser), denoiser, call, plain) for name in heads}
    return {"denoiser": plain, **added}


def share_at_full_size(head: WeakHead, denoiser: Denoiser) -> float:
    """Return what a head like this one adds to a pass of the published network of its family.

    Args:
        head: a head of any size; what sets it apart from an untrained one counts at full size too.
        denoiser: what it was made for.

    Returns:
        FLOPs over those of the pass; nan for an adapter on other layers than the usual ones.
    """
    usual = type(head).for_denoiser(denoiser).config
    options = {
        key: value
        for key, value in head.config.items()
        if key in usual and not key.startswith("_") and value != usual[key]
    }
    if "layers" in options:
        return math.nan
    large, call, plain = _published(OF_FAMILY[denoiser.family])
    added = head_cost(build_head(type(head), large, **options), large, call, plain)
    return added.flops / plain.flops


@cache
def _published(name: str) -> tuple[Denoiser, Call, Cost]:
    denoiser, call = build_denoiser(FULL_SIZE.get(name)), example_call(FULL_SIZE.get(name))
    return denoiser, call, denoiser_cost(denoiser, call)


def rows_of(costs: Mapping[str, Mapping[str, Cost]]) -> list[Row]:
    """Return the rows of the table: parameters, FLOPs and shares of all models and heads.

    Args:
        costs: by name of the model, what `measure` returns.
    """
    rows = []
    for name, parts in costs.items():
        plain = parts["denoiser"]
        for part, cost in parts.items():
            values: dict[str, float] = {"parameters": cost.parameters, "flops": cost.flops}
            if cost is plain:
                values["attention_share"] = cost.attention_flops / cost.flops
            else:
                values["share_of_pass"] = cost.flops / plain.flops
            fixed = (FULL_SIZE.get(name).family, f"{name}/{part}", 1, 1.0, 1.0, 0)
            nan = math.nan
            rows += [Row(*fixed, key, value, nan, nan, COMMAND) for key, value in values.items()]
    return rows


def markdown_of(costs: Mapping[str, Mapping[str, Cost]]) -> str:
    """Return one Markdown line per model.

    Args:
        costs: by name of the model, what `measure` returns.
    """
    heads = [name for name in next(iter(costs.values())) if name != "denoiser"]
    head = ["model", "repository", "parameters, 1e9", "TFLOP", "attention"]
    head += [f"{name}: {unit}" for name in heads for unit in ("parameters, 1e6", "share")]
    lines = []
    for name, parts in costs.items():
        plain = parts["denoiser"]
        line = [name, FULL_SIZE.get(name).repo, f"{plain.parameters / 1e9:.4f}"]
        line += [f"{plain.flops / 1e12:.3f}", f"{plain.attention_flops / plain.flops:.1%}"]
        for cost in (parts[key] for key in heads):
            line += [f"{cost.parameters / 1e6:.2f}", f"{cost.flops / plain.flops:.3%}"]
        lines.append(line)
    return markdown_lines(head, lines, texts=2)


def write_costs(path: Path, costs: Mapping[str, Mapping[str, Cost]]) -> None:
    """Write the table as Markdown, and its rows as JSON beside it.

    Args:
        path: the Markdown file.
        costs: by name of the model, what `measure` returns.
    """
    about = provenance("meta", batch_size=1, height=1024, width=1024)
    notes = f"- commit: {about['commit']}\n- torch {about['versions']['torch']}, diffusers "
    notes += about["versions"]["diffusers"]
    parts = ["# Full size: what a pass costs", markdown_of(costs), TEXT, "Made by"]
    page = "\n\n".join([*parts, f"    {COMMAND}", notes]) + "\n"
    write_rows(path.with_suffix(".json"), [(row, about) for row in rows_of(costs)])
    write_atomic(path, page.encode())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count(run: Callable[[], Tensor]) -> tuple[int, int, Tensor]:
    """Run, and return all FLOPs, those of attention, and the output.

    On the meta device ``scaled_dot_product_attention`` takes its plain form, two batched matrix
    products, so it is counted whole; nothing else in these networks is a batched product.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = run()
    counts = counter.get_flop_counts().get("Global", {})
    return sum(counts.values()), counts.get(torch.ops.aten.bmm, 0), output


if __name__ == "__main__":
    write_costs(TABLE, {name: measure(FULL_SIZE.get(name)) for name in FULL_SIZE.names()})
