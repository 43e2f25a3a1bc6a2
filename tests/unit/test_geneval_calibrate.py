"""Agreement with human labels: the published columns, votes by hand, kappa by known values."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from core2_sampler.benchmarks.geneval.aggregate import ResultRow
from core2_sampler.benchmarks.geneval.calibrate import (
    calibrate,
    cohen_kappa,
    read_labels,
    vote,
)
from core2_sampler.benchmarks.geneval.prompts import Exclude, GenEvalPrompt, Include

# The columns of annotations_if-xl.csv, in its order.
HEADER = (
    "HITId,Input.index,Input.prompt_id,Input.image_id,Input.image_url,Input.caption,"
    "Input.object_0_name,Input.object_1_name,Input.object_0_name_plural,Input.object_1_name_plural,"
    "Input.exclude,Answer.ee,Answer.task-color-0,Answer.task-color-1,Answer.task-count-0,"
    "Answer.task-count-1,Answer.task-objects,Answer.task-position-x,Answer.task-position-y,"
    "Answer.task-quality,Answer.task-real-0,Answer.task-real-1"
)

DONUTS = GenEvalPrompt(
    "00007", "a photo of two donuts", "counting", (Include("donut", 2),), (Exclude("donut", 3),)
)
KITE = GenEvalPrompt(
    "00003",
    "a photo of a kite above a cow",
    "position",
    (Include("cow"), Include("kite", 1, None, ("above", 0))),
)
PAIR = GenEvalPrompt(
    "00004",
    "a photo of a red cow and a white kite",
    "color_attr",
    (Include("cow", 1, "red"), Include("kite", 1, "white")),
)


def answer(names: tuple[str, str], counts=("1", "1.0"), colors=("", ""), place=("", "")) -> dict:
    return {
        "Input.object_0_name": names[0],
        "Input.object_1_name": names[1],
        "Answer.task-count-0": counts[0],
        "Answer.task-count-1": counts[1],
        "Answer.task-color-0": colors[0],
        "Answer.task-color-1": colors[1],
        "Answer.task-position-x": place[0],
        "Answer.task-position-y": place[1],
    }


@pytest.mark.parametrize("count", ["", "0", "1", "2", "3", "5"])
def test_a_rater_counts_exactly(count: str):
    assert vote(answer(("donut", ""), (count, "")), DONUTS) is (count == "2")


@pytest.mark.parametrize(
    ("names", "place", "right"),
    [
        (("cow", "kite"), ("neither_x", "above"), True),
        (("cow", "kite"), ("left", "above"), True),
        (("cow", "kite"), ("left", "neither_y"), False),
        (("cow", "kite"), ("left", ""), False),  # left blank
        (("cow", "kite"), ("neither_x", "below"), False),
        (("kite", "cow"), ("neither_x", "below"), True),  # asked the other way round
        (("kite", "cow"), ("neither_x", "above"), False),
    ],
)
def test_a_rater_sees_where_object_1_lies_relative_to_object_0(names, place, right: bool):
    assert vote(answer(names, place=place), KITE) is right
    assert not vote(answer(names, ("1", ""), place=place), KITE)


@pytest.mark.parametrize(
    ("colors", "right"),
    [
        (("red", "white"), True),
        (("red|black", "gray|white"), True),
        (("white", "red"), False),
        (("red", ""), False),
    ],
)
def test_a_raters_colors_must_name_the_one_demanded(colors, right: bool):
    assert vote(answer(("cow", "kite"), colors=colors), PAIR) is right


def test_a_rater_who_was_asked_about_another_object_is_an_error():
    with pytest.raises(ValueError, match="asked about 'kite', got"):
        vote(answer(("cow", "bear")), KITE)


# --- files and agreement -------------------------------------------------------------------------


def write_labels(path: Path, images: list[tuple[GenEvalPrompt, int, list[str]]]) -> None:
    """Labels of one object, from each rater's count."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, next(csv.reader([HEADER])), restval="")
        writer.writeheader()
        for prompt, index, counts in images:
            for count in counts:
                writer.writerow(
                    answer((prompt.include[0].name, ""), (count, ""))
                    | {
                        "Input.prompt_id": str(int(prompt.id)),
                        "Input.image_id": str(index),
                        "Input.caption": prompt.text,
                        "Answer.task-objects": 'donut, "plate"',
                    }
                )


def result(prompt: GenEvalPrompt, index: int, correct: bool) -> ResultRow:
    name = f"images/{prompt.id}/samples/{index:05d}.png"
    line = prompt.metadata_line()
    return ResultRow(name, prompt.task, prompt.text, correct, "", line, "{}")


COW = GenEvalPrompt("00012", "a photo of a cow", "single_object", (Include("cow"),))


def test_agreement_by_task_and_over_all(tmp_path: Path):
    path = tmp_path / "annotations.csv"
    write_labels(
        path,
        [
            (DONUTS, 0, ["2", "2", "2", "2", "2"]),  # right, unanimous
            (DONUTS, 1, ["2", "2", "3", "1", "2"]),  # right
            (DONUTS, 2, ["3", "3", "3", "4", "5"]),  # wrong, unanimous: never two
            (COW, 3, ["1", "0", "0", "0", "1"]),  # wrong
        ],
    )
    labels = read_labels(path)
    assert [(x.prompt_id, x.index, len(x.answers)) for x in labels] == [
        (7, 0, 5),
        (7, 1, 5),
        (7, 2, 5),
        (12, 3, 5),
    ]
    rows = [
        result(DONUTS, 0, True),
        result(DONUTS, 1, False),
        result(DONUTS, 2, False),
        result(DONUTS, 3, True),  # not labelled
        result(COW, 3, False),
    ]
    found = calibrate(rows, labels)
    assert set(found) == {"all", "counting", "single_object"}
    counting = found["counting"]
    assert (counting.images, counting.agreement) == (3, pytest.approx(2 / 3))
    # Both right 1, both wrong 1, human alone 1: chance 1/3 * 2/3 + 2/3 * 1/3 = 4/9.
    assert counting.kappa == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    assert (counting.judge_correct, counting.human_correct) == pytest.approx((1 / 3, 2 / 3))
    assert (counting.unanimous, counting.unanimous_agreement) == (2, 1.0)
    assert math.isnan(found["single_object"].kappa)  # both say wrong, and nothing else
    assert math.isnan(found["single_object"].unanimous_agreement)
    assert (found["all"].images, found["all"].agreement) == (4, 0.75)


def test_kappa_by_known_values():
    # Yes/yes 20, yes/no 5, no/yes 10, no/no 15: agreement 0.7, chance 0.5, kappa 0.4.
    a = [True] * 25 + [False] * 25
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == pytest.approx(1)
    assert cohen_kappa(a, [not x for x in a]) == pytest.approx(-1)


def test_labels_of_other_images_are_refused(tmp_path: Path):
    path = tmp_path / "annotations.csv"
    write_labels(path, [(DONUTS, 0, ["2"])])
    labels = read_labels(path)
    with pytest.raises(ValueError, match="got no result for image 0 of prompt 7"):
        calibrate([result(DONUTS, 1, True)], labels)
    other = GenEvalPrompt("00007", "a photo of a cow", "single_object", (Include("cow"),))
    with pytest.raises(ValueError, match="got 'a photo of a cow' for image 0"):
        calibrate([result(other, 0, True)], labels)
    with pytest.raises(ValueError, match="got none"):
        calibrate([], [])


def test_bad_files_of_labels_are_refused(tmp_path: Path):
    path = tmp_path / "annotations.csv"
    with pytest.raises(ValueError, match="take one of annotations/"):
        read_labels(path)
    path.write_text("Input.prompt_id,Input.image_id\n1,2\n")
    with pytest.raises(ValueError, match="must have rows with Input.caption"):
        read_labels(path)
