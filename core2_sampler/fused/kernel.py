"""`core2_sampler.fused.reference` as one Triton kernel; import it only where Triton is installed.

The kernel reads its coefficients from ``table[step]`` and writes the next row, so nothing that one
program writes is read by another; for the same reason each program has a step counter of its own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from core2_sampler.fused.state import BLOCK, COLUMNS, EXTRA, KEEP, PAST, PULL, SIGMA, W2S, State

NO_GUESS, GAP, GUIDED = range(3)
_WARPS = 4


# Triton reads annotations as its own types, so kernels have none.


@triton.jit
def _load(ptr, row, c, h, w, stride_b, stride_c, stride_h, stride_w, mask):  # type: ignore[no-untyped-def]
    """Return one sample's part of a tensor of any strides and dtype, in float32."""
    at = ptr + row * stride_b + c * stride_c + h * stride_h + w * stride_w
    return tl.load(at, mask).to(tl.float32)


@triton.jit
def _guide(cond, uncond, guess, extra, w2s, PAIR: tl.constexpr, GUESS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the guided derivative; what a kind of step has not is not read."""
    guided = cond
    if GUESS == 1:
        guided = cond + extra * guess
    elif GUESS == 2:
        guided = guess
    if PAIR:
        strong = cond + extra * (cond - uncond)
        if GUESS == 0:
            guided = strong
        else:
            # As torch.lerp: exact at 0 and at 1.
            low = guided + w2s * (strong - guided)
            high = strong - (1 - w2s) * (strong - guided)
            guided = tl.where(tl.abs(w2s) < 0.5, low, high)
    return guided


@triton.jit
def _guided_step(  # type: ignore[no-untyped-def]
    x_ptr,
    seen_ptr,
    before_ptr,
    table_ptr,
    row_ptr,
    step_ptr,
    d_ptr,
    guess_ptr,
    size,
    height,
    width,
    batch,
    last,
    d_b,
    d_c,
    d_h,
    d_w,
    guess_b,
    guess_c,
    guess_h,
    guess_w,
    PAIR: tl.constexpr,
    GUESS: tl.constexpr,
    MULTISTEP: tl.constexpr,
    COPIES: tl.constexpr,
    SIGMA: tl.constexpr,
    EXTRA: tl.constexpr,
    W2S: tl.constexpr,
    KEEP: tl.constexpr,
    PULL: tl.constexpr,
    PAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    counter = step_ptr + sample * tl.num_programs(0) + block
    step = tl.load(counter)
    now = table_ptr + step * COLUMNS * batch + sample

    inside = block * BLOCK + tl.arange(0, BLOCK)
    mask = inside < size
    at = sample * size + inside
    c = (inside // (height * width)).to(tl.int64)
    h = (inside // width) % height
    w = inside % width

    cond_row = sample + batch if PAIR else sample
    cond = _load(d_ptr, cond_row, c, h, w, d_b, d_c, d_h, d_w, mask)
    uncond, guess, w2s = cond, cond, 1.0
    if PAIR:
        uncond = _load(d_ptr, sample, c, h, w, d_b, d_c, d_h, d_w, mask)
    if GUESS != 0:
        guess = _load(guess_ptr, sample, c, h, w, guess_b, guess_c, guess_h, guess_w, mask)
        w2s = tl.load(now + W2S * batch)
    guided = _guide(cond, uncond, guess, tl.load(now + EXTRA * batch), w2s, PAIR, GUESS)

    x = tl.load(x_ptr + at, mask)
    pull = tl.load(now + PULL * batch)
    if MULTISTEP:
        x0 = x - tl.load(now + SIGMA * batch) * guided
        before = tl.load(before_ptr + at, mask)
        x = tl.load(now + KEEP * batch) * x + pull * x0 + tl.load(now + PAST * batch) * before
        tl.store(before_ptr + at, x0, mask)
    else:
        x = x + pull * guided
    tl.store(x_ptr + at, x, mask)
    for copy in tl.static_range(COPIES):
        tl.store(seen_ptr + copy * batch * size + at, x.to(seen_ptr.dtype.element_ty), mask)

    tl.store(counter, step + 1)
    if block == 0:
        following = tl.minimum(step + 1, last)
        for k in tl.static_range(COLUMNS):
            value = tl.load(table_ptr + (following * COLUMNS + k) * batch + sample)
            tl.store(row_ptr + k * batch + sample, value)


def guided_step(
    state: State, d: Tensor, guess: Tensor | None = None, *, guess_is_gap: bool = True
) -> None:
    """Do what `core2_sampler.fused.reference.guided_step` does, with the same arguments.

    Raises:
        ValueError: `d` or `guess` has another shape than the latents.
    """
    launch(_guided_step, state, d, guess, guess_is_gap)


def launch(kernel: Any, state: State, d: Tensor, guess: Tensor | None, guess_is_gap: bool) -> None:
    """Check the shapes and start a kernel with the signature of the one here."""
    batch, channels, height, width = state.x.shape
    if d.shape[1:] != state.x.shape[1:] or len(d) not in (batch, 2 * batch):
        raise ValueError(
            f"d must be the latents' {tuple(state.x.shape)}, or two such batches, "
            f"got {tuple(d.shape)}"
        )
    if guess is not None and guess.shape != state.x.shape:
        raise ValueError(
            f"guess must be the latents' {tuple(state.x.shape)}, got {tuple(guess.shape)}"
        )
    size = channels * height * width
    form = NO_GUESS if guess is None else GAP if guess_is_gap else GUIDED
    other = d if guess is None else guess
    kernel[(triton.cdiv(size, BLOCK), batch)](
        state.x,
        state.seen,
        state.before,
        state.table,
        state.row,
        state.step,
        d,
        other,
        size,
        height,
        width,
        batch,
        len(state.table) - 1,
        *d.stride(),
        *other.stride(),
        PAIR=len(d) == 2 * batch,
        GUESS=form,
        MULTISTEP=state.multistep,
        COPIES=len(state.seen) // batch,
        SIGMA=SIGMA,
        EXTRA=EXTRA,
        W2S=W2S,
        KEEP=KEEP,
        PULL=PULL,
        PAST=PAST,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
        num_warps=_WARPS,
    )
