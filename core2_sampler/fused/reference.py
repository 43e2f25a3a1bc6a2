"""The spec of the one fused operation of a step: guidance, weak-to-strong, update, down-cast.

Plain torch, in float32 whatever the network's dtype, in place, without a new tensor and without
the host: every fast path must do what this does. Formulas: `core2_sampler.guidance` and
`core2_sampler.samplers`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core2_sampler.fused.state import COLUMNS, EXTRA, KEEP, PAST, PULL, SIGMA, W2S, State
from core2_sampler.precision import wide


@torch.no_grad()
def guided_step(
    state: State, d: Tensor, guess: Tensor | None = None, *, guess_is_gap: bool = True
) -> None:
    """Guide a finished pass, make the solver's update of ``state.x``, and count the step.

    Which inputs there are says which kind of step it is: d alone is cond, a pair is CFG, a guess
    makes it fast, both make it slow.

    Args:
        state: the run's buffers; x, seen, before, row and step are written.
        d: cond, [B, C, H, W], or the pair [uncond; cond], [2B, C, H, W].
        guess: what a weak head says, as cond: the gap, or the guided derivative itself.
        guess_is_gap: which of the two; False is an in-model head.
    """
    batch = len(state.x)
    column = [state.column(k) for k in range(COLUMNS)]
    cond = d[len(d) - batch :]
    strong, weak = state.work
    guided = cond
    if guess is not None:
        guided = guess
        if guess_is_gap:
            guided = torch.addcmul(cond, guess, column[EXTRA], out=weak)
    if len(d) == 2 * batch:
        # cond - uncond: written so that it is one operation, in float32 for every dtype of d
        torch.addcmul(cond, d[:batch], state.one, value=-1, out=strong)
        torch.addcmul(cond, strong, column[EXTRA], out=strong)
        if guess is not None:
            torch.lerp(wide(guided), strong, column[W2S], out=strong)
        guided = strong
    if state.multistep:
        _update_multistep(state, guided, column)
    else:
        state.x.addcmul_(guided, column[PULL])
    state.show()
    state.step.add_(1)
    torch.index_select(state.table, 0, state.step[:1], out=state.row)


def _update_multistep(state: State, guided: Tensor, column: list[Tensor]) -> None:
    x0, x = state.work
    torch.addcmul(state.x, guided, column[SIGMA], value=-1, out=x0)
    torch.mul(state.x, column[KEEP], out=x)
    x.addcmul_(x0, column[PULL]).addcmul_(state.before, column[PAST])
    state.before.copy_(x0)
    state.x.copy_(x)
