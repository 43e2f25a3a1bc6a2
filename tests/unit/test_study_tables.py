"""Verdicts of the studies of Shapes, and tables on one page. Truth: results made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.correction import flips_for
from core2_sampler.benchmarks.head_study import HeadsConfig
from core2_sampler.benchmarks.head_tables import COSTS, Entry, verdicts, write_tables
from core2_sampler.benchmarks.matching import Matched
from core2_sampler.benchmarks.merge import MergeConfig, bench_merge
from core2_sampler.benchmarks.options import StudyConfig
from core2_sampler.benchmarks.report import PLAIN, Row, write_rows
from core2_sampler.benchmarks.study import ArmResult, Study
from core2_sampler.benchmarks.study_table import corrected_differences
from core2_sampler.benchmarks.suites import SuitePrompt
from core2_sampler.benchmarks.zigzag_study import _Table
from core2_sampler.config import ConfigError

CFG, METHOD = Arm("cfg", "cfg", 4, 3.0), Arm("fast", "core", 4, 3.0, "tap")
FOUND = Matched(1.0, 0.0, 2, 4)
TASKS = ("counting", "position")


def study_of(prompts: int) -> Study:
    chosen = tuple(SuitePrompt(f"{k}", f"prompt {k}", TASKS[k % 2], {}) for k in range(prompts))
    return Study(pipe=None, family="sd3", prompts=chosen, seeds=(0, 1), folder=Path("unused"))


def result(arm: Arm, correct: list[bool]) -> ArmResult:
    latents = torch.ones(len(correct), 1)
    return ArmResult(arm, 4.0, latents, latents, correct, [""] * len(correct))


STUDY = study_of(20)
WINS = [k % 2 == 0 or k % 6 == 1 for k in range(40)]
"""One or two of the two images of every prompt are right."""

LOST, WON = result(CFG, [False] * 40), result(METHOD, WINS)
CONTROL = result(FOUND.arm(METHOD), WINS)


def test_a_win_against_cfg_alone_is_no_more_than_that():
    methods = Entry(WON, {"cfg": LOST}, FOUND, CONTROL)
    (heads,) = verdicts(STUDY, [Entry(LOST, {"cfg": LOST}, None, None), methods])
    table = _Table(STUDY, [LOST, WON], {"fast": FOUND}, {CONTROL.arm: CONTROL}, "command")
    for name, text in (("fast, N = 4, scale 3", heads), ("- fast", table.verdicts())):
        assert text.startswith(f"{name} beats default CFG (+") and "told from CFG at its" in text
        assert text.endswith("wins only against default CFG, and its scale may be all of that.")


def test_one_win_among_250_comparisons_can_be_shown():
    """No p of 9,999 flips is below 0.0002, and 250 times that is not below 0.05."""
    changes = [np.array(WINS, dtype=float), *[np.zeros(40)] * 249]
    found, *others = corrected_differences(STUDY, changes)
    assert found.is_win and found.p_holm == pytest.approx(250 * 2 / (flips_for(250) + 1))
    assert len(others) == 249 and {each.p_holm for each in others} == {1.0}
    assert (found.estimate.value, others[0].estimate.high) == (pytest.approx(np.mean(WINS)), 0)


def test_a_difference_of_one_task_is_that_of_its_images():
    """Prompts of both tasks take turns, with two images each."""
    change = np.array([float(k // 2 % 2 == 0) * (1 + k % 8) for k in range(40)])
    own, other, both = corrected_differences(STUDY, [change] * 3, [*TASKS, None])
    assert [each.estimate.value for each in (own, other, both)] == [3.5, 0, 1.75]
    assert own.p_holm == pytest.approx(3 * 2 / 2**10) and other.p_holm == 1  # 10 prompts
    assert own.is_win and not other.is_win
    (alone,) = corrected_differences(study_of(2), [np.ones(4)], ["counting"])
    assert alone.p_holm == 1 and not alone.is_win  # of one prompt


def row(metric: str, value: float, scale: float = 3.0, arm: str = "tap") -> Row:
    return Row("sd3", arm, 4, scale, 4.0, 8, metric, value, math.nan, math.nan, "core2 bench x")


def merged(tmp_path: Path, rows: list[tuple[Row, dict[str, object]]]) -> str:
    write_rows(tmp_path / "t.json", rows)
    bench_merge(MergeConfig((str(tmp_path / "t.json"),), out=tmp_path / "m.md"))
    return (tmp_path / "m.md").read_text()


def test_what_is_no_share_is_not_told_in_percent(tmp_path):
    values = {"effective_scale": 4.5, "parameters": 8192, "share_of_pass": 0.0036}
    values |= {"flops": 1.5e12, "frechet_distance": 0.25, "overall": 0.5}
    page = merged(tmp_path, [(row(name, value), {}) for name, value in values.items()])
    assert "| 4.5 | 8192 | 0.0036 | 1.5e+12 | 0.25 | 50.0 |" in page
    assert set(COSTS) - {"orthogonal_share"} <= set(PLAIN)


def test_each_guidance_scale_of_a_study_has_a_table_on_a_merged_page(tmp_path):
    """Cond is at scale 1 in both: its rows could not stand in one table."""
    groups = {}
    for scale in (2.0, 3.0):
        arms = {name: Arm(name, "cfg", 4, scale) for name in ("cfg", "cfg-half")}
        arms["cond"] = Arm("cond", "cond", 4, scale)
        done = {name: result(arm, [True, False, False, True]) for name, arm in arms.items()}
        references = {"cfg": done["cfg"], "cfg_half": done["cfg-half"]}
        groups[4, scale] = [Entry(each, references, None, None) for each in done.values()]
    config = HeadsConfig(StudyConfig(), out=tmp_path / "heads.md")
    write_tables(config, study_of(2), groups, {"commit": "abc"})
    rows = json.loads((tmp_path / "heads.json").read_text())
    assert {(r["provenance"]["N"], r["provenance"]["scale"]) for r in rows} == {(4, 2.0), (4, 3.0)}
    tables = ("heads.json", "heads.json")
    bench_merge(MergeConfig(tuple(str(tmp_path / t) for t in tables), out=tmp_path / "m.md"))
    page = (tmp_path / "m.md").read_text()
    assert page.count("## sd3") == 2 and page.count("| sd3 | cond | 4 | 1 |") == 4
    places = [
        page.index(text) for text in ("- scale: 2.0", "| sd3 | cfg | 4 | 3 |", "- scale: 3.0")
    ]
    assert places == sorted(places)
    assert page.count("    core2 bench heads") == 4
    assert len(json.loads((tmp_path / "m.json").read_text())) == 2 * len(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(row("imagereward", 0.4), {"scorer": "k"})], "got the scores of `core2 bench report`"),
        ([(row("overall", 0.4), {}), (row("overall", 0.5), {})], "is given twice"),
    ],
)
def test_what_cannot_stand_on_a_page_is_refused_and_nothing_is_written(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        merged(tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
