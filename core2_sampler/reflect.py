"""Reflect: distil classifier-free guidance into a weak head.

Every head is trained on one thing, the gap, so it serves any guidance scale. An output head
predicts the gap directly. An in-model head is run at a scale s and its gap is
``(d(s) - cond) / (s - 1)``, so that its target is CFG itself: ``d(s) = cond + (s - 1) * gap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from core2_sampler.config import option
from core2_sampler.gap_error import NoiseBins, predict_gap, relative_gap_error, scales_of
from core2_sampler.rows import RowSource, stable_hash
from core2_sampler.training import FitConfig, Progress, fit
from core2_sampler.types import Denoiser, InModelHead

Precision = Literal["auto", "fp32", "bf16"]

_POWER_ROWS = 512  # rows that the mean square of the gap is estimated from


@dataclass(frozen=True, slots=True)
class ReflectConfig(FitConfig):
    """How a head is trained. Either ``steps`` or ``minutes`` ends the training."""

    batch_size: int = option(64, help="rows of one step", min=1)
    precision: Precision = option("auto", help="auto is bf16 where the device computes it natively")
    noise_bins: int = option(10, help="noise levels are told apart in so many bins", min=1)
    seed: int = option(0, help="of the batches and scales")


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a training.

    Attributes:
        progress: steps, time, losses and evaluations.
        bins: edges of the noise bins, [noise_bins + 1], lowest sigma first.
        gap_power: mean square of the gap in each bin, [noise_bins].
        config: the settings.
        data: what the source says about itself.
        precision: ``fp32`` or ``bf16``, as trained.
    """

    progress: Progress
    bins: list[float]
    gap_power: list[float]
    config: ReflectConfig
    data: dict[str, Any]
    precision: str

    @property
    def errors(self) -> dict[str, list[float | None]]:
        """Guidance scale (``any`` for output heads) -> relative gap error of each noise bin.

        None stands where a bin has no held-out row.
        """
        return dict(self.progress.evaluations[-1]["by_bin"])

    @property
    def held_out(self) -> list[list[float]]:
        """The curve [step, relative gap error over all held-out rows]."""
        return [[entry["step"], entry["relative_gap_error"]] for entry in self.progress.evaluations]


def reflect(
    head: nn.Module,
    source: RowSource,
    config: ReflectConfig,
    *,
    denoiser: Denoiser | None = None,
    folder: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> Report:
    """Train a head in place; it ends with the averaged weights.

    Args:
        head: an output head or an in-model head, on its device.
        source: rows to learn from, such as ``TrajectoryStore.source()``.
        config: how to train.
        denoiser: the base model, which is left as it was; not needed by an output head whose
            features, if any, are stored.
        folder: where the checkpoint lives; the same call after a kill continues from it. None
            keeps no checkpoint.
        log: called with a line of progress.

    Raises:
        ValueError: if the folder has a checkpoint of other settings, other data or another head,
            the denoiser is missing, or the loss is not finite.
    """
    typed = cast(InModelHead, head)
    attached = typed.attached(_module(denoiser)) if typed.in_model else nullcontext()
    with _frozen(denoiser), attached:
        work = _Reflect(head, source, config, denoiser)
        progress = fit(
            head,
            work.loss,
            config,
            folder=folder,
            evaluate=work.evaluate,
            log=log or (lambda line: None),
            identity={"data": source.describe(), "head": _identity(head)},
        )
    bins, power = work.bins.edges.tolist(), work.power.tolist()
    return Report(progress, bins, power, config, source.describe(), work.precision)


def _identity(head: nn.Module) -> dict[str, Any]:
    """Return what a head is before it is trained, its class and its config, as JSON values."""
    config = {k: v for k, v in cast(Any, head).config.items() if not k.startswith("_")}
    return {"class": type(head).__name__, **config}


def _module(denoiser: Denoiser | None) -> nn.Module:
    if denoiser is None:
        raise ValueError("an in-model head must be trained in a denoiser, got None")
    return denoiser.module


@contextmanager
def _frozen(denoiser: Denoiser | None) -> Iterator[None]:
    trained = [p for p in denoiser.module.parameters() if p.requires_grad] if denoiser else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision to train in; ``auto`` is bf16 where the device computes it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


class _Reflect:
    """The loss of a head and its evaluation."""

    def __init__(
        self, head: nn.Module, source: RowSource, config: ReflectConfig, denoiser: Denoiser | None
    ) -> None:
        self.head, self.source, self.config = cast(Any, head), source, config
        self.denoiser = denoiser
        self.device = next((p.device for p in head.parameters()), torch.device("cpu"))
        self.precision = resolve_precision(config.precision, self.device)
        self.bins = NoiseBins.of(source.sigmas, config.noise_bins)
        self.power = self._gap_power().to(self.device)

    def _gap_power(self) -> Tensor:
        """Return the mean square of the gap in each noise bin, [K]: the unit of the loss."""
        rows = self.source.train(0, _POWER_ROWS, stable_hash("power", self.config.seed))
        power = self.bins.sum(rows.sigma, rows.gap.square().flatten(1).mean(1))
        count = self.bins.sum(rows.sigma, torch.ones(len(rows)))
        mean = power.sum() / count.sum()
        return torch.where(count > 0, power / count.clamp(min=1), mean).clamp(min=1e-12).float()

    def loss(self, step: int) -> Tensor:
        """Return the squared gap error in units of the gap; the batch depends on the step alone."""
        rows = self.source.train(step, self.config.batch_size, self.config.seed)
        rows = rows.map(lambda tensor: tensor.to(self.device))
        scales = scales_of(self.head)
        scale = None
        if scales is not None:
            low, high = scales[0], scales[-1]
            generator = torch.Generator().manual_seed(stable_hash("scale", self.config.seed, step))
            scale = low + (high - low) * float(torch.rand((), generator=generator))
        enabled = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            gap = predict_gap(self.head, rows, self.denoiser, scale)
        error = (gap - rows.gap).square().flatten(1).mean(1)  # [N]
        return (error / self.power[self.bins.index(rows.sigma)]).mean()

    def evaluate(self) -> dict[str, Any]:
        """Measure the head on held-out prompts, without autocast."""
        totals, by_bin = [], {}
        for scale in scales_of(self.head) or (None,):
            rows = self.source.held_out(self.config.batch_size)
            total, errors = relative_gap_error(self.head, rows, self.bins, self.denoiser, scale)
            totals.append(total)
            by_bin["any" if scale is None else f"{scale:g}"] = errors
        return {"relative_gap_error": sum(totals) / len(totals), "by_bin": by_bin}
