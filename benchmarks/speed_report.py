"""The files of the speed benchmark: all numbers as JSON, and a CSV that diffusers' tools read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic

CSV_COLUMNS = (
    "scenario",
    "model_cls",
    "num_params_B",
    "flops_G",
    "time_plain_s",
    "mem_plain_GB",
    "time_compile_s",
    "mem_compile_GB",
    "fullgraph",
    "mode",
    "github_sha",
)
"""As in the ``benchmarks`` folder of diffusers; here a row is a whole run, not one forward."""

_PEAK = {"H100": 790e12, "H200": 790e12}
"""bf16 matrix products a second that these GPUs were seen to reach, in FLOPs."""


NETWORKS = ("denoiser", "head", "evaluator")
"""The components that are no overhead of the loop."""


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One arm in one stack.

    Attributes:
        model: name of the model.
        batch_size: B.
        stack: of `core2_sampler.benchmarks.speed.STACKS`.
        arm: name of the arm.
        steps: sampling steps.
        nfe: denoiser evaluations of one sample, counted by a wrapper.
        denoiser_calls: passes, counted; a CFG pair is one.
        head_calls: the same for the head.
        flops: of a run, counted on the meta device.
        wall: seconds of a run, synced wall clock.
        device: seconds of a run, CUDA events; None on the CPU.
        first_run_s: the first run in this stack, which compiles and captures.
        first_run_peak: bytes allocated during it; None on the CPU.
        peak_allocated: bytes during timed runs; None on the CPU.
        peak_reserved: the same, of the allocator.
        components: seconds of denoiser, head, evaluator and fused operation in one run without
            graphs, and of the steps of each kind.
        profile: launches and waits of a run of one step of each kind; None on the CPU.
        captured: whether every step was the replay of a graph.
        off_first: distance of the final latents from those of the first stack, or of the first one
            in float8, relative.
        speedup: of the CFG arm in the same stack and batch, by the median.
    """

    model: str
    batch_size: int
    stack: str
    arm: str
    steps: int
    nfe: float
    denoiser_calls: int
    head_calls: int
    flops: int
    wall: dict[str, float] | None
    device: dict[str, float] | None
    first_run_s: float
    first_run_peak: int | None
    peak_allocated: int | None
    peak_reserved: int | None
    components: dict[str, float]
    profile: dict[str, Any] | None
    captured: bool
    off_first: float
    speedup: float | None = None

    def seconds(self) -> float:
        """Return the median seconds of a run: of the device where there is one."""
        return (self.device or self.wall or {})["median"]

    def flops_a_second(self) -> float:
        """Return what the run achieved."""
        return self.flops / self.seconds()

    def loop_share(self) -> float | None:
        """Return the share of the wall clock that no network takes; None on the CPU.

        With graphs the networks are timed without them: small shares may come out below 0.
        """
        if self.wall is None or self.device is None:
            return None
        networks = sum(self.components.get(name, 0.0) for name in NETWORKS)
        return 1 - networks / self.wall["median"]

    def share_of_peak(self, gpu: str | None) -> float | None:
        """Return the share of the GPU's limit in bf16; None where it is not known, or not it."""
        peak = next((v for name, v in _PEAK.items() if name in (gpu or "")), None)
        return None if peak is None or "fp8" in self.stack else self.flops_a_second() / peak


def records(rows: Sequence[SpeedRow], gpu: str | None) -> list[dict[str, Any]]:
    """Return rows as JSON objects, with what follows from their numbers."""
    return [
        asdict(row)
        | {
            "seconds": row.seconds(),
            "tflops_a_second": row.flops_a_second() / 1e12,
            "share_of_peak": row.share_of_peak(gpu),
            "loop_share": row.loop_share(),
            "host_overhead_s": None
            if row.wall is None or row.device is None
            else row.wall["median"] - row.device["median"],
        }
        for row in rows
    ]


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the JSON file, replaced whole."""
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def write_csv(path: Path, rows: Sequence[SpeedRow], *, model_class: str, **about: Any) -> None:
    """Write the CSV: one line for each model, batch and arm.

    Args:
        path: the file.
        rows: of all stacks.
        model_class: name of the network's class.
        **about: ``params``, ``mode`` and ``commit``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for key in dict.fromkeys((row.model, row.batch_size, row.arm) for row in rows):
        of = {row.stack: row for row in rows if (row.model, row.batch_size, row.arm) == key}
        plain, compiled = of.get("eager"), of.get("compile")
        some = next(iter(of.values()))
        writer.writerow(
            {
                "scenario": f"{some.model}-b{some.batch_size}-{some.arm}-{some.steps}steps",
                "model_cls": model_class,
                "num_params_B": round(about["params"] / 1e9, 4),
                "flops_G": round(some.flops / 1e9, 3),
                "time_plain_s": _seconds(plain),
                "mem_plain_GB": _gigabytes(plain),
                "time_compile_s": _seconds(compiled),
                "mem_compile_GB": _gigabytes(compiled),
                "fullgraph": True,
                "mode": about["mode"],
                "github_sha": about["commit"],
            }
        )
    write_atomic(path, text.getvalue().encode())


def table(rows: Sequence[SpeedRow]) -> str:
    """Return the rows as Markdown."""
    head = ["batch", "stack", "arm", "steps", "NFE", "median, s", "IQR", "p90", "against CFG"]
    lines = [head, ["---:", "---", "---", *["---:"] * 6]]
    for row in rows:
        times = row.device or row.wall or {}
        lines.append(
            [
                f"{row.batch_size}",
                row.stack + ("" if row.captured or "graphs" not in row.stack else ", not captured"),
                row.arm,
                f"{row.steps}",
                f"{row.nfe:g}",
                f"{times['median']:.4f}",
                f"{times['q75'] - times['q25']:.4f}",
                f"{times['p90']:.4f}",
                "" if row.speedup is None else f"{row.speedup:.3f} x",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(row: SpeedRow | None) -> float | str:
    return "" if row is None else round(row.seconds(), 6)


def _gigabytes(row: SpeedRow | None) -> float | str:
    if row is None or row.peak_allocated is None:
        return ""
    return round(row.peak_allocated / 1e9, 3)
