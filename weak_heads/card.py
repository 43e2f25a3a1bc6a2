"""The card of a trained head: how it was trained, on what, and how far it is off."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core2_sampler.reflect import Report
from core2_sampler.trajectory import write_atomic
from core2_sampler.weak_heads.base import WeakHead


def save_head(head: WeakHead, folder: str | Path, report: Report, **facts: Any) -> Path:
    """Save a trained head with its card, and a plot of it where matplotlib is installed.

    Args:
        head: the head.
        folder: gets ``config.json``, the weights, ``card.json`` and ``card.png``.
        report: what Reflect returned.
        facts: further facts for the card, such as the base model's name; JSON values.

    Returns:
        The path of ``card.json``.
    """
    folder = Path(folder)
    head.save_pretrained(folder)
    card = make_card(head, report) | facts
    path = folder / "card.json"
    write_atomic(path, (json.dumps(card, indent=1) + "\n").encode())
    if importlib.util.find_spec("matplotlib") is not None:
        write_atomic(folder / "card.png", plot_card(card))
    return path


def make_card(head: WeakHead, report: Report) -> dict[str, Any]:
    """Return the card as JSON values; ``noise_bins`` has one more entry than each error list."""
    progress = report.progress
    return {
        "head": type(head).__name__,
        "family": head.config.family,
        "parameters": sum(p.numel() for p in head.parameters()),
        "training": asdict(report.config) | {"precision": report.precision},
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "data": report.data,
        "noise_bins": report.bins,
        "relative_gap_error": report.errors,
        "relative_gap_error_total": report.held_out[-1][1],
        "held_out_curve": report.held_out,
        "loss_curve": progress.losses,
    }


def plot_card(card: dict[str, Any]) -> bytes:
    """Draw the errors over the noise level, and over the training, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_noise, by_step = figure.subplots(1, 2)
    edges = card["noise_bins"]
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)] or edges
    for scale, errors in card["relative_gap_error"].items():
        points = [(m, e) for m, e in zip(middles, errors, strict=True) if e is not None]
        by_noise.plot(*zip(*points, strict=True), marker="o", label=f"scale {scale}")
    by_noise.axhline(1, color="grey", linestyle=":", label="no guidance")
    by_noise.set(xlabel="sigma", ylabel="relative gap error, held-out", ylim=(0, None))
    by_noise.legend()
    by_step.plot(*zip(*card["held_out_curve"], strict=True), marker="o", label="held-out, averaged")
    steps = [step for step, _, _ in card["loss_curve"]]
    by_step.plot(steps, [loss for _, _, loss in card["loss_curve"]], label="training")
    by_step.set(xlabel="step", ylim=(0, None))
    by_step.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
