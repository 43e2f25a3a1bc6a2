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
from core2_sampler.fused.run import make_hot, sample_fused
from core2_sampler.fused.state import Solver
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
    """

    denoiser: Denoiser
    head: OutputHead | InModelHead | None = None
    input_dtype: torch.dtype = torch.float32
    observes: bool = True
    static_head: bool = False


class FusedSampler:
    """Run plans by hot steps.

    Args:
        graphs: where CUDA graphs are kept; None runs the steps one by one.
    """

    def __init__(self, graphs: Graphs | None = None) -> None:
        self.graphs = graphs

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
            on_step: called with the latents after each step; it must not change them.

        Returns:
            Latents at ``sigmas[N]``, in the dtype of `x`.
        """
        run: dict[str, Any] = {"solver": solver, "on_step": on_step}

        # Inference tensors could not be filled by a later call outside of inference mode.
        @torch.inference_mode(False)
        @torch.no_grad()
        def make() -> Hot:
            return make_hot(
                model.denoiser,
                model.head,
                x,
                len(plan),
                cond,
                uncond,
                solver=solver,
                input_dtype=model.input_dtype,
                observes=model.observes,
            )

        graphs = self.graphs
        if graphs is None or not _may_capture(graphs, model, x.device):
            hot = make()
            with hot.hooked():
                return sample_fused(hot, x, sigmas, plan, **run)
        key = shape_key(
            model.denoiser, model.head, x, len(plan), cond, uncond, solver, model.input_dtype
        )
        shape = graphs.shape(key, make)
        shape.hot.prompts.load(cond, uncond)
        with graphs.launcher(shape, plan) as launch:
            return sample_fused(shape.hot, x, sigmas, plan, launch=launch, **run)


def _may_capture(graphs: Graphs, model: Model, device: torch.device) -> bool:
    if device.type != graphs.device_type:
        return False
    reason = obstacle(model.denoiser, model.head, device, model.static_head)
    if reason is not None:
        graphs.explain(reason)
    return reason is None
