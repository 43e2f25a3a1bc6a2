"""The card of a trained head: how it was trained, on what, and how far it is off.

A card with the gap's mean square by noise level tells what the head's errors weigh, so that slow
steps can be placed where they help most.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core2_sampler.atomic import write_atomic
from core2_sampler.gap_error import NoiseBins
from core2_sampler.json_files import find_file
from core2_sampler.reflect import Report
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
        "gap_power": report.gap_power,
        "relative_gap_error": report.errors,
        "relative_gap_error_total": report.held_out[-1][1],
        "held_out_curve": report.held_out,
        "loss_curve": progress.losses,
    }


def read_card(head: WeakHead) -> dict[str, Any]:
    """Return the card that lies beside a head's weights, in a folder or on the hub.

    Raises:
        ValueError: if the head was not loaded from where one is.
    """
    place = head.config.get("_name_or_path")
    wanted = "a head must lie in a folder with card.json for its errors to be known, got"
    if place is None:
        raise ValueError(f"{wanted} an untrained one: `core2 reflect` writes it")
    try:
        path = find_file(place, place, "card.json", kind="weak head")
    except ValueError as error:
        raise ValueError(f"{wanted} {place}: `core2 reflect` writes it") from error
    return json.loads(path.read_text(encoding="utf-8"))


def step_errors(
    head: WeakHead | None, sigmas: Tensor, scales: Sequence[float], *, noise: bool = False
) -> list[float]:
    """Return how far off each step's guided prediction is if the head makes it.

    Args:
        head: a trained head, loaded from its folder or the hub.
        sigmas: noise levels, [N] or more.
        scales: guidance scale of each step, [N].
        noise: whether the network predicts noise, as SDXL's ``d`` is in any case.

    Returns:
        ``(scale - 1) * sqrt(relative error * mean square of the gap)``, [N], in the unit of a
        velocity: an error of noise counts ``sqrt(1 + sigma^2)`` times. 0 where there is no
        guidance. Noise levels and scales beyond those of the card have the error of the nearest.

    Raises:
        ValueError: if there is no head, no card, or a card without what is needed.
    """
    if head is None:
        raise ValueError("a weak head is needed to place slow steps by its errors, got none")
    card = read_card(head)
    power = np.asarray(card.get("gap_power") or [], dtype=np.float64)
    by_scale = {key: errors for key, errors in card["relative_gap_error"].items() if errors}
    if not power.size or None in [error for errors in by_scale.values() for error in errors]:
        raise ValueError(
            "a card must have gap_power and an error in every noise bin, got "
            f"{head.config['_name_or_path']}/card.json without: train the head again, with more "
            "held-out prompts"
        )
    bins = NoiseBins(torch.tensor(card["noise_bins"], dtype=torch.float64))
    of_step = bins.index(sigmas[: len(scales)].cpu()).numpy()
    relative = _relative_errors(by_scale, of_step, scales)
    strength = np.maximum(np.asarray(scales) - 1, 0)
    levels = sigmas[: len(scales)].double().cpu().numpy()
    unit = np.sqrt(1 + levels**2) if noise or head.config.family == "sdxl" else 1.0
    return (strength * unit * np.sqrt(relative * power[of_step])).tolist()


def _relative_errors(
    by_scale: Mapping[str, Sequence[float]], of_step: Any, scales: Sequence[float]
) -> Any:
    """Return the relative gap error of steps [N], linear between the scales that were measured."""
    if "any" in by_scale:
        return np.asarray(by_scale["any"])[of_step]
    known = sorted(by_scale, key=float)
    table = np.array([by_scale[key] for key in known])  # [scales, bins]
    measured = [float(key) for key in known]
    columns = zip(of_step, scales, strict=True)
    return np.array([np.interp(scale, measured, table[:, k]) for k, scale in columns])


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
