"""Scale rules that are known before a run: one guidance scale for each step, for all samples alike.

A static rule, ``scale = rule(i, num_steps)``, is part of the plan, so a step at scale 1 costs one
pass. Rules that see the latents are in `core2_sampler.scales`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from core2_sampler.registry import Registry

StaticRule = Callable[[int, int], float]
"""``scale = rule(i, num_steps)`` of step ``i``; 1 is cond."""

ONLINE = "online"
"""What the command line calls the rule that looks ahead, which a text alone cannot make."""

RULES: Registry[Callable[..., StaticRule]] = Registry("scale rule")
"""Makers of static rules by name; each takes numbers."""


@RULES.register("constant")
def constant(scale: float) -> StaticRule:
    """Return the rule of one scale throughout."""
    return lambda i, num_steps: scale


@RULES.register("interval")
def interval(scale: float, start: float, stop: float) -> StaticRule:
    """Return the rule that guides in a part of the run only; the rest is cond.

    Args:
        scale: inside the interval.
        start: share of the steps, 0 to 1, before which there is no guidance.
        stop: share of the steps from which on there is none.

    Raises:
        ValueError: not ``0 <= start < stop <= 1``.

    Reference:
        Kynkaanniemi et al., arXiv 2404.07724, with shares of the steps for noise levels.
    """
    if not 0 <= start < stop <= 1:
        raise ValueError(f"an interval must be 0 <= start < stop <= 1, got {start} and {stop}")

    def rule(i: int, num_steps: int) -> float:
        first, end = (
            round(share * num_steps, 9) for share in (start, stop)
        )  # 0.14 * 50 is above 7
        return scale if first <= i < end else 1.0

    return rule


@RULES.register("linear")
def linear(first: float, last: float) -> StaticRule:
    """Return the rule that goes from the first to the last step's scale in equal steps."""
    return lambda i, num_steps: first + (last - first) * i / max(num_steps - 1, 1)


@RULES.register("cosine")
def cosine(first: float, last: float) -> StaticRule:
    """Return the rule that goes from the first to the last step's scale on half a cosine wave."""

    def rule(i: int, num_steps: int) -> float:
        return last + (first - last) * (1 + math.cos(math.pi * i / max(num_steps - 1, 1))) / 2

    return rule


@RULES.register("list")
def listed(*scales: float) -> StaticRule:
    """Return the rule of one scale for each step; a run of another length is refused."""

    def rule(i: int, num_steps: int) -> float:
        if len(scales) != num_steps:
            raise ValueError(f"scales must be one a step ({num_steps}), got {len(scales)}")
        return scales[i]

    return rule


def parse_rule(text: str) -> StaticRule:
    """Return the static rule that a text names, such as ``constant:4.5`` or ``cosine:9,1``.

    Args:
        text: a name of `RULES`, a colon, numbers.

    Raises:
        ValueError: unknown name, or other numbers than the rule takes.
    """
    name, _, numbers = text.partition(":")
    if name == ONLINE:
        raise ValueError(
            f"a scale rule of a text alone must be one of {', '.join(RULES.names())}, got "
            f"{text!r}, which needs evaluators: give an OnlineScale with them"
        )
    make = RULES.get(name)
    try:
        values = [float(number) for number in numbers.split(",")]
        if not all(map(math.isfinite, values)):
            raise ValueError("its numbers must be finite")
        return make(*values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a scale rule must read NAME:NUMBER,NUMBER as in cosine:9,1, got {text!r} ({error})"
        ) from None


def static_scales(rule: StaticRule, num_steps: int) -> tuple[float, ...]:
    """Return a static rule's scales, [N], as `core2_sampler.plan.make_plan` takes them.

    Args:
        rule: any callable of the step and the number of steps.
        num_steps: N.

    Raises:
        ValueError: a scale is not finite, or the rule does not know N steps.
    """
    scales = tuple(float(rule(i, num_steps)) for i in range(num_steps))
    if not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"a scale rule must give finite scales, got {scales}")
    return scales
