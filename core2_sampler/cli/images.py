"""Write images with all that made them, and lay them out in grids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

_GAP = 4  # px between cells
_MIN_CELL = 128  # px: smaller images are enlarged in grids, so that captions can be read


def file_stem(prompt: str, seed: int, mode: str) -> str:
    """Name an image after its prompt, seed and mode; different prompts get different names."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]
    if words.replace("-", " ") != prompt:
        words += "-" + hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{words}-seed{seed}-{mode}"


def save_image(image: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG with ``record`` in its text chunks, and the record as JSON beside it.

    Args:
        image: the picture.
        path: ends in ``.png``; the JSON has the same stem.
        record: what made the image. Texts are stored as they are, all else as JSON.
    """
    info = PngInfo()
    for key, value in record.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    image.save(path, pnginfo=info)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Lay images of one size out in rows; small ones are enlarged by a whole factor."""
    width, height = rows[0][0].size
    factor = max(1, -(-_MIN_CELL // min(width, height)))
    width, height = width * factor, height * factor
    columns = max(map(len, rows))
    sheet = Image.new(
        "RGB",
        (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP),
        "white",
    )
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            cell = image.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (x * (width + _GAP), y * (height + _GAP)))
    return sheet


def captioned(sheets: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Put sheets of one height side by side, each below a strip with its caption."""
    font = ImageFont.load_default(size=14)
    widths = [
        max(sheet.width, int(font.getlength(text)) + 2 * _GAP)
        for sheet, text in zip(sheets, captions, strict=True)
    ]
    strip, between = 24, 4 * _GAP
    size = (sum(widths) + between * (len(sheets) - 1), strip + sheets[0].height)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    left = 0
    for sheet, text, width in zip(sheets, captions, widths, strict=True):
        draw.text((left + _GAP, _GAP), text, fill="black", font=font)
        canvas.paste(sheet, (left + (width - sheet.width) // 2, strip))
        left += width + between
    return canvas
