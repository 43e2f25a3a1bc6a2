"""Train a latent evaluator: one loop and one measure for every kind.

What is measured is how often a right example scores above the wrong one beside it, on held-out
images; chance is one half. Where it depends on captions, both images are compared under a caption
and both captions under an image: who knows the captions alone, or the images alone, is right by
chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.config import option
from core2_sampler.evaluators.kinds import contrastive_loss, ranking_loss, real_loss
from core2_sampler.evaluators.network import LatentEvaluator, from_flow, path_of
from core2_sampler.evaluators.pairs import Pairs, PairSource
from core2_sampler.rows import stable_hash
from core2_sampler.training import FitConfig, Log, Progress, fit
from core2_sampler.types import Conditioning

Read = Callable[[list[str]], Conditioning]
"""Encodes captions as the denoiser's prompts."""

NOISE = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of noise that are measured."""

_MOST_NOISE = {"flow": 1.0, "ve": 0.94}  # SDXL starts at sigma 14.6, which is 0.936


@dataclass(frozen=True, slots=True)
class EvaluatorConfig(FitConfig):
    """How an evaluator is trained. Either ``steps`` or ``minutes`` ends the training."""

    batch_size: int = option(64, help="right examples of one step", min=2)
    seed: int = option(0, help="of the noise")


def train_evaluator(
    evaluator: LatentEvaluator,
    source: PairSource,
    read: Read,
    config: EvaluatorConfig,
    *,
    folder: Path | None = None,
    log: Log = print,
    identity: Mapping[str, Any] | None = None,
) -> Progress:
    """Train an evaluator in place; it ends with the averaged weights.

    Args:
        evaluator: on its device.
        source: pairs of the evaluator's kind.
        read: encodes captions on that device.
        config: how to train.
        folder: where the checkpoint lives; the same call after a kill continues from it.
        log: called with lines of progress.
        identity: what the training is of, as `core2_sampler.training.fit` takes it.

    Returns:
        Losses, and evaluations with the ``accuracy`` over all noise levels and ``by_noise``.

    Raises:
        ValueError: nothing is held out, a checkpoint of other settings, or a loss that is not
            finite.
    """
    if next(iter(source.held_out(config.batch_size)), None) is None:
        raise ValueError(
            "an evaluator must be measured on held-out pairs, got none: give more data"
        )
    work = _Lesson(evaluator, source, read, config)
    return fit(
        evaluator,
        work.loss,
        config,
        folder=folder,
        evaluate=work.evaluate,
        log=log,
        identity=identity,
    )


def save_evaluator(
    evaluator: LatentEvaluator,
    folder: Path,
    progress: Progress,
    config: EvaluatorConfig,
    **facts: Any,
) -> Path:
    """Save a trained evaluator with its card, and return the card's path.

    Args:
        evaluator: the evaluator.
        folder: gets ``config.json``, the weights and ``card.json``.
        progress: of its training.
        config: of its training.
        facts: further facts for the card, such as the base model's name; JSON values.
    """
    evaluator.save_pretrained(folder)
    last = progress.evaluations[-1]
    card = {
        "kind": evaluator.config.kind,
        "tells": evaluator.kind.about,
        "family": evaluator.config.family,
        "parameters": evaluator.num_parameters(),
        "training": asdict(config),
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "held_out_accuracy": last["accuracy"],
        "held_out_accuracy_by_noise": last["by_noise"],
        "chance": 0.5,
        "held_out_curve": [[each["step"], each["accuracy"]] for each in progress.evaluations],
        "loss_curve": progress.losses,
    }
    write_atomic(folder / "card.json", (json.dumps(card | facts, indent=1) + "\n").encode())
    return folder / "card.json"


class _Lesson:
    """The loss of an evaluator, and its measure."""

    def __init__(
        self, evaluator: LatentEvaluator, source: PairSource, read: Read, config: EvaluatorConfig
    ) -> None:
        self.evaluator, self.source, self.read, self.config = evaluator, source, read, config
        self.path = path_of(evaluator.config.family)

    def loss(self, step: int) -> Tensor:
        """Return the loss of a step; the batch depends on the step alone."""
        pairs = self.source.train(step, self.config.batch_size)
        generator = _generator("noise", self.config.seed, step)
        share = torch.rand(len(pairs.texts), generator=generator) * _MOST_NOISE[self.path]
        lesson, net = self.evaluator.kind.lesson, self.evaluator
        if lesson == "captions":
            read = net.read(self.read(pairs.texts))
            if read is None:
                raise ValueError(f"a {net.config.kind} evaluator must read prompts")
            seen = self._see(pairs.x0, share, generator)
            return contrastive_loss(net.match(seen, read), pairs.texts)
        better, worse = self._scores(pairs, self._read(pairs), share, generator)
        return real_loss(better, worse) if lesson == "generated" else ranking_loss(better, worse)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Return the share of held-out pairs that are told right, over all and by noise level."""
        right: dict[float, list[Tensor]] = {share: [] for share in NOISE}
        for index, pairs in enumerate(self.source.held_out(self.config.batch_size)):
            read = self._read(pairs)
            for share in NOISE:
                shares = torch.full((len(pairs.texts),), share)
                generator = _generator("held out", index, share)
                better, worse = self._scores(pairs, read, shares, generator)
                # A tie is half right, so that a constant scores as chance does.
                right[share].append((1 + (better - worse).sign()).cpu() / 2)
        by_noise = {f"{share:g}": float(torch.cat(told).mean()) for share, told in right.items()}
        return {"accuracy": sum(by_noise.values()) / len(by_noise), "by_noise": by_noise}

    def _read(self, pairs: Pairs) -> tuple[Tensor | None, Tensor | None]:
        """Return what the evaluator reads in the captions of the right and the other examples."""
        net = self.evaluator
        if not net.kind.reads_prompt:
            return None, None
        read = net.read(self.read(pairs.texts))
        return read, read if pairs.other_texts is None else net.read(self.read(pairs.other_texts))

    def _scores(
        self,
        pairs: Pairs,
        read: tuple[Tensor | None, Tensor | None],
        share: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Return what should score better and what worse: images with the same noise, [B] each.

        Where the others have captions of their own, [4 B]: two images under each caption, as a run
        compares candidates, and two captions under each image.
        """
        net, state = self.evaluator, generator.get_state()
        seen = self._see(pairs.x0, share, generator)
        other_seen = self._see(pairs.other_x0, share, generator.set_state(state))
        own, other = net.score(seen, read[0]), net.score(other_seen, read[1])
        if pairs.other_texts is None:
            return own, other
        wrong, other_wrong = net.score(other_seen, read[0]), net.score(seen, read[1])
        return (
            torch.cat([own, own, other, other]),
            torch.cat([wrong, other_wrong, other_wrong, wrong]),
        )

    def _see(self, x0: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
        """Noise clean latents and return what the evaluator sees in them."""
        level = share[:, None, None, None]
        x0 = x0.cpu().float()
        x = (1 - level) * x0 + level * torch.randn(x0.shape, generator=generator)
        x, sigma = from_flow(x, share, self.path)
        device = self.evaluator.device
        return self.evaluator.see(x.to(device), sigma.to(device))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(stable_hash(*parts))
