"""The contract of a model family: how to call its network, encode a prompt, make a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from core2_sampler.conditioning import stamp
from core2_sampler.guidance import Prompts
from core2_sampler.types import Denoiser, OnStep, Predict
from core2_sampler.weak_heads.compiled import notice_hooks

Solver = Callable[..., Tensor]
"""``solver(predict, x, sigmas, on_step=)``: one of `core2_sampler.samplers`."""


def unchanged(x: Tensor) -> Tensor:
    """Return the argument itself."""
    return x


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run's noise levels, and how the pipeline's own latents differ from ours.

    Ours are ``x`` [B, C, H, W] with ``dx/dsigma = d``. The pipeline's, which its callers and its
    scheduler see, may be scaled (variance-preserving for DDIM) or packed into tokens (FLUX).

    Attributes:
        timesteps: the scheduler's, [N].
        num_steps: inference steps; fewer than N for schedulers of higher order.
        sigmas: noise level of each timestep, float64 on the CPU: [N + 1] with the final one, or
            [N] where the scheduler makes the update itself.
        solver: the scheduler's update in closed form; None runs ``scheduler.step`` itself.
        noise_scale: ``x`` at ``sigmas[0]`` is unit noise times this.
        latent_scale: the pipeline's latents at ``sigmas[i]`` are ``x`` times ``latent_scale[i]``,
            [N + 1]; None is 1 throughout.
        pack: our layout to the pipeline's.
        unpack: the pipeline's layout to ours.
        model_input: for ``scheduler.step``: the pipeline's latents at timestep i to ``x``.
        model_output: for ``scheduler.step``: ``d`` at ``x`` and step i to what the network says.
    """

    timesteps: Tensor
    num_steps: int
    sigmas: Tensor
    solver: Solver | None
    noise_scale: float = 1.0
    latent_scale: Tensor | None = None
    pack: Callable[[Tensor], Tensor] = unchanged
    unpack: Callable[[Tensor], Tensor] = unchanged
    model_input: Callable[[Tensor, int], Tensor] | None = None
    model_output: Callable[[Tensor, Tensor, int], Tensor] | None = None

    def to_pipeline(self, x: Tensor, i: int) -> Tensor:
        """Return the pipeline's latents for ``x`` at ``sigmas[i]``."""
        scaled = x if self.latent_scale is None else x * float(self.latent_scale[i])
        return self.pack(scaled)

    def from_pipeline(self, latents: Tensor, i: int) -> Tensor:
        """Return ``x`` for the pipeline's latents at ``sigmas[i]``."""
        x = self.unpack(latents)
        return x if self.latent_scale is None else x / float(self.latent_scale[i])

    def around(self, on_step: OnStep) -> OnStep:
        """Let ``on_step(i, latents)`` see, edit and replace the pipeline's latents, not ours."""
        if self.latent_scale is None and self.pack is unchanged:
            return on_step

        def converted(i: int, x: Tensor) -> Tensor | None:
            seen = self.to_pipeline(x, i + 1)
            before = stamp(seen)
            replaced = on_step(i, seen)
            replaced = seen if replaced is None else replaced
            if stamp(replaced) == before and not seen.is_inference():
                return None  # a way there and back would round
            return self.from_pipeline(replaced, i + 1)

        return converted

    def network_view(self, predict: Predict) -> Predict:
        """Return ``predict`` as ``scheduler.step`` wants it: on and for the pipeline's latents."""

        def output(latents: Tensor, i: int) -> Tensor:
            x = self.unpack(latents)
            x = x if self.model_input is None else self.model_input(x, i)
            d = predict(x, i)
            return self.pack(d if self.model_output is None else self.model_output(d, x, i))

        return output


class Family(Protocol):
    """One model family behind the interface that pipelines, Collect and benchmarks know."""

    name: str
    """As in heads and results: ``sd3``, ``sdxl`` or ``flux``."""

    scale_argument: str
    """The stock call's argument that is the scale of classifier-free guidance."""

    def denoiser(self, pipe: Any) -> Denoiser:
        """Return the pipeline's network as the engine knows it."""
        ...

    def encode(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> Prompts:
        """Encode as the pipeline's own call does; None is the empty negative prompt.

        Returns:
            ``(cond, uncond)``, B rows each.
        """
        ...

    def noise(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Draw what the stock call takes as ``latents``, one generator an image; sizes in px."""
        ...

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of ``x`` at the model's own size."""
        ...

    def schedule(self, pipe: Any, num_steps: int, latent_size: tuple[int, int]) -> Schedule:
        """Set the pipeline's scheduler as the stock call does, and return its grid."""
        ...

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [-1, 1] of final latents as the stock call returns them."""
        ...


def draw_noise(
    pipe: Any, generators: Sequence[torch.Generator], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return unit noise [B, *shape]: one generator an image, so none depends on its batch-mates.

    Args:
        pipe: tells the device.
        generators: B generators.
        shape: of one sample.
        dtype: of the result.
    """
    return randn_tensor(
        (len(generators), *shape),
        generator=list(generators),
        device=pipe._execution_device,
        dtype=dtype,
    )


def draw_noise_of_size(
    pipe: Any,
    network: Any,
    generators: Sequence[torch.Generator],
    height: int | None,
    width: int | None,
) -> Tensor:
    """Return unit noise for a network that takes [B, C, H, W], as the stock call draws it.

    Args:
        pipe: tells the device, the default size and the pixels to one latent.
        network: tells C and the dtype.
        generators: one an image.
        height: px; None is the model's own.
        width: px; None is the model's own.
    """
    sides = [
        pixels // pipe.vae_scale_factor if pixels else pipe.default_sample_size
        for pixels in (height, width)
    ]
    return draw_noise(pipe, generators, (network.config.in_channels, *sides), network.dtype)


def check_no_lone_cache(module: nn.Module) -> None:
    """Refuse a cache between steps on a network that cannot be told which pass is which.

    Caches of diffusers keep a state for each ``cache_context``; SD3.5 and SDXL have none, and on
    FLUX only ``enable_cache`` makes a cache known.

    Args:
        module: the network.

    Raises:
        ValueError: see above.
    """
    if getattr(module, "_cache_config", None) is not None:
        return  # `check_cache` of the family has seen it
    for part in module.modules():
        hooks = getattr(vars(part).get("_diffusers_hook"), "hooks", {})
        for name, hook in hooks.items():
            if hook._is_stateful:
                raise ValueError(
                    f"{type(module).__name__} must have no cache between steps, which it could not "
                    f"tell the passes apart for, got {type(hook).__name__}: take it off with "
                    f"HookRegistry.remove_hook({name!r}, recurse=True)"
                    + (", and use enable_cache" if hasattr(module, "enable_cache") else "")
                )


@contextmanager
def capture_input(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Record what a layer is given.

    Yields:
        A callable that returns the input of the latest pass.

    Raises:
        RuntimeError: from that callable, if there was no pass yet.
    """
    latest: list[Tensor] = []

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        latest[:] = inputs[:1]

    def read() -> Tensor:
        if not latest:
            raise RuntimeError("features must be read after a pass of the denoiser, got none")
        return latest[0]

    notice_hooks()
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield read
    finally:
        handle.remove()
