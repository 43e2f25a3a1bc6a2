"""Time-boxed training that survives being killed: one loop for every model that we train.

The learning rate follows the clock, not a step count: warm-up, a plateau, then a linear decay that
ends with the time box, however fast the machine is. State is written atomically as safetensors and
JSON; the same call after a kill goes on where the last checkpoint stood. Data must be a function of
the step number (``loss(step)``), so that nothing random needs to be saved.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TimeBox:
    """How long to train and how fast to learn.

    Attributes:
        minutes: length of the box; time spent before a kill counts.
        learning_rate: at the plateau.
        warmup_steps: linear warm-up from zero.
        decay_share: last share of the box (0 to 1) in which the rate falls linearly to 1 %.
    """

    minutes: float
    learning_rate: float
    warmup_steps: int = 100
    decay_share: float = 0.4

    def rate(self, step: int, seconds: float) -> float:
        """Return the learning rate at ``step`` after ``seconds`` of training."""
        left = 1 - seconds / (60 * self.minutes)
        decay = min(1.0, max(left, 0.0) / self.decay_share) if self.decay_share else 1.0
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * max(decay, 0.01)


@dataclass(slots=True)
class _Progress:
    step: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)  # [step, seconds, mean loss]


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a reader, or a kill, sees the old one or the new one, never a part.

    Args:
        path: the file.
        write: called with a temporary path in the same folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _save(
    folder: Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    tensors |= _optimizer_tensors(optimizer)
    # clones: shared storage cannot be written; the progress travels in the same file, so that the
    # two can never disagree
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    note = {"step": progress.step, "seconds": progress.seconds, "losses": progress.losses}
    metadata = {"progress": json.dumps(note)}
    write_atomically(
        folder / "checkpoint.safetensors", lambda path: save_file(tensors, path, metadata)
    )


def _load(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> _Progress:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return _Progress()
    tensors = load_file(path)
    with safe_open(path, framework="pt") as handle:
        progress = _Progress(**json.loads(handle.metadata()["progress"]))
    for target, prefix in ((model, "model."), (ema, "ema.")):
        part = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        target.load_state_dict(part)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    box: TimeBox,
    folder: Path,
    *,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    log: Log = print,
    log_seconds: float = 20.0,
    save_seconds: float = 60.0,
) -> nn.Module:
    """Train the parameters of ``model`` that require gradients; return the averaged model.

    Args:
        model: trained in place.
        loss: scalar loss of a step; draws its own batch as a function of the step number.
        box: time and learning rate.
        folder: where the checkpoint lives; made if missing, continued if it holds one.
        ema_decay: of the exponential moving average of the weights, per step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        log: called with a line of progress: step, loss, rate, time left.
        log_seconds: seconds between two lines.
        save_seconds: seconds between two checkpoints.

    Returns:
        A copy of ``model`` with the averaged weights, in eval mode.

    Raises:
        RuntimeError: if the loss is not finite, naming the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, box.learning_rate, (0.9, 0.98), weight_decay=weight_decay, fused=True
    )
    progress = _load(folder, model, ema, optimizer)
    if progress.step:
        log(f"resumed at step {progress.step}, {progress.seconds / 60:.1f} of {box.minutes} min")
    model.train()
    before, mean, logged, saved = progress.seconds, [], time.monotonic(), time.monotonic()
    started = time.monotonic()
    while progress.seconds < 60 * box.minutes:
        for group in optimizer.param_groups:
            group["lr"] = box.rate(progress.step, progress.seconds)
        value = loss(progress.step)
        value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        _average(ema, model, min(ema_decay, (1 + progress.step) / (10 + progress.step)))
        mean.append(value.detach())
        now = time.monotonic()
        progress.seconds = before + now - started
        if now - logged > log_seconds:
            _report(progress, mean, box, log)
            mean, logged = [], now
        if now - saved > save_seconds:
            _save(folder, model, ema, optimizer, progress)
            saved = time.monotonic()
    _save(folder, model, ema, optimizer, progress)
    return ema


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    for average, current in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(current.detach(), 1 - decay)
    for average, current in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(current)


def _report(progress: _Progress, losses: list[Tensor], box: TimeBox, log: Log) -> None:
    mean = float(torch.stack(losses).mean())
    if not torch.isfinite(torch.tensor(mean)):
        raise RuntimeError(f"the loss must stay finite, got {mean} near step {progress.step}")
    progress.losses.append([progress.step, round(progress.seconds, 1), round(mean, 5)])
    rate = progress.step / progress.seconds
    left = box.minutes - progress.seconds / 60
    log(f"step {progress.step}  loss {mean:.4f}  {rate:.2f} steps/s  {left:.1f} min left")
