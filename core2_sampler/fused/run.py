"""A run of hot steps: the loop around them, and whether a plan can run this way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from core2_sampler.fused.hot import Hot, Prompts, step_of, update_for
from core2_sampler.fused.modulation import Modulation
from core2_sampler.fused.moves import Move, moves_of
from core2_sampler.fused.online import Online
from core2_sampler.fused.state import Solver, State, has_form, is_multistep, step_table
from core2_sampler.samplers import sample_euler
from core2_sampler.scales import OnlineScale
from core2_sampler.steps import Plan
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead

Launch = Callable[[Hot, Move], None]
"""``launch(hot, move)``: run the hot step of a move, whichever way."""


def can_run(plan: Plan, solver: Solver | None) -> bool:
    """Say whether a run's updates have a table; zigzag steps do where they are exactly undone."""
    undone = plan.zigs and (plan.upstream is not None or is_multistep(solver))
    return has_form(solver) and not undone


def make_hot(
    denoiser: Denoiser,
    head: OutputHead | InModelHead | None,
    x: Tensor,
    num_steps: int,
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    solver: Solver = sample_euler,
    input_dtype: torch.dtype = torch.float32,
    observes: bool = True,
    rule: OnlineScale | None = None,
    tables: bool = False,
    split_pairs: bool = False,
) -> Hot:
    """Allocate the buffers of a shape.

    Args:
        denoiser: the network.
        head: the weak head, if any step asks for it.
        x: latents of the shape and device wanted, [B, C, H, W].
        num_steps: hot steps of the longest run; a zigzag step is three, or two by the gap.
        cond: the prompt, B rows.
        uncond: the negative prompt, B rows; None if no step asks for it.
        solver: of the runs.
        input_dtype: that the denoiser casts x to before all else, if it does; so that the cast is
            the fused operation's.
        observes: whether the head wants to see the gaps of pairs.
        rule: picks the guidance scale of each sample, in the steps that ask.
        tables: whether to look the network's modulation up, see `core2_sampler.fused.modulation`.
        split_pairs: whether pairs are two passes of B rows; not under a cache between steps, which
            knows passes by their rows.
    """
    state = State.allocate(
        x,
        num_steps,
        pairs=uncond is not None,
        multistep=is_multistep(solver),
        input_dtype=input_dtype,
    )
    modulation = None
    if tables:
        inside = head is not None and head.in_model
        with cast(InModelHead, head).attached(denoiser.module) if inside else nullcontext():
            modulation = Modulation.allocate(denoiser, state)
    return Hot(
        denoiser,
        head,
        state,
        Prompts.of(cond, uncond),
        update_for(x.device),
        observes,
        online=None if rule is None else Online.allocate(rule, state),
        modulation=modulation,
        split=split_pairs and getattr(denoiser.module, "_cache_config", None) is None,
    )


def run_eagerly(hot: Hot, move: Move) -> None:
    """Run a hot step as it is."""
    step_of(move)(hot)


@torch.no_grad()
def sample_fused(
    hot: Hot,
    x: Tensor,
    sigmas: Tensor,
    plan: Plan,
    *,
    solver: Solver = sample_euler,
    scales: Tensor | None = None,
    launch: Launch = run_eagerly,
    on_level: Callable[[int], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Solve as ``solver(make_predict(...), x, sigmas)`` would, with the latents in float32.

    The prompt is the one in ``hot.prompts``. No step waits for the device.

    Args:
        hot: of `make_hot`, for this shape, solver and at least so many steps.
        x: latents at ``sigmas[0]``, [B, C, H, W].
        sigmas: noise levels in the order of the steps, [N + 1].
        plan: one entry a step, [N].
        solver: see `can_run`.
        scales: guidance scale of each step and sample, [N, B], in place of the plan's.
        launch: how steps are run.
        on_level: called before each prediction with the number of its noise level.
        on_step: called with the latents after each step of the plan; they are the buffer itself.

    Returns:
        Latents at ``sigmas[N]``, in the dtype of `x`.

    Raises:
        ValueError: the plan or the solver cannot run this way, or needs what `hot` has not.
    """
    _check(hot, x, plan, solver, scales)
    if hot.head is not None and not hot.head.in_model:
        cast(OutputHead, hot.head).reset()
    table = step_table(plan, sigmas, solver, len(x), scales)
    with torch.cuda.device_of(x):
        hot.begin(x, table)
        asked: list[int] = []
        try:
            _run(hot, plan, launch, on_level, on_step, asked)
        finally:  # an interrupted run tells what it picked
            if hot.online is not None:
                hot.online.record(len(plan), asked)
    return hot.state.x.to(x.dtype, copy=True)


def _run(
    hot: Hot,
    plan: Plan,
    launch: Launch,
    on_level: Callable[[int], None] | None,
    on_step: Callable[[int, Tensor], None] | None,
    asked: list[int],
) -> None:
    """Run all hot steps; `asked` gets the steps that asked the scale rule."""
    for move in moves_of(plan, picks=hot.online is not None):
        hot.scale, hot.keeps = move.step.guidance_scale, move.keeps
        if on_level is not None and move.push is None:
            on_level(move.start)
        launch(hot, move)
        asked += [move.at] * move.picks
        if on_step is not None and move.last:
            on_step(move.at, hot.state.x)


def _check(hot: Hot, x: Tensor, plan: Plan, solver: Solver, scales: Tensor | None) -> None:
    if x.shape != hot.state.x.shape:
        raise ValueError(
            f"x must have the buffers' shape {tuple(hot.state.x.shape)}, got {tuple(x.shape)}: "
            "call make_hot again"
        )
    if not can_run(plan, solver):
        undone = f" and steps undone (upstream {plan.upstream})" if plan.zigs else ""
        raise ValueError(
            "a fused run must have a solver with a table, and sample_euler to undo steps exactly, "
            f"got {solver!r}{undone}: use make_predict and the solver itself"
        )
    needed = len(moves_of(plan))
    if needed >= len(hot.state.table) or is_multistep(solver) != hot.state.multistep:
        raise ValueError(
            f"the buffers must be made for {needed} hot steps of this solver, got ones for "
            f"{len(hot.state.table) - 1}: call make_hot again"
        )
    if plan.needs_uncond and len(hot.state.seen) == len(hot.state.x):
        raise ValueError("the plan has CFG or slow steps and must get uncond, got None")
    if plan.needs_head and (hot.head is None or hot.head.in_model != plan.in_model):
        raise ValueError("the plan has fast or slow steps and must get a weak head of its kind")
    if scales is not None and plan.in_model and plan.needs_head:
        raise ValueError("scales must be None for an in-model head, which knows one for all rows")
    if plan.zigs and (scales is not None or hot.online is not None):
        raise ValueError("zigzag steps must have the plan's scales, got scales or a rule for them")
