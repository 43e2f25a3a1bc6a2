"""What the speed benchmark runs: tiny and embedded models, and full-size ones of random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core2_sampler.benchmarks.full_size import build_denoiser
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.full_size import FULL_SIZE, example_call
from core2_sampler.fused.hot import ONLINE, STEPS
from core2_sampler.fused.run import make_hot
from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.discrete import Clock
from core2_sampler.pipelines.adapters.sdxl import SDXLDenoiser
from core2_sampler.registry import unknown_name
from core2_sampler.scales import OnlineScale
from core2_sampler.schedules import flow_sigmas, sigmas_from_scheduler
from core2_sampler.steps import Kind
from core2_sampler.types import Conditioning, Denoiser
from core2_sampler.weak_heads import HEADS
from core2_sampler.weak_heads.base import WeakHead

TINY = ("tiny-sd3", "tiny-flux", "tiny-sdxl")
"""Random networks of 16 x 16 px: they show that the benchmark runs, and nothing else."""

_FLOW_SHIFT = 3.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch for a network.

    Attributes:
        x: unit noise, [B, C, H, W].
        cond: the prompt, B rows.
        uncond: the negative prompt, B rows.
    """

    x: Tensor
    cond: Conditioning
    uncond: Conditioning


@dataclass(slots=True)
class Subject:
    """A network to be timed.

    Attributes:
        name: of the model.
        denoiser: the network; another one for another grid, see `at`.
        sigmas: noise levels of a run of N steps, [N + 1].
        inputs: makes a batch of B.
        meta: the same network on the meta device, to count on.
        input_dtype: that the denoiser casts x to before all else, if it does.
        vae: decodes latents; None where there is none worth timing.
    """

    name: str
    denoiser: Denoiser
    sigmas: Callable[[int], Tensor]
    inputs: Callable[[int], Inputs]
    meta: Denoiser
    input_dtype: torch.dtype = torch.float32
    vae: nn.Module | None = None

    def at(self, num_steps: int) -> Denoiser:
        """Return the denoiser for a run of N steps."""
        if not isinstance(self.denoiser, SDXLDenoiser):
            return self.denoiser
        device = next(self.denoiser.module.parameters()).device
        return replace(self.denoiser, clock=_clock(num_steps, device))

    def parameters(self) -> int:
        """Return how many numbers were trained, or would have been."""
        return sum(parameter.numel() for parameter in self.denoiser.module.parameters())


def build_subject(name: str, device: str, dtype: torch.dtype, pixels: int) -> Subject:
    """Return a model by name.

    Args:
        name: of `TINY`, of an embedded model (shapes-sd3 ...) or of `FULL_SIZE`.
        device: to run on.
        dtype: of the network.
        pixels: height and width of a full-size model's image.

    Raises:
        ValueError: unknown name.
    """
    from core2_sampler.model_files import EMBEDDED

    if name in FULL_SIZE.names():
        return _full_size(name, device, dtype, pixels)
    if name in TINY:
        from core2_sampler import testing

        pipe = getattr(testing, f"tiny_{name.removeprefix('tiny-')}_pipeline")()
    elif name in EMBEDDED:
        from core2_sampler.pipelines.auto import load_pipeline
        from core2_sampler.shapes import model_path

        pipe = load_pipeline(model_path(EMBEDDED[name]), dtype=dtype)
    else:
        raise unknown_name("model", name, (*TINY, *EMBEDDED, *FULL_SIZE.names()))
    return _of_pipeline(name, pipe.to(device, dtype))


def build_head(name: str, subject: Subject, dtype: torch.dtype) -> WeakHead:
    """Return a weak head of random weights for a subject.

    Args:
        name: of a head in `core2_sampler.weak_heads.HEADS`.
        subject: the network.
        dtype: of the head.

    Raises:
        ValueError: unknown name, or a head inside the denoiser: merged it costs nothing.
    """
    head = HEADS.get(name).for_denoiser(subject.denoiser).to(dtype).eval().requires_grad_(False)
    if head.in_model:
        raise ValueError(f"head must read a finished pass, got {name}, which works inside it")
    if next(head.parameters(), None) is not None:
        fill(head, seed=1)
    return head


def build_evaluator(subject: Subject) -> LatentEvaluator:
    """Return an evaluator of random weights, as online scales ask them, for a subject."""
    inputs, family = subject.inputs(1), subject.denoiser.family
    sizes = {"width": 64, "num_layers": 1} if subject.name in TINY else {}
    evaluator = LatentEvaluator.for_model("preference", family, inputs.x, inputs.cond, **sizes)
    fill(evaluator.eval().requires_grad_(False), seed=2)
    return evaluator


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Give a module random weights that keep activations near unit size, in place.

    Never zeros: what a matrix product takes depends on its numbers, through the power they draw.

    Args:
        module: on its device, of any content.
        seed: of the weights.
    """
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = math.prod(parameter.shape[1:])
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.normal_(0, 0.5, generator=generator)


@torch.no_grad()
def check_output(subject: Subject) -> None:
    """Refuse a network that answers as no real one would: not finite, constant, or far too large.

    Raises:
        RuntimeError: see above.
    """
    inputs, denoiser = subject.inputs(1), subject.at(4)
    d = denoiser(inputs.x, torch.full((1,), 0.7, device=inputs.x.device), inputs.cond)
    spread = float(d.float().std())
    if not torch.isfinite(d).all() or not 0.01 < spread < 10:
        raise RuntimeError(
            f"{subject.name} must answer with finite numbers that vary, got a standard deviation "
            f"of {spread:.3g}: its timings would mean nothing"
        )


@torch.no_grad()
def count_flops(
    subject: Subject, head: WeakHead | None, kind: Kind, rule: OnlineScale | None = None
) -> int:
    """Return the FLOPs of one step of one sample: matrix products and convolutions.

    Args:
        subject: the network.
        head: on the meta device; None for a kind that asks none.
        kind: of the step.
        rule: its evaluators on the meta device; None for a step that asks none.
    """
    inputs, step = subject.inputs(1), (STEPS if rule is None else ONLINE)[kind]
    cond, uncond = (_to(side, "meta") for side in (inputs.cond, inputs.uncond))
    hot = make_hot(subject.meta, head, inputs.x.to("meta"), 1, cond, uncond, rule=rule)
    with hot.hooked(), _all_products(), FlopCounterMode(display=False) as counter:
        step(hot)
    return counter.get_total_flops()


@contextmanager
def _all_products() -> Iterator[None]:
    """Let encoder layers make their products one by one: the fused ones are not counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _of_pipeline(name: str, pipe: Any) -> Subject:
    family, denoiser = pipe.family, pipe.family.denoiser(pipe)
    texts = {} if family.name == "sdxl" else {"max_sequence_length": 32}
    _, height, width = family.latent_shape(pipe)

    def inputs(batch_size: int) -> Inputs:
        prompts = ["a red star"] * batch_size
        with torch.no_grad():
            sides: Prompts = family.encode(pipe, prompts, [""] * batch_size, **texts)
        shape = (batch_size, denoiser.latent_channels, height, width)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(pipe._execution_device)
        cond, uncond = (_with_size(side, x, family.name) for side in sides if side is not None)
        return Inputs(x, cond, uncond)

    twin = replace(denoiser, module=copy.deepcopy(denoiser.module).to("meta"))
    if isinstance(twin, SDXLDenoiser):
        twin = replace(twin, clock=_clock(4, torch.device("meta")))
    half = family.name != "sdxl" and next(denoiser.module.parameters()).dtype != torch.float32
    return Subject(
        name,
        denoiser,
        _sigmas_of(family.name),
        inputs,
        twin,
        next(denoiser.module.parameters()).dtype if half else torch.float32,
    )


def _full_size(name: str, device: str, dtype: torch.dtype, pixels: int) -> Subject:
    model = FULL_SIZE.get(name)
    denoiser: Any = build_denoiser(model)
    denoiser.module.to(dtype).to_empty(device=device)
    fill(denoiser.module)
    meta: Any = build_denoiser(model)
    meta.module.to(dtype)

    def inputs(batch_size: int) -> Inputs:
        call = example_call(model, batch_size, pixels, pixels)
        generator = torch.Generator(device).manual_seed(0)

        def draw(like: Tensor, kind: torch.dtype = dtype) -> Tensor:
            x = torch.randn(like.shape, generator=generator, device=device)
            return x.to(kind)

        def side() -> Conditioning:
            extra = {key: draw(value).abs() for key, value in call.prompt.extra.items()}
            return Conditioning(draw(call.prompt.prompt_embeds), draw(call.prompt.pooled), extra)

        return Inputs(draw(call.x, torch.float32), side(), side())

    wanted = torch.float32 if model.family == "sdxl" else dtype
    vae = _vae(model.latent_channels, device, dtype)
    return Subject(name, denoiser, _sigmas_of(model.family), inputs, meta, wanted, vae)


def _vae(latent_channels: int, device: str, dtype: torch.dtype) -> nn.Module:
    """Return the VAE that all of these models have, with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
    )
    return vae.to(device, dtype).eval().requires_grad_(False)


def _sigmas_of(family: str) -> Callable[[int], Tensor]:
    if family == "sdxl":
        return lambda num_steps: sigmas_from_scheduler(_scheduler(num_steps))
    return lambda num_steps: flow_sigmas(num_steps, _FLOW_SHIFT)


def _scheduler(num_steps: int) -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def _clock(num_steps: int, device: torch.device) -> Clock:
    return Clock.of(_scheduler(num_steps), device)


def _with_size(side: Conditioning, x: Tensor, family: str) -> Conditioning:
    """Return an SDXL prompt with its sizes as a tensor, as the pipeline's call makes it once."""
    if family != "sdxl":
        return side
    sides = [x.shape[2] * 8, x.shape[3] * 8]
    ids = torch.tensor([[*sides, 0, 0, *sides]] * len(x), device=x.device, dtype=side.pooled.dtype)
    return Conditioning(side.prompt_embeds, side.pooled, {**side.extra, "time_ids": ids})


def _to(side: Conditioning, device: str) -> Conditioning:
    extra = {key: value.to(device) for key, value in side.extra.items()}
    return Conditioning(side.prompt_embeds.to(device), side.pooled.to(device), extra)
