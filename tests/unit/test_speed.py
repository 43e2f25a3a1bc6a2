"""``bench speed`` on tiny networks: what it counts is exact, what it times is in the right order.

Truth: `Plan.nfe`, `benchmarks.full_size` for FLOPs, numpy for quantiles.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core2_sampler.benchmarks import speed_arms, speed_models
from core2_sampler.benchmarks.full_size import denoiser_cost
from core2_sampler.benchmarks.speed import (
    ARM_NAMES,
    STACKS,
    SpeedConfig,
    bench_speed,
    check_config,
    choose_stacks,
    open_bench,
)
from core2_sampler.benchmarks.speed_arms import SPEED_ARMS, make_arms, time_stack
from core2_sampler.benchmarks.speed_models import (
    build_evaluator,
    build_subject,
    check_output,
    count_flops,
    fill,
)
from core2_sampler.benchmarks.speed_report import CSV_COLUMNS, SpeedRow, table
from core2_sampler.benchmarks.speed_timing import LEAST_RUNS, interleave, summary
from core2_sampler.config import ConfigError, load_config
from core2_sampler.full_size import FULL_SIZE, Call, FullSize
from core2_sampler.pipelines.stock import CoRe2Mixin
from core2_sampler.registry import Registry
from core2_sampler.scales import CANDIDATES

ROOT = Path(__file__).parents[2]
TEXT = {"capture_output": True, "text": True, "check": True}
STEPS = 4
NFE = {
    "cfg": 8,
    "cond": 4,
    "cfg-half": 4,
    "interval": 7,  # steps 1, 2 and 3 lie in 0.8 to 3.2
    "last-gap": 5,
    "fast": 4,
    "fast-quarter": 5,
    "fast-half": 6,
    "slow": 8,
    "zigzag": 17,  # the pair twice and uncond, 5(N - 1) + 2
    "zcore": 17,  # the same with the head in place of uncond
    "online": 8,
}
HEAD_CALLS = {"last-gap": 3, "fast": 4, "fast-quarter": 4, "fast-half": 4, "slow": 4, "zcore": 3}
CALLS = {"cfg-half": 2, "zigzag": 10, "zcore": 10}


def config(path, **options):
    given = {"model": "tiny-sd3", "steps": STEPS, "runs": 1, "device": "cpu", "dtype": "fp32"}
    return SpeedConfig(**(given | {"out": path / "speed.json"} | options))


def test_the_command_counts_every_arm_and_ends_with_json(tmp_path, capsys):
    bench_speed(config(tmp_path, batch_sizes=(1, 2), seconds=0.0))
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["batch_size"], row["arm"]) for row in last["rows"]] == [
        (batch, arm) for batch in (1, 2) for arm in ARM_NAMES
    ]
    for row in rows:
        arm = row["arm"]
        assert row["nfe"] == NFE[arm], arm
        assert row["head_calls"] == HEAD_CALLS.get(arm, 0), arm
        assert row["denoiser_calls"] == CALLS.get(arm, STEPS)
        assert row["steps"] == (2 if arm == "cfg-half" else STEPS)
        assert row["off_first"] == 0
        assert row["loop_share"] is None and row["first_run_peak"] is None
        assert not row["captured"]
        assert row["device"] is None
        assert row["peak_allocated"] is None
        steps = {name for name in row["components"] if name.endswith(" step")}
        assert set(row["components"]) - steps == {"denoiser", "update"} | (
            {"head"} if arm in HEAD_CALLS else {"evaluator"} if arm == "online" else set()
        )
        assert sum(row["components"][name] for name in steps) > row["components"]["denoiser"]
        assert row["seconds"] == row["wall"]["median"] > 0
        assert row["tflops_a_second"] == row["flops"] / row["seconds"] / 1e12
    flops = {(row["batch_size"], row["arm"]): row["flops"] for row in rows}
    assert flops[1, "cfg"] == 2 * flops[1, "cond"] == 2 * flops[1, "cfg-half"]
    assert flops[1, "slow"] - flops[1, "cfg"] == flops[1, "fast"] - flops[1, "cond"] > 0
    assert flops[2, "slow"] == 2 * flops[1, "slow"]
    assert flops[1, "zigzag"] == 17 * flops[1, "cond"] // STEPS
    assert flops[1, "zcore"] - flops[1, "zigzag"] == 3 * (flops[1, "fast"] - flops[1, "cond"]) // 4
    assert flops[1, "online"] - flops[1, "cfg"] == STEPS * flops_of_candidates()
    with (tmp_path / "speed.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert len(lines) == len(rows)
    assert lines[0]["scenario"] == "tiny-sd3-b1-cfg-4steps"


def flops_of_candidates():
    """What scoring all candidates of one step takes, counted on the CPU with gradients on."""
    subject = build_subject("tiny-sd3", "cpu", torch.float32, 0)
    evaluator, inputs = build_evaluator(subject), subject.inputs(len(CANDIDATES))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluator(inputs.x.requires_grad_(), torch.full((len(CANDIDATES),), 0.5), inputs.cond)
    return counter.get_total_flops()


def test_the_steps_of_an_arm_are_timed_by_their_kind(tmp_path):
    bench = open_bench(config(tmp_path))
    kinds = {"zcore": ["cfg", "fast"], "zigzag": ["cfg", "uncond"], "fast-half": ["fast", "slow"]}
    for arm in make_arms(bench, tuple(kinds), 1, None):
        calls = arm.take_apart().calls
        assert sorted(name for name in calls if "step" in name) == [
            f"{kind} step" for kind in kinds[arm.name]
        ]
        assert sum(calls[f"{kind} step"] for kind in kinds[arm.name]) == calls["update"]


def test_the_loop_share_is_what_no_network_takes():
    times = {"median": 2.0}
    parts = {"denoiser": 1.5, "head": 0.25, "evaluator": 0.125, "update": 0.1, "cfg step": 2.0}
    blank = dict.fromkeys(field.name for field in fields(SpeedRow))
    row = SpeedRow(**(blank | {"wall": times, "device": times, "components": parts}))
    assert row.loop_share() == 0.0625


def test_arms_are_those_of_the_options():
    assert set(SPEED_ARMS) == set(ARM_NAMES)


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux", "tiny-sdxl"])
def test_flops_are_those_of_the_network(name):
    subject = build_subject(name, "cpu", torch.float32, 0)
    inputs = subject.inputs(1)
    prompt = speed_models._to(inputs.cond, "meta")
    call = Call(inputs.x.to("meta"), torch.empty(1, device="meta"), prompt)
    assert count_flops(subject, None, "cond") == denoiser_cost(subject.meta, call).flops > 0


SMALL = {
    "sd3": FullSize(
        "",
        "sd3",
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 6,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        4,
        (7, 32),
        16,
    ),
    "flux": FullSize(
        "",
        "flux",
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 3,
            "num_single_layers": 6,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 2, 2),
        },
        4,
        (7, 32),
        16,
        {"guidance": ()},
    ),
    "sdxl": FullSize(
        "",
        "sdxl",
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
            "cross_attention_dim": 32,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 16 + 6 * 4,
        },
        4,
        (7, 32),
        16,
        {"time_ids": (6,)},
    ),
}


@pytest.mark.parametrize("family", SMALL)
def test_networks_built_as_the_full_size_ones_answer_and_run(family, monkeypatch, tmp_path):
    models = Registry("full-size model")
    models.register("small")(SMALL[family])
    monkeypatch.setattr(speed_models, "FULL_SIZE", models)
    monkeypatch.setattr(speed_models, "_vae", lambda *_: None)
    bench = open_bench(config(tmp_path, model="small", pixels=64, dtype="bf16"))
    d = bench.subject.inputs(2)
    assert d.x.shape == (2, 4, 8, 8)
    for arm in make_arms(bench, ("cfg", "slow", "fast", "cfg-half", "zcore"), 2, None):
        arm.run()
        assert torch.isfinite(arm.final).all()
        assert arm.take_apart().rows["denoiser"] == 2 * NFE[arm.name]
        assert bench.flops_of(arm.moves, arm.head) > 0
    assert bench.subject.input_dtype == (torch.float32 if family == "sdxl" else torch.bfloat16)


def test_a_network_that_says_nothing_is_refused():
    subject = build_subject("tiny-sd3", "cpu", torch.float32, 0)
    fill(subject.denoiser.module)
    check_output(subject)
    with torch.no_grad():
        subject.denoiser.module.proj_out.weight.zero_()
    with pytest.raises(RuntimeError, match="must answer with finite numbers that vary"):
        check_output(subject)


def test_latents_that_differ_between_stacks_void_the_timing(tmp_path, monkeypatch, capsys):
    time_stack = speed_arms.time_stack

    def other_latents_first(bench, *args):
        (arm,) = make_arms(bench, ("cfg",), 1, None)
        arm.run()
        assert arm.off("eager", 1) == arm.off("compile+fp8", 1) == 0
        bench.finals[False, 1, "cfg"] = 1.06 * arm.final
        return time_stack(bench, *args)

    monkeypatch.setattr(speed_arms, "time_stack", other_latents_first)
    with pytest.raises(SystemExit) as stop:
        bench_speed(config(tmp_path, steps=2, arms=("cfg",), batch_sizes=(1,)))
    assert stop.value.code == 1
    *_, void, last = capsys.readouterr().out.strip().splitlines()
    fault = "cfg, eager: latents are 0.057 off the first stack's"
    assert void == f"Void: {fault}"
    assert json.loads(last)["faults"] == [fault]
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["faults"] == [fault]  # what was timed is not lost
    assert result["rows"]


def test_a_graph_that_is_missing_voids_the_timing(tmp_path):
    bench = open_bench(config(tmp_path, steps=2))
    rows = time_stack(bench, ("cfg", "last-gap"), "graphs", 1)  # on the CPU there are none
    assert bench.faults == ["cfg, graphs: not every step is the replay of a graph"]
    assert "| graphs, not captured | last-gap |" in table(rows)


def test_arms_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(runs, 5, 100.0, cuda=False)
    assert "".join(order) == "abc" * 5
    assert [len(t.wall) for t in times.values()] == [5] * 3
    assert not any(t.device for t in times.values())
    order.clear()
    interleave(runs, 50, 0.0, cuda=False)
    assert "".join(order) == "abc" * LEAST_RUNS
    order.clear()
    interleave(runs | {"b": lambda: order.append("b") or time.sleep(0.02)}, 9, 0.02, cuda=False)
    assert "".join(order) == "abc" * 9  # the slow arm waits for the others to have enough


def test_the_summary_is_numpys():
    seconds = np.random.default_rng(0).random(23).tolist()
    found = summary(seconds)
    for key, share in (("q25", 25), ("median", 50), ("q75", 75), ("p90", 90)):
        assert found[key] == pytest.approx(np.percentile(seconds, share)), key
    assert found["min"] == min(seconds)
    assert found["runs"] == 23
    assert summary([2.0])["p90"] == 2.0
    assert summary([]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("cfg", "fats")}, "did you mean 'fast'"),
        ({"arms": ("fast",)}, "arms must have cfg"),
        ({"stacks": ("compiled",)}, "unknown stack"),
        ({"stacks": ("compile+graphs",)}, "must run on a CUDA device"),
        ({"stacks": ("compile+fp8",)}, "must run on a CUDA device"),
        ({"model": "tiny-sd"}, "unknown model"),
        ({"head": "adapter"}, "must read a finished pass"),
    ],
)
def test_options_that_cannot_run_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        open_bench(config(tmp_path, **options))


def test_the_results_are_a_json_file(tmp_path):
    with pytest.raises(ConfigError, match="ends in .json"):
        open_bench(replace(config(tmp_path), out=tmp_path / "speed.md"))


@pytest.mark.checkout
def test_the_parts_of_the_gpu_suite_are_runs_that_there_are():
    script = (ROOT / "benchmarks" / "gpu_suite.sh").read_text()
    names = dict(re.findall(r'^(\w+)="(\w+=[^"$]*)"$', script, re.M))
    parts = re.findall(r'^  \[([\w-]+)\]="(.*)"$', script, re.M)
    listed = subprocess.run(["bash", ROOT / "benchmarks" / "gpu_suite.sh"], **TEXT).stdout.split()
    assert sorted(name for name, _ in parts) == sorted(listed)
    arms, stacks = set(), set()
    for name, text in parts:
        if text.startswith("tests/"):
            assert all((ROOT / file).is_file() for file in text.split()), name
            continue
        words = re.sub(r"\$(\w+)", lambda match: names[match[1]], text).split()
        options = load_config(SpeedConfig, overrides=words)
        check_config(options)
        assert options.model in FULL_SIZE.names(), name
        stacks.update(choose_stacks(options, cuda=True))
        arms.update(options.arms)
    assert arms == set(ARM_NAMES)
    assert stacks == set(STACKS) - {"graphs", "compile+fp8"}


@pytest.mark.checkout
def test_the_speed_page_names_every_option():
    page = (ROOT / "docs" / "speed.md").read_text()
    defaults = inspect.signature(CoRe2Mixin.core2_compile).parameters
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, re.M))
    assert told == {
        name: str(value.default).replace("regional", '"regional"')
        for name, value in defaults.items()
        if name != "self"
    }
