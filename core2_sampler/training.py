"""One training loop for every network that we train: timed, averaged, and safe to kill.

The end is a number of steps or a time box; the learning rate follows the share that is over, so it
falls at the end of the box however fast the machine is. State is one safetensors file, written
atomically; the same call after a kill goes on where it stood. ``loss(step)`` must draw its batch as
a function of the step number alone, so nothing random needs to be saved.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core2_sampler.atomic import write_atomic
from core2_sampler.config import option

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How a network is trained. Either ``steps`` or ``minutes`` ends the training."""

    steps: int | None = option(None, help="train for so many steps", min=1)
    minutes: float | None = option(None, help="train for so long; time before a kill counts", min=0)
    learning_rate: float = option(1e-3, help="highest learning rate", min=0)
    hold_share: float = option(
        0.0, help="share of the training before the rate falls", min=0, max=1
    )
    final_share: float = option(0.02, help="learning rate at the end, as a share", min=0, max=1)
    warmup_steps: int = option(30, help="steps of linear warm-up", min=1)
    weight_decay: float = option(0.01, help="decoupled weight decay", min=0)
    muon: bool = option(False, help="Muon for the matrices of blocks, AdamW for the rest")
    ema_decay: float = option(0.998, help="decay of the averaged weights, per step", min=0, max=1)
    clip: float = option(1.0, help="largest norm of the gradient", min=0)
    evaluations: int = option(4, help="evaluations on held-out data, the last included", min=1)
    save_seconds: float = option(30.0, help="seconds between two checkpoints", min=0)

    def __post_init__(self) -> None:
        """Check that exactly one end is given."""
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"either steps or minutes must be given, got steps={self.steps} and "
                f"minutes={self.minutes}"
            )

    def rate(self, step: int, share: float) -> float:
        """Return the learning rate of a step: linear warm-up, plateau, cosine to ``final_share``.

        Args:
            step: steps done.
            share: share of the training that is over, 0 to 1.
        """
        fallen = max(0.0, min(share, 1.0) - self.hold_share) / max(1 - self.hold_share, 1e-9)
        cosine = 0.5 * (1 + math.cos(math.pi * fallen))
        decay = self.final_share + (1 - self.final_share) * cosine
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * decay


@dataclass(slots=True)
class Progress:
    """How far a training got.

    Attributes:
        step: steps done.
        seconds: time spent, over all runs.
        losses: [step, seconds, mean loss since the entry before].
        evaluations: what ``evaluate`` returned each time, with the step.
        done: whether the training ended.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


def fit(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    config: FitConfig,
    *,
    folder: Path | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    log: Log = print,
    identity: Mapping[str, Any] | None = None,
) -> Progress:
    """Train the parameters that require gradients, in place; they end as their averages.

    Args:
        module: trained in place, in train mode; returned to eval mode.
        loss: scalar loss of a step.
        config: how to train; a checkpoint resumes only with the same.
        folder: where the checkpoint lives; the same call after a kill continues from it. None
            keeps no checkpoint.
        evaluate: called on the averaged weights, ``config.evaluations`` times at equal distances.
        log: called with lines of progress.
        identity: what the training is of, beside ``config`` (the data, the kind of network), as
            JSON values; a checkpoint resumes only with the same.

    Raises:
        ValueError: if the folder has a checkpoint of other settings or another identity, the
            module has nothing to train, or the loss is not finite.
    """
    checkpoint = None if folder is None else folder / "checkpoint.safetensors"
    run = _Run(module, config, checkpoint, log, identity or {})
    run.resume()
    module.train()
    run.loop(loss, evaluate)
    module.eval()
    return run.progress


def _trainable_attention(device: torch.device) -> AbstractContextManager[None]:
    """Take plain attention on a CPU, whose fused kernel has a backward up to a third slower."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _optimizers(
    parameters: Mapping[str, nn.Parameter], config: FitConfig
) -> list[torch.optim.Optimizer]:
    """Return AdamW, and with ``muon`` Muon before it for the matrices inside blocks.

    Muon's updates are scaled to the size of AdamW's, so both take one rate (arXiv 2502.16982).
    """
    matrices = [
        parameter
        for name, parameter in parameters.items()
        if config.muon and parameter.ndim == 2 and "block" in name
    ]
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters.values() if id(parameter) not in taken]
    rate, decay = config.learning_rate, config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        muon = torch.optim.Muon(matrices, rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    if rest:
        betas = (0.9, 0.98)
        adam = torch.optim.AdamW(rest, rate, betas=betas, weight_decay=decay, fused=True)
        optimizers.append(adam)
    return optimizers


class _Run:
    """The state of a training run, and the loop over it."""

    def __init__(
        self,
        module: nn.Module,
        config: FitConfig,
        checkpoint: Path | None,
        log: Log,
        identity: Mapping[str, Any],
    ) -> None:
        self.config, self.checkpoint, self.log = config, checkpoint, log
        self.identity = _as_json(identity)
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(f"a network must have weights to train, got a {type(module).__name__}")
        self.device = next(iter(self.parameters.values())).device
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizers = _optimizers(self.parameters, config)
        self.losses: list[Tensor] = []  # since the last report
        self.progress = Progress()

    def loop(
        self, loss: Callable[[int], Tensor], evaluate: Callable[[], dict[str, Any]] | None
    ) -> None:
        progress = self.progress
        started, saved = time.monotonic() - progress.seconds, time.monotonic()
        while not progress.done and self._share() < 1:
            with _trainable_attention(self.device):
                step_loss = loss(progress.step)
            self._step(step_loss)
            progress.seconds = time.monotonic() - started
            if evaluate is not None and self._evaluation_due():
                self._evaluate(evaluate)
            if time.monotonic() - saved >= self.config.save_seconds:
                self._report()
                self.save()
                saved = time.monotonic()
        if progress.done:
            return
        self._load(self.ema)
        self._report()
        if evaluate is not None:
            self._record(evaluate)
        progress.done = True
        self.save()

    def _share(self) -> float:
        """Return how much of the training is over, 0 to 1 and above."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        return self.progress.seconds / max(60 * cast(float, self.config.minutes), 1e-9)

    def _step(self, loss: Tensor) -> None:
        config, progress = self.config, self.progress
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.rate(progress.step, self._share())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        decay = min(config.ema_decay, (1 + progress.step) / (10 + progress.step))
        for name, parameter in self.parameters.items():
            self.ema[name].lerp_(parameter.detach(), 1 - decay)
        progress.step += 1

    def _evaluation_due(self) -> bool:
        share = self._share()
        return share < 1 and share * self.config.evaluations >= len(self.progress.evaluations) + 1

    def _evaluate(self, evaluate: Callable[[], dict[str, Any]]) -> None:
        """Evaluate the averaged weights, then go on with the others."""
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load(self.ema)
        self._record(evaluate)
        self._load(current)

    def _record(self, evaluate: Callable[[], dict[str, Any]]) -> None:
        entry = {"step": self.progress.step, **evaluate()}
        self.progress.evaluations.append(entry)
        self.log("  ".join(f"{k} {v:.4g}" for k, v in entry.items() if not isinstance(v, dict)))

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def _report(self) -> None:
        """Log and keep the mean loss since the last report.

        Raises:
            ValueError: if it is not finite; so no such weights reach a checkpoint.
        """
        if not self.losses:
            return
        progress, loss = self.progress, float(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            raise ValueError(f"the loss must stay finite, got {loss} before step {progress.step}")
        self.losses = []
        progress.losses.append([progress.step, round(progress.seconds, 1), loss])
        left = progress.seconds * (1 / max(self._share(), 1e-9) - 1)
        rate = progress.step / max(progress.seconds, 1e-9)
        self.log(
            f"step {progress.step}  loss {loss:.4f}  {rate:.2f} steps/s  "
            f"{progress.seconds:.0f} s done, {max(left, 0):.0f} s left"
        )

    def save(self) -> None:
        """Write the checkpoint: one file, so that its parts can never disagree."""
        if self.checkpoint is None:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        for which, optimizer in enumerate(self.optimizers):
            for index, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{index}.{k}": v for k, v in entry.items()}
        about = {
            "progress": asdict(self.progress),
            "config": asdict(self.config),
            "identity": self.identity,
        }
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(self.checkpoint, save(contiguous, {"about": json.dumps(about)}))

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            ValueError: if it is of another network, other settings or another identity.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        with safe_open(self.checkpoint, framework="pt", device=str(self.device)) as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._check(about, tensors)
        self._load({name: tensors[f"model.{name}"] for name in self.parameters})
        self.ema = {name: tensors[f"ema.{name}"].clone() for name in self.parameters}
        states: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, which, index, key = name.split(".")
                states.setdefault(int(which), {}).setdefault(int(index), {})[key] = tensor
        for i, optimizer in enumerate(self.optimizers):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states.get(i, {}), "param_groups": groups})
        self.progress = Progress(**about["progress"])
        self.log(f"resumed at step {self.progress.step}, {self.progress.seconds:.0f} s")

    def _check(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config, wanted = about["config"], _as_json(asdict(self.config))
        changed = [f"{k}={config.get(k)}" for k in wanted if config.get(k) != wanted[k]]
        kept, mine = about.get("identity", {}), self.identity
        changed += [f"other {k}" for k in sorted({*kept, *mine}) if kept.get(k) != mine.get(k)]
        shapes = {f"model.{name}": p.shape for name, p in self.parameters.items()}
        if shapes != {n: t.shape for n, t in tensors.items() if n.startswith("model.")}:
            changed.append("a network of another shape")
        if changed:
            raise ValueError(
                f"a training must resume with its own settings, got a checkpoint with "
                f"{', '.join(changed)} in {self.checkpoint}: take another folder, or remove it"
            )


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as a JSON file gives them back, so that tuples equal lists."""
    return cast(dict[str, Any], json.loads(json.dumps(dict(values))))
