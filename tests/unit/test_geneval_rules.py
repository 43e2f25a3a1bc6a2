"""GenEval's rules against a second implementation, and by hand at their edges.

The second implementation below was written from the description of the protocol (arXiv 2310.11513
and the comments of its evaluator), in exact rational arithmetic where the first is in float32.
"""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from itertools import product

import pytest

from core2_sampler.benchmarks.geneval.prompts import (
    COLORS,
    POSITIONS,
    TASKS,
    Exclude,
    GenEvalPrompt,
    Include,
)
from core2_sampler.benchmarks.geneval.rules import (
    Detection,
    Thresholds,
    Verdict,
    judge_objects,
    keep_detections,
    overlap,
    relations,
)

NAMES = ("cow", "kite", "orange")


def single(value: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


# --- the second implementation -------------------------------------------------------------------


def pixels(box: tuple[float, ...]) -> int:
    left, top, right, bottom = (int(side) for side in box)
    return max(0, right - left + 1) * max(0, bottom - top + 1)


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> Fraction:
    common = pixels((*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])))
    total = pixels(a) + pixels(b) - common
    return Fraction(common, total) if total else Fraction(0)


def filtered(found: dict, counting: bool, cap: int, max_overlap: Fraction) -> dict:
    limit = single(0.9 if counting else 0.3)
    result = {}
    for name, items in found.items():
        ranked = sorted(enumerate(items), key=lambda pair: (pair[1].score, pair[0]), reverse=True)
        rest = [item for _, item in ranked if single(item.score) > limit][:cap]
        chosen = []
        while rest:
            first, *rest = rest
            chosen.append(first)
            if max_overlap != 1:
                rest = [item for item in rest if iou(first.box, item.box) < max_overlap]
        if chosen:
            result[name] = chosen
    return result


def lies(a: Detection, b: Detection, relation: str) -> bool:
    """Whether |d'| / |d| > 1/2 on the axis and side that the relation names, without roots."""
    axis, side = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[
        relation
    ]
    d = [Fraction(int(a.box[k] + a.box[k + 2]) - int(b.box[k] + b.box[k + 2]), 2) for k in range(2)]
    sizes = [sum(abs(int(box[k + 2] - box[k])) for box in (a.box, b.box)) for k in range(2)]
    shrunk = [max(abs(d[k]) - Fraction(sizes[k], 10), Fraction(0)) for k in range(2)]
    if max(shrunk) < Fraction(1, 1000) or d[axis] * side <= 0:
        return False
    return 4 * shrunk[axis] ** 2 > d[0] ** 2 + d[1] ** 2


def is_right(objects: dict, record: dict, color_of: dict) -> bool:
    """The verdict alone, clause by clause, from the metadata record."""
    valid: list = []
    for clause in record["include"]:
        group = objects.get(clause["class"], [])[: clause["count"]]
        holds = len(group) == clause["count"]
        if holds and "color" in clause:
            holds = {color_of[id(item)] for item in group} == {clause["color"]}
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = valid[target] is not None and all(
                lies(a, b, relation) for a, b in product(group, valid[target])
            )
        valid.append(group if holds else None)
    too_many = any(
        len(objects.get(clause["class"], [])) >= clause["count"]
        for clause in record.get("exclude", [])
    )
    return None not in valid and not too_many


# --- random detection sets -----------------------------------------------------------------------


def random_box(rng: random.Random) -> tuple[float, float, float, float]:
    x, y = rng.randrange(0, 80), rng.randrange(0, 80)
    if rng.random() < 0.3:  # on a coarse grid, so that offsets of zero and exact ties are frequent
        x, y = x // 20 * 20, y // 20 * 20
        return (x, y, x + 20, y + 20)
    return (x, y, x + rng.randrange(0, 25), y + rng.randrange(0, 25))


def random_found(rng: random.Random) -> dict[str, list[Detection]]:
    grid = [single(s) for s in (0.1, 0.3, 0.30000004, 0.5, 0.5, 0.9, 0.90000004, 0.95, 0.95, 0.99)]
    found = {}
    for name in NAMES:
        number = rng.choice([0, 1, 1, 1, 2, 2, 3, 4, 16, 17, 20])
        found[name] = [Detection(random_box(rng), rng.choice(grid)) for _ in range(number)]
    return found


def random_prompt(rng: random.Random) -> GenEvalPrompt:
    include = []
    for k in range(rng.choice([1, 1, 2, 2, 2, 3])):
        include.append(
            Include(
                rng.choice(NAMES),
                rng.choice([1, 1, 1, 1, 1, 2, 3, 4, 16]),
                rng.choice(COLORS[:2]) if rng.random() < 0.2 else None,
                (rng.choice(POSITIONS), rng.randrange(k)) if k and rng.random() < 0.6 else None,
            )
        )
    exclude = [
        Exclude(rng.choice(NAMES), rng.choice([1, 2, 3, 4, 5, 16, 17]))
        for _ in range(rng.choice([0, 0, 0, 1, 2]))
    ]
    return GenEvalPrompt("00000", "a photo", rng.choice(TASKS), tuple(include), tuple(exclude))


def test_verdicts_are_those_of_a_second_implementation_on_random_detections():
    rng = random.Random(0)
    outcomes: dict[tuple[str, bool], int] = {}
    for _ in range(5000):
        found, prompt = random_found(rng), random_prompt(rng)
        max_overlap = rng.choice([1.0, 1.0, 0.5])
        color_of = {id(d): rng.choice(COLORS[:2]) for items in found.values() for d in items}
        thresholds = Thresholds(max_overlap=max_overlap)
        kept = keep_detections(found, prompt.task, thresholds)
        verdict = judge_objects(
            kept,
            prompt,
            lambda detections, name, known=color_of: [known[id(d)] for d in detections],
            thresholds.position_margin,
        )

        again = filtered(found, prompt.task == "counting", 16, Fraction(max_overlap))
        assert {k: [id(d) for d in v] for k, v in kept.items()} == {
            k: [id(d) for d in v] for k, v in again.items()
        }
        expected = is_right(again, prompt.metadata(), color_of)
        assert verdict.correct == expected, (found, prompt, verdict)
        assert bool(verdict.reason) != verdict.correct
        positioned = any(clause.position for clause in prompt.include)
        kind = "position" if positioned else "exclude" if prompt.exclude else "plain"
        outcomes[kind, expected] = outcomes.get((kind, expected), 0) + 1
    assert min(outcomes.values()) > 50  # both verdicts of every kind were really met
    assert len(outcomes) == 6


def test_relations_are_those_of_a_second_implementation_on_random_boxes():
    rng = random.Random(1)
    seen: dict[tuple[str, ...], int] = {}
    for _ in range(5000):
        a, b = (Detection(random_box(rng), 1.0) for _ in range(2))
        held = relations(a, b, 0.1)
        assert held == tuple(r for r in POSITIONS if lies(a, b, r)), (a, b)
        seen[held] = seen.get(held, 0) + 1
    assert len(seen) == 9  # none, four sides, four corners


# --- by hand -------------------------------------------------------------------------------------


def at(x: float, y: float, size: float = 10, score: float = 0.95) -> Detection:
    """A square with this center."""
    half = size / 2
    return Detection((x - half, y - half, x + half, y + half), score)


def verdict_of(objects: dict, *include: Include, exclude: tuple = (), colors=()) -> Verdict:
    prompt = GenEvalPrompt("00000", "a photo", "position", include, exclude)
    return judge_objects(objects, prompt, lambda found, name: colors[: len(found)], 0.1)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((0, 0), ()),
        ((2, 0), ()),  # 0.1 * (10 + 10) = 2 px are shortened away
        ((4, 0), ()),  # (4 - 2) / 4 is 0.5 and not more
        ((4.5, 0), ("right of",)),
        ((-4.5, 0), ("left of",)),
        ((0, -4.5), ("above",)),  # y down
        ((0, 4.5), ("below",)),
        ((30, 30), ("right of", "below")),  # 28 / 42.4 = 0.66 on both axes
        ((5, 5), ()),  # 3 / 7.07 = 0.42; by the shortened length it would be 0.71
    ],
)
def test_relation_by_hand(offset: tuple[float, float], expected: tuple[str, ...]):
    assert relations(at(50 + offset[0], 50 + offset[1]), at(50, 50), 0.1) == expected


def test_a_score_of_the_threshold_in_float32_is_not_above_it():
    edge, above = single(0.3), single(0.30000004)
    assert edge > 0.3  # in float64 it would be
    found = {"cow": [at(0, 0, score=edge), at(0, 0, score=above)]}
    assert [d.score for d in keep_detections(found, "colors", Thresholds())["cow"]] == [above]


def test_counting_raises_the_threshold_of_every_class():
    found = {"cow": [at(0, 0, score=0.8)], "kite": [at(0, 0, score=0.95)]}
    assert set(keep_detections(found, "counting", Thresholds())) == {"kite"}
    assert set(keep_detections(found, "two_object", Thresholds())) == {"cow", "kite"}


def test_of_equal_scores_the_later_detection_comes_first_and_the_cut_is_before_the_overlap():
    same = [at(k, 0, size=100, score=0.5) for k in range(20)]
    kept = keep_detections({"cow": same}, "colors", Thresholds())["cow"]
    assert kept == same[:3:-1]  # 16 of them, the last first
    far = at(1000, 0, score=0.4)
    cut = Thresholds(max_overlap=0.5)
    assert keep_detections({"cow": [*same, far]}, "colors", cut)["cow"] == [same[-1]]


def test_overlap_counts_a_pixel_more_on_every_side():
    assert overlap((0, 0, 9, 9), (0, 0, 9, 4)) == pytest.approx(0.5)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0


def test_surplus_objects_are_no_error_but_where_they_are_excluded():
    cows = {"cow": [at(k, 0) for k in range(3)]}
    assert verdict_of(cows, Include("cow", 2)).correct
    wrong = verdict_of(cows, Include("cow", 2), exclude=(Exclude("cow", 3),))
    assert wrong == Verdict(False, "expected cow < 3, found 3")
    assert verdict_of(cows, Include("cow", 3), exclude=(Exclude("cow", 4),)).correct


def test_only_the_most_confident_objects_are_looked_at():
    objects = {"cow": [at(0, 0), at(90, 0, score=0.4)], "kite": [at(50, 0)]}
    clauses = (Include("kite"), Include("cow", 1, None, ("left of", 0)))
    assert verdict_of(objects, *clauses).correct
    both = (Include("kite"), Include("cow", 2, None, ("left of", 0)))
    assert "found right of" in verdict_of(objects, *both).reason


def test_two_clauses_of_one_class_see_the_same_object():
    clauses = (Include("cow", 1, "red"), Include("cow", 1, "orange"))
    two = {"cow": [at(0, 0), at(90, 0)]}
    assert not verdict_of(two, *clauses, colors=["red", "orange"]).correct
    assert verdict_of(two, clauses[0], clauses[0], colors=["red", "orange"]).correct


def test_a_target_of_the_wrong_color_is_no_target():
    objects = {"kite": [at(50, 0)], "cow": [at(0, 0)]}
    wrong = verdict_of(
        objects,
        Include("kite", 1, "blue"),
        Include("cow", 1, None, ("left of", 0)),
        colors=["red"],
    )
    assert wrong.reason.splitlines() == [
        "expected blue kite >= 1, found red",
        "expected cow left of its target, found no valid target",
    ]


def test_colors_are_asked_only_where_enough_objects_were_found():
    def never(found: list, name: str) -> list[str]:
        raise AssertionError("asked")

    prompt = GenEvalPrompt("00000", "a photo", "colors", (Include("cow", 1, "red"),))
    assert judge_objects({}, prompt, never, 0.1).reason == "expected cow >= 1, found 0"
