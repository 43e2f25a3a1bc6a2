"""A run of hot steps: the loop around them, and whether a plan can run this way."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from core2_sampler.fused.hot import STEPS, Hot, Prompts, update_for
from core2_sampler.fused.state import Solver, State, has_form, is_multistep, step_table
from core2_sampler.samplers import sample_euler
from core2_sampler.steps import Plan, Step
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead

Launch = Callable[[Hot, Step], None]
"""``launch(hot, step)``: run the hot step of ``step.kind``, whichever way."""


def can_run(plan: Plan, solver: Solver | None) -> bool:
    """Say whether every step of a run is one of `STEPS` and its update has a table."""
    return has_form(solver) and not plan.zigs and plan.kinds <= STEPS.keys()


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
) -> Hot:
    """Allocate the buffers of a shape.

    Args:
        denoiser: the network.
        head: the weak head, if any step asks for it.
        x: latents of the shape and device wanted, [B, C, H, W].
        num_steps: of the longest run.
        cond: the prompt, B rows.
        uncond: the negative prompt, B rows; None if no step asks for it.
        solver: of the runs.
        input_dtype: that the denoiser casts x to before all else, if it does; so that the cast is
            the fused operation's.
        observes: whether the head wants to see the gaps of pairs.
    """
    state = State.allocate(
        x,
        num_steps,
        pairs=uncond is not None,
        multistep=is_multistep(solver),
        input_dtype=input_dtype,
    )
    return Hot(denoiser, head, state, Prompts.of(cond, uncond), update_for(x.device), observes)


def run_eagerly(hot: Hot, step: Step) -> None:
    """Run a hot step as it is."""
    STEPS[step.kind](hot)


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
        on_step: called with the latents after each step; they are the buffer itself.

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
        hot.state.begin(x, table)
        for i, step in enumerate(plan.steps):
            hot.scale = step.guidance_scale
            launch(hot, step)
            if on_step is not None:
                on_step(i, hot.state.x)
    return hot.state.x.to(x.dtype, copy=True)


def _check(hot: Hot, x: Tensor, plan: Plan, solver: Solver, scales: Tensor | None) -> None:
    if x.shape != hot.state.x.shape:
        raise ValueError(
            f"x must have the buffers' shape {tuple(hot.state.x.shape)}, got {tuple(x.shape)}: "
            "call make_hot again"
        )
    if not can_run(plan, solver):
        kinds = ", ".join(sorted(plan.kinds)) + (", some undone" if plan.zigs else "")
        raise ValueError(
            f"a fused run must have steps of {', '.join(STEPS)} and a solver with a table, got "
            f"{kinds} with {solver!r}: use make_predict and the solver itself"
        )
    if len(plan) >= len(hot.state.table) or is_multistep(solver) != hot.state.multistep:
        raise ValueError(
            f"the buffers must be made for {len(plan)} steps of this solver, got ones for "
            f"{len(hot.state.table) - 1}: call make_hot again"
        )
    if plan.needs_uncond and len(hot.state.seen) == len(hot.state.x):
        raise ValueError("the plan has CFG or slow steps and must get uncond, got None")
    if plan.needs_head and (hot.head is None or hot.head.in_model != plan.in_model):
        raise ValueError("the plan has fast or slow steps and must get a weak head of its kind")
    if scales is not None and plan.in_model and plan.needs_head:
        raise ValueError("scales must be None for an in-model head, which knows one for all rows")
