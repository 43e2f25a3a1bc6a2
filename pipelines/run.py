"""One call's state, from the encoded prompt to the final latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from core2_sampler.conditioning import Stamp, stamp
from core2_sampler.guidance import Adjust, Prompts
from core2_sampler.pipelines.adapters.base import Schedule
from core2_sampler.scales import SampleRule
from core2_sampler.steps import Plan
from core2_sampler.types import Conditioning


@dataclass(slots=True)
class Run:
    """One call's state: what callbacks may edit, and what the loop records.

    Attributes:
        call: the stock call's arguments by name.
        plan: one entry a timestep.
        schedule: the noise levels.
        latents: the initial latents, as the pipeline lays them out.
        embeds: the stock call's other tensors by the names that callbacks know; with the negative
            prompt's rows first where it is encoded.
        split: makes (cond, uncond) of `embeds`; uncond None where only the prompt's rows are left.
        adjust: see `make_predict`.
        rule: picks the guidance scale of each sample in the steps that ask it.
        empty: the empty prompt, for a head that reads it in place of the negative prompt.
        finite: whether the latents were finite after each step, [N], on the latents' device.
    """

    call: SimpleNamespace
    plan: Plan
    schedule: Schedule
    latents: Tensor
    embeds: dict[str, Tensor]
    split: Callable[[Mapping[str, Tensor]], Prompts]
    adjust: Adjust | None = None
    rule: SampleRule | None = None
    empty: Conditioning | None = None
    finite: Tensor = field(init=False)
    _paired: bool = field(init=False)
    _prompts: tuple[dict[str, Tensor], Stamp, Prompts] | None = None

    def __post_init__(self) -> None:
        """Start with a clean record."""
        self.finite = torch.ones(len(self.plan), dtype=torch.bool, device=self.latents.device)
        self._paired = self.prompts()[1] is not None

    @property
    def cut(self) -> bool:
        """Whether a callback took the negative prompt's rows away."""
        return self._paired and self.prompts()[1] is None

    def prompts(self) -> Prompts:
        """Return (cond, uncond) as they are now."""
        known, now = self._prompts, stamp(*self.embeds.values())
        if known is None or known[1] != now:
            known = self._prompts = (dict(self.embeds), now, self.split(self.embeds))
        return known[2]


class NonFiniteError(RuntimeError):
    """The latents became nan or inf."""


class Interrupted(Exception):
    """A callback set ``pipe._interrupt``: the run ends with the latents as they are."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents
