"""Timing that stands review: arms take turns, CUDA events beside the synced wall clock, counts."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from core2_sampler.benchmarks.speed_models import Subject
from core2_sampler.fused.hot import Hot
from core2_sampler.fused.moves import Move
from core2_sampler.fused.run import run_eagerly

Run = Callable[[], Any]

LEAST_RUNS = 3
"""Runs that are timed of every arm, however slow it is."""

MAX_DRIFT = 0.02
"""The baseline may be so much slower or faster at the end than during the timing."""

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the timed runs of one arm; ``device`` has none on the CPU.

    Attributes:
        wall: synced wall clock around each run.
        device: CUDA events around each run.
    """

    wall: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)


def timed(run: Run, cuda: bool) -> tuple[float, float | None]:
    """Return the wall and the device seconds of one run."""
    if not cuda:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, events[0].elapsed_time(events[1]) / 1000


def interleave(runs: Mapping[str, Run], count: int, seconds: float, cuda: bool) -> dict[str, Times]:
    """Time arms in turns, ABAB, so that what changes on the machine changes for all of them.

    Args:
        runs: arms by name.
        count: timed runs of each arm.
        seconds: of timed runs of the quickest arm after which all stop, if they have `LEAST_RUNS`.
        cuda: whether the runs are on a GPU.
    """
    times = {name: Times() for name in runs}
    for done in range(count):
        if done >= LEAST_RUNS and min(sum(known.wall) for known in times.values()) >= seconds:
            break
        for name, run in runs.items():
            wall, device = timed(run, cuda)
            times[name].wall.append(wall)
            if device is not None:
                times[name].device.append(device)
    return times


def summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return median, quartiles, least and 90th percentile; None without numbers."""
    if not seconds:
        return None
    if len(seconds) == 1:
        values = [seconds[0]] * 99
    else:
        values = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "median": statistics.median(seconds),
        "q25": values[24],
        "q75": values[74],
        "p90": values[89],
        "min": min(seconds),
        "runs": len(seconds),
    }


class Parts:
    """Counts and times the parts of one eager run: networks, fused operation, and whole steps.

    Args:
        cuda: whether to time by CUDA events; else by the wall clock.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._spans: list[tuple[str, Any, Any]] = []
        self.calls: dict[str, int] = {}
        self.rows: dict[str, int] = {}

    @contextmanager
    def span(self, name: str, rows: int) -> Iterator[None]:
        """Count and time what happens inside."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.rows[name] = self.rows.get(name, 0) + rows
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part."""
        if self._cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, start, end in self._spans:
            took = start.elapsed_time(end) / 1000 if self._cuda else end - start
            total[name] = total.get(name, 0.0) + took
        return total

    def watch(self, hot: Hot) -> None:
        """Put itself around the parts of a run's buffers, which are used for nothing else."""
        hot.denoiser = _Watched("denoiser", hot.denoiser, self)
        if hot.head is not None and not hot.head.in_model:
            hot.head = _Watched("head", hot.head, self)
        if hot.online is not None:
            evaluators = hot.online.rule.evaluators
            watched = {key: _Watched("evaluator", each, self) for key, each in evaluators.items()}
            hot.online.rule = replace(hot.online.rule, evaluators=watched)
        hot.update = _Watched("update", hot.update, self)

    def launch(self, hot: Hot, move: Move) -> None:
        """Run a hot step, counted and timed by its kind."""
        with self.span(f"{move.step.kind} step", 0):
            run_eagerly(hot, move)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Watched:
    """Stands in for a callable and has all of its attributes."""

    def __init__(self, name: str, inner: Any, parts: Parts) -> None:
        self._name, self._inner, self._parts = name, inner, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = len(args[0]) if args and isinstance(args[0], Tensor) else 0
        with self._parts.span(self._name, rows):
            return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def profile(run: Run) -> dict[str, Any]:
    """Return what one run does on a GPU: launches, waits for the device, attention kernels."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()  # one wait is the profiler's own
    counts = {event.key: event.count for event in profiler.key_averages()}
    attention = sorted(
        {name for name in counts if any(word in name.lower() for word in ("flash", "fmha", "sdpa"))}
    )
    return {
        "kernel_launches": sum(counts.get(name, 0) for name in _LAUNCHES),
        "graph_launches": counts.get("cudaGraphLaunch", 0),
        "waits": {
            name: count for name, count in counts.items() if any(wait in name for wait in _WAITS)
        },
        "attention": attention[:8],
    }


def vae_seconds(subject: Subject, runs: int, seconds: float, cuda: bool) -> dict[str, float] | None:
    """Return the seconds of decoding one image in the network's dtype; None without a VAE."""
    vae: Any = subject.vae
    if vae is None:
        return None
    x = subject.inputs(1).x.to(next(vae.parameters()).dtype)

    @torch.no_grad()
    def run() -> None:
        vae.decode(x, return_dict=False)

    for _ in range(LEAST_RUNS):
        run()
    times = interleave({"vae": run}, runs, seconds, cuda)["vae"]
    return summary(times.device or times.wall)


def gpu_state() -> str | None:
    """Return name, power cap, clocks and temperature as ``nvidia-smi`` says; None without one."""
    fields = "name,driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
