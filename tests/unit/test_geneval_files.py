"""GenEval's files: metadata, images, results; and a folder judged, killed and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from core2_sampler.benchmarks.geneval.aggregate import (
    ResultRow,
    read_results,
    summarize,
    write_results,
)
from core2_sampler.benchmarks.geneval.judge import PORT, GenEvalJudge, judge_samples
from core2_sampler.benchmarks.geneval.layout import read_folder, write_folder
from core2_sampler.benchmarks.geneval.prompts import (
    OBJECT_NAMES,
    Exclude,
    GenEvalPrompt,
    Include,
    read_prompts,
)
from core2_sampler.benchmarks.geneval.rules import Detection

COUNTING = (
    '{"tag": "counting", "include": [{"class": "kite", "count": 2}], '
    '"exclude": [{"class": "kite", "count": 3}], "prompt": "a photo of two kites"}'
)
POSITION = (
    '{"tag": "position", "include": [{"class": "cow", "count": 1}, '
    '{"class": "tv remote", "count": 1, "position": ["left of", 0]}], '
    '"prompt": "a photo of a tv remote left of a cow"}'
)
COLOR = (
    '{"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], '
    '"prompt": "a photo of a red cow"}'
)


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join([COUNTING, POSITION, COLOR]) + "\n")
    return path


# --- metadata ------------------------------------------------------------------------------------


def test_prompts_are_read_and_written_back_to_the_letter(metadata: Path):
    prompts = read_prompts(metadata)
    assert prompts[0] == GenEvalPrompt(
        "00000", "a photo of two kites", "counting", (Include("kite", 2),), (Exclude("kite", 3),)
    )
    assert prompts[1].id == "00001"
    assert prompts[1].include[1] == Include("tv remote", 1, None, ("left of", 0))
    assert [prompt.metadata_line() for prompt in prompts] == [COUNTING, POSITION, COLOR]


def test_the_classes_are_cocos_in_its_order():
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 80
    # COCO's category order: mouse 64, remote 65, keyboard 66 are the three with other names.
    assert OBJECT_NAMES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert (OBJECT_NAMES[0], OBJECT_NAMES[17], OBJECT_NAMES[79]) == (
        "person",
        "horse",
        "toothbrush",
    )


@pytest.mark.skipif("CORE2_DATA" not in os.environ, reason="needs the published prompts")
def test_the_published_prompts_are_read_and_written_back_to_the_letter():
    folder = Path(os.environ["CORE2_DATA"])
    path = folder / "geneval_evaluation_metadata.jsonl"
    prompts = read_prompts(path)
    assert len(prompts) == 553
    assert [prompt.metadata_line() for prompt in prompts] == path.read_text().splitlines()
    names = (folder / "geneval_object_names.txt").read_text().splitlines()
    assert [name.strip() for name in names] == list(OBJECT_NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("tag"), "keys must be include, prompt, tag, exclude"),
        (lambda r: r.update(seed=1), "got tag, include, exclude, prompt, seed"),
        (lambda r: r.update(tag="count"), "did you mean 'counting'"),
        (lambda r: r.update(prompt=""), "prompt must be a caption"),
        (lambda r: r.update(include=[]), "include must be a list of clauses"),
        (lambda r: r["include"][0].update({"class": "remote"}), "did you mean 'tv remote'"),
        (lambda r: r["include"][0].update(count=0), "count must be a whole number"),
        (lambda r: r["include"][0].update(color="gray"), "unknown GenEval color: got 'gray'"),
        (lambda r: r["include"][0].update(position=["above", 0]), "index of an earlier"),
        (lambda r: r["exclude"][0].update(color="red"), "keys must be class, count"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(tmp_path: Path, change, message: str):
    record = json.loads(COUNTING)
    change(record)
    path = tmp_path / "metadata.jsonl"
    path.write_text(COLOR + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert f"{path} line 2: " in str(error.value)


def test_a_missing_an_empty_and_a_broken_file_are_refused(tmp_path: Path):
    path = tmp_path / "metadata.jsonl"
    with pytest.raises(ValueError, match="evaluation_metadata.jsonl from github"):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="one prompt a line"):
        read_prompts(path)
    path.write_text(COLOR[:-5])
    with pytest.raises(ValueError, match="line 1: a line must be JSON"):
        read_prompts(path)


# --- folders -------------------------------------------------------------------------------------


def picture(*boxes: tuple[str, tuple[int, int, int, int]]) -> Image.Image:
    """Rectangles of plain colors on white; Pillow draws the right and bottom side too."""
    image = Image.new("RGB", (64, 48), "white")
    for color, (left, top, right, bottom) in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=color)
    return image


RED_COW = ("#ff0000", (40, 10, 60, 30))
BLUE_COW = ("#fe0000", (40, 10, 60, 30))
REMOTE = ("#00ff00", (4, 10, 20, 30))
KITES = (("#0000ff", (0, 0, 20, 20)), ("#0000fe", (30, 0, 50, 20)))


def fill(folder: Path, metadata: Path) -> None:
    two, position, color = read_prompts(metadata)
    write_folder(
        folder,
        [
            (two, [picture(*KITES), picture(KITES[0])]),
            (position, [picture(RED_COW, REMOTE), picture(RED_COW)]),
            (color, [picture(RED_COW), picture(BLUE_COW)]),
        ],
    )


def test_a_written_folder_is_the_official_layout_and_is_read_back(tmp_path: Path, metadata: Path):
    folder = tmp_path / "images"
    fill(folder, metadata)
    (folder / "00000" / "grid.png").touch()
    (folder / "00000" / "samples" / "preview.png").touch()
    (folder / "notes").mkdir()
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"00002/metadata.jsonl", "00002/samples/00001.png", "00000/grid.png"} < files
    assert not [name for name in files if name.endswith(".tmp")]
    assert (folder / "00001" / "metadata.jsonl").read_text() == POSITION

    samples = read_folder(folder)
    names = [f"0000{p}/samples/0000{k}.png" for p in range(3) for k in range(2)]
    assert [sample.filename for sample in samples] == names
    assert [s.prompt for s in samples] == [p for p in read_prompts(metadata) for _ in range(2)]
    with Image.open(samples[2].path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture(RED_COW, REMOTE)))


def test_images_of_four_digits_are_read_by_number(tmp_path: Path, metadata: Path):
    folder = tmp_path / "images"
    samples = folder / "00000" / "samples"
    samples.mkdir(parents=True)
    (folder / "00000" / "metadata.jsonl").write_text(COUNTING + "\n")
    for name in ("10000.png", "0002.png", "0010.png"):
        picture().save(samples / name)
    assert [s.index for s in read_folder(folder)] == [2, 10, 10000]


def test_bad_folders_are_refused(tmp_path: Path, metadata: Path):
    folder = tmp_path / "images"
    with pytest.raises(ValueError, match="which is none"):
        read_folder(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="a folder for each prompt"):
        read_folder(folder)
    (folder / "00000").mkdir()
    with pytest.raises(ValueError, match="file of one line, got 0"):
        read_folder(folder)
    (folder / "00000" / "metadata.jsonl").write_text(COUNTING)
    with pytest.raises(ValueError, match="got none: a prompt without images"):
        read_folder(folder)
    named = GenEvalPrompt("cow", "a cow", "single_object", (Include("cow"),))
    with pytest.raises(ValueError, match="must be digits, got 'cow'"):
        write_folder(folder, [(named, [picture()])])


# --- results -------------------------------------------------------------------------------------


def row(k: int, tag: str, prompt: str, correct: bool) -> ResultRow:
    reason = "" if correct else "expected"
    return ResultRow(f"{k:05d}.png", tag, prompt, correct, reason, f'{{"p": "{prompt}"}}', "{}")


def test_scores_by_hand():
    # counting: prompts a 1/2, b 0/2; colors: c 2/2; position: d 0/1
    right = [True, False, False, False, True, True, False]
    prompts = ["a", "a", "b", "b", "c", "c", "d"]
    tags = ["counting"] * 4 + ["colors"] * 2 + ["position"]
    rows = [row(k, *x) for k, x in enumerate(zip(tags, prompts, right, strict=True))]
    summary = summarize(rows)
    assert (summary.images, summary.prompts) == (7, 4)
    assert summary.correct_images == pytest.approx(3 / 7)
    assert summary.correct_prompts == 0.5  # a and c
    assert [(tag, t.score, t.correct, t.images) for tag, t in summary.tasks.items()] == [
        ("counting", 0.25, 1, 4),
        ("colors", 1.0, 2, 2),
        ("position", 0.0, 0, 1),
    ]
    assert summary.overall == pytest.approx((0.25 + 1 + 0) / 3)  # tasks, not images


def test_results_of_two_judges_and_of_none_have_no_score():
    official, port = row(0, "colors", "a", True), row(1, "colors", "a", True)
    with pytest.raises(ValueError, match="one judge"):
        summarize([official, ResultRow(**{k: getattr(port, k) for k in KEYS}, judge=PORT)])
    with pytest.raises(ValueError, match="got none"):
        summarize([])


KEYS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


def test_an_official_results_file_is_read_and_written_with_its_columns(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    official = (  # as pandas writes it: no spaces, slashes escaped
        '{"filename":"out\\/00000\\/samples\\/0000.png","tag":"counting",'
        '"prompt":"a photo of two kites","correct":false,"reason":"expected kite>=2, found 1",'
        '"metadata":"{\\"tag\\": \\"counting\\"}","details":"{\\"kite\\": [[1.0, 2, 3, 4, 0.5]]}"}'
    )
    path.write_text(official + "\n")
    rows = read_results(path)
    assert rows[0].filename == "out/00000/samples/0000.png"
    assert json.loads(rows[0].details) == {"kite": [[1.0, 2, 3, 4, 0.5]]}
    write_results(path, rows)
    assert list(json.loads(path.read_text())) == list(KEYS)
    assert json.loads(path.read_text()) == json.loads(official)
    assert read_results(path) == rows


def test_bad_results_files_are_refused(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="must exist"):
        read_results(path)
    good = row(0, "colors", "a", True).line()
    for bad, message in [
        ('{"filename": "a.png"}', "line 2: a row must have filename"),
        (good[:-3], "line 2: a row must be JSON"),
        (good.replace("true", "1"), "true or false, got 1"),
    ]:
        path.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match=message):
            read_results(path)


# --- judging a folder ----------------------------------------------------------------------------


class Rectangles:
    """An exact detector of the pictures above: one object for each plain color but white."""

    name = "rectangles"

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        self.images += 1
        pixels = np.asarray(image).astype(int)
        found: dict[str, list[Detection]] = {}
        for color in np.unique(pixels.reshape(-1, 3), axis=0):
            mask = (pixels == color).all(-1)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            name = ("cow", "tv remote", "kite")[int(color.argmax())]
            if color.min() < 255:
                found.setdefault(name, []).append(Detection(tuple(map(float, box)), 0.95, mask))
        return found


class FullOrNot:
    """Full red is red, all else blue."""

    name = "full or not"

    def __call__(
        self, image: Image.Image, detections: Sequence[Detection], object_name: str
    ) -> list[str]:
        pixels = np.asarray(image)
        return ["red" if pixels[d.mask][0, 0] == 255 else "blue" for d in detections]


def test_a_folder_is_judged_killed_and_resumed(tmp_path: Path, metadata: Path):
    folder, results = tmp_path / "images", tmp_path / "out" / "results.jsonl"
    fill(folder, metadata)
    judge = GenEvalJudge(Rectangles(), FullOrNot())
    counts: list[int] = []

    def stop_after_three(count: int) -> None:
        counts.append(count)
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge_samples(read_folder(folder), judge, results, on_image=stop_after_three)
    assert counts == [0, 1, 2, 3]
    with results.open("a") as file:
        file.write('{"filename": "00001/samples/00001.png", "ta')  # killed in the middle of a line

    rows = judge_samples(read_folder(folder), judge, results, on_image=counts.append)
    assert counts[4:] == [3, 4, 5, 6]
    assert judge.detect.images == 6  # none twice
    assert read_results(results) == rows
    assert [r.correct for r in rows] == [True, False, True, False, True, False]
    assert [r.reason for r in rows[1::2]] == [
        "expected kite >= 2, found 1",
        "expected tv remote >= 1, found 0",
        "expected red cow >= 1, found blue",
    ]
    assert json.loads(rows[2].details) == {
        "tv remote": [[4.0, 10.0, 20.0, 30.0, 0.95]],
        "cow": [[40.0, 10.0, 60.0, 30.0, 0.95]],
    }
    assert (rows[0].metadata, rows[0].tag) == (COUNTING, "counting")
    assert all(r.judge.startswith(PORT) and "rectangles" in r.judge for r in rows)
    assert summarize(rows).overall == 0.5
    assert judge_samples(read_folder(folder), judge, results) == rows
    assert judge.detect.images == 6


def test_results_of_another_judge_or_other_images_are_not_mixed(tmp_path: Path, metadata: Path):
    folder, results = tmp_path / "images", tmp_path / "results.jsonl"
    fill(folder, metadata)
    judge = GenEvalJudge(Rectangles(), FullOrNot())
    judge_samples(read_folder(folder), judge, results)
    before = results.read_bytes()

    other = Rectangles()
    other.name = "other weights"
    with pytest.raises(ValueError, match="other weights.*give another file"):
        judge_samples(read_folder(folder), GenEvalJudge(other, FullOrNot()), results)
    picture(KITES[1]).save(folder / "00000" / "samples" / "00001.png")
    with pytest.raises(ValueError, match="a changed 00000/samples/00001.png"):
        judge_samples(read_folder(folder), judge, results)
    assert results.read_bytes() == before
