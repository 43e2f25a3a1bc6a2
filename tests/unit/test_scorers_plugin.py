"""Judges in their own process. Truth: small programs whose answers are known."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from core2_sampler.benchmarks.scorers.plugin import PluginError, PluginScorer

HEAD = """
import json, os, sys, time
print(json.dumps({"key": "test@" + str(os.getpid())}), flush=True)
def answer(**line): print(json.dumps(line), flush=True)
asked = (json.loads(line) for line in sys.stdin)
"""
LENGTH = """
for line in asked: answer(id=line["id"], score=len(line["prompt"]))
"""
IMAGE = Image.new("RGB", (4, 4))


def plugin(tmp_path: Path, body: str, **seconds: float) -> PluginScorer:
    path = tmp_path / "judge.py"
    path.write_text(HEAD + body)
    return PluginScorer([sys.executable, "-u", str(path)], **seconds)


def score(scorer, *prompts):
    return scorer.score([IMAGE] * len(prompts), prompts).tolist()


def test_one_process_answers_every_batch(tmp_path):
    scorer = plugin(tmp_path, LENGTH)
    assert score(scorer, "a", "bbb", "") == [1.0, 3.0, 0.0]
    assert score(scorer, "cc") == [2.0]
    assert scorer.key == f"plugin;judge=test@{scorer._process.pid}"


def test_answers_may_come_in_any_order(tmp_path):
    body = """
import itertools
batch = list(itertools.islice(asked, 3))
for line in reversed(batch): answer(id=line["id"], score=len(line["prompt"]))
"""
    assert score(plugin(tmp_path, body), "a", "bbb", "cc") == [1.0, 3.0, 2.0]


def test_it_gets_the_pixels_and_any_text(tmp_path):
    body = """
from PIL import Image
for line in asked:
    with Image.open(line["image"]) as image:
        answer(id=line["id"], score=image.getpixel((1, 0))[2] + len(line["prompt"]))
"""
    scorer = plugin(tmp_path, body)
    image = Image.new("RGBA", (2, 1), (1, 2, 77, 255))
    assert scorer.score([image], ['é "\n\u2028 x']).tolist() == [77 + 7]


def test_more_than_a_pipe_holds_is_no_deadlock(tmp_path):
    body = "batch = [next(asked) for _ in range(40)]\n" + (
        "for line in batch: answer(id=line['id'], score=len(line['prompt']), pad='x' * 5000)"
    )
    assert score(plugin(tmp_path, body), *["p" * 5000] * 40) == [5000.0] * 40


def test_its_stderr_is_shown_when_it_dies(tmp_path):
    body = "print('loading', file=sys.stderr)\nraise KeyError('no weights')"
    scorer = plugin(tmp_path, body)
    message = r"(?s)must give a score, but it ended \(exit 1\).*loading.*KeyError: 'no weights'"
    with pytest.raises(PluginError, match=message):
        score(scorer, "a")
    with pytest.raises(PluginError, match="but it ended"):
        score(scorer, "a")


def test_it_must_answer_in_time(tmp_path):
    body = "print('slow', file=sys.stderr, flush=True)\ntime.sleep(60)"
    scorer = plugin(tmp_path, body, pair_seconds=0.3)
    with pytest.raises(PluginError, match="within 0.3 s, got nothing.*stderr: slow"):
        score(scorer, "a")
    assert scorer._process.poll() is not None
    (tmp_path / "silent.py").write_text("import time; time.sleep(60)")
    with pytest.raises(PluginError, match="must give its key within 0.3 s"):
        PluginScorer([sys.executable, str(tmp_path / "silent.py")], start_seconds=0.3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("next(asked); print('hello')", "one JSON object a line, got 'hello'"),
        ("next(asked); answer(id=0, score=float('nan'))", "an id and a finite score"),
        ("next(asked); answer(id=0, error='too big')", "finite score, got .*too big"),
        ("next(asked); answer(id=1, score=1)", "every id once, got 1 again or unasked"),
    ],
)
def test_a_wrong_answer_is_an_error(tmp_path, body, message):
    with pytest.raises(PluginError, match=message):
        score(plugin(tmp_path, body), "a")


def test_a_program_without_a_key_or_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "keyless.py").write_text("print('{}')")
    with pytest.raises(PluginError, match="must begin with"):
        PluginScorer([sys.executable, str(tmp_path / "keyless.py")])
    with pytest.raises(ValueError, match="a program that runs, got no-such-program"):
        PluginScorer(["no-such-program"])


def test_it_ends_with_its_scorer(tmp_path):
    scorer = plugin(tmp_path, LENGTH)
    pid, folder = scorer._process.pid, Path(scorer._folder.name)
    assert folder.is_dir()
    del scorer
    gc.collect()
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.05)
    assert not _alive(pid) and not folder.exists()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
