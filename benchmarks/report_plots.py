"""A report's plots and contact sheets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core2_sampler.benchmarks.compare import Comparison
from core2_sampler.benchmarks.measured import Measured, Metric
from core2_sampler.benchmarks.report import Row, contact_sheet
from core2_sampler.benchmarks.report_render import Picture
from core2_sampler.benchmarks.runs import MATCHED, RunArm, store_of

_MARKERS = "osD^v<>PX*"
_DASHES = ("-", "--", "-.", ":")
_GRAYS = {"cfg": "black", "cond": "0.55"}
_TAB20 = (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 3, 5, 7, 9, 11, 13, 17, 19)  # strong first, no grays


def quality_plot(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture | None:
    """Draw a metric against NFE: a point with its interval for each arm, a band for several N.

    None where no arm's NFE is known, as images from elsewhere may have none.
    """
    by_name: dict[str, list[Row]] = {}
    for own in rows:
        if math.isfinite(own[0].nfe):
            by_name.setdefault(own[0].arm, []).append(own[0])
    if not by_name:
        return None
    figure, axes = _figure(9, 4.5)
    for name, points in by_name.items():
        points.sort(key=lambda row: row.nfe)
        nfe, values, low, high = _columns(metric, points)
        nfe = [x + _aside(by_name, name, x) for x in nfe]
        look = _look(metric, name)
        axes.plot(nfe, values, **look, linewidth=1)
        axes.vlines(nfe, low, high, color=look["color"], linewidth=1)
        if not name.endswith(MATCHED):
            axes.fill_between(nfe, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="denoiser evaluations of an image (NFE)", ylabel=_unit(metric))
    title = f"{metric.label} against NFE, 95 % intervals; arms of equal NFE stand side by side"
    return _finished(figure, axes, title)


def _aside(by_name: Mapping[str, Sequence[Row]], name: str, nfe: float) -> float:
    """Return how far from its NFE a point is drawn, so that equal ones do not hide each other."""
    equal = [other for other, points in by_name.items() if any(row.nfe == nfe for row in points)]
    widest = max(row.nfe for points in by_name.values() for row in points)
    return (equal.index(name) - (len(equal) - 1) / 2) * widest / 120


def _look(metric: Metric, name: str) -> dict[str, Any]:
    """Return how an arm is drawn in every plot of a run; hollow is CFG that is matched to it."""
    from matplotlib import colormaps

    method = name.removesuffix(MATCHED)
    names = list(dict.fromkeys(arm.entry.arm.name.removesuffix(MATCHED) for arm in metric.arms))
    colored = [each for each in names if each not in _GRAYS]
    color = _GRAYS.get(method) or colormaps["tab20"](_TAB20[colored.index(method) % len(_TAB20)])
    look = {"color": color, "marker": _MARKERS[names.index(method) % len(_MARKERS)]}
    if name == method:
        return look | {"label": name}
    return look | {"markerfacecolor": "white", "linestyle": ":"}


def _tone(metric: Metric, entry: RunArm) -> float:
    """Return the opacity that tells arms of one name at several N or scales apart."""
    groups = list(dict.fromkeys(arm.entry.group for arm in metric.arms))
    return 1 - 0.7 * groups.index(entry.group) / len(groups)


def scale_plot(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture | None:
    """Draw a metric against the effective guidance scale: CFG as a curve, methods as points.

    A gain that is more than guiding harder lies above the curve, and above CFG at the method's own
    NFE. None where nothing was measured.
    """
    if all(_scale(metric, arm.entry) is None for arm in metric.arms):
        return None
    figure, axes = _figure(9, 4.5)
    curves: dict[int, list[Row]] = {}
    for arm, (own, *_) in zip(metric.arms, rows, strict=True):
        entry = arm.entry
        if entry.arm.name in _GRAYS:
            curves.setdefault(entry.of_steps, []).append(own)
            continue
        is_matched = entry.arm.name.endswith(MATCHED)
        scale = _scale(metric, entry)
        if scale is not None:
            _, values, low, high = _columns(metric, [own])
            look = _look(metric, own.arm)
            label = None if is_matched else metric.run.short_name(entry)
            look |= {"linestyle": "", "label": label, "alpha": _tone(metric, entry)}
            axes.plot([scale], values, **look)
            axes.vlines([scale], low, high, color=look["color"], linewidth=1)
    for k, (steps, points) in enumerate(sorted(curves.items())):
        points.sort(key=lambda row: row.guidance_scale)
        _, values, low, high = _columns(metric, points)
        scales = [row.guidance_scale for row in points]
        axes.plot(scales, values, "k.", ls=_DASHES[k % 4], label=f"cond and CFG, {steps} steps")
        axes.fill_between(scales, low, high, color="black", alpha=0.08, linewidth=0)
    axes.set(xlabel="effective guidance scale", ylabel=_unit(metric))
    title = f"{metric.label} against the effective guidance scale, 95 % intervals"
    return _finished(figure, axes, title)


def _scale(metric: Metric, entry: RunArm) -> float | None:
    """Return the effective scale of a method, or that of the CFG matched to it; None if unknown."""
    name = entry.arm.name
    if name.endswith(MATCHED) and entry.arm.image_scales is None:
        return None if entry.arm.embedded_guidance is not None else entry.arm.guidance_scale
    method = name.removesuffix(MATCHED)
    own = [e.entry for e in metric.arms if e.entry.group == entry.group]
    (found,) = [e for e in own if e.arm.name == method] or [entry]
    return None if found.measured_by == "embedded" else found.effective_scale


def task_bars(metric: Metric, rows: Sequence[Sequence[Row]]) -> Picture | None:
    """Draw a bar for each task and arm but the matched ones; None where there is one task only."""
    tasks = [row.metric.partition("/")[2] for row in rows[0][1:]]
    if not tasks:
        return None
    both = zip(metric.arms, rows, strict=True)
    shown = [(arm.entry, own) for arm, own in both if not arm.entry.arm.name.endswith(MATCHED)]
    width = 0.8 / len(shown)
    figure, axes = _figure(min(16, 4 + 0.15 * len(tasks) * (len(shown) + 2)), 4.5)
    for k, (entry, own) in enumerate(shown):
        _, values, low, high = _columns(metric, own[1:])
        places = np.arange(len(tasks)) + (k - (len(shown) - 1) / 2) * width
        look = {"color": _look(metric, entry.arm.name)["color"], "alpha": _tone(metric, entry)}
        axes.bar(places, values, width, label=metric.run.short_name(entry), **look)
        axes.vlines(places, low, high, color="0.5", linewidth=1)
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.set(ylabel=_unit(metric))
    return _finished(figure, axes, f"{metric.label} by task, 95 % intervals")


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
            f"{kind} pairs by {found.metric.label}: left {found.reference.entry.arm.name}, "
            f"right {found.metric.run.short_name(found.arm.entry)}",
            "image/png",
            _sheet(out, found, chosen, change),
        )
        for kind, chosen in picks.items()
        if chosen
    ]


def _sheet(out: Path, found: Comparison, chosen: Sequence[int], change: Any) -> bytes:
    """Draw the reference's and the arm's image of each chosen case, two cases side by side."""
    both = (found.reference, found.arm)
    pairs = [[_image(out, each, i) for each in both] for i in chosen]
    names = [found.metric.run.short_name(each.entry) for each in both]
    captions = []
    for i in chosen:
        won = f"{names[int(change[i] > 0)]} better"
        if not found.metric.is_share:
            won += f" by {abs(change[i]):.3g}"
        reason = found.arm.reasons[i] or found.reference.reasons[i]
        parts = [f"{names[0]} | {names[1]}", won, found.metric.cases[i].prompt.text, reason]
        captions.append(": ".join(part for part in parts if part))
    side = 160 if max(pairs[0][0].size) <= 160 else 256
    buffer = io.BytesIO()
    contact_sheet(pairs, captions, side=side, columns=2).save(buffer, format="PNG")
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
    name = f"{metric.label}, % right" if metric.is_share else metric.label
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


def _finished(figure: Any, axes: Any, title: str) -> Picture:
    """Return a figure with its legend; the same figure is the same files."""
    from matplotlib import rc_context
    from matplotlib.lines import Line2D

    handles, _ = axes.get_legend_handles_labels()
    if any(line.get_markerfacecolor() == "white" for line in axes.lines):
        hollow = Line2D([], [], color="gray", marker="o", markerfacecolor="white", linestyle=":")
        hollow.set_label("CFG matched (GA-Eval)")
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    svg, pdf = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": "core2"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return Picture(title, "image/svg+xml", svg.getvalue(), pdf.getvalue())
