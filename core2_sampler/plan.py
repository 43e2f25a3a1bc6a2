"""Which steps of a run pay for what: a plan knows its own cost before the run starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from core2_sampler.registry import unknown_name

Kind = Literal["cond", "cfg", "fast", "slow"]
Mode = Literal["cond", "cfg", "core"]

_PASSES: dict[Kind, int] = {"cond": 1, "cfg": 2, "fast": 1, "slow": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run.

    Attributes:
        kind: ``cond`` (prompt only), ``cfg`` (both passes), ``fast`` (prompt pass and head) or
            ``slow`` (both passes and head).
        guidance_scale: 1 is cond.
        w2s_scale: slow steps only: ``weak + w2s_scale * (strong - weak)``; 1 is plain CFG.
    """

    kind: Kind
    guidance_scale: float = 1.0
    w2s_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no step can run."""
        if self.kind not in _PASSES:
            raise unknown_name("step kind", self.kind, _PASSES)
        for name in ("guidance_scale", "w2s_scale"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of one run, in order; a slow step with ``w2s_scale`` 1 is stored as CFG.

    Attributes:
        steps: one entry a step.
        in_model: the head works inside the denoiser, so a slow step needs a third pass for it.
    """

    steps: tuple[Step, ...]
    in_model: bool = False

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
        third = sum(s.kind == "slow" for s in self.steps) if self.in_model else 0
        return sum(_PASSES[s.kind] for s in self.steps) + third

    @property
    def needs_uncond(self) -> bool:
        """Whether any step runs the pass with the negative prompt."""
        return any(s.kind in ("cfg", "slow") for s in self.steps)

    @property
    def needs_head(self) -> bool:
        """Whether any step asks the weak head."""
        return any(s.kind in ("fast", "slow") for s in self.steps)


def make_plan(
    mode: Mode,
    num_steps: int,
    guidance_scale: float | Sequence[float],
    *,
    slow_steps: int | Sequence[int] | None = None,
    w2s_scale: float = 1.5,
    in_model: bool = False,
) -> Plan:
    """Lay out a run. A step whose guidance scale is 1 or less is a cond step, as in diffusers.

    Args:
        mode: ``cond``, ``cfg`` or ``core`` (slow steps where asked for, fast ones elsewhere).
        num_steps: number of steps N, at least 1.
        guidance_scale: one scale, or one for each step.
        slow_steps: mode ``core`` only: an int E in 0..N for the first E steps, or the positions
            themselves; None is 0.
        w2s_scale: weight of strong against weak in slow steps; 1 is plain CFG.
        in_model: whether the head works inside the denoiser.

    Returns:
        The plan, of N steps.

    Raises:
        ValueError: unknown mode, N < 1, scales that are not N, slow steps outside 0..N.

    Reference:
        CoRe^2, arXiv 2503.09662: slow steps first, fast steps after.
    """
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")
    if mode != "core" and slow_steps is not None:
        raise ValueError(
            f"slow_steps belongs to mode 'core', got {slow_steps!r} with mode {mode!r}; "
            "leave it out"
        )
    slow = _slow_positions(0 if slow_steps is None else slow_steps, num_steps)
    kinds: list[Kind] = [
        mode if mode != "core" else ("slow" if i in slow else "fast") for i in range(num_steps)
    ]
    return Plan(
        tuple(
            Step(kind if scale > 1 else "cond", scale, w2s_scale if kind == "slow" else 1.0)
            for kind, scale in zip(kinds, _scales(guidance_scale, num_steps), strict=True)
        ),
        in_model,
    )


def _scales(guidance_scale: float | Sequence[float], num_steps: int) -> list[float]:
    if isinstance(guidance_scale, int | float):
        scales = [float(guidance_scale)] * num_steps
    else:
        scales = [float(s) for s in guidance_scale]
    if len(scales) != num_steps:
        raise ValueError(
            f"guidance scales must be one a step ({num_steps}), got {len(scales)}: {scales}"
        )
    if not all(math.isfinite(s) for s in scales):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
    return scales


def _slow_positions(slow_steps: int | Sequence[int], num_steps: int) -> set[int]:
    if isinstance(slow_steps, int) and not isinstance(slow_steps, bool):
        if not 0 <= slow_steps <= num_steps:
            raise ValueError(
                f"slow_steps must be between 0 and the number of steps ({num_steps}), "
                f"got {slow_steps}"
            )
        return set(range(slow_steps))
    if isinstance(slow_steps, bool | float | str):
        raise ValueError(f"slow_steps must be a count or a list of positions, got {slow_steps!r}")
    positions = list(slow_steps)
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in positions)
    if not whole or any(not 0 <= p < num_steps for p in positions):
        raise ValueError(f"slow positions must be ints in 0..{num_steps - 1}, got {positions}")
    if len(set(positions)) != len(positions):
        raise ValueError(f"slow positions must not repeat, got {positions}")
    return set(positions)


@dataclass(frozen=True, slots=True)
class Core2Config:
    """How a pipeline run spends its passes; the number of steps is the pipeline's own argument."""

    mode: Mode = field(
        default="core",
        metadata={
            "help": "cond: prompt only; cfg: classifier-free guidance; core: slow steps where "
            "asked for, fast steps elsewhere"
        },
    )
    slow_steps: int | float | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "mode core: how many of the first steps also run the negative prompt: a count, "
            "a share written with a point (0.25), or a list of positions; none by default"
        },
    )
    w2s_scale: float = field(
        default=1.5,
        metadata={"help": "slow steps: weak + w2s_scale * (strong - weak); 1 is plain CFG"},
    )
    guidance_scales: tuple[float, ...] | None = field(
        default=None,
        metadata={"help": "one guidance scale for each step, in place of the single one"},
    )

    def __post_init__(self) -> None:
        """Refuse what no number of steps could make right."""
        if self.mode not in get_args(Mode):
            raise unknown_name("mode", self.mode, get_args(Mode))
        if isinstance(self.slow_steps, float) and not 0 <= self.slow_steps <= 1:
            raise ValueError(
                "slow_steps written with a point is a share and must lie in 0..1, "
                f"got {self.slow_steps}; write a count without a point"
            )
        for name in ("slow_steps", "guidance_scales"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def plan(self, num_steps: int, guidance_scale: float, in_model: bool = False) -> Plan:
        """Return the plan of a run.

        Args:
            num_steps: number of steps N of the run.
            guidance_scale: the scale of every step, unless `guidance_scales` says otherwise.
            in_model: whether the head works inside the denoiser.

        Returns:
            The plan, of N steps.

        Raises:
            ValueError: as `make_plan`.
        """
        slow = self.slow_steps
        if isinstance(slow, float):
            slow = math.floor(slow * num_steps + 0.5)
        return make_plan(
            self.mode,
            num_steps,
            self.guidance_scales or guidance_scale,
            slow_steps=slow,
            w2s_scale=self.w2s_scale,
            in_model=in_model,
        )


PRESETS: dict[str, Core2Config] = {
    "fast": Core2Config(slow_steps=0),
    "balanced": Core2Config(slow_steps=0.25, w2s_scale=1.0),
    "quality": Core2Config(slow_steps=1.0, w2s_scale=1.5),
}
"""``fast``: one pass a step; ``balanced``: CFG in the first quarter; ``quality``: all slow."""


def resolve_config(core2: str | Core2Config) -> Core2Config:
    """Return the config that a preset name stands for, or the config itself.

    Args:
        core2: a name of `PRESETS`, or a config.

    Returns:
        The config.

    Raises:
        ValueError: unknown preset name.
        TypeError: neither a name nor a config.
    """
    if isinstance(core2, Core2Config):
        return core2
    if not isinstance(core2, str):
        raise TypeError(
            f"core2 must be a preset name or a Core2Config, got {type(core2).__name__}; "
            f"presets: {', '.join(PRESETS)}"
        )
    if core2 not in PRESETS:
        raise unknown_name("core2 preset", core2, PRESETS)
    return PRESETS[core2]
