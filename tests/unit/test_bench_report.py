"""Scores and reports: nothing scored twice, nothing dropped, every number as numpy has it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core2_sampler.benchmarks.arms import Arm
from core2_sampler.benchmarks.calibration import agreements, calibrate_judge, labelled_samples
from core2_sampler.benchmarks.compare import comparisons
from core2_sampler.benchmarks.correction import correct, flips_for
from core2_sampler.benchmarks.export import export
from core2_sampler.benchmarks.ga_eval import matched_arms
from core2_sampler.benchmarks.geneval.aggregate import read_results, summarize
from core2_sampler.benchmarks.geneval.calibrate import Labels
from core2_sampler.benchmarks.geneval.judge import GenEvalJudge
from core2_sampler.benchmarks.geneval.prompts import TASKS as GENEVAL_TASKS
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.judges import (
    Judge,
    asked,
    is_meaningless,
    judge_name,
    judges_task,
    load_judge,
    split_spec,
    suite_judges,
    without_judge,
)
from core2_sampler.benchmarks.lines import read_lines
from core2_sampler.benchmarks.measured import declared, measure, measure_run
from core2_sampler.benchmarks.official import import_results
from core2_sampler.benchmarks.options import GenerateConfig, Judging, RunConfig
from core2_sampler.benchmarks.presets import PRESETS
from core2_sampler.benchmarks.report_findings import below_note, small_note, tasks_note
from core2_sampler.benchmarks.report_page import write_report
from core2_sampler.benchmarks.report_render import Section, Table, html_page, latex, markdown
from core2_sampler.benchmarks.request import check_request, check_scorers
from core2_sampler.benchmarks.runs import Run, RunArm, read_runs, write_run
from core2_sampler.benchmarks.scorers import SCORERS
from core2_sampler.benchmarks.scores import open_scores, read_scores, score_tasks, tasks_of
from core2_sampler.benchmarks.stages import declared_judges
from core2_sampler.benchmarks.suite_cli import bench_run
from core2_sampler.benchmarks.suites import SUITES, SuitePrompt, load
from core2_sampler.config import ConfigError

DATA = {"commit": "abc", "device": "cpu", "versions": {"torch": "2"}}
GENEVAL = {"tag": "counting", "include": [{"class": "kite", "count": 2}], "prompt": "two kites"}


class Brightness:
    """A judge whose scores can be told from the image: the first pixel's red."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[SuitePrompt]
    ) -> list[tuple[float, str]]:
        self.asked += len(images)
        return [(float(image.getpixel((0, 0))[0]), "") for image in images]


def make_run(
    out: Path,
    colors: dict[str, list[int | None]],
    *,
    suite: str = "drawbench",
    prompts: int = 4,
    seeds: tuple[int, ...] = (0, 1),
    meta: dict[str, object] | None = None,
    tasks: Sequence[str] = ("Colors", "Text"),
) -> Run:
    """Write a run whose images are plain: one red value an image, None for one that failed."""
    chosen = tuple(
        SuitePrompt(f"{suite}/{k:05d}", f"prompt {k}", tasks[k % len(tasks)], meta or {})
        for k in range(prompts)
    )
    entries = []
    for name in colors:
        mode = "cfg" if name.startswith("cfg") else "cond"
        arm = Arm(name, mode, 4, 3.0)
        if name.startswith("head"):
            arm = Arm(name, "core", 4, 3.0, "tap")
        entries.append(RunArm(arm, 4, 3.0, f"images/{suite}-{name}", "core2 bench generate", DATA))
    settings = {"family": "sd3", "model": "tiny"}
    run = Run(suite, chosen, seeds, settings, tuple(entries))
    for entry, values in zip(entries, colors.values(), strict=True):
        store = ImageStore(out / entry.folder)
        for case, value in zip(run.cases, values, strict=True):
            if value is None:
                store.add_failure(case, RuntimeError("no memory"))
            else:
                image = torch.full((8, 8, 3), value, dtype=torch.uint8)
                image[1, 1, 0] = case.seed  # files of one color still differ
                image[2, 2, 0] = int(case.prompt.id[-5:])
                store.add(case, image, 8.0 if entry.arm.mode == "cfg" else 4.0, 0.5)
    return write_run(out, run, [len(run.cases)] * len(entries))


def score(out: Path, name: str = "imagereward", key: str = "k") -> Brightness:
    look = Brightness()
    judge = Judge(name, key, look)
    tasks = tasks_of(out, read_runs(out), name)
    score_tasks(tasks, judge, open_scores(out, judge), batch_size=3)
    return look


def cells(text: str, caption: str) -> list[list[str]]:
    """Return the lines of a table of a report in Markdown, without its head."""
    after = text[re.search(rf"^(### )?{re.escape(caption)}$", text, re.MULTILINE).end() :]
    lines = after.strip().split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


CFG_VALUES = [10, 20, 30, 40, 50, 60, 70, 80]
COND_VALUES = [12, 24, 30, 40, 40, 60, 90, 80]


def test_no_image_is_scored_twice_for_one_scorer_and_prompt(tmp_path):
    make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    # prompts 1 (both seeds), 2 (seed 1) and 3 (seed 1) have the same pixels in both arms
    assert score(tmp_path).asked == 16 - 4
    assert score(tmp_path).asked == 0
    assert score(tmp_path, key="another").asked == 12
    path = next((tmp_path / "scores").glob("*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed within a line
    total = score(tmp_path).asked + score(tmp_path, key="another").asked
    assert total == 1
    assert len(read_lines(path)) == 12


def test_numbers_are_those_of_numpy(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    score(tmp_path)
    (found,) = correct(comparisons([measure(tmp_path, run, read_scores(tmp_path)[0])]))
    change = np.subtract(COND_VALUES, CFG_VALUES).reshape(4, 2).mean(1)  # by prompt
    assert found.difference.value == pytest.approx(change.mean())
    assert (found.wins.wins, found.wins.ties, found.wins.losses) == (2, 1, 1)
    assert (found.wins.strict.value, found.wins.half.value) == (0.5, 0.625)
    z = 1.959964 + 0.841621  # two-sided 95 %, power 80 %
    assert found.detectable == pytest.approx(z * change.std(ddof=1) / math.sqrt(4), rel=1e-5)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    exact = np.mean(np.abs((signs * change).mean(1)) >= abs(change.mean()) - 1e-12)
    assert found.p_value == found.p_holm == pytest.approx(exact)
    assert (found.arm.nfe, found.arm.seconds) == (4.0, 0.5)


def test_holm_is_over_all_arms_metrics_and_suites_but_no_random_judge(tmp_path):
    """Truth: the definition, worked out over the p-values of both suites."""
    more = [v + 1 for v in CFG_VALUES]
    arms = {"cfg": CFG_VALUES, "cond": COND_VALUES, "other": more}
    runs = [make_run(tmp_path, arms, suite=suite) for suite in ("drawbench", "pickapic")]
    score(tmp_path)
    score(tmp_path, name="aes-tiny")
    alone = []
    for run in runs:
        metrics, missing = measure_run(tmp_path, run, read_scores(tmp_path))
        assert missing == []
        alone.append(comparisons(metrics))
    found = correct([each for one in alone for each in one])
    assert [(each.metric.run, each.metric.name) for each in found] == [
        (each.metric.run, each.metric.name) for one in alone for each in one
    ]
    assert {each.metric.name for each in found if each.p_holm is None} == {"aes-tiny"}
    real = sorted((each for each in found if each.p_holm is not None), key=lambda e: e.p_value)
    assert len(real) == 4
    lowest = 0.0
    for left, each in zip((4, 3, 2, 1), real, strict=True):
        lowest = max(lowest, min(1, left * each.p_value))
        assert each.p_holm == pytest.approx(lowest)
    write_report(tmp_path, sheet=0)
    page = (tmp_path / "report/report.md").read_text()
    assert page.count("with the 4 comparisons of this report") == 2
    rows = json.loads((tmp_path / "report/report.json").read_text())
    written = [row["value"] for row in rows if "p_holm" in row["metric"]]
    assert sorted(written) == pytest.approx(sorted(each.p_holm for each in real))


def test_many_comparisons_are_tested_finely_enough_to_pass(tmp_path):
    """With 10,000 flips no p is below 0.0002: 300 comparisons could never show anything."""
    plain = [10 * (k % 8) for k in range(40)]
    better = [v + 4 + k // 2 % 3 for k, v in enumerate(plain)]
    run = make_run(tmp_path, {"cfg": plain, "cond": better}, prompts=20)
    score(tmp_path)
    (one,) = comparisons([measure(tmp_path, run, read_scores(tmp_path)[0])])
    assert one.p_value == pytest.approx(2e-4)
    equal = dataclasses.replace(one, p_value=0.5)
    found = correct([one, *[equal] * 299])
    assert found[0].p_value == pytest.approx(2 / (flips_for(300) + 1))  # all signs agree
    assert found[0].p_holm == pytest.approx(300 * found[0].p_value) and found[0].p_holm < 0.05
    assert {each.p_value for each in found[1:]} == {0.5} and flips_for(50) == 9_999
    assert correct([one])[0].p_value == one.p_value


def test_a_failed_image_counts_as_the_worst_and_is_named(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "cond": [None, *CFG_VALUES[1:]]})
    score(tmp_path)
    metric = measure(tmp_path, run, read_scores(tmp_path)[0])
    cond = metric.arms[1]
    assert (cond.failed, cond.values[0]) == (1, 10.0)  # the lowest of all is CFG's 10
    score(tmp_path, name="geneval")
    (shares,) = [s for s in read_scores(tmp_path) if s.name == "geneval"]
    assert measure(tmp_path, run, shares).arms[1].values[0] == 0.0
    text = write_report(tmp_path, sheet=2)
    assert "1 images of cond, N = 4, scale 3 could not be generated." in text


def test_what_is_missing_is_asked_for(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    with pytest.raises(ValueError, match="drawbench-sd3-.* has no scores: run `core2 bench score"):
        write_report(tmp_path, sheet=0)
    score(tmp_path)
    manifest = tmp_path / run.arms[1].folder / "manifest.0.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:6]))
    with pytest.raises(ValueError, match="2 of 8 missing: run `core2 bench generate` again"):
        write_report(tmp_path, sheet=0)
    manifest.write_bytes(b"".join(lines))
    path = next((tmp_path / "scores").glob("*.jsonl"))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    with pytest.raises(ValueError, match="must have a score by imagereward, got 3 without"):
        write_report(tmp_path, sheet=0)


def test_a_run_that_lacks_something_is_a_warning_beside_one_that_does_not(tmp_path):
    make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    score(tmp_path)
    make_run(tmp_path, {"cfg": [v + 100 for v in CFG_VALUES]}, suite="pickapic")
    half = make_run(tmp_path, {"cond": CFG_VALUES}, suite="hpdv2")
    manifest = tmp_path / half.arms[0].folder / "manifest.0.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:6]))
    text = write_report(tmp_path, sheet=2)
    assert re.search("pickapic-sd3-.* has no scores: run `core2 bench score", text)
    assert "2 of 8 missing: run `core2 bench generate` again" in text
    assert cells(text, "Paired comparisons")[0][:3] == ["cond", "cfg", "imagereward"]


def test_a_score_that_is_not_finite_is_refused_and_not_kept(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES})
    judge = Judge("aes", "aes;dtype=float16", lambda images, _: [(math.nan, "")] * len(images))
    scores = open_scores(tmp_path, judge)
    message = r"got nan by aes \(aes;dtype=float16\) for .*00000-0-.*png: use another --judge-dtype"
    with pytest.raises(ValueError, match=message):
        score_tasks(tasks_of(tmp_path, [run], "aes"), judge, scores, batch_size=3)
    assert read_lines(scores.path) == []


def test_a_run_is_scored_by_the_preset_that_it_was_generated_with(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES})
    assert declared_judges(run, None) == ["imagereward"]  # DrawBench's own
    arms = tuple(
        dataclasses.replace(arm, provenance={"preset": "xielab-pick101"}) for arm in run.arms
    )
    made = dataclasses.replace(run, arms=arms)
    assert declared_judges(made, None) == [*PRESETS.get("xielab-pick101").scorers]
    assert declared_judges(made, "geneval-official") == ["geneval"]


def test_the_report_is_four_files_that_say_the_same(tmp_path):
    make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    score(tmp_path)
    score(tmp_path, name="clipscore-tiny")
    printed = write_report(tmp_path, sheet=2)
    base = tmp_path / "report" / "report"
    rows = json.loads(base.with_suffix(".json").read_text())
    by_metric = {(row["arm"], row["metric"]): row for row in rows}
    assert by_metric["cond", "imagereward"]["value"] == pytest.approx(np.mean(COND_VALUES))
    assert by_metric["cond", "imagereward/Text"]["value"] == pytest.approx(
        np.mean([30, 40, 90, 80])
    )
    assert by_metric["cond", "imagereward/Text"]["n_images"] == 4
    assert by_metric["cond", "imagereward_minus_cfg"]["value"] == pytest.approx(2.0)
    assert by_metric["cond", "imagereward_win_rate_strict_over_cfg"]["value"] == 0.5
    assert by_metric["cfg", "imagereward"]["provenance"]["suite"] == "drawbench"
    assert list(rows[0]) == [
        *("family", "arm", "steps", "guidance_scale", "nfe", "n_images", "metric", "value"),
        *("low", "high", "command", "provenance"),
    ]
    page = base.with_suffix(".md").read_text()
    assert page.index("imagereward (decides)") < page.index("clipscore-tiny (MEANINGLESS)")
    assert "not stated upstream" in page and "scores of clipscore-tiny come from random" in page
    for text in (page, printed):
        first, second = cells(text, "Paired comparisons")
        assert first[:3] == ["cond", "cfg", "imagereward"] and first[3].startswith("+2 [")
        assert second[:3] == ["cond", "cfg", "clipscore-tiny"] and second[5] == ""  # no p (Holm)
        assert cells(text, "imagereward (decides) by task")[1][2].startswith("60 [")  # Text
    assert "prompt 0" not in printed  # prompts may be anything: logs are public
    tex = base.with_suffix(".tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 5
    assert tex.count(r"\includegraphics") == 2 * 2 + 2 and "not stated upstream" in tex
    html = base.with_suffix(".html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert html.count("<img") == 2 * 2 + 2  # a plot and bars for each metric; best and worst
    shown = re.findall(r"!\[.*\]\((pictures/.*)\)", page)
    shown += re.findall(r"{(pictures/.*\.pdf)}", tex)
    folder = tmp_path / "report"
    assert sorted(shown) == sorted(str(p.relative_to(folder)) for p in folder.glob("pictures/*"))
    write_report(tmp_path, sheet=0)
    again = set(folder.glob("pictures/*"))
    assert len(again) == 2 * 4 and again < {folder / name for name in shown}  # the same files


def test_a_report_without_the_deciding_metric_says_so(tmp_path):
    make_run(tmp_path, {"cond": COND_VALUES})
    score(tmp_path, name="aes")
    text = write_report(tmp_path, sheet=0)
    assert "The metric that decides, imagereward, was not measured." in text
    assert "Without an arm cfg at the same N and scale nothing is compared." in text


def test_a_win_by_guidance_alone_is_a_warning(tmp_path):
    """The method is 5 better than CFG on average, and 0 or 5 than CFG that is matched."""
    plain = [10 * (k % 8) for k in range(24)]
    better = [v + 4 + k // 2 % 3 for k, v in enumerate(plain)]
    for name, matched in (("hollow", better), ("real", plain)):
        out = tmp_path / name
        run = make_run(out, {"cfg": plain, "own": better, "own-matched": matched}, prompts=12)
        assert [e.arm.name for e in run.references(run.arms[1])] == ["cfg", "own-matched"]
        assert run.references(run.arms[2]) == []
        score(out)
        write_report(out, sheet=0)
        page = (out / "report" / "report.md").read_text()
        hollow = r"\*\*GA-Eval on imagereward: own beats default CFG \(\+5 \[.* and cannot"
        assert bool(re.search(hollow, page)) == (name == "hollow")
        assert ("the gain is more than a change of guidance scale" in page) == (name == "real")
        assert "with 12 prompts no p is below 0.00049, and with the 2 comparisons" in page


def test_equal_gains_on_a_few_prompts_are_no_win(tmp_path):
    better = [v + 5 for v in CFG_VALUES]
    make_run(tmp_path, {"cfg": CFG_VALUES, "own": better, "own-matched": CFG_VALUES})
    score(tmp_path)
    write_report(tmp_path, sheet=0)
    page = (tmp_path / "report" / "report.md").read_text()
    # no interval; 2 / 2^4
    assert cells(page, "Paired comparisons")[0][:5] == ["own", "cfg", "imagereward", "+5", "0.12"]
    assert "nothing is shown" in page and "beats" not in page


def test_a_task_that_is_not_there_is_a_warning(tmp_path):
    """One of GenEval's six tasks is no GenEval score, nor is one of which all images failed."""
    colors = {"cfg": CFG_VALUES, "cond": [None, None, 1, 2, None, None, 3, 4]}
    run = make_run(tmp_path, colors, suite="geneval", meta=GENEVAL, tasks=("counting", "position"))
    score(tmp_path, "geneval")
    text = write_report(tmp_path, sheet=0)
    assert "has no prompt of single_object, two_object, colors, color_attr here." in text
    assert "cond, N = 4, scale 3 has no image of counting: all of them count as failed." in text
    whole = dataclasses.replace(
        run,
        prompts=tuple(SuitePrompt(f"{k}", "a", task) for k, task in enumerate(GENEVAL_TASKS)),
    )
    assert tasks_note(whole, []) == []
    assert tasks_note(dataclasses.replace(run, suite="drawbench"), []) == []  # tasks not known


def test_an_effective_scale_that_cfg_does_not_have_is_named(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "head": COND_VALUES})
    for scale, said in ((0.4, "is 0.40"), (-2.0, "is -2.00"), (1.00001, ""), (3.0, "")):
        head = dataclasses.replace(run.arms[1], effective_scale=scale)
        notes = below_note(dataclasses.replace(run, arms=(run.arms[0], head)))
        assert bool(notes) == bool(said) and all(said in note for note in notes)
        matched = matched_arms(head.arm, scale, 8)[1]
        assert (matched.mode == "cond") == (round(scale, 4) <= 1)
    head = dataclasses.replace(run.arms[1], effective_scale=0.4, orthogonal_share=0.1)
    write_run(tmp_path, dataclasses.replace(run, arms=(head,)), [0])
    score(tmp_path)
    assert "CFG has none below 1: head-matched is the model without" in write_report(tmp_path, 0)


def test_a_scale_that_is_not_one_number_says_what_it_is(tmp_path):
    names = ("cfg", "cfg-online", "cfg-official", "cond")
    run = make_run(tmp_path, dict.fromkeys(names, CFG_VALUES))
    ways = ({}, {"evaluators": "e"}, {"image_scales": "f"}, {"embedded_guidance": 2.5})
    arms = tuple(
        dataclasses.replace(entry, arm=dataclasses.replace(entry.arm, **way))
        for entry, way in zip(run.arms, ways, strict=True)
    )
    write_run(tmp_path, dataclasses.replace(run, arms=arms), [0] * 4)
    score(tmp_path)
    lines = cells(write_report(tmp_path, sheet=0), "imagereward (decides)")
    assert [line[2] for line in lines] == ["3", "picked", "each its own", "1, embeds 2.5"]


def test_cfg_alone_lacks_no_reference(tmp_path):
    make_run(tmp_path, {"cfg": CFG_VALUES})
    score(tmp_path)
    assert "Without an arm" not in write_report(tmp_path, sheet=0)


def test_what_a_judge_ran_on_is_kept_with_its_scores_and_told(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES})
    judge = Judge("imagereward", "k", Brightness())
    tasks = tasks_of(tmp_path, [run], "imagereward")
    places = [{"device": name, "versions": {"torch": "2"}} for name in ("cpu", "cuda", "mps")]
    score_tasks(tasks[:3], judge, open_scores(tmp_path, judge, places[0]), batch_size=3)
    score_tasks(tasks, judge, open_scores(tmp_path, judge, places[1]), batch_size=3)
    score_tasks(tasks, judge, open_scores(tmp_path, judge, places[2]), batch_size=3)  # none left
    (scores,) = read_scores(tmp_path)
    assert scores.environments == places[:2]
    write_report(tmp_path, sheet=0)
    page = (tmp_path / "report/report.md").read_text()
    assert "imagereward judged on cpu, torch 2" in page and "judged on cuda, torch 2" in page
    assert "imagereward: weights Apache-2.0 (THUDM/ImageReward)" in page


def test_judges_that_a_preset_does_not_have_are_named(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES})
    arms = tuple(dataclasses.replace(arm, provenance={"preset": "core2-paper"}) for arm in run.arms)
    write_run(tmp_path, dataclasses.replace(run, arms=arms), [8])
    score(tmp_path, "aes")
    score(tmp_path, "clipscore")
    write_report(tmp_path, sheet=0)
    page = (tmp_path / "report/report.md").read_text()
    assert "not as in core2-paper: no scores by hpsv21, pickscore, imagereward" in page
    assert "not as in core2-paper: also scores by clipscore" in page


@pytest.mark.parametrize(
    ("scorer", "lacking", "message"),
    [
        ("hpsv21=tiny", "open_clip", "HPSv2.1 needs open_clip: pip install"),
        ("geneval", "torchvision", "classifier of colors needs torchvision: pip install"),
        ("geneval=tiny", "scipy", "detector needs scipy: pip install"),
        ("blipvqa", "spacy", "BLIP-VQA, without noun_chunks.json .* needs spacy: pip install"),
        ("blipvqa", "en_core_web_sm", "python -m spacy download en_core_web_sm"),
    ],
)
def test_a_missing_package_is_found_before_anything_is_made(monkeypatch, scorer, lacking, message):
    def find_spec(name):
        return None if name == lacking else name

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises((ModuleNotFoundError, ConfigError), match=message):
        check_scorers(["shapes", scorer])
    check_scorers(["shapes", "pickscore", "blipvqa=tiny"])


def test_noun_phrases_in_a_file_need_no_spacy(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "noun_chunks.json").write_text("{}")
    check_scorers([f"blipvqa={tmp_path}"])


def test_the_judges_by_default_are_checked_before_anything_is_made(monkeypatch, tmp_path):
    """A run of T2I-CompBench, whose judge of colors needs spaCy."""
    (tmp_path / "color_val.txt").write_text("a red book\n")
    own = {"suite": "t2icompbench", "source": str(tmp_path / "color_val.txt"), "limit": 1}
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "spacy" else real(name, *a)
    )
    config = RunConfig(GenerateConfig(**own, arms=("cfg",), out=tmp_path / "out"), Judging())
    with pytest.raises(ModuleNotFoundError, match="needs spacy"):
        bench_run(config)
    assert not (tmp_path / "out").exists()


def test_a_source_given_beside_a_preset_is_a_deviation(tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n" * 101)
    given = {"source": str(tmp_path / "list.txt"), "preset": "ga-eval", "arms": ("cfg",)}
    found = check_request(GenerateConfig(**given)).deviations
    assert f"source given as {tmp_path / 'list.txt'}" in found
    assert any("HPSv2.1 in place of HPSv2" in text for text in found)
    assert "one of its four prompt sets" in found


def test_warnings_in_captions_end_once():
    section = Section("t", ["nothing is compared.", "few"], tables=[Table("c", ["x"], [["1"]])])
    assert r"\caption{t: c. nothing is compared. few}" in latex([section])


def test_cells_are_escaped_in_every_format():
    section = Section("a_b", ["50 %"], ["<i>"], [Table("c & d", ["x|y", "z"], [["<b>", "1_0"]])])
    assert r"| x\|y |   z |" in markdown("t", [section])
    assert r"\textless{}b\textgreater{} & 1\_0" in latex([section])
    assert r"\caption{a\_b: c \& d. 50 \%}" in latex([section])
    assert "a -{}-b" in latex([Section("a --b")])  # not one dash
    page = html_page("t", [section])
    assert "&lt;b&gt;" in page and "<b>" not in page and "&lt;i&gt;" in page


def test_two_judges_of_one_name_are_two_metrics(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES})
    score(tmp_path, key="old")
    score(tmp_path, key="new")
    score(tmp_path, name="aes")
    metrics, _ = measure_run(tmp_path, run, read_scores(tmp_path))
    assert [(m.judge, m.key) for m in metrics] == [
        ("imagereward", "new"),
        ("imagereward", "old"),
        ("aes", "k"),
    ]
    first, second, third = (metric.name for metric in metrics)
    assert first != second and third == "aes"
    assert all(re.fullmatch("imagereward@[0-9a-f]{6}", name) for name in (first, second))
    page = write_report(tmp_path, sheet=0)
    assert f"{first} (decides)" in page and f"{second} (decides)" in page


def test_plugins_are_called_after_their_own_keys(tmp_path):
    program = "import json; print(json.dumps({'key': 'my judge/v%d-tiny'}), flush=True); input()"
    judges = []
    for version in (1, 2):
        path = tmp_path / f"{version}.py"
        path.write_text(program % version)
        spec = f"plugin={sys.executable} {path}"
        judges.append(load_judge(spec, [], tmp_path, device="cpu", dtype=torch.float32))
    assert [j.name for j in judges] == ["plugin(my-judge-v1-tiny)", "plugin(my-judge-v2-tiny)"]
    assert not is_meaningless(judges[0].name)
    assert open_scores(tmp_path, judges[0]).path.parent == tmp_path / "scores"


def test_specs_of_judges():
    assert split_spec("plugin=judge --scale=2") == ("plugin", "judge --scale=2")
    assert judge_name("pickscore=tiny") == "pickscore-tiny" and is_meaningless("geneval-tiny")
    assert judge_name("pickscore=./tiny") == "pickscore"
    for text, message in (("pikscore", "did you mean 'pickscore'"), ("aes=", "name=SOURCE")):
        with pytest.raises(ValueError, match=message):
            split_spec(text)
    assert judges_task("blipvqa-tiny", "t2icompbench", "color")
    assert not judges_task("blipvqa", "t2icompbench", "non_spatial")
    assert judges_task("blipvqa", "drawbench", "Colors")
    prompt = SuitePrompt("a", "text", "t", {"x": 1})
    assert asked(prompt, True) != asked(prompt, False)


def test_tiny_geneval_judges_by_what_the_suite_says(tmp_path):
    run = make_run(tmp_path, {"cfg": [100, 200]}, suite="geneval", prompts=1, meta=GENEVAL)
    judge = load_judge("geneval=tiny", [], tmp_path, device="cpu", dtype=torch.float32)
    half = load_judge("geneval=tiny", [], tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.key == judge.key  # as the option's help says
    (option,) = (each for each in dataclasses.fields(Judging) if each.name == "judge_dtype")
    assert "GenEval's judge is always fp32" in option.metadata["help"]
    tasks = tasks_of(tmp_path, [run], judge.name)
    scores = open_scores(tmp_path, judge)
    assert score_tasks(tasks, judge, scores, batch_size=2) == 2
    found = scores.get(tasks[0].record.sha256, tasks[0].prompt)
    assert found.value in (0.0, 1.0) and bool(found.reason) == (found.value == 0.0)
    assert measure(tmp_path, run, scores).is_meaningless
    with pytest.raises(ValueError, match="unknown GenEval object"):
        judge.score([Image.new("RGB", (64, 64))], load("shapes", limit=1))


@pytest.mark.parametrize("name", PRESETS.names())
def test_presets_name_what_exists(name):
    preset = PRESETS.get(name)
    suite = SUITES.get(preset.suite)
    assert suite.primary in preset.scorers
    assert all(s == "geneval" or SCORERS.get(s) for s in preset.scorers)
    assert set(preset.steps) == set(preset.guidance_scale) == {"sd3", "sdxl", "flux"}
    assert preset.limit is None or preset.limit <= suite.size
    assert preset.deviations


def test_export_gives_the_official_names(tmp_path):
    """Truth: the layouts as upstream evaluators read them (reference of each project)."""
    make_run(tmp_path, {"cfg": [1, 2]}, suite="geneval", prompts=1, meta=GENEVAL)
    make_run(tmp_path, {"cfg": list(range(8))}, suite="t2icompbench", tasks=("color", "shape"))
    one = {"cfg": list(range(4))}
    make_run(tmp_path, one, suite="hpdv2", seeds=(0,), tasks=("anime", "photo"))
    names = {}
    for layout in ("geneval", "t2icompbench", "hpsv2"):
        ((folder, count),) = export(tmp_path, read_runs(tmp_path), layout, tmp_path / layout)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        names[layout] = [str(file) for file in files]
        assert count == {"geneval": 2, "t2icompbench": 8, "hpsv2": 4}[layout]
    assert names["geneval"] == [
        "00000/metadata.jsonl",
        "00000/samples/00000.png",
        "00000/samples/00001.png",
        "core2-images.json",
    ]
    assert names["t2icompbench"][:3] == [
        "color/samples/prompt 0_000000.png",
        "color/samples/prompt 0_000001.png",
        "color/samples/prompt 2_000002.png",
    ]
    assert names["hpsv2"] == [f"{s}/0000{k}.jpg" for s in ("anime", "photo") for k in (0, 1)]


def test_of_t2icompbench_every_prompt_has_its_judge_or_a_warning(tmp_path):
    tasks = ("color", "numeracy", "non_spatial", "spatial")
    run = make_run(tmp_path, {"cfg": CFG_VALUES}, suite="t2icompbench", tasks=tasks)
    assert declared(run) == declared_judges(run, None) == ["blipvqa", "t2icompbench-clip"]
    warning = (
        "2 of 4 prompts get no score of their own: T2I-CompBench judges numeracy, spatial with"
    )
    assert without_judge("t2icompbench", tasks).startswith(warning)
    assert without_judge("drawbench", tasks) == without_judge("t2icompbench", ["color"]) == ""
    score(tmp_path, "blipvqa")
    text = write_report(tmp_path, sheet=0)
    assert f"warning: {warning} the UniDet detector, which is not supported." in text
    assert "The metric that decides, t2icompbench-clip, was not measured." in text
    score(tmp_path, "t2icompbench-clip")
    page = write_report(tmp_path, sheet=0)
    assert "was not measured" not in page and warning in page
    assert suite_judges("t2icompbench", ["spatial"]) == []
    other = make_run(tmp_path / "b", {"cfg": CFG_VALUES}, suite="t2icompbench", tasks=("spatial",))
    with pytest.raises(ValueError, match="category 'spatial' of T2I-CompBench is not supported"):
        declared_judges(other, None)


def test_a_win_that_ga_eval_has_not_looked_at_is_a_warning(tmp_path):
    plain = [10 * (k % 8) for k in range(24)]
    better = [v + 4 + k // 2 % 3 for k, v in enumerate(plain)]
    make_run(tmp_path, {"cfg": plain, "head": better, "cond": better}, prompts=12)
    score(tmp_path)
    text = write_report(tmp_path, sheet=0)
    assert re.search(r"warning: head beats default CFG on imagereward \(\+5 \[.*only guide", text)
    assert "cond beats" not in text  # it has no guidance to be stronger


def test_an_arm_without_any_image_has_no_cost_and_the_lowest_score(tmp_path, recwarn):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "cond": [None] * 8})
    score(tmp_path)
    cond = measure(tmp_path, run, read_scores(tmp_path)[0]).arms[1]
    assert math.isnan(cond.nfe) and math.isnan(cond.seconds) and set(cond.values) == {10.0}
    assert "8 images of cond, N = 4, scale 3 could not" in write_report(tmp_path, sheet=2)
    assert not [each for each in recwarn if each.category is RuntimeWarning]


def test_the_least_p_is_that_of_the_prompts_that_were_judged(tmp_path):
    """Half of the 12 prompts have another judge: with 6, no p is below 2 / 2^6."""
    plain = [10 * (k % 8) for k in range(24)]
    arms = {"cfg": plain, "cond": plain[::-1]}
    make_run(tmp_path, arms, suite="t2icompbench", tasks=("color", "spatial"), prompts=12)
    score(tmp_path, "blipvqa")
    write_report(tmp_path, sheet=0)
    assert "with 6 prompts no p is below 0.031" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize(("prompts", "warned"), [(8, True), (20, False)])
def test_intervals_over_few_prompts_of_a_task_are_called_too_narrow(tmp_path, prompts, warned):
    values = [k % 7 for k in range(2 * prompts)]
    run = make_run(tmp_path, {"cfg": values}, suite="t2icompbench", prompts=prompts, tasks=TWO)
    score(tmp_path, "blipvqa")
    notes = small_note([measure(tmp_path, run, read_scores(tmp_path)[0])])
    assert bool(notes) == warned and all("only 4 prompts:" in note for note in notes)


TWO = ("color", "shape")


def test_names_say_n_and_scale_only_where_arms_differ_in_them(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "cond": COND_VALUES})
    assert [run.short_name(entry) for entry in run.arms] == ["cfg", "cond"]
    other = dataclasses.replace(run.arms[1], of_steps=8)
    both = dataclasses.replace(run, arms=(*run.arms, other))
    assert both.short_name(other) == "cond, N = 8, scale 3"


def test_rows_tell_the_steps_they_are_compared_at_and_the_effective_scale(tmp_path):
    run = make_run(tmp_path, {"cfg": CFG_VALUES, "head": COND_VALUES})
    head = dataclasses.replace(run.arms[1], effective_scale=2.5, orthogonal_share=0.25)
    write_run(tmp_path, dataclasses.replace(run, arms=(head,)), [0])
    score(tmp_path)
    write_report(tmp_path, sheet=0)
    rows = json.loads((tmp_path / "report/report.json").read_text())
    about = {row["arm"]: row["provenance"] for row in rows}
    assert about["head"]["N"] == 4 and about["head"]["effective_scale"] == 2.5
    assert "effective_scale" not in about["cfg"]


def official_rows(folder: Path, right: Sequence[bool]) -> str:
    """Lines as GenEval's evaluator writes them by pandas, in no order."""
    lines = []
    for path, is_right in zip(sorted(folder.glob("*/samples/*.png")), right, strict=True):
        metadata = (path.parents[1] / "metadata.jsonl").read_text()
        record = json.loads(metadata)
        row = {"filename": str(path), "tag": record["tag"], "prompt": record["prompt"]}
        row |= {"correct": is_right, "reason": "" if is_right else "few"}
        row |= {"metadata": json.dumps(record), "details": "{}"}
        lines.append(json.dumps(row, separators=(",", ":")).replace("/", "\\/"))
    return "\n".join(reversed(lines)) + "\n"


def test_the_ports_verdicts_are_exported_in_official_rows_and_never_come_back_as_official(tmp_path):
    """Truth: the verdicts themselves; brightness is right above 0."""
    make_run(tmp_path, {"cfg": [0, 9, 0, 0]}, suite="geneval", prompts=2, meta=GENEVAL)
    score(tmp_path, "geneval", "one detector")
    score(tmp_path, "geneval-official")
    ((folder, _),) = export(tmp_path, read_runs(tmp_path), "geneval", tmp_path / "to")
    (path,) = folder.glob("results-*.jsonl")
    rows = read_results(path)
    assert [row.correct for row in rows] == [False, True, False, False]
    assert [row.filename for row in rows] == [
        f"{folder.name}/0000{p}/samples/0000{k}.png" for p in (0, 1) for k in (0, 1)
    ]
    assert {row.judge for row in rows} == {"one detector"} and rows[0].tag == "counting"
    assert json.loads(rows[0].metadata)["include"] == GENEVAL["include"]
    assert summarize(rows).correct_images == 0.25
    with pytest.raises(ValueError, match="must be of GenEval's own evaluator"):
        import_results(tmp_path, read_runs(tmp_path), path, folder)


def test_geneval_is_called_a_port_everywhere_and_has_its_two_other_scores(tmp_path):
    """Truth: three of eight images are right, of two of four prompts."""
    values = {"cfg": [1, 1, 0, 0, 1, 0, 0, 0], "cond": [0] * 8}
    make_run(tmp_path, values, suite="geneval", meta=GENEVAL)
    score(tmp_path, "geneval")
    printed = write_report(tmp_path, sheet=1)
    first, second = cells(printed, "geneval (HF port) % (decides)")
    assert first[-3].startswith("37.5") and first[-2:] == ["37.5", "50.0"]
    assert second[-2:] == ["0.0", "0.0"]
    assert "% correct images" in printed and "% correct prompts" in printed
    base = tmp_path / "report" / "report"
    for suffix in (".md", ".tex", ".html"):
        text = base.with_suffix(suffix).read_text()
        assert len(re.findall(r"geneval \(HF port\)", text)) > 5, suffix
        assert not re.search(r"geneval(,| ?[&<|]| \\?%| by | against | \(decides)", text), suffix
    plots = "".join(path.read_text() for path in base.parent.glob("pictures/*.svg"))
    assert "geneval (HF port), % right" in plots
    rows = json.loads(base.with_suffix(".json").read_text())
    assert {row["metric"] for row in rows} >= {"geneval", "geneval/Colors"}  # names for programs


def test_official_verdicts_on_an_export_are_scores(tmp_path):
    """Truth: the verdicts themselves, and their means by numpy."""
    right = {"cfg": [True, False, True, True], "cond": [False, False, True, False]}
    colors = {"cfg": [1, 2, 3, 4], "cond": [5, 6, 7, 8]}
    make_run(tmp_path, colors, suite="geneval", prompts=2, meta=GENEVAL)
    runs = read_runs(tmp_path)
    exported = export(tmp_path, runs, "geneval", tmp_path / "to")
    for (folder, _), verdicts in zip(exported, right.values(), strict=True):
        results = tmp_path / f"{folder.name}.jsonl"
        results.write_text(official_rows(folder, verdicts))
        rows, replaced = import_results(tmp_path, runs, results, folder)
        assert (len(rows), replaced) == (4, 0)
    (scores,) = read_scores(tmp_path)
    metric = measure(tmp_path, runs[0], scores)
    assert metric.name == "geneval-official" and metric.is_share and metric.is_primary
    for arm in metric.arms:
        assert arm.values.tolist() == [float(v) for v in right[arm.entry.arm.name]]
    (found,) = comparisons([metric])
    assert found.difference.value == pytest.approx(np.mean([-1, 0, 0, -1]))
    assert metric.arms[1].reasons[0] == "few"
    text = write_report(tmp_path, sheet=0)
    assert "geneval-official % (decides)" in text and "was not measured" not in text
    again = tmp_path / "again.jsonl"
    again.write_text(official_rows(exported[0][0], [True] * 4))
    assert import_results(tmp_path, runs, again, exported[0][0])[1] == 1
    assert measure(tmp_path, runs[0], read_scores(tmp_path)[0]).arms[0].values.sum() == 4


def test_official_verdicts_on_anything_else_are_refused(tmp_path):
    colors = {"cfg": [1, 2, 3, 4], "cond": [5, 6, 7, 8]}
    make_run(tmp_path, colors, suite="geneval", prompts=2, meta=GENEVAL)
    runs = read_runs(tmp_path)
    (cfg, _), (cond, _) = export(tmp_path, runs, "geneval", tmp_path / "to")
    text = official_rows(cfg, [True] * 4)
    lines = text.splitlines(keepends=True)
    ours = text.replace("{}", '{}","judge":"GenEval (HF port)', 1).replace('"}\n', '"}\n')
    for wrong, folder, message in [
        (text, cond, "must be about the images in cond-4-3-"),  # the same file names
        ("".join(lines[1:]), cfg, "got 3 rows, 1 images without and 0 verdicts on others"),
        (text + lines[0], cfg, "got 5 rows"),
        (text.replace("two kites", "two cows"), cfg, "must be about the exported prompts"),
        (ours, cfg, "must be of GenEval's own evaluator"),
        (text, tmp_path, "must be one arm's folder with core2-images.json"),
    ]:
        path = tmp_path / "results.jsonl"
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            import_results(tmp_path, runs, path, folder)
    assert not (tmp_path / "scores").exists() or not read_lines(
        next((tmp_path / "scores").glob("*.jsonl"), Path("none"))
    )


def test_agreement_with_people_stands_beside_the_scores(tmp_path):
    """A judge that calls all wrong, two images that the rater finds right, one wrong."""
    prompts = [
        SuitePrompt(f"geneval/{k:05d}", "two kites", "counting", GENEVAL | {"prompt": "two kites"})
        for k in range(3)
    ]
    answer = {"Input.object_0_name": "kite", "Input.object_1_name": ""}
    answer |= {f"Answer.task-{w}-{k}": "" for w in ("count", "color") for k in (0, 1)}
    labels = []
    for k, count in enumerate("221"):
        image = tmp_path / f"images/{k:05d}/samples/00001.png"
        image.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(image)
        labels.append(Labels(k, 1, "two kites", "", [answer | {"Answer.task-count-0": count}]))
    blind = GenEvalJudge(Blind(), Blind())
    samples = labelled_samples(labels, prompts, tmp_path / "images")
    found = calibrate_judge(blind, samples, labels, "annotations_x", tmp_path)
    assert (found["all"].images, found["all"].agreement) == (3, pytest.approx(1 / 3))
    assert agreements(tmp_path, "another") == []
    make_run(tmp_path, {"cfg": CFG_VALUES}, suite="geneval", meta=GENEVAL)
    score(tmp_path, "geneval", blind.name)
    write_report(tmp_path, sheet=0)
    page = (tmp_path / "report/report.md").read_text()
    assert "agrees with the majority of the raters of annotations_x on 33.3 % of 3 images" in page
    (tmp_path / "images/00002/samples/00001.png").unlink()
    with pytest.raises(ValueError, match="every labelled image must be there"):
        labelled_samples(labels, prompts, tmp_path / "images")
    published = tmp_path / "published.png"
    Image.new("RGB", (9, 9)).save(published)
    labels[2] = dataclasses.replace(labels[2], url=str(published))
    (*_, last) = labelled_samples(labels, prompts, tmp_path / "images")
    assert last.path.read_bytes() == published.read_bytes()
    with pytest.raises(ValueError, match="must be 'a cow', as labelled, got 'two kites'"):
        labelled_samples([dataclasses.replace(labels[0], caption="a cow")], prompts, tmp_path)


class Blind:
    """Sees nothing."""

    name = "blind"

    def __call__(self, image: Image.Image, *_: object) -> dict[str, list[object]]:
        return {}


def test_export_refuses_what_an_evaluator_would_misread(tmp_path):
    make_run(tmp_path, {"cfg": list(range(8))}, suite="hpdv2")
    with pytest.raises(ValueError, match="one image a prompt"):
        export(tmp_path, read_runs(tmp_path), "hpsv2", tmp_path / "to")
    with pytest.raises(ValueError, match="must have a run of the suite geneval"):
        export(tmp_path, read_runs(tmp_path), "geneval", tmp_path / "to")
