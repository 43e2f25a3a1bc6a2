"""Tables: what is written is what was measured, whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from core2_sampler.benchmarks import report
from core2_sampler.benchmarks.report import Row, contact_sheet, markdown_table, write_table

KEYS = [
    "family",
    "arm",
    "steps",
    "guidance_scale",
    "nfe",
    "n_images",
    "metric",
    "value",
    "low",
    "high",
    "command",
]


def row(arm: str, metric: str, value: float, low: float, high: float) -> Row:
    return Row("sd3", arm, 28, 4.5, 56.0, 480, metric, value, low, high, "core2 bench shapes")


ROWS = [
    row("cfg", "overall", 0.7014, 0.66, 0.7444),
    row("cond", "overall", 0.5, math.nan, math.nan),
    row("cond", "overall_minus_cfg", -0.2014, -0.25, 0.0149),
    row("cond", "latent_distance_to_cfg", 0.1331, 0.12, 0.14),
]


def test_json_is_a_list_of_rows_with_the_agreed_keys(tmp_path: Path):
    markdown, data = write_table(
        tmp_path / "deep" / "table.md", ROWS, title="T", provenance={"commit": "abc", "seeds": [0]}
    )
    records = json.loads(data.read_text())
    assert (markdown.stem, data.name) == ("table", "table.json")
    assert [list(r)[: len(KEYS)] for r in records] == [KEYS] * 4
    assert records[0]["value"] == 0.7014 and records[1]["low"] is None
    assert all(r["provenance"] == {"commit": "abc", "seeds": [0]} for r in records)


def test_markdown_shows_percent_points_and_distances(tmp_path: Path):
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == (
        "| family | arm | steps | scale | NFE | images | overall | overall - cfg (points) "
        "| distance to cfg |"
    )
    assert lines[2] == "| sd3 | cfg | 28 | 4.5 | 56 | 480 | 70.1 [66.0, 74.4] |  |  |"
    assert lines[3] == (
        "| sd3 | cond | 28 | 4.5 | 56 | 480 | 50.0 | -20.1 [-25.0, +1.5] | 0.133 [0.120, 0.140] |"
    )
    markdown, _ = write_table(
        tmp_path / "t.md", ROWS, title="Heads", provenance={"dtype": "fp32"}, text="Reading."
    )
    page = markdown.read_text()
    assert page.startswith("# Heads\n") and "Reading." in page and "- dtype: fp32" in page
    assert page.count("    core2 bench shapes\n") == 1


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("t.txt", ROWS, "must end in .md"),
        ("t.md", [], "at least one row"),
        ("t.md", [ROWS[0], ROWS[0]], "given twice"),
    ],
)
def test_bad_tables_are_refused_and_leave_nothing(tmp_path, name, rows, message):
    with pytest.raises(ValueError, match=message):
        write_table(tmp_path / name, rows, title="T", provenance={})
    assert list(tmp_path.iterdir()) == []


def test_commit_is_that_of_git_and_says_when_files_changed(tmp_path: Path):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *args],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    assert report.source_commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-q", "-m", "x")
    assert report.source_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "f").write_text("2")
    assert report.source_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


def test_contact_sheet_keeps_every_image_apart():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    sheet = contact_sheet([(red, blue), (blue, red)], ["first", "second"], side=32)
    colors = [sheet.getpixel((x, y)) for y in (32, 84) for x in (16, 52)]
    assert colors == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]
    long = contact_sheet([(red, blue)], ["a word " * 60], side=32)
    assert long.height > contact_sheet([(red, blue)], ["a word"], side=32).height + 60
    edge = [long.getpixel((long.width - 1, y)) for y in range(long.height)]
    assert set(edge) == {(255, 255, 255)}  # no caption is cut
    wide = contact_sheet(
        [(red, blue), (blue, red), (red, red)], ["a", "b", "c"], side=32, columns=2
    )
    assert wide.width == 2 * sheet.width and wide.height == sheet.height
    colors = [wide.getpixel((sheet.width + x, y)) for y in (32, 84) for x in (16, 52)]
    assert colors == [(0, 0, 255), (255, 0, 0), (255, 255, 255), (255, 255, 255)]
    flat = contact_sheet([(Image.new("RGB", (64, 32), "red"),)], [""], side=32)
    assert [flat.getpixel((16, y)) for y in (32, 40)] == [(255, 0, 0), (255, 255, 255)]
    with pytest.raises(ValueError, match="one caption"):
        contact_sheet([(red,)], [])
