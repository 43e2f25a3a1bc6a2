"""GenEval's judge end to end on tiny random models of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core2_sampler.benchmarks.geneval.judge import GenEvalJudge, judge_samples
from core2_sampler.benchmarks.geneval.layout import read_folder, write_folder
from core2_sampler.benchmarks.geneval.prompts import COLORS, GenEvalPrompt, Include
from core2_sampler.benchmarks.geneval.rules import Thresholds
from core2_sampler.benchmarks.geneval.tiny import tiny_judge


@pytest.fixture(scope="module")
def judge() -> GenEvalJudge:
    found = tiny_judge()
    return GenEvalJudge(found.detect, found.colors, Thresholds(counting_score=0.4))


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def single(index: int, name: str, color: str | None = None) -> GenEvalPrompt:
    task = "single_object" if color is None else "colors"
    return GenEvalPrompt(f"{index:05d}", f"a photo of {name}", task, (Include(name, 1, color),))


def test_what_the_models_see_is_what_prompts_must_demand(judge: GenEvalJudge, image: Image.Image):
    candidates = judge.detect(image)
    scores = {name: max(d.score for d in found) for name, found in candidates.items()}
    seen = max(scores, key=lambda name: scores[name])
    unseen = min(scores, key=lambda name: scores[name])
    assert scores[seen] > 0.4
    assert scores[unseen] < 0.3
    assert judge(image, single(0, seen)).correct
    assert judge(image, single(0, unseen)).reason == f"expected {unseen} >= 1, found 0"

    best = max(candidates[seen], key=lambda d: d.score)
    (color,) = judge.colors(image, [best], seen)
    right = [judge(image, single(0, seen, name)).correct for name in COLORS]
    assert right == [name == color for name in COLORS]


def test_a_folder_is_judged_the_same_whole_or_in_parts(
    judge: GenEvalJudge, image: Image.Image, tmp_path: Path
):
    seen = max(
        judge.detect(image).items(), key=lambda item: max(detection.score for detection in item[1])
    )[0]
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    images = [(single(0, seen), [image, mirrored]), (single(1, seen, "red"), [image])]
    write_folder(tmp_path / "images", images)
    rows = judge_samples(read_folder(tmp_path / "images"), judge, tmp_path / "whole.jsonl")
    assert rows[0].correct
    assert "random@" in rows[0].judge
    for name, boxes in json.loads(rows[0].details).items():
        for left, top, right, bottom, score in boxes:
            assert 0 <= left < right <= 72 and 0 <= top < bottom <= 48, name
            assert 0.3 < score < 1

    lines = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "parts.jsonl").write_bytes(lines[: lines.index(b"\n") + 20])  # torn
    assert judge_samples(read_folder(tmp_path / "images"), judge, tmp_path / "parts.jsonl") == rows
    assert (tmp_path / "parts.jsonl").read_bytes() == lines


def test_random_models_depend_on_their_seed_alone(judge: GenEvalJudge, global_random_state: None):
    assert tiny_judge().detect.name == judge.detect.name
    assert tiny_judge(seed=1).name != tiny_judge().name
