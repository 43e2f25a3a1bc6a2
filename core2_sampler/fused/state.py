"""What a run's steps read and write: static buffers, and a table of coefficients by step.

Every solver here is linear in the latents and in d, and guidance is linear in d, so a step is six
numbers a sample. They lie in a table on the device, and a counter beside it says which step is
next: another plan, scale or noise schedule is another table, and no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core2_sampler.fused.moves import Move, moves_of
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler
from core2_sampler.steps import Plan

COLUMNS = 6
SIGMA, EXTRA, W2S, KEEP, PULL, PAST = range(COLUMNS)
"""Columns of the table: noise level, guidance scale minus 1, weak-to-strong scale, and what the
update takes of ``x``, of d (or of x0, see `State.multistep`) and of the x0 of the step before."""

BLOCK = 1024
"""Elements of one sample that one program of the kernel works on."""

_LEAST_CAPACITY = 64

Solver = Callable[..., Tensor]


@dataclass(slots=True, eq=False)
class State:
    """The static buffers of one shape; steps allocate nothing else that outlives them.

    Attributes:
        x: latents, float32, [B, C, H, W].
        seen: what the denoiser is given: x in the network's dtype, once [B, C, H, W] or, where
            steps run pairs, twice [2B, C, H, W].
        before: x0 of the step before, float32, as x.
        gap: that of the latest pair whose gap was to be kept, float32, as x; 0 before the first.
        table: coefficients of each step, float32, [capacity + 1, COLUMNS, B].
        row: those of the next step, ``table[step]``, [1, COLUMNS, B].
        step: the next step, int64, the same number once for each program of the kernel.
        multistep: the update is ``keep * x + pull * x0 + past * before`` with
            ``x0 = x - sigma * d``; otherwise ``x + pull * d``.
        work: scratch of the reference, float32, [2, B, C, H, W].
        one: 1 in float32, [1, 1, 1, 1].
    """

    x: Tensor
    seen: Tensor
    before: Tensor
    gap: Tensor
    table: Tensor
    row: Tensor
    step: Tensor
    multistep: bool
    work: Tensor
    one: Tensor

    @classmethod
    def allocate(
        cls,
        like: Tensor,
        num_steps: int,
        *,
        pairs: bool,
        multistep: bool = False,
        input_dtype: torch.dtype = torch.float32,
    ) -> State:
        """Return buffers for latents of a shape and device.

        Args:
            like: latents, [B, C, H, W].
            num_steps: hot steps of the longest run, see `capacity`.
            pairs: whether steps run cond and uncond as one batch of 2B.
            multistep: see `State`.
            input_dtype: of what the denoiser is given.

        Raises:
            ValueError: `like` is not [B, C, H, W].
        """
        if like.ndim != 4:
            raise ValueError(f"latents must be [B, C, H, W], got {tuple(like.shape)}")
        batch, device = len(like), like.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        programs = batch * -(-like[0].numel() // BLOCK)
        return cls(
            x=zeros(*like.shape),
            seen=zeros((1 + pairs) * batch, *like.shape[1:], dtype=input_dtype),
            before=zeros(*like.shape),
            gap=zeros(*like.shape),
            table=zeros(capacity(num_steps) + 1, COLUMNS, batch),
            row=zeros(1, COLUMNS, batch),
            step=zeros(programs, dtype=torch.int64),
            multistep=multistep,
            work=zeros(2, *like.shape),
            one=torch.ones(1, 1, 1, 1, device=device),
        )

    def begin(self, x: Tensor, table: Tensor) -> None:
        """Start a run: outside every captured graph, as the host writes here.

        Args:
            x: latents at the first noise level, [B, C, H, W].
            table: of `step_table`, no longer than the buffers were allocated for.
        """
        self.x.copy_(x)
        self.show()
        self.before.zero_()
        self.gap.zero_()
        self.table[: len(table)].copy_(table)
        self.step.zero_()
        self.row.copy_(self.table[:1])

    def show(self) -> None:
        """Write the latents where the denoiser reads them."""
        self.seen.unflatten(0, (-1, len(self.x))).copy_(self.x)

    def sigma(self, rows: int) -> Tensor:
        """Return the next step's noise level, [rows]; a view, the same for all samples."""
        return self.row[0, SIGMA, :1].expand(rows)

    def column(self, k: int) -> Tensor:
        """Return a coefficient of the next step, [B, 1, 1, 1]; a view."""
        return self.row[0, k].view(-1, 1, 1, 1)

    def guide(self, scale: Tensor) -> None:
        """Put a guidance scale for each sample [B] in place of the next step's."""
        extra = scale - 1
        self.row[0, EXTRA].copy_(extra)
        self.table[:, EXTRA].index_copy_(0, self.step[:1], extra[None])

    @property
    def changing(self) -> tuple[Tensor, ...]:
        """All that steps change, but for the scales in the table, which they make anew."""
        return self.x, self.seen, self.before, self.gap, self.row, self.step


def keep(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Return a function that puts tensors back to what they are now."""
    kept = [(tensor, tensor.clone()) for tensor in tensors]

    def restore() -> None:
        for tensor, old in kept:
            tensor.copy_(old)

    return restore


def capacity(num_steps: int) -> int:
    """Return how many steps the buffers of a run hold: runs of similar length share them."""
    return max(_LEAST_CAPACITY, 1 << (num_steps - 1).bit_length())


def has_form(solver: Solver | None) -> bool:
    """Say whether a solver of `core2_sampler.samplers` can be written as a table."""
    return _function(solver) in (sample_euler, sample_dpmpp_2m)


def is_multistep(solver: Solver | None) -> bool:
    """Say whether a solver reads the step before."""
    return _function(solver) is sample_dpmpp_2m


def step_table(
    plan: Plan,
    sigmas: Tensor,
    solver: Solver,
    batch_size: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Return the coefficients of a run, [M + 1, COLUMNS, B], float32; the last row only ends it.

    Args:
        plan: one entry a step, [N]; its M hot steps are those of `moves_of`.
        sigmas: noise levels in the order of the steps, [N + 1].
        solver: `sample_euler`, or `sample_dpmpp_2m` with its path bound.
        batch_size: B.
        scales: guidance scale of each step and sample, [N, B], in place of the plan's.

    Raises:
        ValueError: the solver has no such form, or a length does not fit the plan's.
    """
    if not has_form(solver):
        raise ValueError(
            f"solver must be sample_euler or sample_dpmpp_2m, got {solver!r}: run it by itself"
        )
    if len(sigmas) != len(plan) + 1:
        raise ValueError(f"sigmas must be {len(plan) + 1} for this plan, got {len(sigmas)}")
    moves, levels = moves_of(plan), sigmas.double().cpu()
    if scales is None:
        given = [[move.step.guidance_scale] for move in moves]
        scales = torch.tensor(given, dtype=torch.float64)
    elif scales.shape != (len(plan), batch_size):
        raise ValueError(f"scales must be [{len(plan)}, {batch_size}], got {tuple(scales.shape)}")
    table = torch.zeros(len(moves) + 1, COLUMNS, batch_size, dtype=torch.float64)
    table[:, SIGMA] = levels[[*(move.start for move in moves), len(plan)]][:, None]
    table[:-1, EXTRA] = scales.double().cpu() - 1
    table[:-1, W2S] = torch.tensor([[move.step.w2s_scale] for move in moves], dtype=torch.float64)
    table[:-1, KEEP:] = _updates(solver, levels, moves)[:, :, None]
    return table.float()


def _updates(solver: Solver, levels: Tensor, moves: Sequence[Move]) -> Tensor:
    """Return keep, pull and past of each hot step, [M, 3], float64.

    A solver is linear, so its steps on unit vectors are its coefficients: those of two steps are
    read off the solver itself, on x, x0 and the x0 of the step before as three coordinates.
    """
    if not is_multistep(solver):
        often = [1.0 if move.push is None else move.push for move in moves]
        spans = [levels[move.end] - levels[move.start] for move in moves]
        dt = torch.stack(spans) * torch.tensor(often, dtype=torch.float64)
        return torch.stack([torch.ones_like(dt), dt, torch.zeros_like(dt)], 1)
    x, x0, before = torch.eye(3, dtype=torch.float64)
    rows = []
    for i, sigma in enumerate(levels[:-1]):
        d = (x - x0) / sigma  # so that x - sigma * d is x0
        if i == 0:
            rows.append(solver(lambda _x, _j, d=d: d, x, levels[:2]))
            continue
        # The step before starts and ends in `before`, as d is 0 there; then x takes its place.
        rows.append(
            solver(
                lambda _x, j, d=d: j * d,
                before,
                levels[i - 1 : i + 2],
                on_step=lambda j, _x: x if j == 0 else None,
            )
        )
    return torch.stack(rows)


def _function(solver: Any) -> Any:
    return solver.func if isinstance(solver, partial) else solver
