"""The latents of a stock loop as scale rules see them: in the measure where ``dx/dsigma = d``.

Heads outside SDXL, SD3 and FLUX are shown what the network is given and says. A rule that looks
ahead must know how the latents move, which the scheduler tells: flow matching has the loop's own
velocity; a table of training has ``x = x0 + sigma * noise``, as in
`core2_sampler.pipelines.adapters.discrete`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from core2_sampler.attachment.layouts import Call, Shown
from core2_sampler.attachment.networks import Network, noise_gap
from core2_sampler.pipelines.adapters.discrete import eps_from_v
from core2_sampler.precision import wide

_FLOW = "flow_prediction"
_TABLE = ("epsilon", "v_prediction")


@dataclass(frozen=True, slots=True)
class Measure:
    """Turns what a network is given and says into latents and their derivative.

    Attributes:
        network: of the run.
        predicts: ``flow_prediction``, ``epsilon`` or ``v_prediction``; None where `Network.show`
            has latents and derivative already, as for SDXL, SD3 and FLUX.
        keeps_norm: whether the loop gives what is guided the norm of cond.
    """

    network: Network
    predicts: str | None
    keeps_norm: bool

    def show(self, cond: Tensor, call: Call, sigma: float) -> Shown:
        """Return a pass with latents ``x`` and ``cond = dx/dsigma``, both [B, C, H, W].

        Args:
            cond: what the network predicted with the prompt, [B, ...].
            call: the pass that made it, B rows.
            sigma: noise level.
        """
        shown = self.network.show(cond, call, sigma)
        if self.predicts is None:
            return shown
        if self.predicts == _FLOW:
            return replace(shown, cond=self._signed(shown.cond))
        level = shown.sigma[:, None, None, None]
        x = wide(shown.x) * (1 + level**2).sqrt()
        eps = shown.cond if self.predicts == "epsilon" else eps_from_v(shown.cond, x, level)
        return replace(shown, x=x, cond=eps)

    def gap(self, gap: Tensor, call: Call, sigma: float) -> Tensor:
        """Return a gap of the network's predictions, [B, ...], as one of derivatives."""
        ours = self.network.true_gap(gap, call, sigma)
        if self.predicts == _FLOW:
            return self._signed(ours)
        return noise_gap(ours, sigma) if self.predicts == "v_prediction" else ours

    def finish(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Return what the loop makes of a guided derivative, both [B, C, H, W]."""
        if self.keeps_norm:
            dim = self.network.layout.norm_dim
            norms = [x.norm(dim=dim, keepdim=True) for x in (wide(cond), guided)]
            guided = guided * (norms[0] / norms[1])
        return guided.to(cond.dtype)

    def _signed(self, prediction: Tensor) -> Tensor:
        return -prediction if self.network.layout.to_data else prediction


def measure_of(network: Network, scheduler: Any, call: Mapping[str, Any] | None = None) -> Measure:
    """Return the measure of a network's latents.

    Args:
        network: of a pipeline.
        scheduler: of that pipeline.
        call: the stock call's arguments by name, once they are known.

    Raises:
        ValueError: the scheduler does not tell it, or the call normalises what is guided in a way
            that looking ahead would leave out.
    """
    predicts = None if network.denoiser is not None else _predicts(scheduler)
    known = network.layout.norm_dim is not None
    normalises = (call or {}).get("cfg_normalization", known)
    if normalises and not known:
        raise ValueError(
            "cfg_normalization must be left out with a scale rule that sees the latents, which "
            f"would look ahead without it, got {normalises}"
        )
    return Measure(network, predicts, bool(normalises))


def check_pass(call: Call) -> None:
    """Raise ValueError for a pass whose network is given more than the latents of one noise level.

    Args:
        call: a pass of the run.
    """
    timestep = call.kwargs["timestep"] if "timestep" in call.kwargs else call.args[1]
    images = call.kwargs.get("img_shapes")
    if torch.as_tensor(timestep).ndim > 1:
        lack = "a timestep for each token"
    elif images is not None and len(images[0]) > 1:
        lack = f"{len(images[0])} images for each sample"
    else:
        return
    raise ValueError(
        "a scale rule that sees the latents must have a network that is given these alone, at one "
        f"noise level, got {lack}: use a rule of the step, such as cosine:9,1"
    )


def _predicts(scheduler: Any) -> str:
    """Return what the network that a scheduler was made for predicts."""
    predicted = scheduler.config.get("prediction_type")
    flow = scheduler.config.get("use_flow_sigmas", False) and predicted == _FLOW
    if flow or isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return _FLOW
    if getattr(scheduler, "alphas_cumprod", None) is not None and predicted in _TABLE:
        return str(predicted)
    raise ValueError(
        "a scale rule that sees the latents must see them as dx/dsigma = d, so that it can look "
        "ahead, which FlowMatchEulerDiscreteScheduler tells, one with use_flow_sigmas and "
        "flow_prediction, or one with a table of training and epsilon or v_prediction, got "
        f"{type(scheduler).__name__} with {predicted}: use a rule of the step, such as cosine:9,1"
    )
