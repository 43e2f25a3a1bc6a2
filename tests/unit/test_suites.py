"""The prompt suites. Truth: small files written by hand in each upstream format."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from core2_sampler.benchmarks.cli import COMMANDS
from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.judges import suite_judges
from core2_sampler.benchmarks.prompt_files import read_rows
from core2_sampler.benchmarks.scorers import ABOUT, SCORERS
from core2_sampler.benchmarks.suites import HPD_STYLES, SUITES, T2I_CATEGORIES, load
from core2_sampler.config import load_config
from core2_sampler.shapes.world import held_out_prompts

DATA = os.environ.get("CORE2_DATA")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_the_default_is_the_embedded_suite_with_the_ids_of_the_world():
    prompts = load()
    world = held_out_prompts(240)
    assert [(p.id, p.text, p.task) for p in prompts] == [(p.id, p.text, p.task) for p in world]
    assert prompts[0].meta == world[0].metadata()
    assert texts(load(limit=12)) == [prompt.text for prompt in held_out_prompts(12)]


def test_drawbench_csv_has_quotes_line_breaks_and_a_trailing_space(tmp_path):
    content = (
        '"Prompts","Category"\r\n"A ""red"" car, big.","Colors"\r\n"Two\nlines","Gary et al. "'
    )
    prompts = load("drawbench", write(tmp_path / "a.csv", content))
    assert texts(prompts) == ['A "red" car, big.', "Two\nlines"]
    assert [p.task for p in prompts] == ["Colors", "Gary et al."]
    assert [p.id for p in prompts] == ["drawbench/00000", "drawbench/00001"]


def test_geneval_keeps_its_metadata_and_its_line_numbers(tmp_path):
    lines = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"},
        {"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": "a red cat"},
    ]
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    prompts = load("geneval", path)
    assert [dict(p.meta) for p in prompts] == lines
    assert [(p.id, p.task) for p in prompts] == [
        ("geneval/00000", "counting"),
        ("geneval/00001", "colors"),
    ]


def test_hpdv2_is_a_folder_of_json_lists_by_style(tmp_path):
    for style in HPD_STYLES:
        write(tmp_path / f"{style}.json", json.dumps([f"{style} one", f"{style}, two"]))
    prompts = load("hpdv2", tmp_path)
    assert [p.task for p in prompts] == [style for style in HPD_STYLES for _ in range(2)]
    assert prompts[3].id == "hpdv2/concept-art/00001"
    assert prompts[3].text == "concept-art, two"
    assert texts(load("hpdv2", tmp_path / "photo.json")) == ["photo one", "photo, two"]


def test_the_hpdv2_subset_is_split_at_the_first_comma_only(tmp_path):
    content = "n,caption,caption_zh,note\n0,plain\n1,a cat, a dog, and more\n2,one, comma\n"
    prompts = load("hpdv2", write(tmp_path / "subset.csv", content))
    assert texts(prompts) == ["plain", "a cat, a dog, and more", "one, comma"]


def test_the_hpdv2_subset_has_its_styles_one_after_the_other(tmp_path):
    """Truth: the published file of 400, by style in the order of the benchmark's own lists."""

    def rows(count):
        lines = "".join(f"{k},prompt, {k}\n" for k in range(count))
        return write(tmp_path / "subset.csv", f"n,caption,caption_zh,note\n{lines}")

    tasks = [prompt.task for prompt in load("hpdv2", rows(400))]
    assert tasks == [style for style in HPD_STYLES for _ in range(100)]
    few = load("hpdv2", rows(400), limit=8)
    assert [(p.text, p.task) for p in few[2:4]] == [
        ("prompt, 100", "concept-art"),
        ("prompt, 101", "concept-art"),
    ]
    assert {prompt.task for prompt in load("hpdv2", rows(399))} == {"hpdv2"}


def test_t2icompbench_is_a_folder_of_lists_by_category(tmp_path):
    for category in T2I_CATEGORIES:
        write(tmp_path / f"t2icompbench_{category}_val.txt", f"{category} a\r\n{category} b\r\n")
    prompts = load("t2icompbench", tmp_path)
    assert texts(prompts) == [f"{c} {x}" for c in T2I_CATEGORIES for x in "ab"]
    assert [p.task for p in prompts[::2]] == list(T2I_CATEGORIES)
    assert (
        load("t2icompbench", tmp_path / "t2icompbench_3d_spatial_val.txt")[0].task == "3d_spatial"
    )
    (tmp_path / "t2icompbench_shape_val.txt").unlink()
    with pytest.raises(ValueError, match="one file for each of color.*got 0 for shape"):
        load("t2icompbench", tmp_path)


def test_a_limit_takes_every_task_alike_in_the_order_of_the_list(tmp_path):
    """Truth: by hand. GenEval's file begins with 80 prompts of one task."""
    tags = ["single_object"] * 6 + ["counting"] + ["colors"] * 3 + ["position"] * 3
    rows = [{"tag": tag, "include": [], "prompt": f"{k}"} for k, tag in enumerate(tags)]
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows)))
    assert texts(load("geneval", path, limit=6)) == ["0", "1", "6", "7", "8", "10"]
    assert texts(load("geneval", path, limit=9)) == list("0126789") + ["10", "11"]
    assert texts(load("geneval", path, limit=13)) == texts(load("geneval", path))
    assert texts(load("geneval", path, limit=3, evenly=False)) == ["0", "1", "2"]


def test_a_list_may_be_named_by_its_address():
    """A Path would make `https:/...` of it, and look for a file."""
    address = "https://example.invalid/a/list.csv"
    for command in ("run", "generate", "import-images"):
        given = {"source": address, "images": "x", "arm": "a"}
        kept = given if command == "import-images" else {"source": address}
        config = load_config(COMMANDS[command][0], given=kept)
        assert getattr(config, "generate", config).source == address
    with pytest.raises(ValueError, match=f"^{address} must be reachable or in the local cache"):
        load("drawbench", address)


def test_a_parquet_file_is_told_how_to_become_a_list(tmp_path):
    with pytest.raises(ValueError, match=r"pandas.read_parquet\(FILE\)\[\['caption'\]\].to_json"):
        load("pickapic", write(tmp_path / "test_unique.parquet", ""))


def test_what_stands_twice_is_two_prompts(tmp_path):
    prompts = load("pickapic", write(tmp_path / "p.txt", "a cat\na cat\n"))
    assert texts(prompts) == ["a cat", "a cat"]
    assert len({prompt.id for prompt in prompts}) == 2


def test_skip_nsfw_leaves_out_words_but_not_their_neighbours_and_no_id_moves(tmp_path):
    listed = ["a Nude model", "essex road", "grass", "assassin", "sexy robot", "a cat"]
    path = write(tmp_path / "p.json", json.dumps([{"caption": text} for text in listed]))
    assert texts(load("pickapic", path)) == listed
    kept = load("pickapic", path, skip_nsfw=True)
    assert texts(kept) == ["essex road", "grass", "assassin", "a cat"]
    assert kept[-1].id == "pickapic/00005"
    assert texts(load("pickapic", path, limit=2, skip_nsfw=True)) == ["essex road", "grass"]


@pytest.mark.parametrize("limit", [0, -1, 3])
def test_an_impossible_limit_is_refused(tmp_path, limit):
    path = write(tmp_path / "p.txt", "a\nb\n")
    assert texts(load("pickapic", path, limit=2)) == ["a", "b"]
    with pytest.raises(ValueError, match=f"limit must be 1 to 2 .*got {limit}"):
        load("pickapic", path, limit=limit)


@pytest.mark.parametrize(
    ("suite", "name", "content", "message"),
    [
        ("pickapic", "a.txt", "\n\n", "at least one prompt, got none"),
        ("pickapic", "a.csv", "", "at least one prompt, got none"),
        ("drawbench", "a.csv", "Text,Category\nx,y\n", "column prompt or .*got Text, Category"),
        ("drawbench", "a.csv", "Prompts\na, b\n", "named columns in every row"),
        ("geneval", "a.jsonl", '{"prompt": "x"}\n', "must have tag, include, got prompt"),
        ("geneval", "a.jsonl", "{\n", "must be a jsonl file"),
        ("hpdv2", "a.json", "[1]", "texts or named columns"),
        ("hpdv2", "a.json", '["x", " "]', "prompt in every row, got ' ' in row 1"),
        ("pickapic", "a.parquet", "", "one of .csv, .tsv, .json, .jsonl, .txt, got a.parquet"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, suite, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(suite, write(tmp_path / name, content))


def test_tab_separated_rows_are_read(tmp_path):
    rows = read_rows(write(tmp_path / "a.tsv", "Prompt\tCategory\na, b\tc\n"))
    assert rows == [{"Prompt": "a, b", "Category": "c"}]


@pytest.mark.parametrize("name", [name for name in SUITES.names() if SUITES.get(name).upstream])
def test_offline_each_suite_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="must be reachable or in the local cache.*your own copy"):
        load(name)
    with pytest.raises(ValueError, match="got .*none.json: check the path"):
        load(name, tmp_path / "none.json")


def test_a_suite_is_described_and_its_primary_metric_exists():
    for name in SUITES.names():
        suite = SUITES.get(name)
        assert suite.name == name and suite.about and suite.licence and suite.size > 0
        assert suite.primary == "geneval" or suite.primary in SCORERS.names()
        for address in suite.upstream:
            if address.startswith("https://raw."):
                assert re.search("/[0-9a-f]{40}/", address), "a branch would change under us"
        judges = set(suite_judges(name, suite.tasks))
        assert judges <= set(ABOUT), "a report says under which licence a judge is"
    assert {prompt.task for prompt in load()} == set(SUITES.get("shapes").tasks)
    assert set(SCORERS.names()) - {"plugin"} < set(ABOUT)
    named = re.compile(r"Apache-2\.0|MIT|BSD-3-Clause|detector: other|without a stated licence")
    assert all(named.search(text) for text in ABOUT.values()), "no link in place of a licence"


def test_a_fetched_file_must_have_its_digest(tmp_path):
    path = write(tmp_path / "x", "abc")  # the digest is FIPS 180-2's example
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fetch(path, digest) == path
    with pytest.raises(ValueError, match=f"sha256 {'0' * 64}, got {digest}"):
        fetch(path, "0" * 64)


@pytest.mark.skipif(DATA is None, reason="CORE2_DATA is the folder of the published lists")
@pytest.mark.parametrize(
    ("suite", "source", "tasks"),
    [
        ("drawbench", "drawbench.csv", 11),
        ("hpdv2", "hpdv2_subset400_goldennoise.csv", 4),
        ("geneval", "geneval_evaluation_metadata.jsonl", 6),
        ("t2icompbench", "", 8),
    ],
)
def test_the_published_lists_are_complete(suite, source, tasks):
    prompts = load(suite, Path(DATA) / source)
    assert len(prompts) in (SUITES.get(suite).size, SUITES.get(suite).subset)
    assert len({prompt.task for prompt in prompts}) == tasks
    assert len({prompt.id for prompt in prompts}) == len(prompts)
