"""GenEval's judging rules: from what a detector found to a verdict, as upstream decides it.

Upstream computes in float32, and so do these rules: a score of 0.3 in float32 is not above 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from core2_sampler.benchmarks.geneval.prompts import POSITIONS, GenEvalPrompt, Include

_LEVEL = 1e-3  # px; offsets that shrink to less have no direction


@dataclass(frozen=True, slots=True)
class Detection:
    """An object that a detector found.

    Attributes:
        box: left, top, right, bottom in px, y down; right and bottom lie one past the mask.
        score: confidence, 0 to 1.
        mask: which pixels it covers, [H, W] bool.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


Classify = Callable[[Sequence[Detection], str], Sequence[str]]
"""``classify(detections, object name)``: the color of each, one of ``COLORS``."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The numbers of the rules; the defaults are GenEval's.

    Attributes:
        score: detections must score above it.
        counting_score: the same for every class in the counting task.
        max_objects: no more than so many of a class, the most confident ones.
        max_overlap: of two boxes whose IoU reaches it the less confident one goes; 1 keeps all.
        position_margin: share of the two sizes by which an offset is shortened.
    """

    score: float = 0.3
    counting_score: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an image is right, and if not, why: one line a clause."""

    correct: bool
    reason: str


def keep_detections(
    found: Mapping[str, Sequence[Detection]], task: str, thresholds: Thresholds
) -> dict[str, list[Detection]]:
    """Return what counts of all that a detector found, the most confident first.

    Args:
        found: detections by object name, in the detector's order.
        task: the prompt's task; ``counting`` has a threshold of its own, for every class.
        thresholds: the numbers.

    Returns:
        Detections by object name; a class without any is left out. Of equal scores the later
        detection comes first, as in upstream's reversed ascending sort.
    """
    minimum = thresholds.counting_score if task == "counting" else thresholds.score
    kept = {name: _keep(candidates, minimum, thresholds) for name, candidates in found.items()}
    return {name: detections for name, detections in kept.items() if detections}


def _keep(
    candidates: Sequence[Detection], minimum: float, thresholds: Thresholds
) -> list[Detection]:
    scores = np.array([detection.score for detection in candidates], dtype=np.float32)
    order = scores.argsort(kind="stable")[::-1]
    order = order[scores[order] > np.float32(minimum)][: thresholds.max_objects]
    kept: list[Detection] = []
    for index in order:
        box = candidates[index].box
        if thresholds.max_overlap == 1 or all(
            overlap(other.box, box) < thresholds.max_overlap for other in kept
        ):
            kept.append(candidates[index])
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the IoU of two boxes, sides counted with one pixel more, as upstream does."""

    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)

    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def relations(a: Detection, b: Detection, margin: float) -> tuple[str, ...]:
    """Return where ``a`` lies relative to ``b``: none, one or two of ``POSITIONS``.

    The offset of the centers is shortened by the margin, but made a direction by its full length,
    so that large objects close to each other have no relation.
    """
    boxes = np.array([a.box, b.box], dtype=np.float32).reshape(2, 2, 2)  # [object, corner, axis]
    offset = np.subtract(*boxes.mean(axis=1))
    size = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    shortened = np.maximum(np.abs(offset) - margin * size, 0) * np.sign(offset)
    if np.all(np.abs(shortened) < _LEVEL):
        return ()
    dx, dy = shortened / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return tuple(name for name, held in zip(POSITIONS, holds, strict=True) if held)


def judge_objects(
    objects: Mapping[str, Sequence[Detection]],
    prompt: GenEvalPrompt,
    classify: Classify,
    margin: float,
) -> Verdict:
    """Decide whether the objects of an image are what its prompt demands.

    Every include clause looks at the ``count`` most confident objects of its class alone: surplus
    ones are no error, and two clauses of one class see the same objects.

    Args:
        objects: detections by object name, the most confident first.
        prompt: the demand.
        classify: names colors; asked only where a color is demanded of enough objects.
        margin: ``Thresholds.position_margin``.

    Reference:
        ``evaluate`` of djghosh13/geneval, evaluation/evaluate_images.py.
    """
    reasons = []
    groups: list[Sequence[Detection] | None] = []
    for wanted in prompt.include:
        found = objects.get(wanted.name, ())[: wanted.count]
        wrong = _check(wanted, found, groups, classify, margin)
        groups.append(None if wrong else found)
        reasons += [wrong] if wrong else []
    for banned in prompt.exclude:
        number = len(objects.get(banned.name, ()))
        if number >= banned.count:
            reasons.append(f"expected {banned.name} < {banned.count}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _check(
    wanted: Include,
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    classify: Classify,
    margin: float,
) -> str:
    """Return what is wrong with an include clause, empty if nothing is; the first error counts."""
    if len(found) < wanted.count:
        return f"expected {wanted.name} >= {wanted.count}, found {len(found)}"
    if wanted.color is not None:
        colors = list(classify(found, wanted.name))
        if colors.count(wanted.color) < wanted.count:
            seen = ", ".join(sorted(colors))
            return f"expected {wanted.color} {wanted.name} >= {wanted.count}, found {seen}"
    if wanted.position is not None:
        relation, index = wanted.position
        targets = groups[index]
        if targets is None:
            return f"expected {wanted.name} {relation} its target, found no valid target"
        for detection in found:
            for target in targets:
                held = relations(detection, target, margin)
                if relation not in held:
                    seen = " and ".join(held) or "no clear relation"
                    return f"expected {wanted.name} {relation} its target, found {seen}"
    return ""
