"""The trajectory store. Truth: the tensors that were written, and hashlib."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from core2_sampler.atomic import write_atomic
from core2_sampler.rows import is_held_out, stable_hash
from core2_sampler.trajectory import Record, TrajectoryStore


def make_unit(prompts, seeds=(0,), steps=3, round=0):
    """Return (records, rows, encodings) of a unit with random values that halves can hold."""
    records = [Record(f"id-{p}", f"text {p}", s, round, 4.0) for p in prompts for s in seeds]
    generator = torch.Generator().manual_seed(stable_hash(list(prompts), list(seeds)))
    count = len(records) * steps
    rows = {
        name: torch.randn(count, 4, 2, 2, generator=generator).half()
        for name in ("x", "cond", "gap")
    }
    rows["record"] = torch.arange(len(records)).repeat_interleave(steps).int()
    rows["step"] = torch.arange(steps).repeat(len(records)).int()
    rows["sigma"] = 1 - rows["step"] / 10
    encodings = {
        record.prompt_file: {
            "prompt_embeds": torch.full((5, 6), float(record.prompt_id[3:])).half(),
            "pooled": torch.full((7,), float(record.prompt_id[3:])).half(),
            "extra.time_ids": torch.tensor([1.0, 2.0]),
            "extra.guidance": torch.tensor(3.5),
        }
        for record in records
    }
    return records, rows, encodings


@pytest.fixture
def store(tmp_path):
    store = TrajectoryStore(tmp_path / "store")
    store.write_unit(*make_unit(range(0, 4), seeds=(0, 1)))
    store.write_unit(*make_unit(range(4, 7), seeds=(0, 1)))
    return store


def test_rows_come_back_as_written(store):
    wanted = torch.cat(
        [make_unit(range(0, 4), (0, 1))[1]["x"], make_unit(range(4, 7), (0, 1))[1]["x"]]
    )
    rows = store.rows()
    got = rows.take(torch.arange(len(rows)))
    assert len(rows) == len(wanted) == 42
    assert got.x.dtype == torch.float32
    # units are read in the order of their names, so compare as sets of rows
    assert sorted(got.x.flatten(1).tolist()) == sorted(wanted.float().flatten(1).tolist())
    assert torch.equal(got.sigma, 1 - got.step / 10)
    assert torch.equal(got.conditioning().extra["time_ids"], torch.tensor([[1.0, 2.0]] * 42))
    assert torch.equal(got.conditioning().extra["guidance"], torch.tensor([3.5] * 42))


def test_each_row_comes_with_its_own_prompt(store):
    rows = store.rows(lambda prompt_id: prompt_id == "id-5")
    got = rows.take(torch.arange(len(rows)))
    assert len(rows) == 6
    assert (got.prompt_embeds == 5).all() and (got.pooled == 5).all()


def test_a_prompt_is_stored_once_whatever_its_seeds_and_rounds(store):
    store.write_unit(*make_unit(range(0, 4), seeds=(2,), round=1))
    assert len(list((store.root / "prompts").iterdir())) == 7
    assert len(store.records()) == 18


def test_random_rows_are_a_function_of_the_generator(store):
    rows = store.rows()
    first, again, other = (
        rows.sample(16, torch.Generator().manual_seed(seed)).x for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_held_out_prompts_never_train(store):
    source = store.source(held_out_share=0.4, held_out_rows=9)
    held_out = {p for p in map(str, range(7)) if is_held_out(f"id-{p}", 0.4)}
    assert 0 < len(held_out) < 7
    seen = set(source.train(0, 500, seed=0).pooled[:, 0].int().tolist())
    evaluated = [rows.pooled[:, 0].int() for rows in source.held_out(4)]
    assert seen == {int(p) for p in {str(i) for i in range(7)} - held_out}
    assert set(torch.cat(evaluated).tolist()) <= {int(p) for p in held_out}
    assert [len(part) for part in evaluated] == [4, 4, 1]
    again = torch.cat([rows.pooled[:, 0].int() for rows in source.held_out(4)])
    assert torch.equal(torch.cat(evaluated), again)


def test_a_batch_is_a_function_of_its_step_and_seed(store):
    first, second = store.source(0.4), store.source(0.4)
    for step in (2, 0):
        assert torch.equal(first.train(step, 16, seed=1).x, second.train(step, 16, seed=1).x)
    assert not torch.equal(first.train(2, 16, seed=1).x, first.train(2, 16, seed=2).x)
    assert not torch.equal(first.train(2, 16, seed=1).x, first.train(3, 16, seed=1).x)


def test_a_source_tells_what_it_holds_and_can_end_at_a_round(store):
    store.pin_settings(0, {"steps": 3})
    before = store.source(0.4).describe()
    store.write_unit(*make_unit(range(0, 7), seeds=(5,), round=1))
    store.pin_settings(1, {"steps": 3})
    grown, first = store.source(0.4), store.source(0.4, last_round=0)
    assert first.describe() == before and set(before["rounds"]) == {"000"}
    assert set(grown.describe()["rounds"]) == {"000", "001"}
    assert (before["records"], grown.describe()["records"]) == (14, 21)
    assert len(grown.training) + len(grown.evaluation) == 3 * 21
    assert len(first.training) + len(first.evaluation) == 3 * 14
    other = TrajectoryStore(store.root.parent / "other" / "store")
    other.write_unit(*make_unit(range(0, 4), seeds=(0, 1)))
    other.write_unit(*make_unit(range(4, 7), seeds=(0, 2)))
    other.pin_settings(0, {"steps": 3})
    told = other.source(0.4).describe()
    assert {key for key in told if told[key] != before[key]} == {"contents"}


def test_the_split_is_sha256_of_the_prompt_id():
    def independent(prompt_id, share):
        digest = hashlib.sha256(f'["held out", "{prompt_id}"]'.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    ids = [f"prompt {i}" for i in range(1000)]
    assert [is_held_out(i, 0.2) for i in ids] == [independent(i, 0.2) for i in ids]
    # binomial, 4 standard deviations of sqrt(1000 * 0.2 * 0.8) = 12.6
    assert abs(sum(is_held_out(i, 0.2) for i in ids) - 200) < 51


def test_a_unit_without_its_entry_is_not_there(store):
    entry = next((store.root / "shards").glob("*.json"))
    gone = len(json.loads(entry.read_text())["records"])
    entry.unlink()
    assert len(store.records()) == 14 - gone


def test_leftovers_are_ignored_and_removed_by_their_owner(store):
    for writer in range(4):
        (store.root / "shards" / f"aa.json.{writer}.tmp").write_text("{")
    assert len(store.records()) == 14
    TrajectoryStore(store.root, writer=1).remove_leftovers(num_writers=3)
    left = sorted(path.name for path in (store.root / "shards").glob("*.tmp"))
    assert left == ["aa.json.0.tmp", "aa.json.2.tmp", "aa.json.3.tmp"]
    store.remove_leftovers(num_writers=3)
    assert [path.name for path in (store.root / "shards").glob("*.tmp")] == ["aa.json.2.tmp"]


def test_write_atomic_replaces_the_whole_file(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"long content")
    write_atomic(path, b"short", writer=3)
    assert path.read_bytes() == b"short"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("part", ["shards/*.safetensors", "prompts/*.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_before_a_head_learns_from_it(store, part, damage):
    store.verify()
    path = sorted(store.root.glob(part))[0]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-4])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=path.name):
        store.source(0.4)


def test_a_record_stored_twice_is_refused(store):
    records, rows, encodings = make_unit(range(6, 9), seeds=(1,))
    store.write_unit(records, rows, encodings)
    with pytest.raises(ValueError, match="once, got .*id-6"):
        store.records()


def test_a_round_keeps_its_settings(store):
    store.pin_settings(0, {"steps": 28, "scales": (2.0, 4.0)})
    store.pin_settings(0, {"steps": 28, "scales": [2.0, 4.0]})
    store.pin_settings(1, {"steps": 14})
    with pytest.raises(ValueError, match="round 0 .*steps 28.*got steps 14"):
        store.pin_settings(0, {"steps": 14, "scales": [2.0, 4.0]})


def test_an_empty_store_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="collect first"):
        TrajectoryStore(tmp_path / "nothing").rows()
