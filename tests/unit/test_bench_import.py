"""Images made elsewhere: each is found as the prompt's that it shows, or refused by name.

Truth: folders laid out by hand as each upstream project lays them out, every image of one color.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from core2_sampler.benchmarks.compare import value_rows
from core2_sampler.benchmarks.exchange_options import ImportImagesConfig
from core2_sampler.benchmarks.export import export
from core2_sampler.benchmarks.importing import import_images
from core2_sampler.benchmarks.judges import Judge
from core2_sampler.benchmarks.measured import measure
from core2_sampler.benchmarks.options import command_line
from core2_sampler.benchmarks.report_page import write_report
from core2_sampler.benchmarks.runs import Run, read_runs, store_of
from core2_sampler.benchmarks.scores import open_scores, score_tasks, tasks_of

GENEVAL = [
    {"tag": "counting", "include": [{"class": "kite", "count": 2}], "prompt": "two kites"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"},
]


def paint(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path, quality=100)


def plain(folder: Path) -> Path:
    """Two images of each of three prompts, by number."""
    for k in range(3):
        for n in range(2):
            paint(folder / "images" / f"{k:05d}-{n}.png", 100 * n + k)
    (folder / "list.txt").write_text("a cat\na dog\na cat\n")
    return folder / "list.txt"


def texts(folder: Path) -> Path:
    """The same, by text; the one that stands twice has its images in the order of the lines."""
    lines = [("a dog", 1), ("a cat", 0), ("a cat", 100), ("a cat", 2), ("a dog", 101)]
    for k, (_, red) in enumerate([*lines, ("a cat", 102)]):
        paint(folder / "images" / f"any-{k}.webp.png", red)
    rows = [
        {"file_name": f"any-{k}.webp.png", "text": text}
        for k, (text, _) in enumerate([*lines, ("a cat", 102)])
    ]
    (folder / "images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.txt").write_text("a cat\na dog\na cat\n")
    return folder / "list.txt"


def geneval(folder: Path) -> Path:
    for k, record in enumerate(GENEVAL):
        place = folder / "images" / f"{k:05d}"
        for n in range(2):
            paint(place / "samples" / f"{n:04d}.png", 100 * n + k)
        (place / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        paint(place / "grid.png", 255)
    (folder / "list.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GENEVAL))
    return folder / "list.jsonl"


def t2icompbench(folder: Path) -> Path:
    """Numbers run through the category; the text is the name, full stop and all."""
    for k, text in enumerate(("a red car.", "two_cars_2")):
        for n in range(2):
            paint(folder / "images/color/samples" / f"{text}_{2 * k + n:06d}.png", 100 * n + k)
    (folder / "color_val.txt").write_text("a red car.\ntwo_cars_2\n")
    return folder / "color_val.txt"


def hpsv2(folder: Path) -> Path:
    for k in range(2):
        paint(folder / "images/anime" / f"{k:05d}.png", k)
    (folder / "anime.json").write_text('["a cat", "a dog"]')
    return folder / "anime.json"


def config(folder: Path, make: Callable[[Path], Path], **changes: object) -> ImportImagesConfig:
    layout = "plain" if make is texts else make.__name__
    values = {"images": folder / "images", "arm": "theirs", "layout": layout, "steps": 4}
    values |= {"suite": "drawbench"} if layout == "plain" else {}
    values |= {"guidance_scale": 3.0, "source": make(folder), "out": folder / "out"} | changes
    return ImportImagesConfig(**values)


@pytest.mark.parametrize("make", [plain, texts, geneval, t2icompbench, hpsv2])
def test_every_image_is_that_of_its_prompt_and_number(tmp_path, make):
    run, made = import_images(config(tmp_path, make))
    (entry,) = run.arms
    assert made == len(run.cases) and [p.id for p in run.prompts] == sorted(
        p.id for p in run.prompts
    )
    store = store_of(tmp_path / "out", entry)
    records = store.records()
    for case in run.cases:
        red, green, blue = store.read(records[case.key]).getpixel((4, 4))
        assert red == 100 * case.seed + run.prompts.index(case.prompt)
        assert (green, blue) == (0, 0)
    assert (run.seeds, entry.group) == ((0,) if make is hpsv2 else (0, 1), (4, 3.0))
    assert import_images(config(tmp_path, make))[1] == 0


def test_a_limit_is_the_first_prompts_as_files_count_from_the_first(tmp_path):
    rows = "Prompts,Category\na,Colors\nb,Colors\nc,Text\n"
    (tmp_path / "list.csv").write_text(rows)
    for k in range(2):
        paint(tmp_path / "images" / f"{k:05d}.png", k)
    given = config(tmp_path, plain, source=str(tmp_path / "list.csv"), limit=2)
    for path in (tmp_path / "images").glob("*-*.png"):
        path.unlink()
    run, _ = import_images(given)
    assert [prompt.text for prompt in run.prompts] == ["a", "b"]


def test_what_is_exported_comes_back(tmp_path):
    """Truth: the exporter, whose names are tested against upstream's on their own."""
    for make, layout in ((geneval, "geneval"), (t2icompbench, "t2icompbench")):
        folder = tmp_path / layout
        run, _ = import_images(config(folder, make))
        ((there, _),) = export(folder / "out", read_runs(folder / "out"), layout, folder / "to")
        again = dataclasses.replace(config(folder, make), images=there, out=folder / "two")
        back, _ = import_images(again)
        files = [
            {key: record.sha256 for key, record in store_of(out, own.arms[0]).records().items()}
            for out, own in ((folder / "out", run), (folder / "two", back))
        ]
        assert files[0] == files[1] and len(files[0]) == 4


def remove(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def add(name: str) -> Callable[[Path], object]:
    return lambda folder: paint(folder / name, 1)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (plain, remove("00001-1.png"), "fewer than 2 for drawbench/00001"),
        (plain, remove("00001-0.png", "00001-1.png"), "none for drawbench/00001:"),
        (plain, add("1-1.png"), "image 1 of drawbench/00001 must be there once, got .*00001-1.png"),
        (plain, add("00003.png"), "00000.png or 00000-1.png up to 00002, got .*00003.png"),
        (plain, add("cat.png"), "named by the place of its prompt"),
        (plain, write("00001-1.png", "x"), "00001-1.png must be an image"),
        (texts, add("more.png"), "must name every image, got none of more.png"),
        (texts, remove("any-0.webp.png"), "must name a file that is there"),
        (texts, write("metadata.jsonl", '{"file_name": "any-0.webp.png", "text": "x"}\n'), "every"),
        (geneval, remove("00001/metadata.jsonl"), "must be a file of one line"),
        (geneval, write("00001/metadata.jsonl", json.dumps(GENEVAL[0])), "which is 'a cow'"),
        (geneval, add("00001/samples/00001.png"), "image 1 of geneval/00001 must be there once"),
        (geneval, remove("00000/samples/0001.png"), "fewer than 2 for geneval/00000"),
        (t2icompbench, add("color/samples/a cow_000004.png"), "of a prompt of the list, got 'a co"),
        (t2icompbench, add("shape/samples/a cow_000004.png"), "must be among color, got shape"),
        (t2icompbench, add("color/samples/cow.png"), "must be named PROMPT_000000.png"),
        (hpsv2, remove("anime/00001.png"), "none for hpdv2/anime/00001"),
    ],
)
def test_what_does_not_fit_the_prompts_is_refused(tmp_path, make, change, message):
    given = config(tmp_path, make)
    change(given.images)
    with pytest.raises(ValueError, match=message):
        import_images(given)
    assert not (tmp_path / "out/runs").exists()


def test_a_text_that_stands_twice_needs_its_images_twice(tmp_path):
    given = config(tmp_path, texts)
    lines = (given.images / "metadata.jsonl").read_text().splitlines(keepends=True)
    (given.images / "metadata.jsonl").write_text("".join(lines[:-1]))
    (given.images / "any-5.webp.png").unlink()
    with pytest.raises(ValueError, match="'a cat' stands 2 times in the list .* got 3"):
        import_images(given)


@pytest.fixture
def first(tmp_path: Path) -> tuple[ImportImagesConfig, Run]:
    given = config(tmp_path, plain, arm="cfg", nfe=8.0)
    return given, import_images(given)[0]


def test_images_join_a_run_and_the_report_says_what_is_not_known(tmp_path, first):
    given, run = first
    for path in given.images.glob("*-1.png"):
        paint(path, 250)
    joining = ImportImagesConfig(given.images, "theirs", run=run.name, out=given.out)
    joined, made = import_images(joining)
    assert made == 6 and [entry.arm.name for entry in joined.arms] == ["cfg", "theirs"]
    assert [e.arm.name for e in joined.references(joined.arms[1])] == ["cfg"]
    judge = Judge(
        "imagereward", "k", lambda images, _: [(i.getpixel((0, 0))[0], "") for i in images]
    )
    score_tasks(
        tasks_of(given.out, [joined], "imagereward"),
        judge,
        open_scores(given.out, judge),
        batch_size=6,
    )
    text = write_report(given.out, sheet=2)
    assert "warning: The images of cfg, theirs were made elsewhere: differences" in text
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["theirs", "4", "3", "", "6"] in [line[:5] for line in lines]  # no NFE, no s/image
    assert ["cfg", "4", "3", "8", "6"] in [line[:5] for line in lines]
    change = (250 - 100 + 250 - 101 + 250 - 102) / 6
    assert any(line[:3] == ["theirs", "cfg", "imagereward"] for line in lines)
    assert re.search(rf"\+{change:.4g} ", text)
    page = (given.out / "report/report.md").read_text()
    assert f"made by, theirs: `{command_line(joining)}`" in page
    assert "core2 bench import-images --images" in page


def test_another_nfe_is_refused_by_name_and_is_another_arm(first):
    given, run = first
    assert import_images(given)[1] == 0
    with pytest.raises(ValueError, match="for other images or another nfe, got 'cfg'"):
        import_images(dataclasses.replace(given, nfe=4.0))
    joined, _ = import_images(dataclasses.replace(given, arm="cfg-2", nfe=4.0))
    told = [
        {record.nfe for record in store_of(given.out, entry).records().values()}
        for entry in joined.arms
    ]
    assert joined.name == run.name and told == [{8.0}, {4.0}]


def test_images_without_guidance_are_at_scale_1(first):
    """Truth: the scale of cond in the rows of every other table."""
    given, run = first
    for path in given.images.iterdir():
        paint(path, 30)
    joined, _ = import_images(ImportImagesConfig(given.images, "cond", run=run.name, out=given.out))
    judge = Judge("imagereward", "k", lambda images, _: [(0.5, "")] * len(images))
    scores = open_scores(given.out, judge)
    score_tasks(tasks_of(given.out, [joined], "imagereward"), judge, scores, batch_size=6)
    (rows, cond) = value_rows(measure(given.out, joined, scores))
    assert (rows[0].guidance_scale, cond[0].guidance_scale) == (3.0, 1.0)
    assert [e.arm.name for e in joined.references(joined.arms[1])] == ["cfg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "cfg"}, "does not have for other images or another nfe, got 'cfg'"),
        ({"arm": "a/b"}, "arm must be a name of letters"),
        ({"arm": "x-matched"}, "does not end in -matched"),
        ({"run": "x"}, "unknown run in this folder: got 'x'; choose one of drawbench-imported-"),
        ({"limit": 2}, "limit must be left out with --run"),
        ({"run": None}, "suite must be given"),
        ({"run": None, "suite": "drawbench", "source": "list.txt"}, "got None and None for a run"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, first, changes, message):
    monkeypatch.chdir(tmp_path)
    given, run = first
    paint(given.images / "00000-0.png", 77)
    joining = ImportImagesConfig(given.images, "theirs", run=run.name, out=given.out)
    if "source" in changes:
        (tmp_path / "list.txt").write_text("a cat\na dog\na bird\n")  # not those of the run
    with pytest.raises(ValueError, match=message):
        import_images(dataclasses.replace(joining, **changes))
    assert len(read_runs(given.out)) == len(read_runs(given.out)[0].arms) == 1
