"""What all arms of the speed benchmark share: the networks, the limits, and what was found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from core2_sampler.benchmarks.speed_models import Subject, count_flops
from core2_sampler.evaluators.network import LatentEvaluator
from core2_sampler.fused.moves import Move
from core2_sampler.scales import OnlineScale
from core2_sampler.steps import Kind
from core2_sampler.weak_heads.base import WeakHead


@dataclass(slots=True)
class Bench:
    """What all arms share.

    Attributes:
        subject: the network.
        head: the weak head, of random weights.
        evaluator: what online scales ask, of random weights.
        device: of the runs.
        steps: N.
        guidance_scale: of every arm.
        runs: timed runs of each arm.
        seconds: of timed runs after which an arm has enough.
        flops: of a prediction for one sample, by kind, class of the head, and whether a scale is
            picked.
        finals: final latents of the first stack, and of the first one in float8, by whether it is
            one, batch size and arm.
        drift: of the baseline while a stack was timed, by stack and batch size.
        faults: what makes the timings void.
    """

    subject: Subject
    head: WeakHead
    evaluator: LatentEvaluator
    device: str
    steps: int
    guidance_scale: float
    runs: int
    seconds: float
    flops: dict[tuple[Kind, str, bool], int] = field(default_factory=dict)
    finals: dict[tuple[bool, int, str], Tensor] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the runs are on a GPU."""
        return self.device.startswith("cuda")

    def flops_of(self, moves: Sequence[Move], head: WeakHead | None) -> int:
        """Return the FLOPs of a run of one sample, counted once a kind on the meta device."""
        total = 0
        for move in moves:
            key = (move.step.kind, type(head).__name__, move.picks)
            if key not in self.flops:
                twin = None if head is None else copy.deepcopy(head).to("meta")
                judge = copy.deepcopy(self.evaluator).to("meta") if move.picks else None
                rule = None if judge is None else OnlineScale({"random": judge})
                self.flops[key] = count_flops(self.subject, twin, move.step.kind, rule)
            total += self.flops[key]
        return total
