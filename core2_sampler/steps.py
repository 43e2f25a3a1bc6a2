"""What each step of a run pays for: a plan knows its own cost before the run starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from core2_sampler.registry import unknown_name

Kind = Literal["cond", "uncond", "cfg", "fast", "slow"]

Inversion = Kind | Literal["gap"]
"""How a step is undone: by a prediction, or by the latest gap in place of one."""

Leg = tuple[Kind, float]
"""A prediction: which passes make it, at which guidance scale."""

_PASSES: dict[Kind, int] = {"cond": 1, "uncond": 1, "cfg": 2, "fast": 1, "slow": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        kind: ``cond`` (prompt only), ``uncond`` (negative prompt only), ``cfg`` (both passes),
            ``fast`` (prompt pass and head) or ``slow`` (both passes and head).
        guidance_scale: 1 is cond.
        w2s_scale: slow steps only: ``weak + w2s_scale * (strong - weak)``; 1 is plain CFG.
        inversion: None, or the kind of prediction that undoes the step, which is then made again:
            a zigzag step, three predictions long; or ``gap``: a zigzag step of one, for which the
            latest gap stands in for there and back, see `core2_sampler.z2`.
        inversion_scale: guidance scale of the way back; 1 is cond, 0 is uncond.
    """

    kind: Kind
    guidance_scale: float = 1.0
    w2s_scale: float = 1.0
    inversion: Inversion | None = None
    inversion_scale: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no step can run."""
        if self.kind not in _PASSES:
            raise unknown_name("step kind", self.kind, _PASSES)
        if self.inversion not in (None, "gap", *_PASSES):
            raise unknown_name("inversion", str(self.inversion), (*_PASSES, "gap"))
        for name in ("guidance_scale", "w2s_scale", "inversion_scale"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")

    @property
    def legs(self) -> tuple[Leg, ...]:
        """The step's predictions in order: one, or those there, back and there again."""
        there: Leg = (self.kind, self.guidance_scale)
        if self.inversion is None or self.inversion == "gap":
            return (there,)
        return there, (self.inversion, self.inversion_scale), there


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one run, in order; a slow step with ``w2s_scale`` 1 is stored as CFG.

    Attributes:
        steps: one entry a step.
        in_model: the head works inside the denoiser, so a slow step needs a third pass for it.
        upstream: the mode whose zigzag steps are to be made as the released code makes them;
            None makes them exactly.
    """

    steps: tuple[Step, ...]
    in_model: bool = False
    upstream: Literal["zigzag", "zcore"] | None = None

    def __post_init__(self) -> None:
        """Store slow steps that ignore the head as CFG."""
        steps = tuple(
            replace(s, kind="cfg") if s.kind == "slow" and s.w2s_scale == 1 else s
            for s in self.steps
        )
        object.__setattr__(self, "steps", steps)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    @property
    def nfe(self) -> int:
        """Denoiser evaluations of one sample; a CFG pair counts 2."""
        kinds = [kind for step in self.steps for kind, _ in step.legs]
        third = kinds.count("slow") if self.in_model else 0
        return sum(_PASSES[kind] for kind in kinds) + third

    @property
    def kinds(self) -> set[Kind]:
        """The kinds of prediction that the run makes."""
        return {kind for step in self.steps for kind, _ in step.legs}

    @property
    def needs_uncond(self) -> bool:
        """Whether any step runs the pass with the negative prompt."""
        return not self.kinds.isdisjoint(("uncond", "cfg", "slow"))

    @property
    def needs_head(self) -> bool:
        """Whether any step asks the weak head."""
        return not self.kinds.isdisjoint(("fast", "slow"))

    @property
    def asking(self) -> tuple[int, ...]:
        """Which steps know cond and a gap, so that a scale can be picked while they run.

        That is every guided step but those that an in-model head makes in one pass.
        """
        known = ("cfg", "slow") if self.in_model else ("cfg", "slow", "fast")
        return tuple(
            i for i, s in enumerate(self.steps) if s.kind in known and s.guidance_scale > 1
        )

    @property
    def zigs(self) -> tuple[int, ...]:
        """Which steps are zigzag steps."""
        return tuple(i for i, step in enumerate(self.steps) if step.inversion is not None)

    @property
    def by_gap(self) -> tuple[int, ...]:
        """Which zigzag steps have the latest gap in place of the way there and back."""
        return tuple(i for i, step in enumerate(self.steps) if step.inversion == "gap")

    @property
    def undo(self) -> Plan:
        """The predictions that undo the zigzag steps, as a plan; cond for all other steps."""
        legs = (s.legs[1] if len(s.legs) > 1 else ("cond", 1.0) for s in self.steps)
        return Plan(tuple(Step(kind, scale) for kind, scale in legs), self.in_model)


def check_asking(plan: Plan) -> None:
    """Refuse a plan in which a scale rule that sees the latents would never be asked, or twice.

    Args:
        plan: of the run to come.

    Raises:
        ValueError: see above.
    """
    if plan.zigs:
        raise ValueError(
            "a scale rule that sees the latents must have steps that are made once, got zigzag "
            "steps: use mode 'cfg' or 'core'"
        )
    if not plan.asking:
        kinds = ", ".join(sorted(plan.kinds))
        raise ValueError(
            "a scale rule that sees the latents must have a step whose scale can still be picked: "
            "CFG, slow, or fast with a head on outputs, at a guidance scale above 1; got only "
            f"{kinds}" + (" of a head inside the denoiser" if plan.in_model else "")
        )
