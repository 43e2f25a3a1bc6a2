"""An online scale inside the hot step: candidates, scores and picks never leave the device.

What `core2_sampler.scales.OnlineScale` does eagerly, with everything that lasts from step to step
in static buffers, and noise levels read from the run's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core2_sampler.evaluators.mixing import adaptive_weights, mixed
from core2_sampler.fused.state import SIGMA, State
from core2_sampler.precision import wide
from core2_sampler.scales import OnlineScale
from core2_sampler.types import Conditioning


@dataclass(slots=True, eq=False)
class Online:
    """The buffers of an online scale for one shape.

    Attributes:
        rule: the scale rule.
        candidates: its scales, float32, [K].
        weights: of its evaluators, float32, [E, 1]; None is adaptive.
        mean: mean score of the candidates in the latest step that asked, [E, B].
        asked: whether there was one yet, [1].
        picked: the scale that each step picked, nan where it did not ask, [capacity + 1, B].
    """

    rule: OnlineScale
    candidates: Tensor
    weights: Tensor | None
    mean: Tensor
    asked: Tensor
    picked: Tensor

    @classmethod
    def allocate(cls, rule: OnlineScale, state: State) -> Online:
        """Return the buffers of a rule for runs of a state's shape."""
        batch, device = len(state.x), state.x.device
        weights = None
        if rule.weights != "adaptive":
            told = [[rule.weights[name]] for name in rule.evaluators]
            weights = torch.tensor(told, dtype=torch.float32, device=device)
        return cls(
            rule,
            candidates=torch.tensor(rule.candidates, dtype=torch.float32, device=device),
            weights=weights,
            mean=torch.zeros(len(rule.evaluators), batch, device=device),
            asked=torch.zeros(1, dtype=torch.bool, device=device),
            picked=torch.zeros(len(state.table), batch, device=device),
        )

    def begin(self) -> None:
        """Forget the run before."""
        self.asked.zero_()
        self.picked.fill_(torch.nan)

    @property
    def changing(self) -> tuple[Tensor, ...]:
        """All that steps change, but for what they pick, which they pick anew."""
        return self.mean, self.asked

    def pick(self, state: State, prompt: Conditioning, cond: Tensor, gap: Tensor) -> None:
        """Make the best candidate of each sample the next step's guidance scale.

        Args:
            state: the run's buffers.
            prompt: the prompts, B rows.
            cond: derivative with the prompt, [B, C, H, W].
            gap: what the scale multiplies, as `cond`.
        """
        scores = self._scores(state, prompt, cond, gap)  # [E, K, B]
        if self.weights is None:
            upstream = self.rule.upstream
            equal = adaptive_weights(scores, None)
            gained = adaptive_weights(scores, self.mean, upstream=upstream)
            total = mixed(scores, torch.where(self.asked, gained, equal), raw=upstream)
        else:
            total = mixed(scores, self.weights)
        scale = self.candidates[total.argmax(0)]  # [B]
        self.mean.copy_(scores.mean(1))
        self.asked.fill_(True)
        self.picked.index_copy_(0, state.step[:1], scale[None])
        state.guide(scale)

    def _scores(self, state: State, prompt: Conditioning, cond: Tensor, gap: Tensor) -> Tensor:
        """Return what each evaluator says of each candidate of each sample, [E, K, B]."""
        count = len(self.candidates)
        after = torch.index_select(state.table, 0, state.step[:1] + 1)[0, SIGMA]  # [B]
        dt = (after - state.row[0, SIGMA])[:, None, None, None]
        extra = (self.candidates - 1)[:, None, None, None, None]
        ahead = state.x + dt * (wide(cond) + extra * wide(gap))  # [K, B, C, H, W]
        prompts = Conditioning(
            prompt.prompt_embeds.repeat(count, 1, 1), prompt.pooled.repeat(count, 1)
        )
        told = [
            evaluator(ahead.flatten(0, 1), after.repeat(count), prompts)
            for evaluator in self.rule.evaluators.values()
        ]
        return torch.stack([wide(each).unflatten(0, (count, -1)) for each in told])

    def record(self, num_steps: int, asked: Sequence[int]) -> None:
        """Tell the rule what was picked, once a run has ended.

        Args:
            num_steps: N.
            asked: the steps that asked.
        """
        picked = self.picked[:num_steps].clone()
        for i in asked:
            self.rule.record.keep(i, picked[i])
