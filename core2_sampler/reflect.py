"""Reflect: distil classifier-free guidance into a weak head.

Every head is trained on one thing, the gap, so it serves any guidance scale. An output head
predicts the gap directly. An in-model head is run at a scale s and its gap is
``(d(s) - cond) / (s - 1)``, so that its target is CFG itself: ``d(s) = cond + (s - 1) * gap``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from core2_sampler.config import option
from core2_sampler.gap_error import NoiseBins, predict_gap, relative_gap_error, scales_of
from core2_sampler.rows import RowSource, stable_hash
from core2_sampler.trajectory import write_atomic
from core2_sampler.types import Denoiser, InModelHead

Precision = Literal["auto", "fp32", "bf16"]

_POWER_ROWS = 512  # rows that the mean square of the gap is estimated from


@dataclass(frozen=True, slots=True)
class ReflectConfig:
    """How a head is trained. Either ``steps`` or ``minutes`` ends the training."""

    steps: int | None = option(None, help="train for so many steps", min=1)
    minutes: float | None = option(None, help="train for so long; time before a kill counts", min=0)
    batch_size: int = option(64, help="rows of one step", min=1)
    learning_rate: float = option(1e-3, help="highest learning rate of AdamW", min=0)
    final_share: float = option(0.02, help="learning rate at the end, as a share", min=0, max=1)
    warmup_steps: int = option(30, help="steps of linear warm-up", min=1)
    weight_decay: float = option(0.01, help="weight decay of AdamW", min=0)
    ema_decay: float = option(0.998, help="decay of the averaged weights, per step", min=0, max=1)
    clip: float = option(1.0, help="largest norm of the gradient", min=0)
    precision: Precision = option("auto", help="auto is bf16 where the device computes it natively")
    noise_bins: int = option(10, help="noise levels are told apart in so many bins", min=1)
    evaluations: int = option(4, help="evaluations on held-out prompts, the last included", min=1)
    save_seconds: float = option(30.0, help="seconds between two checkpoints", min=0)
    seed: int = option(0, help="of the batches and scales")

    def __post_init__(self) -> None:
        """Check that exactly one end is given."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"either steps or minutes must be given, got steps={self.steps} and "
                f"minutes={self.minutes}"
            )


@dataclass(slots=True)
class Progress:
    """How far a training got.

    Attributes:
        step: steps done.
        seconds: time spent, over all runs.
        losses: [step, seconds, mean loss since the entry before].
        held_out: [step, relative gap error over all held-out rows].
        errors: guidance scale (``any`` for output heads) -> relative gap error of each noise bin,
            None where a bin has no held-out row.
        done: whether the training ended.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    errors: dict[str, list[float | None]] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a training.

    Attributes:
        progress: steps, time, curves and errors.
        bins: edges of the noise bins, [noise_bins + 1], lowest sigma first.
        config: the settings.
        data: what the source says about itself.
        precision: ``fp32`` or ``bf16``, as trained.
    """

    progress: Progress
    bins: list[float]
    config: ReflectConfig
    data: dict[str, Any]
    precision: str


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
        ValueError: if the folder has a checkpoint of other settings, the denoiser is missing, or
            the loss is not finite.
    """
    typed = cast(InModelHead, head)
    attached = typed.attached(_module(denoiser)) if typed.in_model else nullcontext()
    with _frozen(denoiser), attached:
        training = _Training(head, source, config, denoiser, folder, log or (lambda line: None))
        training.resume()
        training.run()
    return training.report()


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


class _Training:
    """The state of a training run, and the loop over it."""

    def __init__(
        self,
        head: nn.Module,
        source: RowSource,
        config: ReflectConfig,
        denoiser: Denoiser | None,
        folder: Path | None,
        log: Callable[[str], None],
    ) -> None:
        self.head, self.source, self.config = head, source, config
        self.denoiser, self.log = denoiser, log
        self.checkpoint = None if folder is None else folder / "checkpoint.safetensors"
        self.parameters = dict(head.named_parameters())
        if not self.parameters:
            raise ValueError(f"a head must have weights to train, got a {type(head).__name__}")
        self.device = next(iter(self.parameters.values())).device
        self.precision = resolve_precision(config.precision, self.device)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.bins = NoiseBins.of(source.sigmas, config.noise_bins)
        self.power = self._gap_power().to(self.device)
        self.losses: list[Tensor] = []  # since the last evaluation
        self.state = Progress()

    def _gap_power(self) -> Tensor:
        """Return the mean square of the gap in each noise bin, [K]: the unit of the loss."""
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = self.source.train(_POWER_ROWS, generator)
        power = self.bins.sum(rows.sigma, rows.gap.square().flatten(1).mean(1))
        count = self.bins.sum(rows.sigma, torch.ones(len(rows)))
        mean = power.sum() / count.sum()
        return torch.where(count > 0, power / count.clamp(min=1), mean).clamp(min=1e-12).float()

    def run(self) -> None:
        state, config = self.state, self.config
        started, saved = time.monotonic() - state.seconds, time.monotonic()
        self.head.train()
        while not state.done and (share := self._share()) < 1:
            self.losses.append(self.step(share))
            state.step += 1
            state.seconds = time.monotonic() - started
            if self._share() * config.evaluations >= len(state.held_out) + 1 and self._share() < 1:
                self.evaluate()
            if time.monotonic() - saved >= config.save_seconds:
                self.log(f"{self._where()}  loss {self._mean_loss():.4f}")
                self.save()
                saved = time.monotonic()
        self.load_average()
        if not state.done:
            self.evaluate()
            state.done = True
            self.save()
        self.head.eval()

    def _share(self) -> float:
        """Return how much of the training is over, 0 to 1 and above."""
        if self.config.steps is not None:
            return self.state.step / self.config.steps
        return self.state.seconds / max(60 * cast(float, self.config.minutes), 1e-9)

    def step(self, share: float) -> Tensor:
        """Take one optimiser step; the batch is a function of the step number alone."""
        config, step = self.config, self.state.step
        generator = torch.Generator().manual_seed(stable_hash("batch", config.seed, step))
        rows = self.source.train(config.batch_size, generator).map(lambda t: t.to(self.device))
        scales = scales_of(cast(Any, self.head))
        scale = None
        if scales is not None:
            low, high = scales[0], scales[-1]
            scale = low + (high - low) * float(torch.rand((), generator=generator))
        with self._autocast():
            gap = predict_gap(cast(Any, self.head), rows, self.denoiser, scale)
        error = (gap - rows.gap).square().flatten(1).mean(1)  # [N]
        loss = (error / self.power[self.bins.index(rows.sigma)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, share)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter.detach(), 1 - decay)
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _where(self) -> str:
        state, share = self.state, max(self._share(), 1e-9)
        left = state.seconds * (1 / share - 1)
        return f"step {state.step}  {state.seconds:.0f} s, {max(left, 0):.0f} s left"

    def _mean_loss(self) -> float:
        """Return the mean loss since the last evaluation.

        Raises:
            ValueError: if it is not finite; so no such weights reach a checkpoint.
        """
        loss = float(torch.stack(self.losses).mean()) if self.losses else 0.0
        if not math.isfinite(loss):
            raise ValueError(f"the loss must stay finite, got {loss} before step {self.state.step}")
        return loss

    def evaluate(self) -> None:
        """Measure the averaged head on held-out prompts, without autocast."""
        state, loss = self.state, self._mean_loss()
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.load_average()
        totals = []
        for scale in scales_of(cast(Any, self.head)) or (None,):
            total, by_bin = relative_gap_error(
                cast(Any, self.head),
                self.source.held_out(self.config.batch_size),
                self.bins,
                self.denoiser,
                scale,
            )
            totals.append(total)
            state.errors["any" if scale is None else f"{scale:g}"] = by_bin
        self._load(current)
        held_out = sum(totals) / len(totals)
        state.held_out.append([state.step, held_out])
        state.losses.append([state.step, round(state.seconds, 1), loss])
        self.losses = []
        self.log(f"{self._where()}  loss {loss:.4f}  held-out relative gap error {held_out:.4f}")

    def load_average(self) -> None:
        """Give the head its averaged weights."""
        self._load(self.ema)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self) -> None:
        """Write the checkpoint: one file, so that its parts can never disagree."""
        if self.checkpoint is None:
            return
        tensors = {f"head.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
        about = {"progress": asdict(self.state), "config": asdict(self.config)}
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(self.checkpoint, save(contiguous, {"about": json.dumps(about)}))

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            ValueError: if it is of another head or other settings.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        with safe_open(self.checkpoint, framework="pt", device=str(self.device)) as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._check(about["config"], {n[5:]: t for n, t in tensors.items() if n[:5] == "head."})
        self._load({name: tensors[f"head.{name}"] for name in self.parameters})
        self.ema = {name: tensors[f"ema.{name}"].clone() for name in self.parameters}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.state = Progress(**about["progress"])
        self.log(f"resumed at step {self.state.step}, {self.state.seconds:.0f} s")

    def _check(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        wanted = json.loads(json.dumps(asdict(self.config)))
        changed = [f"{k}={config.get(k)}" for k in wanted if config.get(k) != wanted[k]]
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in weights.items()}:
            changed.append("a head of another shape")
        if changed:
            raise ValueError(
                f"a training must resume with its own settings, got a checkpoint with "
                f"{', '.join(changed)} in {self.checkpoint}: take another folder, or remove it"
            )

    def report(self) -> Report:
        edges = self.bins.edges.tolist()
        data = self.source.describe()
        return Report(self.state, edges, self.config, data, self.precision)


def learning_rate(config: ReflectConfig, step: int, share: float) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to ``final_share``."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    decay = config.final_share + (1 - config.final_share) * cosine
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * decay
