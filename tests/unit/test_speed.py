"""``bench speed`` on tiny networks: what it counts is exact, what it times is in the right order.

Truth: `Plan.nfe`, `benchmarks.full_size` for FLOPs, numpy for quantiles.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from core2_sampler.benchmarks import speed_arms, speed_models
from core2_sampler.benchmarks.full_size import denoiser_cost
from core2_sampler.benchmarks.speed import ARM_NAMES, SpeedConfig, bench_speed, open_bench
from core2_sampler.benchmarks.speed_arms import SPEED_ARMS, make_arms, time_stack
from core2_sampler.benchmarks.speed_models import build_subject, check_output, count_flops, fill
from core2_sampler.benchmarks.speed_report import CSV_COLUMNS, table
from core2_sampler.benchmarks.speed_timing import LEAST_RUNS, interleave, summary
from core2_sampler.config import ConfigError
from core2_sampler.full_size import Call, FullSize
from core2_sampler.registry import Registry

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
}
HEAD_CALLS = {"last-gap": 3, "fast": 4, "fast-quarter": 4, "fast-half": 4, "slow": 4}


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
        assert row["denoiser_calls"] == row["steps"] == (2 if arm == "cfg-half" else STEPS)
        assert row["off_first"] == 0
        assert not row["captured"]
        assert row["device"] is None
        assert row["peak_allocated"] is None
        assert set(row["components"]) == {"denoiser", "update"} | (
            {"head"} if arm in HEAD_CALLS else set()
        )
        assert row["seconds"] == row["wall"]["median"] > 0
        assert row["tflops_a_second"] == row["flops"] / row["seconds"] / 1e12
    flops = {(row["batch_size"], row["arm"]): row["flops"] for row in rows}
    assert flops[1, "cfg"] == 2 * flops[1, "cond"] == 2 * flops[1, "cfg-half"]
    assert flops[1, "slow"] - flops[1, "cfg"] == flops[1, "fast"] - flops[1, "cond"] > 0
    assert flops[2, "slow"] == 2 * flops[1, "slow"]
    with (tmp_path / "speed.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert len(lines) == len(rows)
    assert lines[0]["scenario"] == "tiny-sd3-b1-cfg-4steps"


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
    for arm in make_arms(bench, ("cfg", "slow", "fast", "cfg-half"), 2, None):
        arm.run()
        assert torch.isfinite(arm.final).all()
        assert arm.take_apart().rows["denoiser"] == 2 * NFE[arm.name]
        assert bench.flops_of(arm.plan, arm.head) > 0
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
        assert arm.off(1) == 0
        bench.finals[1, "cfg"] = 1.06 * arm.final
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
