"""Lay out a run: which steps a mode has, of which kind, at which scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from core2_sampler.registry import unknown_name
from core2_sampler.steps import Inversion, Kind, Plan, Step

Mode = Literal["cond", "cfg", "core", "zigzag", "zcore", "zfast", "z2"]

_ZIG_KINDS: dict[str, Kind] = {"zigzag": "cfg", "zcore": "cfg", "zfast": "fast", "z2": "cfg"}
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
            CFG), ``zcore`` (Z-CoRe^2: undone by a prompt pass and the head), ``zfast`` (all by
            prompt passes and the head) or ``z2`` (made once, by CFG; the latest gap stands in for
            there and back, so the first guided step, which has none, is plain CFG).
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
            ``zigzag`` and for an in-model head, which is made for scales above 1 only. In mode
            ``z2`` it is none.
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
    for i, scale in enumerate(step_scales(guidance_scale, num_steps)):
        kind = _kind(mode, i in slow) if scale > 1 else "cond"
        steps.append(Step(kind, scale, w2s_scale if i in slow else 1.0))
    for i in _zigs(mode, zig_steps, steps):
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


def _zigs(mode: Mode, zig_steps: int | Sequence[int] | None, steps: Sequence[Step]) -> list[int]:
    if mode not in _ZIG_KINDS:
        return []
    last = len(steps) - 1  # ends without noise, where no network can be asked for the way back
    chosen = last if zig_steps is None else zig_steps
    asked = _positions("zig_steps", chosen, last, "the number of steps but the last")
    guided = [i for i, step in enumerate(steps) if step.kind != "cond"]
    if mode == "z2":
        guided = guided[1:]  # there is no gap before the first
    return [i for i in guided if i in asked]


def _inversion(mode: Mode, scale: float, in_model: bool) -> Inversion:
    """Return what undoes a step: a prediction, by one pass where one is enough, or the gap."""
    if mode == "z2":
        return "gap"
    if scale == 1:
        return "cond"
    if scale == 0 and (mode == "zigzag" or in_model):
        return "uncond"
    return "cfg" if mode == "zigzag" else "fast"


def step_scales(guidance_scale: float | Sequence[float], num_steps: int) -> list[float]:
    """Return the guidance scale of each step.

    Args:
        guidance_scale: one scale, or one for each step.
        num_steps: number of steps N.

    Raises:
        ValueError: if there are not N scales, or one is not finite.
    """
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
