"""Lay out a run: its modes, the config that chooses between them, and presets by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from core2_sampler.registry import unknown_name
from core2_sampler.scale_rules import StaticRule, parse_rule, static_scales
from core2_sampler.steps import Kind, Plan, Step, check_asking

if TYPE_CHECKING:
    from core2_sampler.scales import SampleRule

Mode = Literal["cond", "cfg", "core", "zigzag", "zcore", "zfast"]

_ZIG_KINDS: dict[str, Kind] = {"zigzag": "cfg", "zcore": "cfg", "zfast": "fast"}
"""The modes of zigzag steps, and how each makes a step there and there again."""

OPTION_MODES: dict[str, tuple[str, ...]] = {
    "slow_steps": ("core",),
    "w2s_scale": ("core",),
    "scale_rule": tuple(mode for mode in get_args(Mode) if mode != "cond"),
    "zig_steps": tuple(_ZIG_KINDS),
    "inversion_scale": tuple(_ZIG_KINDS),
    "upstream": ("zigzag", "zcore"),
}
"""The modes that an option of `Core2Config` belongs to."""


def make_plan(
    mode: Mode,
    num_steps: int,
    guidance_scale: float | Sequence[float],
    *,
    slow_steps: int | Sequence[int] | None = None,
    w2s_scale: float = 1.5,
    in_model: bool = False,
    zig_steps: int | Sequence[int] | None = None,
    inversion_scale: float | None = None,
    upstream: bool = False,
) -> Plan:
    """Lay out a run. A step whose guidance scale is 1 or less is a cond step, as in diffusers.

    Args:
        mode: ``cond``, ``cfg`` or ``core`` (slow steps where asked for, fast ones elsewhere); or
            zigzag steps, which are made, undone and made again: ``zigzag`` (Z-Sampling: all by
            CFG), ``zcore`` (Z-CoRe^2: undone by a prompt pass and the head) or ``zfast`` (all by
            prompt passes and the head).
        num_steps: number of steps N, at least 1.
        guidance_scale: one scale, or one for each step.
        slow_steps: mode ``core`` only: an int E in 0..N for the first E steps, or the positions
            themselves; None is 0.
        w2s_scale: weight of strong against weak in slow steps; 1 is plain CFG.
        in_model: whether the head works inside the denoiser.
        zig_steps: modes of zigzag steps only: an int in 0..N - 1 for the first so many, or the
            positions in 0..N - 2; None is all but the last.
        inversion_scale: the same modes: guidance scale that undoes a step; None is 0, as in
            Z-Sampling. At 1 that is one pass, cond; at 0 it is one pass as well, uncond, in mode
            ``zigzag`` and for an in-model head, which is made for scales above 1 only.
        upstream: modes ``zigzag`` and ``zcore``: make zigzag steps as the released code does, see
            `core2_sampler.pipelines.zigzag`; ``zcore`` without an `inversion_scale` then undoes
            steps at ``1 + w2s_scale * (guidance_scale - 1)``.

    Returns:
        The plan, of N steps.

    Raises:
        ValueError: unknown mode, N < 1, scales that are not N, steps that do not exist, or an
            option that the mode does not have.

    Reference:
        CoRe^2, arXiv 2503.09662: slow steps first, fast steps after; Z-CoRe^2. Z-Sampling, arXiv
        2412.10891.
    """
    _check_options(
        mode,
        slow_steps=slow_steps,
        zig_steps=zig_steps,
        inversion_scale=inversion_scale,
        upstream=upstream or None,
    )
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")
    first = 0 if slow_steps is None else slow_steps
    slow = _positions("slow_steps", first, num_steps, "the number of steps")
    steps = []
    for i, scale in enumerate(_scales(guidance_scale, num_steps)):
        kind = _kind(mode, i in slow) if scale > 1 else "cond"
        steps.append(Step(kind, scale, w2s_scale if i in slow else 1.0))
    for i in _zigs(mode, zig_steps, num_steps):
        if steps[i].kind != "cond":
            back = inversion_scale
            if back is None:
                released = upstream and mode == "zcore"
                back = 1 + w2s_scale * (steps[i].guidance_scale - 1) if released else 0.0
            undo = _inversion(mode, back, in_model)
            steps[i] = replace(steps[i], inversion=undo, inversion_scale=back)
    return Plan(tuple(steps), in_model, mode if upstream else None)  # type: ignore[arg-type]


def _check_options(mode: str, **options: Any) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
    for name, value in options.items():
        modes = OPTION_MODES[name]
        if value is not None and mode not in modes:
            raise ValueError(
                f"{name} belongs to mode {' or '.join(map(repr, modes))}, got {value!r} with mode "
                f"{mode!r}; leave it out"
            )


def _kind(mode: Mode, slow: bool) -> Kind:
    if mode == "core":
        return "slow" if slow else "fast"
    return _ZIG_KINDS.get(mode, mode)  # type: ignore[arg-type]


def _zigs(mode: Mode, zig_steps: int | Sequence[int] | None, num_steps: int) -> set[int]:
    if mode not in _ZIG_KINDS:
        return set()
    last = num_steps - 1  # ends without noise, where no network can be asked for the way back
    chosen = last if zig_steps is None else zig_steps
    return _positions("zig_steps", chosen, last, "the number of steps but the last")


def _inversion(mode: Mode, scale: float, in_model: bool) -> Kind:
    """Return the prediction that undoes a step, by one pass where one is enough."""
    if scale == 1:
        return "cond"
    if scale == 0 and (mode == "zigzag" or in_model):
        return "uncond"
    return "cfg" if mode == "zigzag" else "fast"


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


def _positions(name: str, steps: int | Sequence[int], limit: int, of: str) -> set[int]:
    """Return the positions below `limit` that a count or a list of them means."""
    if isinstance(steps, int) and not isinstance(steps, bool):
        if not 0 <= steps <= limit:
            raise ValueError(f"{name} must be between 0 and {of} ({limit}), got {steps}")
        return set(range(steps))
    if isinstance(steps, bool | float | str):
        raise ValueError(f"{name} must be a count or a list of positions, got {steps!r}")
    positions = list(steps)
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in positions)
    if not whole or any(not 0 <= p < limit for p in positions):
        raise ValueError(f"positions of {name} must be ints in 0..{limit - 1}, got {positions}")
    if len(set(positions)) != len(positions):
        raise ValueError(f"positions of {name} must not repeat, got {positions}")
    return set(positions)


@dataclass(frozen=True, slots=True)
class Core2Config:
    """How a pipeline run spends its passes; the number of steps is the pipeline's own argument."""

    mode: Mode = field(
        default="core",
        metadata={
            "help": "cond: prompt only; cfg: classifier-free guidance; core: slow steps where "
            "asked for, fast steps elsewhere; zigzag: every step made, undone and made again by "
            "CFG (Z-Sampling); zcore: undone by the head (Z-CoRe^2); zfast: all of it by the head"
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
    scale_rule: str | StaticRule | SampleRule | None = field(
        default=None,
        metadata={
            "help": "guidance scale of each step by a rule, in place of the single one: "
            "constant:4.5, interval:6,0.2,0.8, linear:1,9, cosine:9,1, list:5,5,3,1, a callable of "
            "the step and their number, or a rule that sees the latents of each image"
        },
    )
    zig_steps: int | float | tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "modes zigzag, zcore, zfast: how many of the first steps are undone and made "
            "again: a count, a share of all but the last (0.25), or a list of positions; by "
            "default all but the last"
        },
    )
    inversion_scale: float | None = field(
        default=None,
        metadata={
            "help": "the same modes: guidance scale that undoes a step, below that of the step; "
            "by default 0, the negative prompt alone"
        },
    )
    upstream: bool = field(
        default=False,
        metadata={
            "help": "modes zigzag and zcore: undo steps as the released code of CoRe^2 does, "
            "errors included, in place of exactly"
        },
    )

    def __post_init__(self) -> None:
        """Refuse what no number of steps could make right."""
        if self.mode not in get_args(Mode):
            raise unknown_name("mode", self.mode, get_args(Mode))
        for name in ("slow_steps", "zig_steps"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0 <= value <= 1:
                raise ValueError(
                    f"{name} written with a point is a share and must lie in 0..1, "
                    f"got {value}; write a count without a point"
                )
        for name in ("slow_steps", "zig_steps", "guidance_scales"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.scale_rule is not None:
            self._check_rule()

    def _check_rule(self) -> None:
        rule = self.scale_rule
        if self.guidance_scales is not None:
            raise ValueError(
                "scale_rule and guidance_scales both say the scale of each step, got both: leave "
                "one of them out"
            )
        if self.mode == "cond":
            raise ValueError("scale_rule has no effect in mode 'cond', which has no guidance")
        if isinstance(rule, str):
            parse_rule(rule)
        elif not callable(rule):
            raise TypeError(
                "scale_rule must be a text such as cosine:9,1, a callable of the step and the "
                f"number of steps, or a rule that sees the latents, got {type(rule).__name__}"
            )

    @property
    def sample_rule(self) -> SampleRule | None:
        """The scale rule if it sees the latents, so that the plan cannot know what it picks."""
        seen = hasattr(self.scale_rule, "begin")
        return cast("SampleRule", self.scale_rule) if seen else None

    def plan(self, num_steps: int, guidance_scale: float, in_model: bool = False) -> Plan:
        """Return the plan of a run.

        Args:
            num_steps: number of steps N of the run.
            guidance_scale: the scale of every step, unless `guidance_scales` or a static rule says
                otherwise. Where a rule picks one for each sample, any above 1 asks for guidance.
            in_model: whether the head works inside the denoiser.

        Returns:
            The plan, of N steps.

        Raises:
            ValueError: as `make_plan`; the rule does not know N steps, or no step could ask it.
        """
        scales: float | tuple[float, ...] = self.guidance_scales or guidance_scale
        if self.scale_rule is not None and self.sample_rule is None:
            rule = self.scale_rule
            static = parse_rule(rule) if isinstance(rule, str) else cast(StaticRule, rule)
            scales = static_scales(static, num_steps)
        plan = make_plan(
            self.mode,
            num_steps,
            scales,
            slow_steps=_count(self.slow_steps, num_steps),
            w2s_scale=self.w2s_scale,
            in_model=in_model,
            zig_steps=_count(self.zig_steps, num_steps - 1),
            inversion_scale=self.inversion_scale,
            upstream=self.upstream,
        )
        if self.sample_rule is not None:
            check_asking(plan)
        return plan


def _count(steps: int | float | tuple[int, ...] | None, of: int) -> int | tuple[int, ...] | None:
    """Return a share of the steps as a count, rounded; anything else as it is."""
    return math.floor(steps * of + 0.5) if isinstance(steps, float) else steps


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
