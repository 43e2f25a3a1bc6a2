"""``core2 bench speed``: what a run costs in seconds, all arms in the same stack.

python -m core2_sampler.benchmarks.speed model=tiny-sd3 steps=4
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core2_sampler.benchmarks.options import command_line
from core2_sampler.config import ConfigError, load_config, option, user_input
from core2_sampler.registry import unknown_name

if TYPE_CHECKING:
    from core2_sampler.benchmarks.speed_bench import Bench
    from core2_sampler.benchmarks.speed_report import SpeedRow

ARM_NAMES = (
    *("cfg", "cond", "cfg-half", "interval", "last-gap"),
    *("fast", "fast-quarter", "fast-half", "slow"),
    *("zigzag", "zcore", "online"),
)
STACKS = (
    *("eager", "graphs", "compile", "compile+graphs"),
    *("compile+fp8", "compile+graphs+fp8"),
)
_STEPS = {"sdxl": 50}


@dataclass(frozen=True, slots=True)
class SpeedConfig:
    """Options of ``core2 bench speed``."""

    model: str = option(
        "shapes-sd3",
        help="sdxl, sd35-large, flux-dev ... at full size with random weights; an embedded model; "
        "or tiny-sd3, tiny-flux, tiny-sdxl.",
    )
    head: str = option("tap", help="The weak head, of random weights, by name.")
    steps: int | None = option(None, help="Steps N; by default 50 for sdxl, else 28.", min=2)
    guidance_scale: float = option(4.5, help="Scale of every arm.", min=1.01)
    batch_sizes: tuple[int, ...] = option((1, 4), help="Images at once.", min=1)
    arms: tuple[str, ...] = option(
        ARM_NAMES, help=f"Arms, of: {', '.join(ARM_NAMES)}; cfg is the baseline."
    )
    stacks: tuple[str, ...] | None = option(
        None,
        help=f"Of {', '.join(STACKS)}; by default eager, and on a GPU also compile and "
        "compile+graphs.",
    )
    compile: Literal["regional", "full"] = option("regional", help="What is compiled.")
    runs: int = option(20, help="Timed runs of each arm.", min=1)
    seconds: float = option(
        30.0, help="Timed seconds of the quickest arm after which all stop.", min=0
    )
    pixels: int = option(1024, help="Height and width of full-size images, px.", min=16)
    dtype: Literal["fp32", "bf16"] | None = option(
        None, help="Of network and head; by default bf16 on a GPU, fp32 on the CPU."
    )
    device: str = option("auto", help="A torch device such as cuda:0; auto takes the best one.")
    out: Path = option(Path("out/speed.json"), help="The results; a CSV lies beside them.")


def bench_speed(config: SpeedConfig) -> None:
    """Time ways of sampling against CFG in the same stack; random heads, so only their speed.

    Exits with 1, once all is written, where something makes the timings void.
    """
    bench = open_bench(config)
    from core2_sampler.benchmarks.report import provenance
    from core2_sampler.benchmarks.speed_arms import time_stack
    from core2_sampler.benchmarks.speed_timing import gpu_state
    from core2_sampler.fused.float8 import convert_to_float8

    about = provenance(bench.device, command=command_line(config), weights="random head")
    about["gpu_before"] = gpu_state()
    rows: list[SpeedRow] = []
    done: set[str] = set()
    for stack in choose_stacks(config, bench.cuda):
        if "fp8" in stack and "fp8" not in done:
            convert_to_float8(bench.subject.denoiser.module)
            done = {"fp8"}  # what was compiled before is to be compiled anew
        if "compile" in stack and "compile" not in done:
            _compile(bench, config)
            done.add("compile")
        for batch_size in config.batch_sizes:
            rows += time_stack(bench, config.arms, stack, batch_size)
    _finish(config, bench, rows, about)
    if bench.faults:
        raise SystemExit(1)


def check_config(config: SpeedConfig) -> None:
    """Refuse what is wrong whatever the machine.

    Raises:
        ConfigError: an unknown arm or stack, no baseline, or an output that is no JSON file.
    """
    for kind, names, known in (
        ("arm", config.arms, ARM_NAMES),
        ("stack", config.stacks or (), STACKS),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(str(unknown_name(kind, name, known)))
    if "cfg" not in config.arms:
        raise ConfigError(f"arms must have cfg, the baseline, got {', '.join(config.arms)}")
    if config.out.suffix != ".json":
        raise ConfigError(f"out must be a file that ends in .json, got {config.out}")


def choose_stacks(config: SpeedConfig, cuda: bool) -> list[str]:
    """Return the stacks in the only order that works: a network stays compiled.

    Raises:
        ConfigError: graphs or float8 without a GPU.
    """
    default = ("eager", "compile", "compile+graphs") if cuda else ("eager",)
    stacks = sorted(set(config.stacks or default), key=STACKS.index)
    if not cuda and any("graphs" in stack or "fp8" in stack for stack in stacks):
        raise ConfigError("stacks with graphs or fp8 must run on a CUDA device, got another one")
    return stacks


def open_bench(config: SpeedConfig) -> Bench:
    """Check the options; build the model and the head.

    Raises:
        ConfigError: an option is wrong, or there is no such device.
    """
    check_config(config)
    import torch

    from core2_sampler.benchmarks.speed_bench import Bench
    from core2_sampler.benchmarks.speed_models import (
        build_evaluator,
        build_head,
        build_subject,
        check_output,
    )
    from core2_sampler.fused.float8 import check_float8
    from core2_sampler.info import pick_device

    with user_input():
        device = pick_device(config.device)
        cuda = device.startswith("cuda")
        stacks = choose_stacks(config, cuda)
        half = config.dtype == "bf16" or (config.dtype is None and cuda)
        dtype = torch.bfloat16 if half else torch.float32
        subject = build_subject(config.model, device, dtype, config.pixels)
        head = build_head(config.head, subject, dtype)
        if any("fp8" in stack for stack in stacks):
            check_float8(subject.denoiser.module)
    check_output(subject)
    return Bench(
        subject,
        head,
        build_evaluator(subject),
        device,
        config.steps or _STEPS.get(subject.denoiser.family, 28),
        config.guidance_scale,
        config.runs,
        config.seconds,
    )


def _compile(bench: Bench, config: SpeedConfig) -> None:
    from core2_sampler.fused.compiling import compile_network

    # Else the second batch size met gets kernels of any size, slower than the first one's.
    compile_network(bench.subject.denoiser.module, config.compile, dynamic=False)
    bench.head.compile(fullgraph=True, dynamic=False)


def _finish(
    config: SpeedConfig,
    bench: Bench,
    rows: Sequence[SpeedRow],
    about: dict[str, Any],
) -> None:
    """Write the files; print the table, and all but the details as the last line."""
    from core2_sampler.benchmarks.speed_report import records, table, write_csv, write_json
    from core2_sampler.benchmarks.speed_text import text_seconds
    from core2_sampler.benchmarks.speed_timing import gpu_state, vae_seconds

    subject, module = bench.subject, bench.subject.denoiser.module
    full_size = subject.vae is not None
    dtype = next(module.parameters()).dtype
    limits = (bench.runs, bench.seconds)
    shared: dict[str, Any] = {
        "model": config.model,
        "settings": _settings(config, bench),
        "provenance": about,
        "gpu_after": gpu_state(),
        "baseline_drift": bench.drift,
        "faults": bench.faults,
        "vae_decode_s": vae_seconds(subject, *limits, bench.cuda),
        "text_encode_s": text_seconds(subject.denoiser.family, bench.device, dtype, *limits)
        if full_size
        else None,
    }
    details = records(rows, about["gpu_before"])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, shared | {"rows": details})
    write_csv(
        config.out.with_suffix(".csv"),
        rows,
        model_class=type(module).__name__,
        params=subject.parameters(),
        mode=config.compile,
        commit=about["commit"],
    )
    print(table(rows))
    for fault in bench.faults:
        print(f"Void: {fault}")
    brief = ("arm", "stack", "batch_size", "nfe", "seconds", "speedup")
    print(json.dumps(shared | {"rows": [{k: row[k] for k in brief} for row in details]}))


def _settings(config: SpeedConfig, bench: Bench) -> dict[str, Any]:
    """Return what all runs had in common, defaults filled in."""
    inputs = bench.subject.inputs(1)
    module = bench.subject.denoiser.module
    return {
        "steps": bench.steps,
        "guidance_scale": bench.guidance_scale,
        "solver": "euler",
        "network_dtype": str(next(module.parameters()).dtype),
        "latents": list(inputs.x.shape[1:]),
        "text_tokens": inputs.cond.prompt_embeds.shape[1],
        "head": config.head,
        "head_parameters": sum(each.numel() for each in bench.head.parameters()),
        "compile": config.compile,
    }


if __name__ == "__main__":
    bench_speed(load_config(SpeedConfig, overrides=sys.argv[1:]))
