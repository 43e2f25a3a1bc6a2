"""The adapter head: low-rank changes inside the denoiser, on only where a pass is to be guided.

With the head on, one pass returns the guided prediction. It works through forward hooks, beside
whatever else is loaded: off, the denoiser computes what it always did, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.types import Denoiser
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.compiled import notice_hooks

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # the text stream's attention
    *("net.0.proj", "net.2"),  # feed-forward
    *("norm1.linear", "norm1_context.linear"),  # adaLN: how a layer answers to the noise level
    *("norm.linear", "proj_mlp", "single_transformer_blocks.*.proj_out"),  # FLUX's single blocks
    *("conv1", "conv2", "time_emb_proj"),  # residual blocks of a UNet
)
"""Endings of the names of the layers that get an adapter unless others are asked for; ``*`` stands
for anything."""


class AdapterHead(WeakHead):
    """Low-rank adapters on a denoiser's linear and convolution layers.

    At guidance scale s every adapter's output is multiplied by its strength
    ``(s - 1) / (reference_scale - 1)``: scale 1 is exactly cond.

    Reference:
        LoRA, arXiv 2106.09685; adapter guidance distillation, arXiv 2503.07274.
    """

    in_model = True

    @register_to_config
    def __init__(
        self,
        family: str,
        latent_channels: int,
        layers: dict[str, list[int]],
        rank: int = 8,
        reference_scale: float = 4.5,
        scale_range: tuple[float, float] = (4.5, 4.5),
        weak_guidance: float | None = None,
    ) -> None:
        """Build the head.

        Args:
            family: family of the denoiser.
            latent_channels: C.
            layers: adapted layers: name -> [out, in], or [out, in, kernel height, width].
            rank: of each adapter.
            reference_scale: guidance scale at which the strength is 1.
            scale_range: lowest and highest guidance scale, above 1, that it is trained for.
            weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learns;
                None is the negative prompt.
        """
        super().__init__()
        low, high = scale_range
        if not (1 < low <= high and reference_scale > 1):
            raise ValueError(
                "scale_range must be two rising scales above 1, and reference_scale above 1, got "
                f"{low}, {high} and {reference_scale}"
            )
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for name, (out, into, *kernel) in layers.items():
            down = torch.empty(rank, into, *kernel)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            self.down[_key(name)] = nn.Parameter(down)
            self.up[_key(name)] = nn.Parameter(torch.zeros(out, rank, *[1] * len(kernel)))
        self._strength = 0.0
        self._attached = False

    @classmethod
    def for_denoiser(
        cls,
        denoiser: Denoiser,
        *,
        seed: int = 0,
        targets: Sequence[str] = TARGETS,
        **options: Any,
    ) -> AdapterHead:
        """Build an untrained head with adapters on the layers whose names end as ``targets`` say.

        Raises:
            ValueError: if a denoiser has no such layer.
        """
        layers = {
            name: shape
            for name, layer in _layers(denoiser.module).items()
            if any(fnmatchcase(f".{name}", f"*.{target}") for target in targets)
            and (shape := _shape(layer)) is not None
        }
        if not layers:
            raise ValueError(
                f"targets must end the name of a layer of {type(denoiser.module).__name__}, got "
                f"{', '.join(targets)}"
            )
        return super().for_denoiser(denoiser, seed=seed, layers=layers, **options)

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        """Hook into the denoiser, still off; on exit the denoiser is as it was.

        Raises:
            ValueError: if the denoiser has other layers or latents than the head was made for, its
                attention projections are fused, or the head is attached already.
        """
        if self._attached:
            raise ValueError("a head must be attached once at a time, got a second denoiser")
        handles = []
        found = _layers(module)
        self.check_latents(_latent_channels(module, self.config.family))
        for name, wanted in self.config.layers.items():
            got = _shape(found.get(name))
            if got != list(wanted):
                raise ValueError(
                    f"this head must meet a layer {name} of shape {list(wanted)}, got "
                    f"{got or 'none'} in {type(module).__name__}: use the head trained for it"
                )
            if getattr(found[name.rpartition(".")[0]], "fused_projections", False):
                raise ValueError(
                    f"the layer {name} must be called by the denoiser, got fused projections: call "
                    "unfuse_qkv_projections() first"
                )
        notice_hooks()
        self._attached = True
        try:
            for name in self.config.layers:
                handles.append(found[name].register_forward_hook(self._hook(_key(name))))
            yield
        finally:
            self._attached = False
            for handle in handles:
                handle.remove()

    def strength(self, guidance_scale: float) -> float:
        """Return what every adapter's output is multiplied by at a guidance scale; 0 at scale 1.

        Raises:
            ValueError: if the scale is neither 1 nor within ``scale_range``.
        """
        low, high = self.config.scale_range
        if guidance_scale != 1 and not low <= guidance_scale <= high:
            raise ValueError(
                f"guidance_scale must be within {low} to {high}, which this head was trained for, "
                f"got {guidance_scale}"
            )
        return (guidance_scale - 1) / (self.config.reference_scale - 1)

    @contextmanager
    def active(self, guidance_scale: float) -> Iterator[None]:
        """Turn on for the passes inside the context, at this guidance scale.

        Raises:
            ValueError: if the scale is neither 1 nor within ``scale_range``, or the head is not
                attached.
        """
        strength = self.strength(guidance_scale)
        if not self._attached:
            raise ValueError("the head must be attached before it is active: enter attached()")
        self._strength = strength
        try:
            yield
        finally:
            self._strength = 0.0

    def _hook(self, key: str) -> Any:
        down, up = self.down[key], self.up[key]

        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._strength == 0:
                return None
            x = args[0]
            if down.ndim == 2:
                hidden = F.linear(x, down.to(x.dtype))
                return output + self._strength * F.linear(hidden, up.to(x.dtype))
            layer = cast(nn.Conv2d, getattr(layer, "base_layer", layer))
            hidden = F.conv2d(
                x, down.to(x.dtype), None, layer.stride, layer.padding, layer.dilation
            )
            return output + self._strength * F.conv2d(hidden, up.to(x.dtype))

        return add


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers by name, those of the network itself where it is wrapped to compile."""
    return dict(getattr(module, "_orig_mod", module).named_modules())


def _latent_channels(module: nn.Module, family: str) -> int:
    packed = 4 if family == "flux" else 1  # one token for 2 x 2 latents
    return cast(Any, module).config.in_channels // packed


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's name has no dots


def _shape(layer: nn.Module | None) -> list[int] | None:
    """Return [out, in, *kernel] of a linear or plain convolution layer, or of one under a LoRA."""
    layer = getattr(layer, "base_layer", layer)
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return [layer.out_channels, layer.in_channels, *layer.kernel_size]
    return None
