"""The judge of the Shapes world: does an image show what its prompt demands?

It finds the objects by color and connectivity, names their shapes by overlap with rendered
templates and then applies the rules of GenEval (arXiv 2310.11513), stricter in one point: an
object that was not asked for, or that is no known shape, is an error in every task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from core2_sampler.shapes.render import SIZE, Placed, Scene, draw
from core2_sampler.shapes.world import COLORS, SHAPES, Prompt

_FOREGROUND = 48.0  # RGB distance from the background
_MIN_AREA = 14  # px; smaller components are taken for noise
_TEMPLATE = 24  # px
_MIN_OVERLAP = 0.6  # IoU with the best template
_EDGE_SHRINK = 0.1  # GenEval's position rule: centers closer than this share of the sizes are level


@dataclass(frozen=True, slots=True)
class Detection:
    """An object found in an image: center and size in px, y down; shape None if unknown."""

    shape: str | None
    color: str
    x: float
    y: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an image is right, and if not, why."""

    correct: bool
    reason: str


def _mask_to_template(mask: np.ndarray) -> np.ndarray:
    """Scale a tight boolean mask to the size of the templates."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR)) > 127


@cache
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for shape in SHAPES:
        scene = Scene((Placed(shape, "black", SIZE / 2, SIZE / 2, 40.0),), (255, 255, 255))
        mask = np.asarray(draw(scene).convert("L")) < 128
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tight = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        templates[shape] = _mask_to_template(tight)
    return templates


def _name(mask: np.ndarray) -> str | None:
    """Name the shape of a tight mask, None where no template overlaps it enough."""
    scaled = _mask_to_template(mask)
    overlap = {s: (scaled & t).sum() / (scaled | t).sum() for s, t in _templates().items()}
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] > _MIN_OVERLAP else None


def detect(image: Image.Image) -> list[Detection]:
    """Find the objects of an image, in reading order of their color and place.

    Args:
        image: any size; RGB.

    Raises:
        ModuleNotFoundError: if scipy is missing (``pip install core2-sampler[bench]``).
    """
    try:
        from scipy import ndimage
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the Shapes judge needs scipy: pip install 'core2-sampler[bench]'"
        ) from error
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    foreground = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > _FOREGROUND
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    found = []
    for index, color in enumerate(COLORS):
        mask = foreground & (nearest == index)
        solid = ndimage.binary_opening(mask)  # without the thin fringes of other colors
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            tight = labels[rows, columns] == label
            if (tight & solid[rows, columns]).sum() >= _MIN_AREA:
                height, width = tight.shape
                x, y = columns.start + width / 2, rows.start + height / 2
                found.append(Detection(_name(tight), color, x, y, width, height))
    return found


def _relations(a: Detection, b: Detection) -> set[str]:
    """Return where ``a`` lies relative to ``b`` by GenEval's rule (``relative_position``)."""
    offset = np.array([a.x - b.x, a.y - b.y])
    size = np.array([a.width + b.width, a.height + b.height])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - _EDGE_SHRINK * size, 0)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    sides = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {side for side, holds in sides.items() if holds}


def judge(image: Image.Image, prompt: Prompt) -> Verdict:
    """Decide whether ``image`` shows exactly what ``prompt`` demands, and say why not."""
    found = detect(image)
    if unknown := sum(1 for d in found if d.shape is None):
        return Verdict(False, f"{unknown} object(s) of no known shape")
    groups = []
    for thing in prompt.objects:
        fit = [d for d in found if d.shape == thing.shape]
        if len(fit) != thing.count:
            return Verdict(False, f"expected {thing.count} {thing.shape}(s), found {len(fit)}")
        if wrong := [d.color for d in fit if thing.color not in (None, d.color)]:
            return Verdict(False, f"expected {thing.phrase()}, found color {wrong[0]}")
        groups.append(fit)
    if extra := len(found) - sum(len(group) for group in groups):
        return Verdict(False, f"{extra} object(s) that were not asked for")
    if prompt.relation and prompt.relation not in _relations(groups[0][0], groups[1][0]):
        names = [thing.shape for thing in prompt.objects]
        return Verdict(False, f"{names[0]} is not {prompt.relation} {names[1]}")
    return Verdict(True, "")
