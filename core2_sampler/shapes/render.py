"""Draw prompts of the Shapes world: 64x64 RGB, supersampled, deterministic by seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from core2_sampler.shapes.world import COLORS, SHAPES, Prompt

SIZE = 64  # px
LABELS = 1 + len(SHAPES) * len(COLORS)  # of ``label_map``
_SUPERSAMPLE = 4
_DIAMETER = (16.0, 21.0)  # px
_MARGIN = 1.5  # px between an object and the edge
_GAP = 2.5  # px between two objects
_REACH = 20.0  # px: least distance along the axis of a relation


@dataclass(frozen=True, slots=True)
class Placed:
    """An object of a scene: center and diameter in px, y down."""

    shape: str
    color: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What one image shows: objects on a plain background (RGB 0 to 255)."""

    objects: tuple[Placed, ...]
    background: tuple[int, int, int]


def sample_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """Draw a scene that satisfies ``prompt``: sizes, places, background and unnamed colors."""
    wanted = []
    for thing in prompt.objects:
        color = thing.color or rng.choice(list(COLORS))
        wanted += [(thing.shape, color)] * thing.count
    while True:  # rejection: a layout that does not fit is drawn again
        diameters = [rng.uniform(*_DIAMETER) for _ in wanted]
        centers = [
            tuple(rng.uniform(d / 2 + _MARGIN, SIZE - d / 2 - _MARGIN) for _ in "xy")
            for d in diameters
        ]
        if _apart(centers, diameters) and _related(centers, prompt.relation):
            break
    gray = rng.randint(222, 240)
    background = tuple(gray + rng.randint(-6, 6) for _ in range(3))
    placed = zip(wanted, centers, diameters, strict=True)
    return Scene(
        tuple(Placed(shape, color, x, y, d) for (shape, color), (x, y), d in placed),
        (background[0], background[1], background[2]),
    )


def _apart(centers: list[tuple[float, ...]], diameters: list[float]) -> bool:
    """Bounding boxes keep their distance: no two objects touch."""
    for i, (a, da) in enumerate(zip(centers, diameters, strict=True)):
        for b, db in zip(centers[:i], diameters[:i], strict=True):
            clear = (da + db) / 2 + _GAP
            if abs(a[0] - b[0]) < clear and abs(a[1] - b[1]) < clear:
                return False
    return True


def _related(centers: list[tuple[float, ...]], relation: str | None) -> bool:
    """The first object lies clearly on the named side of the second."""
    if relation is None:
        return True
    dx, dy = centers[0][0] - centers[1][0], centers[0][1] - centers[1][1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    sign = -1 if relation in ("left of", "above") else 1
    return sign * along > _REACH and abs(across) < 0.7 * abs(along)


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of the straight-edged shapes, inscribed in the box of half side ``r``."""
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "star":
        turns = [(1.08 * r if k % 2 == 0 else 0.48 * r, math.pi * k / 5) for k in range(10)]
        return [(x + q * math.sin(a), y + 0.08 * r - q * math.cos(a)) for q, a in turns]
    a = 0.36 * r  # half the thickness of the arms of a cross
    corners = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a)]
    corners += [(a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]
    return [(x + u, y + v) for u, v in corners]


def _paint(
    pen: ImageDraw.ImageDraw, thing: Placed, scale: int, fill: tuple[int, ...] | int
) -> None:
    x, y, r = thing.x * scale, thing.y * scale, thing.diameter * scale / 2
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=fill, width=round(0.5 * r))
    elif thing.shape in SHAPES:
        pen.polygon(_polygon(thing.shape, x, y, r), fill=fill)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {thing.shape!r}")


def draw(scene: Scene) -> Image.Image:
    """Return the RGB image of a scene, ``SIZE`` x ``SIZE``."""
    side = SIZE * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.objects:
        _paint(pen, thing, _SUPERSAMPLE, COLORS[thing.color])
    return image.reduce(_SUPERSAMPLE)


def label_map(scene: Scene, side: int) -> Image.Image:
    """Return what lies where, as a ``side`` x ``side`` image of labels.

    0 is background; the others, below ``LABELS``, tell shape and color.
    """
    image = Image.new("L", (SIZE, SIZE), 0)
    pen = ImageDraw.Draw(image)
    for thing in scene.objects:
        shape, color = SHAPES.index(thing.shape), list(COLORS).index(thing.color)
        _paint(pen, thing, 1, 1 + shape * len(COLORS) + color)
    return image.resize((side, side), Image.Resampling.NEAREST)


def scene_of(prompt: Prompt, seed: int) -> Scene:
    """Return the scene that ``render`` draws."""
    return sample_scene(prompt, random.Random(f"{prompt.id}/{seed}"))


def render(prompt: Prompt, seed: int) -> Image.Image:
    """Draw ``prompt``; the same seed gives the same image."""
    return draw(scene_of(prompt, seed))
