"""Images of a suite: there once, complete, paired, whatever fails or is killed in between."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from core2_sampler.benchmarks import matching, runner
from core2_sampler.benchmarks.arms import Arm, build_arms
from core2_sampler.benchmarks.cache import digest, hash_pipeline
from core2_sampler.benchmarks.effective_scale import EffectiveScale
from core2_sampler.benchmarks.generate import MAX_IN_A_ROW, fill_arm
from core2_sampler.benchmarks.images import ImageStore
from core2_sampler.benchmarks.lines import append_lines, digest_bytes, read_lines
from core2_sampler.benchmarks.matching import is_plain, match
from core2_sampler.benchmarks.online import rule_key
from core2_sampler.benchmarks.options import GenerateConfig
from core2_sampler.benchmarks.request import check_request
from core2_sampler.benchmarks.runner import arm_folder, check_arm, cut_prompts, encode
from core2_sampler.benchmarks.runs import Run, RunArm, read_runs, write_run
from core2_sampler.benchmarks.shard import Shard
from core2_sampler.benchmarks.stages import run_settings
from core2_sampler.benchmarks.study import Study
from core2_sampler.benchmarks.suites import load
from core2_sampler.config import ConfigError
from core2_sampler.evaluators import load_evaluator
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.info import versions
from core2_sampler.plan import Core2Config
from core2_sampler.precision import pick_dtype
from core2_sampler.scales import OnlineScale
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline
from core2_sampler.weak_heads import HEADS

CFG = Arm("cfg", "cfg", 2, 3.0)
COND = Arm("cond", "cond", 2, 3.0)


def make_study(folder: Path, *, prompts: int = 4, batch_size: int = 3, **changes: object) -> Study:
    settings = {"pipe": tiny_sd3_pipeline(), "family": "sd3", "seeds": (0, 1)} | changes
    chosen = tuple(load("shapes", limit=prompts))
    return Study(prompts=chosen, folder=folder, batch_size=batch_size, **settings)


@contextmanager
def refusing(study: Study, *refused: int) -> Iterator[list[int]]:
    """Let the denoiser fail on the initial latents of some cases; yields the rows it was given."""
    latents = [torch.randn(4, 8, 8, generator=study.cases[i].generator()) for i in refused]
    rows: list[int] = []

    def look(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        x = kwargs["hidden_states"]
        rows.append(len(x))
        if any(torch.equal(row, bad) for row in x for bad in latents):
            raise RuntimeError("out of memory")

    handle = study.pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def test_images_are_those_of_the_stock_pipeline_under_the_hash_of_their_file(tmp_path):
    """Truth: diffusers' own StableDiffusion3Pipeline, prompt by prompt."""
    study = make_study(tmp_path, prompts=2)
    done = fill_arm(study, CFG)
    store = ImageStore(done.folder)
    parts = {name: part for name, part in study.pipe.components.items() if name != "weak_head"}
    stock = StableDiffusion3Pipeline(**parts)
    stock.set_progress_bar_config(disable=True)
    records = store.records()
    assert (done.made, done.failed, len(records)) == (4, 0, 4)
    for case in study.cases:
        record = records[case.key]
        assert (record.prompt_id, record.prompt) == (case.prompt.id, case.prompt.text)
        assert (record.seed, record.nfe) == (case.seed, 4) and record.seconds > 0
        assert digest_bytes((done.folder / record.file).read_bytes()) == record.sha256
        wanted = stock(
            case.prompt.text,
            generator=case.generator(),
            num_inference_steps=2,
            guidance_scale=3.0,
        ).images[0]
        difference = np.asarray(wanted).astype(int) - np.asarray(store.read(record)).astype(int)
        assert np.abs(difference).max() <= 1  # float32 sums in another order


def test_one_failing_image_costs_no_other_and_is_tried_again(tmp_path):
    study = make_study(tmp_path)
    with refusing(study, 4):
        done = fill_arm(study, COND)
    store = ImageStore(done.folder)
    assert (done.made, done.failed) == (7, 1)
    assert store.failures() == {study.cases[4].key: "RuntimeError: out of memory"}
    with refusing(study) as rows:
        again = fill_arm(study, COND)
    assert (again.made, again.failed, rows) == (1, 0, [1, 1])
    assert store.failures() == {} and len(store.records()) == 8


def test_an_arm_whose_few_images_all_fail_is_an_error_and_no_empty_arm(tmp_path):
    study = make_study(tmp_path, prompts=1)
    with refusing(study, 0, 1), pytest.raises(RuntimeError, match="out of memory"):
        fill_arm(study, COND)
    with refusing(study, 0):
        assert fill_arm(study, COND).error == "RuntimeError: out of memory"
    with refusing(study, 0):  # one image is there
        assert fill_arm(study, COND).failed == 1


def test_a_run_in_which_everything_fails_ends(tmp_path):
    study = make_study(tmp_path, prompts=6)
    with refusing(study, *range(12)), pytest.raises(RuntimeError, match="out of memory"):
        fill_arm(study, COND)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(ImageStore(folder).failures()) == MAX_IN_A_ROW


def test_what_a_killed_run_leaves_is_neither_lost_nor_doubled(tmp_path):
    study = make_study(tmp_path)
    done = fill_arm(study, COND)
    store = ImageStore(done.folder)
    before = store.records()
    manifest = done.folder / "manifest.0.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed within a line
    (done.folder / before[study.cases[7].key].file).unlink()  # killed before the file
    assert len(store.records()) == 5
    again = fill_arm(study, COND)
    assert again.made == 3
    keys = [line["key"] for line in read_lines(manifest)]
    assert sorted(keys) == sorted(before)
    after = store.records()
    assert {k: r.file for k, r in after.items()} == {k: r.file for k, r in before.items()}
    assert len(list(done.folder.glob("*.png"))) == 8
    for record in after.values():
        store.read(record)


def test_shards_share_the_work_and_make_the_same_images(tmp_path):
    whole = fill_arm(make_study(tmp_path / "whole", batch_size=1), COND)
    study = make_study(tmp_path / "parts", batch_size=1)
    made = [fill_arm(study, COND, Shard(i, 3)).made for i in range(3)]
    assert made == [3, 3, 2]
    folder = tmp_path / "parts" / whole.folder.name
    parts = ImageStore(folder).records()
    assert {k: r.sha256 for k, r in parts.items()} == {
        k: r.sha256 for k, r in ImageStore(whole.folder).records().items()
    }
    assert len(list(folder.glob("manifest.*.jsonl"))) == 3
    assert fill_arm(study, COND).made == 0


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_a_shard_must_be_one_of_its_number(text):
    with pytest.raises(ValueError, match="a shard must be i/n"):
        Shard.parse(text)


def test_shards_of_shards_are_every_item_once():
    items = list(range(11))
    for processes in ((3, 3), (4, 2), (1, 5)):  # of the two shards
        nested = [
            Shard.parse(f"{i}/2").split(j, total)
            for i, total in enumerate(processes)
            for j in range(total)
        ]
        assert sorted(item for part in nested for item in part.of(items)) == items
        assert len({part.index for part in nested}) == len(nested)  # a manifest for each


def test_an_image_that_was_changed_is_refused(tmp_path):
    study = make_study(tmp_path, prompts=1)
    done = fill_arm(study, COND)
    store = ImageStore(done.folder)
    record = store.records()[study.cases[0].key]
    Image.new("RGB", (16, 16)).save(done.folder / record.file)
    with pytest.raises(ValueError, match="must be the image that the manifest names, got another"):
        store.read(record)


def test_lines_without_an_end_are_not_read_and_go_with_the_next(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_lines(path, [{"a": 3}, {"a": 4}])
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 3, 4]


def test_a_run_keeps_its_arms_and_what_made_their_images(tmp_path):
    prompts = tuple(load("shapes", limit=2))
    first = RunArm(CFG, 2, 3.0, "images/a", "first command", {"commit": "1"})
    run = Run("shapes", prompts, (0, 1), {"family": "sd3", "model": "m"}, (first,))
    write_run(tmp_path, run, [4])
    second = RunArm(COND, 2, 3.0, "images/b", "second command", {"commit": "2"})
    same = dataclasses.replace(first, command="second command")
    write_run(tmp_path, dataclasses.replace(run, arms=(same, second)), [0, 4])
    (read,) = read_runs(tmp_path)
    assert read.arms == (first, second)
    assert [case.key for case in read.cases] == [case.key for case in run.cases]
    other = dataclasses.replace(first, folder="images/c")  # another head under the same name
    write_run(tmp_path, dataclasses.replace(run, arms=(other,)), [0])
    assert read_runs(tmp_path)[0].arms == (other, second)
    assert read.references(second) == [first] and read.references(first) == []
    write_run(tmp_path, dataclasses.replace(run, seeds=(0,)), [4])
    assert len(read_runs(tmp_path)) == 2


def test_a_run_forgets_no_measurement_and_keeps_none_of_other_images(tmp_path):
    prompts = tuple(load("shapes", limit=2))
    slow = RunArm(Arm("slow", "core", 2, 3.0, "tap"), 2, 3.0, "images/a", "first", {"commit": "1"})
    other = RunArm(Arm("slow-matched", "cfg", 2, 4.0), 2, 3.0, "images/b", "first", {"commit": "1"})
    run = Run("shapes", prompts, (0,), {"family": "sd3"}, (slow,))
    write_run(tmp_path, run, [2])
    found = {"effective_scale": 4.0, "orthogonal_share": 0.1, "measured_on": 2}
    measured = dataclasses.replace(slow, command="second", **found)
    written = write_run(tmp_path, dataclasses.replace(run, arms=(measured, other)), [0, 2])
    kept = dataclasses.replace(slow, **found)
    assert written.arms == (kept, other)
    again = write_run(tmp_path, dataclasses.replace(run, arms=(measured, other)), [0, 0])
    assert again.arms == (kept, other)
    without = dataclasses.replace(slow, command="third")
    assert write_run(tmp_path, dataclasses.replace(run, arms=(without,)), [1]).arms == (
        dataclasses.replace(without, **found),
        other,
    )
    moved = dataclasses.replace(slow, folder="images/c")  # the head has other weights
    assert write_run(tmp_path, dataclasses.replace(run, arms=(moved,)), [2]).arms == (moved,)


def test_other_weights_under_one_name_are_another_run(tmp_path):
    one, same, other = (make_study(tmp_path, prompts=1) for _ in range(3))
    with torch.no_grad():
        next(other.pipe.vae.parameters()).view(-1)[0] += 1
    names = [
        Run("shapes", study.prompts, (0,), run_settings(study, "model")).name
        for study in (one, same, other)
    ]
    assert names[0] == names[1] != names[2]
    assert one.model_hash == hash_pipeline(one.pipe)
    halved = dataclasses.replace(one, pipe=other.pipe)
    assert halved.model_hash == other.model_hash != one.model_hash
    assert run_settings(one, "model")["device"] == "cpu"


def test_whatever_decides_an_image_decides_its_folder(tmp_path, monkeypatch):
    """Steps of the same kinds and scales, and what no step shows: zigzag steps, the libraries."""
    study = make_study(tmp_path, prompts=1)
    folders = [
        arm_folder(study, arm, None)
        for arm in build_arms(("cfg", "zigzag", "zigzag-half", "zigzag-quarter", "z2"), 5, 3.0, {})
    ]
    assert len(set(folders)) == 5
    assert folders[0] == arm_folder(study, dataclasses.replace(CFG, steps=5), None)
    before = arm_folder(study, CFG, None)
    monkeypatch.setattr(runner, "versions", lambda: versions() | {"diffusers": "0.1"})
    assert arm_folder(study, CFG, None) != before


def test_an_online_arm_is_what_its_evaluators_pick(tmp_path):
    """Truth: the pipeline under the rule itself, with the paper's candidates."""
    study = make_study(tmp_path, prompts=2)
    folder = save_evaluator(study, tmp_path / "alignment", seed=0)
    (arm,) = build_arms(["online"], 3, 3.0, {}, str(folder))
    done = fill_arm(study, arm)
    rule = OnlineScale({"alignment": load_evaluator(folder)})
    records = ImageStore(done.folder).records()
    for case in study.cases:
        wanted = study.pipe(
            case.prompt.text,
            generator=case.generator(),
            num_inference_steps=3,
            guidance_scale=3.0,
            core2=Core2Config(mode="cfg", scale_rule=rule),
        ).images[0]
        image = ImageStore(done.folder).read(records[case.key])
        assert np.abs(np.asarray(wanted).astype(int) - np.asarray(image)).max() <= 1
    other = save_evaluator(study, tmp_path / "other" / "alignment", seed=1)
    (again,) = build_arms(["online"], 3, 3.0, {}, str(other))
    folders = {arm_folder(study, each, None) for each in (arm, again, build_cfg(3))}
    assert len(folders) == 3 and not is_plain(arm)
    with pytest.raises(ValueError, match="without sample_rule to have a key"):
        arm_folder(study, dataclasses.replace(arm, sample_rule=rule), None)
    printed = OnlineScale(rule.evaluators, upstream=True)
    assert rule_key(printed) != rule_key(rule)


def test_evaluators_of_one_name_are_refused_before_anything_is_loaded(tmp_path):
    folders = tuple(str(tmp_path / name / "quality") for name in ("a", "b"))
    for folder in folders:
        Path(folder).mkdir(parents=True)
    with pytest.raises(ConfigError, match="different names, got .*a/quality, .*b/quality"):
        check_request(GenerateConfig(arms=("online",), evaluators=folders))


def test_an_arm_that_could_not_run_is_refused_before_the_first_image(tmp_path):
    study = make_study(tmp_path, prompts=1)
    folder = save_evaluator(study, tmp_path / "alignment", seed=0, channels=8)
    (arm,) = build_arms(["online"], 3, 3.0, {}, str(folder))
    with pytest.raises(ValueError, match="must have 8 channels"):
        check_arm(study, arm)
    pipe = tiny_flux_pipeline()
    head = HEADS.get("tap").for_denoiser(pipe.family.denoiser(pipe), weak_guidance=1.0)
    head.save_pretrained(tmp_path / "tap")
    study = make_study(tmp_path, prompts=1, pipe=pipe, family="flux")
    with pytest.raises(ValueError, match=r"weak_guidance must be 1.0 .* got None"):
        check_arm(study, Arm("fast", "core", 2, 3.0, str(tmp_path / "tap")))


def build_cfg(steps: int) -> Arm:
    return dataclasses.replace(CFG, steps=steps)


def save_evaluator(study: Study, folder: Path, seed: int, channels: int = 4) -> Path:
    """Save an evaluator whose answers differ from image to image."""
    x = torch.randn(1, channels, 8, 8)
    prompt, _ = study.pipe.family.encode(study.pipe, ["a"], max_sequence_length=16)
    sizes = {"patch_size": 2, "width": 64, "num_layers": 1}
    network = LatentEvaluator.for_model("alignment", "sd3", x, prompt, seed=seed, **sizes)
    network.save_pretrained(folder)
    return folder


def test_weights_in_half_precision_are_another_model_and_are_not_cast(tmp_path):
    half = make_study(tmp_path, prompts=1, dtype="bf16", autocast=False)
    half.pipe.to(torch.bfloat16)
    seen: list[torch.dtype] = []
    look = half.pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, k: seen.append(k["hidden_states"].dtype), with_kwargs=True
    )
    store = ImageStore(fill_arm(half, CFG).folder)
    look.remove()
    assert set(seen) == {torch.bfloat16} and len(store.records()) == 2
    wide = make_study(tmp_path, prompts=1)
    cast = dataclasses.replace(wide, dtype="bf16")
    assert [s.precision for s in (half, wide, cast)] == ["bf16", "fp32", "bf16 autocast"]
    assert len({arm_folder(s, CFG, None) for s in (half, wide, cast)}) == 3
    assert [pick_dtype("auto", d) for d in ("cuda:1", "cpu", "mps")] == ["bf16", "fp32", "fp32"]
    assert pick_dtype("fp16", "cpu") == "fp16"


def test_prompts_that_no_encoder_reads_whole_are_counted(tmp_path, caplog):
    """Truth: a token for each letter, of which the tiny text encoders read 14."""
    study = make_study(tmp_path)
    texts = ("x" * 14, "x y z", "x" * 15, "a red star " * 80)
    prompts = [dataclasses.replace(p, text=t) for p, t in zip(study.prompts, texts, strict=True)]
    study = dataclasses.replace(study, prompts=tuple(prompts))
    assert cut_prompts(study) == 2
    encode(study, study.cases, with_negative=False)
    assert "x" * 9 not in caplog.text


def test_processes_that_write_one_run_lose_no_arm(tmp_path):
    prompts = tuple(load("shapes", limit=1))
    run = Run("shapes", prompts, (0,), {"family": "sd3"})

    def write(k: int) -> None:
        entry = RunArm(dataclasses.replace(CFG, name=f"cfg-{k}"), 2, 3.0, f"images/{k}")
        write_run(tmp_path, dataclasses.replace(run, arms=(entry,)), [1], k)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert len(read_runs(tmp_path)[0].arms) == 24


def test_a_process_that_measures_second_takes_the_numbers_of_the_first(tmp_path, monkeypatch):
    study = make_study(tmp_path / "out" / "images", prompts=1)
    first = {"effective_scale": 2.0, "orthogonal_share": 0.5, "measured_on": 1, "nfe": 2}

    def measure(*_: object) -> EffectiveScale:
        folder = tmp_path / "out" / "effective_scales"
        folder.mkdir(parents=True)
        key = digest(matching._MEASURED["signed"], "arm", [study.cases[0].key])
        (folder / f"{key}.json").write_text(json.dumps(first))  # meanwhile, by another
        return EffectiveScale(torch.full((2, 1), 3.0), torch.zeros(2, 1), 2)

    monkeypatch.setattr(matching, "_measure", measure)
    assert match(study, COND, study.folder / "arm", 1) == matching.Matched(**first)


def test_cond_and_cfg_at_one_scale_are_plain():
    names = ("cond", "cfg", "cfg-half", "zigzag", "last-gap")
    arms = build_arms(names, 8, 3.0, {})
    assert [is_plain(arm) for arm in arms] == [True, True, True, False, False]
    assert is_plain(Arm("all-slow", "core", 4, 3.0, "tap", 4, 1.0))  # CFG in every step


def test_the_time_of_an_image_is_without_the_text_encoders(tmp_path):
    study = make_study(tmp_path, prompts=1)
    slept = []
    study.pipe.text_encoder.register_forward_pre_hook(lambda *_: slept.append(time.sleep(1.5)))
    start = time.perf_counter()
    records = ImageStore(fill_arm(study, COND).folder).records().values()
    others = time.perf_counter() - start - 1.5 * len(slept)  # however slow the machine is
    assert slept and 0 < sum(record.seconds for record in records) < others
    assert not any(t.requires_grad for kept in study._embeds.values() for t in kept.values())


def test_unsafe_prompts_go_before_the_limit_and_harmless_words_stay(tmp_path):
    harmless = ["a nudge", "a rapeseed field", "Al Gore", "a sextant", "essex", "nudibranch"]
    unsafe = ["nude art", "nudity", "gore", "lots of GORE", "erotica", "raped", "sexy", "porn"]
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"caption": text} for text in [*unsafe, *harmless]]))
    kept = [p.text for p in load("pickapic", path, skip_nsfw=True)]
    assert kept == harmless
    limited = [p.text for p in load("pickapic", path, limit=2, skip_nsfw=True)]
    assert limited == harmless[:2]


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="core2 bench generate"):
        read_runs(tmp_path)


def test_the_cases_that_a_method_is_measured_on_are_evenly_spaced(tmp_path):
    """Of eight cases three: 0, 2 and 5, seen by the denoiser refusing each."""
    HEADS.get("tap").for_denoiser(
        tiny_sd3_pipeline().family.denoiser(tiny_sd3_pipeline())
    ).save_pretrained(tmp_path / "tap")
    study = make_study(tmp_path / "out" / "images")
    fast = Arm("fast", "core", 2, 3.0, str(tmp_path / "tap"))
    folder = study.folder / "0"
    for wanted in (0, 2, 5):
        with refusing(study, wanted), pytest.raises(RuntimeError, match="out of memory"):
            match(study, fast, folder, 3)
    with refusing(study, 1, 3, 4, 6, 7):
        assert match(study, fast, folder, 3).measured_on == 3


def test_a_method_is_matched_by_what_its_runs_measure(tmp_path):
    """Truth: zero-initialised, a head adds nothing, so slow steps at w2s w are CFG at
    1 + w (s - 1) = 4 exactly, and its fast steps are cond, with nothing orthogonal."""
    head = HEADS.get("tap").for_denoiser(tiny_sd3_pipeline().family.denoiser(tiny_sd3_pipeline()))
    head.save_pretrained(tmp_path / "tap")
    study = make_study(tmp_path / "out" / "images", prompts=2)
    slow = Arm("slow", "core", 4, 3.0, str(tmp_path / "tap"), 4, 1.5)
    fast = dataclasses.replace(slow, name="fast", slow_steps=0, w2s_scale=1.0)
    wanted = {"slow": Arm("slow-matched", "cfg", 4, 4.0), "fast": Arm("fast-matched", "cond", 4, 1)}
    for arm in (slow, fast):
        folder = fill_arm(study, arm).folder
        found = match(study, arm, folder, 3)
        assert found.measured_on == 3 and found.orthogonal_share < 1e-3
        assert found.arm(arm) == wanted[arm.name]
        study.pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("run again"))
        assert match(study, arm, folder, 3) == found
        study.pipe.transformer._forward_pre_hooks.clear()
