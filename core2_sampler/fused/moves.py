"""A plan as hot steps in a row: each is one prediction and the update that it makes.

A zigzag step is three of them: there, back with the noise levels swapped, and there again. One
that has the latest gap in place of there and back is two: by that gap, and there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from core2_sampler.steps import Plan, Step


@dataclass(frozen=True, slots=True)
class Move:
    """One hot step of a run.

    Attributes:
        step: what is predicted; it has no inversion.
        at: number of the plan's step that it is part of.
        start: number of the noise level that it starts from.
        end: number of the noise level that it leads to.
        picks: whether a scale rule picks the guidance scale of each sample.
        last: whether it ends the plan's step.
        keeps: whether the gap of its pair is kept for a later move.
        push: None, or how often it takes the gap that was kept, in place of a prediction.
    """

    step: Step
    at: int
    start: int
    end: int
    picks: bool = False
    last: bool = True
    keeps: bool = False
    push: float | None = None


def moves_of(plan: Plan, picks: bool = False) -> tuple[Move, ...]:
    """Return the hot steps of a plan, in order.

    Args:
        plan: of the run.
        picks: whether there is a scale rule, which is asked in the steps of ``plan.asking``.
    """
    return tuple(_moves(plan, frozenset(plan.asking) if picks else frozenset()))


def _moves(plan: Plan, asking: frozenset[int]) -> Iterator[Move]:
    for i, (step, undo) in enumerate(zip(plan.steps, plan.undo.steps, strict=True)):
        there = replace(step, inversion=None)
        if step.inversion == "gap":
            push = step.guidance_scale - step.inversion_scale
            yield Move(there, i, i, i + 1, last=False, push=push)
        elif step.inversion is not None:
            yield Move(there, i, i, i + 1, last=False)
            yield Move(undo, i, i + 1, i, last=False)
        yield Move(there, i, i, i + 1, picks=i in asking, keeps=bool(plan.by_gap))
