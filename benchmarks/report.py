"""Results tables: a Markdown file for people and a JSON file of the same name for programs.

The JSON is a list of rows, one number with its interval each; every row also carries where it came
from (``provenance``), so that rows of several tables can be put together and keep their source.
"""

from __future__ import annotations

import json
import math
import subprocess
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from core2_sampler.atomic import write_atomic
from core2_sampler.info import environment

LABELS = {
    "single_object": "single",
    "two_object": "two",
    "color_attr": "attribute",
}

PLAIN = ("effective_scale", "frechet_distance", "parameters", "share_of_pass", "flops")
"""Metrics that are no shares of images, and are not told in percent."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of a results table; ``low`` and ``high`` are nan where there is no interval.

    Attributes:
        family: model family, ``sd3`` and so on.
        arm: what was sampled.
        steps: sampling steps.
        guidance_scale: guidance scale.
        nfe: denoiser evaluations of one sample, counted.
        n_images: images behind the number.
        metric: ``overall``, a task, ``*_minus_*`` (paired difference) or ``latent_distance_*``.
        value: shares are in 0..1, not percent.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        command: what makes the table again.
    """

    family: str
    arm: str
    steps: int
    guidance_scale: float
    nfe: float
    n_images: int
    metric: str
    value: float
    low: float
    high: float
    command: str


def provenance(device: str, **run: Any) -> dict[str, Any]:
    """Return commit, device and versions, with what the caller adds (dtype, seeds ...)."""
    about = environment(device)
    about["versions"] |= {"scipy": metadata.version("scipy")}
    return {"commit": source_commit(), **about, **run}


def source_commit(root: Path | None = None) -> str:
    """Return the commit of the checkout the package runs from, '+changes' if it is not clean.

    Args:
        root: a folder of the checkout; default: where this file really lies.
    """
    folder = root or Path(__file__).resolve().parent
    git = ["git", "-C", str(folder)]
    try:
        if subprocess.run([*git, "check-ignore", "-q", "."], check=False).returncode == 0:
            return "unknown"  # an environment inside somebody's checkout
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def write_table(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    provenance: Mapping[str, Any],
    text: str = "",
) -> tuple[Path, Path]:
    """Write ``path`` as Markdown and its name with ``.json``; each replaces its old self whole.

    Args:
        path: the Markdown file; its folder is made.
        rows: the numbers, arms in the order in which the table shall show them.
        title: heading of the Markdown file.
        provenance: see ``provenance``; goes into every JSON row and below the table.
        text: Markdown that follows the table.

    Returns:
        Paths of the Markdown and the JSON file.

    Raises:
        ValueError: if there are no rows, or the name does not end in ``.md``.
    """
    if path.suffix != ".md":
        raise ValueError(f"a table is a Markdown file, its name must end in .md, got {path.name!r}")
    if not rows:
        raise ValueError("a table must have at least one row, got none")
    notes = provenance_notes(provenance)
    parts = [f"# {title}", markdown_table(rows), text.strip(), *sources(rows, notes)]
    page = "\n\n".join(part for part in parts if part) + "\n"
    write_rows(path.with_suffix(".json"), [(row, provenance) for row in rows])
    write_atomic(path, page.encode())
    return path, path.with_suffix(".json")


def sources(rows: Iterable[Row], notes: str) -> list[str]:
    """Return what made some rows, as paragraphs that follow their table and end in ``notes``."""
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(r.command for r in rows))
    return ["Made by", commands, notes]


def write_rows(path: Path, rows: Iterable[tuple[Row, Mapping[str, Any]]]) -> None:
    """Write rows, each with its provenance, as a JSON list of one row a line."""
    records = [{**asdict(row), "provenance": dict(provenance)} for row, provenance in rows]
    lines = [json.dumps(_no_nan(record), ensure_ascii=False) for record in records]
    write_atomic(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def provenance_notes(provenance: Mapping[str, Any]) -> str:
    """Return provenance as a Markdown list."""
    return "\n".join(f"- {key}: {text}" for key, text in provenance_facts(provenance).items())


def provenance_facts(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return provenance as texts, by what each is of."""
    return {key: _note(value) for key, value in provenance.items()}


def markdown_table(rows: Sequence[Row]) -> str:
    """Return one Markdown line per arm and one column per metric, both in order of appearance."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    arms: dict[tuple[str, str, int, float], dict[str, Row]] = {}
    for row in rows:
        key = (row.family, row.arm, row.steps, row.guidance_scale)
        if row.metric in arms.setdefault(key, {}):
            raise ValueError(f"metric {row.metric!r} of arm {key} is given twice")
        arms[key][row.metric] = row
    head = ["family", "arm", "steps", "scale", "NFE", "images", *(_label(m) for m in metrics)]
    lines = []
    for (family, arm, steps, scale), cells in arms.items():
        first = next(iter(cells.values()))
        n_images = max(row.n_images for row in cells.values())
        shown = "" if math.isnan(scale) else f"{scale:g}"
        fixed = [family, arm, f"{steps}", shown, f"{first.nfe:g}", f"{n_images}"]
        lines.append(fixed + [_cell(cells.get(metric)) for metric in metrics])
    return markdown_lines(head, lines, texts=2)


def numbers_table(
    head: Sequence[str],
    arms: Iterable[tuple[Sequence[str], Mapping[str, str]]],
    metrics: Sequence[str],
) -> str:
    """Return one Markdown line per arm and one column per metric, of numbers as they are told.

    Args:
        head: of the columns that say which arm it is, the first of them its name.
        arms: those columns of each arm, and its numbers by metric; it need not have all.
        metrics: the other columns.
    """
    lines = [[*own, *(cells.get(metric, "") for metric in metrics)] for own, cells in arms]
    return markdown_lines([*head, *(metric.replace("_", " ") for metric in metrics)], lines)


def markdown_lines(head: Sequence[str], lines: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table whose first columns are so many of ``texts``, then numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def contact_sheet(
    pairs: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    *,
    side: int = 160,
    columns: int = 1,
) -> Image.Image:
    """Draw each entry: its images side by side, its caption above.

    Args:
        pairs: images of each entry, equally many.
        captions: one text per entry.
        side: drawn side of an image, pixels.
        columns: entries in a line.

    Raises:
        ValueError: if nothing is given or the numbers of entries and captions differ.
    """
    if not pairs or len(pairs) != len(captions):
        raise ValueError(
            f"every line needs one caption, got {len(pairs)} lines and {len(captions)} captions"
        )
    text_height, margin = 14, 4
    width = max(max(map(len, pairs)) * (side + margin), 2 * (side + margin)) + 4 * margin
    letters = width // 6  # of the default font
    texts = [textwrap.wrap(" ".join(caption.split()), letters) or [""] for caption in captions]
    lines = [range(k, min(k + columns, len(pairs))) for k in range(0, len(pairs), columns)]
    heights = [max(len(texts[k]) for k in line) * text_height for line in lines]  # of captions
    height = sum(heights) + len(lines) * (side + 3 * margin)
    sheet = Image.new("RGB", (width * min(columns, len(pairs)), height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for line, tall in zip(lines, heights, strict=True):
        for left, k in zip(range(0, sheet.width, width), line, strict=False):
            for row, words in enumerate(texts[k]):
                draw.text((left + 2, top + 2 + row * text_height), words, fill="black")
            for column, image in enumerate(pairs[k]):
                place = (left + column * (side + margin), top + tall + margin)
                sheet.paste(_scaled(image, side), place)
        top += tall + side + 3 * margin
    return sheet


def _scaled(image: Image.Image, side: int) -> Image.Image:
    """Return an image that fits into a square, in its own proportions."""
    kind = Image.Resampling.LANCZOS if max(image.size) > side else Image.Resampling.NEAREST
    scale = side / max(image.size)
    size = [max(1, round(scale * length)) for length in image.size]
    return image.convert("RGB").resize((size[0], size[1]), kind)


def _label(metric: str) -> str:
    if metric.startswith("latent_distance_to_"):
        return "distance to " + metric.removeprefix("latent_distance_to_").replace("_", " ")
    if "_minus_" in metric:
        return metric.replace("_minus_", " - ").replace("_", " ") + " (points)"
    return LABELS.get(metric, metric.replace("_", " "))


def _cell(row: Row | None) -> str:
    """Return '43.2 [40.1, 46.3]': percent, signed points for differences, others plain."""
    if row is None:
        return ""
    numbers = (row.value, row.low, row.high)
    if row.metric.startswith("latent_distance"):
        value, low, high = (f"{number:.3f}" for number in numbers)
    elif row.metric in PLAIN:
        value, low, high = (f"{number:.4g}" for number in numbers)
    else:
        sign = "+" if "_minus_" in row.metric else ""
        value, low, high = (f"{100 * number:{sign}.1f}" for number in numbers)
    return value if math.isnan(row.low) else f"{value} [{low}, {high}]"


def _note(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _no_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Replace nan, which JSON does not have, by null."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in record.items()
    }
