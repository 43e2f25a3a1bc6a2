"""How the stock loops call a network, and what they hand it in the words of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from core2_sampler.attachment.layouts import (
    BY_TAP,
    EMBEDS,
    LAYOUTS,
    SAMPLE_NAMES,
    SHARED,
    TEXT_EMBEDS,
    Call,
    Layout,
    Shown,
    told,
)
from core2_sampler.pipelines.adapters.base import Family
from core2_sampler.pipelines.adapters.discrete import eps_from_v, v_from_eps
from core2_sampler.pipelines.adapters.flux import FluxFamily, pack, unpack
from core2_sampler.pipelines.adapters.sd3 import SD3Family
from core2_sampler.pipelines.adapters.sdxl import SDXLDenoiser, SDXLFamily
from core2_sampler.pipelines.loop import map_tensors
from core2_sampler.precision import wide, wide_dtype
from core2_sampler.types import Conditioning, Denoiser
from core2_sampler.weak_heads.base import WeakHead

_FAMILIES: dict[str, Family] = {f.name: f for f in (SDXLFamily(), SD3Family(), FluxFamily())}

_COMPONENTS = ("unet", "transformer", "transformer_2")


@dataclass(slots=True, eq=False)
class Network:
    """One network of a pipeline.

    Attributes:
        module: the network itself, also where ``torch.compile`` has wrapped it.
        layout: how it is called.
        family: ``sdxl``, ``sd3``, ``flux``, or else the name of its class; of a UNet with the width
            of its prompts and what it predicts.
        latent_channels: channels C of its latents, or of their tokens outside FLUX.
        denoiser: the adapter of one of our families.
        compiled: whether ``torch.compile`` has the network, or parts of it.
        networks: how many its pipeline has, which its loop asks in turn.
    """

    module: nn.Module
    layout: Layout
    family: str
    latent_channels: int
    denoiser: Denoiser | None
    compiled: bool
    networks: int = 1
    _size: tuple[Tensor, int, tuple[int, int]] | None = None

    def sample(self, call: Call) -> Tensor:
        """Return what the network is to denoise, as the loop lays it out, [R, ...]."""
        found = (
            call.args[0]
            if call.args
            else next(call.kwargs[name] for name in SAMPLE_NAMES if name in call.kwargs)
        )
        return torch.stack(found) if self.layout.lists else found

    def rows(self, call: Call, batch: int, *, prompt: bool) -> Call:
        """Return the B rows of one side of a call with 2B: of the prompt, or the negative one."""
        start = batch if prompt != self.layout.prompt_first else 0

        def side(x: Tensor) -> Tensor:
            return x[start : start + batch] if x.ndim and len(x) == 2 * batch else x

        def value(x: Any) -> Any:
            if self.layout.lists and isinstance(x, list) and len(x) == 2 * batch:
                return x[start : start + batch]
            if isinstance(x, Mapping):
                return {k: v if k in SHARED else value(v) for k, v in x.items()}
            return map_tensors(side, x)

        return Call(tuple(value(x) for x in call.args), value(call.kwargs))

    def prediction(self, output: Any) -> Tensor:
        """Return the prediction inside what the network returned, [R, ...]."""
        return torch.stack(output[0]) if self.layout.lists else output[0]

    def split(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cond, uncond) of a prediction of 2B rows."""
        first, second = prediction.chunk(2)
        return (first, second) if self.layout.prompt_first else (second, first)

    def join(self, output: Any, cond: Tensor, uncond: Tensor) -> Any:
        """Return what a pass of both prompts would have: 2B rows in the place of a prediction."""
        pair = (cond, uncond) if self.layout.prompt_first else (uncond, cond)
        return self.replace(output, torch.cat(pair))

    def replace(self, output: Any, prediction: Tensor) -> Any:
        """Return the network's output with another prediction, [R, ...], in it."""
        new = list(prediction.unbind()) if self.layout.lists else prediction
        if isinstance(output, tuple):
            return (new, *output[1:])
        return type(output)(**{**output, next(iter(output)): new})

    @contextmanager
    def capture(self, wanted: bool) -> Iterator[Callable[[], Tensor | None]]:
        """Record the last hidden state where somebody reads it; the callable returns it."""
        if not wanted or self.denoiser is None:
            yield lambda: None
            return
        with self.denoiser.capture_features() as read:
            yield read

    def show(
        self, cond: Tensor, call: Call, sigma: float | Tensor, features: Tensor | None = None
    ) -> Shown:
        """Return a pass in the words of the library.

        Args:
            cond: what the network predicted with the prompt, [B, ...].
            call: the pass that made it, B rows.
            sigma: noise level, one for all or [B].
            features: the last hidden state of the pass, if it was captured.
        """
        levels = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma).expand(len(cond))
        levels = levels.to(cond.device, wide_dtype(cond))
        x, ours = self._grid(self.sample(call), call), self._grid(cond, call)
        if self.family == "sdxl":  # the network sees x / sqrt(1 + sigma^2)
            x = wide(x) * (1 + levels[:, None, None, None] ** 2).sqrt()
        if self._is_v():
            ours = eps_from_v(ours, x, levels[:, None, None, None])
        if features is not None and self.family == "flux":  # after it may come another image
            features = features[:, : self._image(call)[0]]
        nothing = cond.new_zeros(len(cond), 0)
        embeds, pooled = (told(call.kwargs, path) for path in (EMBEDS, self.pooled_path(call)))
        prompt = Conditioning(
            nothing[..., None] if embeds is None else embeds, nothing if pooled is None else pooled
        )
        return Shown(x, ours, levels, prompt, features)

    def unshow(self, x: Tensor, sigma: Tensor, like: Call) -> Tensor:
        """Return latents that were shown, [B, C, H, W], as the network is given them.

        Args:
            x: of `Shown`.
            sigma: noise levels, [B].
            like: a pass of the same run.

        Raises:
            ValueError: the network was given more than these latents.
        """
        given = self.sample(like)
        if given[0].numel() != x[0].numel():
            raise ValueError(
                "a network must be given these latents and nothing else to make its pass again, "
                f"{tuple(x.shape[1:])}, got {tuple(given.shape[1:])}: {BY_TAP}"
            )
        if self.family == "sdxl":
            x = wide(x) * (1 + sigma[:, None, None, None] ** 2).rsqrt()
        return self._ungrid(x, given.expand(len(x), *given.shape[1:]))

    def pooled_path(self, call: Call) -> str:
        """Return under which name a pass is given the pooled prompt embedding."""
        added = told(call.kwargs, TEXT_EMBEDS)
        return "pooled_projections" if added is None else TEXT_EMBEDS

    def predict_gap(
        self, head: WeakHead, cond: Tensor, call: Call, sigma: float, features: Tensor | None
    ) -> Tensor:
        """Ask a head for the gap, as the network would predict it.

        Args:
            head: an output head.
            cond: prediction with the prompt, [B, ...].
            call: the pass that made it, B rows.
            sigma: noise level.
            features: the last hidden state of the pass, if the head reads it.

        Returns:
            The gap, in the shape of `cond`; zero where that has more than the latents.
        """
        shown = self.show(cond, call, sigma, features)
        gap = head(
            shown.cond,
            x=shown.x,
            sigma=shown.sigma,
            prompt_embeds=shown.prompt.prompt_embeds,
            pooled=shown.prompt.pooled,
            features=shown.features,
        )
        if self._is_v():
            gap = v_from_eps(gap, torch.zeros_like(gap), shown.sigma[:, None, None, None])
        return self._ungrid(gap, cond)

    def true_gap(self, gap: Tensor, call: Call, sigma: float) -> Tensor:
        """Return a gap of the network's predictions, [B, ...], as `WeakHead.observe` takes it."""
        ours = self._grid(gap, call)
        return noise_gap(ours, sigma) if self._is_v() else ours

    def _is_v(self) -> bool:
        return isinstance(self.denoiser, SDXLDenoiser) and (
            self.denoiser.prediction_type == "v_prediction"
        )

    def _grid(self, rows: Tensor, call: Call) -> Tensor:
        """Return rows as [B, C, H, W], or [B, C, tokens, 1], or [B, C, frames * H, W]."""
        if self.family == "flux":
            tokens, size = self._image(call)
            return unpack(rows[:, :tokens, : 4 * self.latent_channels], size)
        if self.layout.tokens:
            return rows[..., : self.latent_channels].mT[..., None]
        rows = rows[:, : self.latent_channels]
        return rows.flatten(2, -2) if rows.ndim > 4 else rows

    def _ungrid(self, gap: Tensor, like: Tensor) -> Tensor:
        """Undo `_grid`; what it left out is zero."""
        if self.layout.tokens:
            gap = pack(gap) if self.family == "flux" else gap[..., 0].mT
            whole = gap.new_zeros(like.shape)
            whole[:, : gap.shape[1], : gap.shape[2]] = gap
        else:
            whole = gap.new_zeros(like.shape)
            whole[:, : gap.shape[1]] = gap.reshape(*gap.shape[:2], *like.shape[2:])
        return whole

    def _image(self, call: Call) -> tuple[int, tuple[int, int]]:
        """Return FLUX's tokens of the image itself, which come first, and its latents' (H, W)."""
        ids = call.kwargs["img_ids"]
        if self._size is None or self._size[0] is not ids:
            tokens = int((ids[:, 0] == 0).sum())
            height, width = (2 * (int(side) + 1) for side in ids[:tokens, 1:].amax(0))
            self._size = (ids, tokens, (height, width))
        return self._size[1:]


def noise_gap(gap: Tensor, sigma: float) -> Tensor:
    """Return the gap in noise that one of v predictions means, [B, C, H, W]."""
    return eps_from_v(gap, torch.zeros_like(gap), torch.full_like(gap[:, :1, :1, :1], sigma))


def find_networks(pipe: Any) -> list[Network]:
    """Return the denoisers of a pipeline.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        ValueError: it has none, or one whose loop is not known.
    """
    found = [module for n in _COMPONENTS if (module := getattr(pipe, n, None)) is not None]
    if not found:
        raise ValueError(f"pipe must have a denoiser, got {type(pipe).__name__} without")
    return [replace(network_of(pipe, module), networks=len(found)) for module in found]


def network_of(pipe: Any, module: nn.Module, layouts: Mapping[str, Layout] = LAYOUTS) -> Network:
    """Return a denoiser as the loops of diffusers call it.

    Args:
        pipe: of which it is the ``unet`` or ``transformer``; tells its family the scheduler.
        module: the denoiser, or what ``torch.compile`` has made of it.
        layouts: the networks that are known, by their class.

    Raises:
        ValueError: its loop is not known.
    """
    given, module = module, unwrap_module(module)
    name = type(module).__name__
    if name not in layouts:
        raise ValueError(f"the denoiser must be one of {', '.join(layouts)}, got {name}")
    config: Any = module.config
    layout, family = layouts[name], _family(pipe, module)
    channels = config.in_channels
    if family == "flux":
        channels = (config.out_channels or channels) // 4
    elif not layout.tokens:  # more in: an inpainting mask; more out: a learned variance
        channels = min(channels, config.get("out_channels") or channels)
    denoiser = _FAMILIES[family].denoiser(pipe) if family in _FAMILIES else None
    parts = (part._compiled_call_impl for part in module.modules())
    compiled = given is not module or any(part is not None for part in parts)
    return Network(module, layout, family, channels, denoiser, compiled)


def _family(pipe: Any, module: Any) -> str:
    name, config = type(module).__name__, module.config
    if name == "UNet2DConditionModel":
        kolors = config.encoder_hid_dim_type == "text_proj"
        if config.addition_embed_type == "text_time" and not kolors:
            return "sdxl"
        predicts = pipe.scheduler.config.get("prediction_type", "epsilon")
        return f"{name}-{config.cross_attention_dim}-{predicts}"
    return {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}.get(name, name)
