"""The arms of the speed benchmark, and how a stack's arms are timed against each other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from core2_sampler.benchmarks.arms import ARMS, OWN, ArmSpec
from core2_sampler.benchmarks.speed_bench import Bench
from core2_sampler.benchmarks.speed_models import Inputs
from core2_sampler.benchmarks.speed_report import SpeedRow
from core2_sampler.benchmarks.speed_timing import (
    LEAST_RUNS,
    MAX_DRIFT,
    Parts,
    Times,
    interleave,
    profile,
    summary,
    timed,
)
from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.moves import Move, moves_of
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.fused.sampler import FusedSampler, Model
from core2_sampler.samplers import sample_euler
from core2_sampler.scales import OnlineScale
from core2_sampler.steps import Plan
from core2_sampler.types import Denoiser
from core2_sampler.weak_heads import HEADS
from core2_sampler.weak_heads.base import WeakHead

SPEED_ARMS: dict[str, ArmSpec] = {
    "cfg": ARMS.get("cfg"),
    "cond": ARMS.get("cond"),
    "cfg-half": ARMS.get("cfg-half"),
    "interval": ARMS.get("interval"),
    "last-gap": ARMS.get("last-gap"),
    "fast": ARMS.get("fast"),
    "fast-quarter": ArmSpec("core", "the head, first quarter slow (E = N/4)", OWN, 0.25, 1.5),
    "fast-half": ArmSpec("core", "the head, first half slow (E = N/2)", OWN, 0.5, 1.5),
    "slow": ArmSpec("core", "the head, all slow (E = N)", OWN, 1.0, 1.5),
    "zigzag": ARMS.get("zigzag"),
    "zcore": ARMS.get("zcore"),
    "online": ARMS.get("online"),
}
"""What is timed. A slow step runs CFG's pair and asks the head."""

WARM_UPS = 3

MAX_OFF = 0.05
"""Latents of an arm may be so far from those of the first stack, relative."""


@dataclass(slots=True)
class SpeedArm:
    """One arm at one batch size, ready to run.

    Attributes:
        name: of the arm.
        bench: what it shares with the others.
        plan: its steps.
        head: its head; None if it needs none.
        inputs: its batch.
        graphs: where its graphs are kept; None without.
        rule: picks its scales; None if the plan has them.
        sigmas: its noise levels.
        denoiser: for these noise levels.
        final: latents of the latest run.
    """

    name: str
    bench: Bench
    plan: Plan
    head: WeakHead | None
    inputs: Inputs
    graphs: Graphs | None
    rule: OnlineScale | None = None
    sigmas: Tensor = field(init=False)
    denoiser: Denoiser = field(init=False)
    final: Tensor | None = None

    def __post_init__(self) -> None:
        """Make what no run makes anew."""
        subject, steps = self.bench.subject, len(self.plan)
        self.sigmas = subject.sigmas(steps)
        self.denoiser = subject.at(steps)

    @property
    def observes(self) -> bool:
        """Whether the head wants to see the gaps of pairs."""
        return self.head is not None and self.head.observes

    @property
    def static_head(self) -> bool:
        """Whether its steps may be captured."""
        return self.head is None or self.head.static_state

    @property
    def moves(self) -> tuple[Move, ...]:
        """The hot steps of a run."""
        return moves_of(self.plan, picks=self.rule is not None)

    def run(self, plan: Plan | None = None) -> None:
        """Sample once; a plan that is not its own runs on the first of its noise levels."""
        plan = plan or self.plan
        model = Model(
            self.denoiser,
            self.head,
            input_dtype=self.bench.subject.input_dtype,
            observes=self.observes,
            static_head=self.static_head,
            rule=self.rule,
        )
        x = self.inputs.x * float(self.sigmas[0])
        prompts = (self.inputs.cond, self.inputs.uncond)
        sampler, sigmas = FusedSampler(self.graphs), self.sigmas[: len(plan) + 1]
        self._begin(sigmas)
        self.final = sampler(model, x, sigmas, plan, *prompts, solver=sample_euler)

    def profile(self) -> dict[str, Any] | None:
        """Return what one step of each of its kinds does on a GPU; None on the CPU."""
        if not self.bench.cuda:
            return None
        kinds = {(step.kind, step.inversion): step for step in self.plan.steps}
        return profile(partial(self.run, Plan(tuple(kinds.values()))))

    def take_apart(self) -> Parts:
        """Return counts and times of the parts of one run without graphs."""
        parts, subject = Parts(self.bench.cuda), self.bench.subject
        x = self.inputs.x * float(self.sigmas[0])
        hot = make_hot(
            self.denoiser,
            self.head,
            x,
            len(self.moves),
            self.inputs.cond,
            self.inputs.uncond,
            input_dtype=subject.input_dtype,
            observes=self.observes,
            rule=self.rule,
        )
        self._begin(self.sigmas)
        with hot.hooked():
            parts.watch(hot)
            sample_fused(hot, x, self.sigmas, self.plan, launch=parts.launch)
        return parts

    def _begin(self, sigmas: Tensor) -> None:
        if self.rule is not None:
            self.rule.begin(self.denoiser, sigmas.tolist())

    def first(self) -> tuple[float, int | None]:
        """Return the wall seconds of one run, and the most bytes allocated; None on the CPU."""
        if self.bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed(self.run, self.bench.cuda)
        return seconds, torch.cuda.max_memory_allocated() if self.bench.cuda else None

    def peak(self) -> tuple[int, int] | None:
        """Return the most bytes allocated and reserved in one run; None on the CPU."""
        if not self.bench.cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def replays_all(self) -> bool:
        """Say whether every step of a run is the replay of a graph."""
        before = 0 if self.graphs is None else self.graphs.replays
        self.run()
        return self.graphs is not None and self.graphs.replays - before == len(self.moves)

    def off(self, stack: str, batch_size: int) -> float:
        """Return how far the latest run's latents are from those of the first stack, relative.

        What runs in float8 is compared with the first of its own kind.
        """
        final = self.final.float() if self.final is not None else torch.empty(0)
        first = self.bench.finals.setdefault(("fp8" in stack, batch_size, self.name), final)
        return float((final - first).norm() / first.norm())


def make_arms(
    bench: Bench, names: tuple[str, ...], batch_size: int, graphs: Graphs | None
) -> list[SpeedArm]:
    """Return the arms of one stack at one batch size.

    Args:
        bench: what they share.
        names: of `SPEED_ARMS`.
        batch_size: B.
        graphs: where graphs are kept; None without.
    """
    inputs, arms = bench.subject.inputs(batch_size), []
    for name in names:
        spec = SPEED_ARMS[name]
        arm = spec.at(name, bench.steps, bench.guidance_scale, {OWN: OWN}, evaluators="random")
        head = None
        if arm.head is not None:
            control = HEADS.get(arm.head) if arm.head != OWN else None
            head = control.for_denoiser(bench.subject.denoiser) if control else bench.head
        rule = OnlineScale({"random": bench.evaluator}) if spec.is_asking else None
        arms.append(SpeedArm(name, bench, arm.plan(in_model=False), head, inputs, graphs, rule))
    return arms


def time_stack(bench: Bench, names: tuple[str, ...], stack: str, batch_size: int) -> list[SpeedRow]:
    """Return the rows of all arms in one stack.

    Args:
        bench: what they share.
        names: of `SPEED_ARMS`, ``cfg`` among them: the baseline.
        stack: what the network runs in; it is compiled already where that is part of it.
        batch_size: B.
    """
    graphs = Graphs(capacity=2 * len(names)) if "graphs" in stack else None
    arms = make_arms(bench, names, batch_size, graphs)
    first = {arm.name: arm.first() for arm in arms}
    for arm in arms:
        for _ in range(WARM_UPS - 1):
            arm.run()
    runs = {arm.name: arm.run for arm in arms}
    times = interleave(runs, bench.runs, bench.seconds, bench.cuda)
    rows = [_row(arm, stack, batch_size, times[arm.name], first[arm.name]) for arm in arms]
    again = interleave({"cfg": runs["cfg"]}, LEAST_RUNS, 0.0, bench.cuda)["cfg"]
    base = next(row for row in rows if row.arm == "cfg").seconds()
    drift = median(again.device or again.wall) / base - 1
    where = f"{stack}, batch {batch_size}"
    bench.drift[where] = drift
    if bench.cuda and abs(drift) > MAX_DRIFT:  # on the CPU no time means anything
        bench.faults.append(f"{where}: the baseline moved by {drift:+.1%} meanwhile")
    return [replace(row, speedup=base / row.seconds()) for row in rows]


def _row(
    arm: SpeedArm, stack: str, batch_size: int, times: Times, first: tuple[float, int | None]
) -> SpeedRow:
    bench, parts, peak, captured = arm.bench, arm.take_apart(), arm.peak(), arm.replays_all()
    off = arm.off(stack, batch_size)
    if not off < MAX_OFF and arm.rule is None:  # a rule may pick otherwise by a rounding error
        bench.faults.append(f"{arm.name}, {stack}: latents are {off:.2g} off the first stack's")
    if "graphs" in stack and arm.static_head and not captured:
        bench.faults.append(f"{arm.name}, {stack}: not every step is the replay of a graph")
    return SpeedRow(
        model=bench.subject.name,
        batch_size=batch_size,
        stack=stack,
        arm=arm.name,
        steps=len(arm.plan),
        nfe=parts.rows["denoiser"] / batch_size,
        denoiser_calls=parts.calls["denoiser"],
        head_calls=parts.calls.get("head", 0),
        flops=batch_size * bench.flops_of(arm.moves, arm.head),
        wall=summary(times.wall),
        device=summary(times.device),
        first_run_s=first[0],
        first_run_peak=first[1],
        peak_allocated=peak and peak[0],
        peak_reserved=peak and peak[1],
        components=parts.seconds(),
        profile=arm.profile(),
        captured=captured,
        off_first=off,
    )
