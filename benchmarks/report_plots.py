"""A report's plots and contact sheets."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.matching import is_plain
from core2_sampler.benchmarks.measured import Measured, Metric
from core2_sampler.benchmarks.report import Row, contact_sheet
from core2_sampler.benchmarks.report_render import Picture
from core2_sampler.benchmarks.runs import MATCHED, store_of

_SVG = "image/svg+xml"
_MARKERS = "osD^v<>PX*"


def quality_plot(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture:
    """Draw a metric against NFE: a point with its interval for each arm, a band for several N."""
    figure, axes = _figure(9, 4)
    by_name: dict[str, list[Row]] = {}
    for own in rows:
        by_name.setdefault(own[0].arm, []).append(own[0])
    for name, points in by_name.items():
        points.sort(key=lambda row: row.nfe)
        nfe, values, low, high = _columns(metric, points)
        nfe = [x + _aside(rows, name, x) for x in nfe]
        color, marker = _look(metric, name)
        axes.plot(nfe, values, marker=marker, color=color, label=name)
        axes.vlines(nfe, low, high, color=color, linewidth=1)
        axes.fill_between(nfe, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="denoiser evaluations of an image (NFE)", ylabel=_unit(metric))
    figure.legend(loc="outside right upper", fontsize="small")
    title = f"{metric.name} against NFE, 95 % intervals; arms of equal NFE stand side by side"
    return Picture(title, _SVG, _svg(figure))


def _aside(rows: Sequence[Sequence[Row]], name: str, nfe: float) -> float:
    """Return how far from its NFE a point is drawn, so that equal ones do not hide each other."""
    equal = list(dict.fromkeys(own[0].arm for own in rows if own[0].nfe == nfe)) or [name]
    widest = float(np.nanmax([own[0].nfe for own in rows]))
    return (equal.index(name) - (len(equal) - 1) / 2) * widest / 120


def _look(metric: Metric, name: str) -> tuple[Any, str]:
    """Return the color and marker that an arm has in every plot of a run."""
    from matplotlib import colormaps

    index = list(dict.fromkeys(arm.entry.arm.name for arm in metric.arms)).index(name)
    return colormaps["tab20"](index % 20), _MARKERS[index % len(_MARKERS)]


def scale_plot(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture | None:
    """Draw a metric against the effective guidance scale: CFG as dots, methods as points.

    A gain that is more than guiding harder lies above the dots. None where nothing was measured.
    """
    if all(arm.entry.effective_scale is None for arm in metric.arms):
        return None
    figure, axes = _figure(9, 4)
    plain: list[tuple[float, float]] = []
    for arm, (own, *_) in zip(metric.arms, rows, strict=True):
        _, values, low, high = _columns(metric, [own])
        if arm.entry.effective_scale is not None:
            scale = [arm.entry.effective_scale]
            color, marker = _look(metric, own.arm)
            name = metric.run.short_name(arm.entry)
            axes.plot(scale, values, marker, color=color, label=name)
            axes.vlines(scale, low, high, color=color, linewidth=1)
        elif is_plain(arm.entry.arm):
            plain.append((own.guidance_scale, values[0]))
    if plain:
        axes.plot(*zip(*sorted(plain), strict=True), "k.", label="cond and CFG, any NFE")
    axes.set(xlabel="effective guidance scale", ylabel=_unit(metric))
    figure.legend(loc="outside right upper", fontsize="small")
    title = f"{metric.name} against the effective guidance scale, 95 % intervals"
    return Picture(title, _SVG, _svg(figure))


def task_bars(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture | None:
    """Draw a bar for each task and arm but the matched ones; None where there is one task only."""
    tasks = [row.metric.partition("/")[2] for row in rows[0][1:]]
    if not tasks:
        return None
    both = zip(metric.arms, rows, strict=True)
    shown = [(arm.entry, own) for arm, own in both if not arm.entry.arm.name.endswith(MATCHED)]
    width = 0.8 / len(shown)
    figure, axes = _figure(4 + 0.15 * len(tasks) * (len(shown) + 2), 4)
    for k, (entry, own) in enumerate(shown):
        _, values, low, high = _columns(metric, own[1:])
        places = np.arange(len(tasks)) + (k - (len(shown) - 1) / 2) * width
        color, _ = _look(metric, entry.arm.name)
        axes.bar(places, values, width, color=color, label=metric.run.short_name(entry))
        axes.vlines(places, low, high, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set(ylabel=_unit(metric))
    figure.legend(loc="outside right upper", fontsize="small")
    return Picture(f"{metric.name} by task, 95 % intervals", _SVG, _svg(figure))


def contact_sheets(out: Path, found: Comparison, count: int) -> list[Picture]:
    """Draw the pairs on which an arm lost most to the reference, and those it won by most."""
    change = found.arm.values - found.reference.values
    both = zip(found.arm.records, found.reference.records, strict=True)
    there = np.array([ours is not None and theirs is not None for ours, theirs in both])
    order = np.argsort(change, kind="stable")
    picks = {
        "worst": [int(i) for i in order if change[i] < 0 and there[i]][:count],
        "best": [int(i) for i in order[::-1] if change[i] > 0 and there[i]][:count],
    }
    return [
        Picture(
            f"{kind} pairs by {found.metric.name}: left {found.reference.entry.arm.name}, "
            f"right {found.metric.run.short_name(found.arm.entry)}",
            "image/png",
            _sheet(out, found, chosen, change),
        )
        for kind, chosen in picks.items()
        if chosen
    ]


def _sheet(out: Path, found: Comparison, chosen: Sequence[int], change: Any) -> bytes:
    """Draw one line for each chosen case: the reference's image, then the arm's."""
    pairs = [[_image(out, m, i) for m in (found.reference, found.arm)] for i in chosen]
    captions = []
    for i in chosen:
        reason = found.arm.reasons[i] or found.reference.reasons[i]
        text = f"{change[i]:+.3g} | {found.metric.cases[i].prompt.text}"
        captions.append(f"{text} | {reason}" if reason else text)
    buffer = io.BytesIO()
    contact_sheet(pairs, captions).save(buffer, format="PNG")
    return buffer.getvalue()


def _image(out: Path, measured: Measured, index: int) -> Any:
    record = measured.records[index]
    if record is None:
        raise ValueError(f"image {index} of {measured.entry.label} must be there, got a failed one")
    return store_of(out, measured.entry).read(record)


def _columns(
    metric: Metric, rows: Sequence[Row]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return NFE, values and both ends, shares in percent; without an interval the value itself."""
    unit = 100 if metric.is_share else 1
    low = [unit * (row.value if math.isnan(row.low) else row.low) for row in rows]
    high = [unit * (row.value if math.isnan(row.high) else row.high) for row in rows]
    return [row.nfe for row in rows], [unit * row.value for row in rows], low, high


def _unit(metric: Metric) -> str:
    name = f"{metric.name}, % right" if metric.is_share else metric.name
    return f"{name}: MEANINGLESS" if metric.is_meaningless else name


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a report needs matplotlib: pip install 'core2-sampler[bench]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> bytes:
    """Return the file of a figure; the same figure is the same file."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "core2"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
