"""The way in: a sampler that a pipeline keeps from call to call, with or without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core2_sampler.fused.graphs import Graphs
from core2_sampler.fused.hot import Hot
from core2_sampler.fused.keys import obstacle, shape_key
from core2_sampler.fused.moves import moves_of
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.fused.state import Solver
from core2_sampler.scales import OnlineScale
from core2_sampler.steps import Plan
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead


@dataclass(frozen=True, slots=True)
class Model:
    """What a run samples from.

    Attributes:
        denoiser: the network; a new one for each run if it caches tensors.
        head: the weak head, if any step of the plan asks for it.
        input_dtype: that the denoiser casts x to before all else, if it does.
        observes: whether the head wants to see the gaps of pairs.
        static_head: whether the head keeps no state between steps, or keeps it in the same tensors.
        rule: picks the guidance scale of each sample in the steps that ask it; begun by the caller.
    """

    denoiser: Denoiser
    head: OutputHead | InModelHead | None = None
    input_dtype: torch.dtype = torch.float32
    observes: bool = True
    static_head: bool = False
    rule: OnlineScale | None = None


class FusedSampler:
    """Run plans by hot steps.

    Args:
        graphs: where CUDA graphs are kept; None runs the steps one by one.
        tables: whether to look the network's modulation up, see `core2_sampler.fused.modulation`.
        split_pairs: see `core2_sampler.fused.run.make_hot`.
    """

    def __init__(
        self, graphs: Graphs | None = None, tables: bool = False, split_pairs: bool = False
    ) -> None:
        self.graphs = graphs
        self.tables = tables
        self.split_pairs = split_pairs

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        plan: Plan,
        cond: Conditioning,
        uncond: Conditioning | None,
        *,
        solver: Solver,
        on_level: Callable[[int], None] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample; where a run cannot be captured it runs eagerly, and one log line says why.

        Args:
            model: see `Model`.
            x: latents at ``sigmas[0]``, [B, C, H, W].
            sigmas: noise levels in the order of the steps, [N + 1].
            plan: one entry a step, [N].
            cond: the prompt, B rows.
            uncond: the negative prompt, B rows; None if no step asks for it.
            solver: see `core2_sampler.fused.run.can_run`.
            on_level: called before each prediction with the number of its noise level.
            on_step: called with the latents after each step; it must not change them.

        Returns:
            Latents at ``sigmas[N]``, in the dtype of `x`.
        """
        run: dict[str, Any] = {"solver": solver, "on_level": on_level, "on_step": on_step}
        num_steps = len(moves_of(plan))

        # Inference tensors could not be filled by a later call outside of inference mode.
        @torch.inference_mode(False)
        @torch.no_grad()
        def make() -> Hot:
            return make_hot(
                model.denoiser,
                model.head,
                x,
                num_steps,
                cond,
                uncond,
                solver=solver,
                input_dtype=model.input_dtype,
                observes=model.observes,
                rule=model.rule,
                tables=self.tables,
                split_pairs=self.split_pairs,
            )

        graphs = self.graphs
        if graphs is None or not _may_capture(graphs, model, x.device):
            hot = make()
            with hot.hooked():
                return sample_fused(hot, x, sigmas, plan, **run)
        key = shape_key(
            model.denoiser,
            model.head,
            x,
            num_steps,
            cond,
            uncond,
            solver,
            model.input_dtype,
            model.rule,
        )
        shape = graphs.shape(key, make)
        shape.hot.prompts.load(cond, uncond)
        if shape.hot.online is not None and model.rule is not None:
            shape.hot.online.rule = model.rule  # an equal one, but it is this one that is told
        with graphs.launcher(shape, plan) as launch:
            return sample_fused(shape.hot, x, sigmas, plan, launch=launch, **run)


def _may_capture(graphs: Graphs, model: Model, device: torch.device) -> bool:
    if device.type != graphs.device_type:
        return False
    reason = obstacle(model.denoiser, model.head, device, model.static_head, model.rule)
    if reason is not None:
        graphs.explain(reason)
    return reason is None
