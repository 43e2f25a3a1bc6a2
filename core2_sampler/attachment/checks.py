"""What can be attached: configs that act on guidance alone, heads that fit the network."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from core2_sampler.attachment.answers import has_own_scales
from core2_sampler.attachment.measure import measure_of
from core2_sampler.attachment.networks import Network
from core2_sampler.plan import Core2Config
from core2_sampler.weak_heads import HEADS, load_head
from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.card import step_errors

NEGATIVES = ("negative_prompt", "negative_prompt_embeds")
"""Arguments of a call, one of which a pipeline with guidance has."""

UNTRAINED = ("cond", "last_gap")
"""The heads that may be named, because there is nothing to train in them."""

_MODES = ("cond", "cfg", "core")
_OPTIONS = ("slow_steps", "w2s_scale", "guidance_scales", "scale_rule")
"""The modes and options of a config that act on guidance alone."""

_OWN_PIPELINES = {
    "sdxl": "CoRe2StableDiffusionXLPipeline",
    "sd3": "CoRe2StableDiffusion3Pipeline",
    "flux": "CoRe2FluxPipeline",
}


def check_config(config: Core2Config, family: str | None = None) -> None:
    """Raise ValueError for a config that asks for more than another guidance.

    Args:
        config: how to spend the passes.
        family: of the network, if it is known.
    """
    defaults = type(config)()
    given = {item.name: getattr(config, item.name) for item in fields(config)}
    wrong = {
        name: value
        for name, value in given.items()
        if (value not in _MODES if name == "mode" else name not in _OPTIONS)
        and value != getattr(defaults, name)
    }
    if wrong:
        name, value = next(iter(wrong.items()))
        own = _OWN_PIPELINES.get(family or "")
        raise ValueError(
            f"a config must act on guidance alone, got {name}={value!r}, which needs the "
            "latents and the scheduler too, as Z-Sampling does: use "
            + (own or f"a model of {', '.join(_OWN_PIPELINES.values())}")
        )


def check_rule(config: Core2Config, network: Network, scheduler: Any) -> None:
    """Raise ValueError for a scale rule that sees the latents where nobody knows their measure.

    Args:
        config: how to spend the passes.
        network: the pipeline's.
        scheduler: the pipeline's.
    """
    if config.sample_rule is not None:
        measure_of(network, scheduler)


def is_placed(config: Core2Config) -> bool:
    """Say whether a config leaves it to the head's card which steps are slow."""
    return config.mode == "core" and isinstance(config.slow_steps, str)


def check_placement(head: WeakHead | None, config: Core2Config) -> None:
    """Raise ValueError where a head's card cannot place the slow steps, before any run asks it."""
    if is_placed(config):
        step_errors(head, torch.ones(1), [1.0])


def check_two_networks(config: Core2Config, networks: Sequence[Network]) -> None:
    """Raise ValueError for what a pipeline must have one network for, if it has two."""
    if len(networks) < 2:
        return
    if has_own_scales(config):
        raise ValueError(
            "guidance_scales and scale_rule must be left out for a pipeline of two networks, which "
            f"have a scale each, got {config}"
        )
    if is_placed(config):
        raise ValueError(
            "slow_steps must be a count or positions for a pipeline of two networks, whose scales "
            f"the head's errors would be weighed by, got {config.slow_steps!r}"
        )


def scale_argument(pipe: Any) -> str:
    """Return the argument of a pipeline's call that is the scale of classifier-free guidance.

    Raises:
        ValueError: it has none.
    """
    names = inspect.signature(type(pipe).__call__).parameters
    scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in names), None)
    if scale is None or not any(name in names for name in NEGATIVES):
        raise ValueError(
            "pipe must have classifier-free guidance, a guidance scale and a negative prompt, got "
            f"{type(pipe).__name__} without: there is no second pass to save"
        )
    return scale


def find_head(head: WeakHead | str | Path | None, network: Network) -> WeakHead | None:
    """Return a head that is given as itself, by its folder or hub id, or by name.

    Raises:
        ValueError: there is none for this network, or the name is not of `UNTRAINED`.
        TypeError: it is given as something else.
    """
    if head is None or isinstance(head, WeakHead):
        return head
    if not isinstance(head, str | Path):
        raise TypeError(f"head must be a weak head, its folder, hub id or a name, got {head!r}")
    if head in UNTRAINED:
        return HEADS.get(str(head)).for_denoiser(network)  # type: ignore[arg-type]
    if head in HEADS.names():
        raise ValueError(
            f"a head must be given by its folder where it has to be trained, got {head!r}: by name "
            f"there are {', '.join(UNTRAINED)}"
        )
    return load_head(head, network.family)


def check_head(head: WeakHead | None, config: Core2Config, network: Network) -> None:
    """Raise ValueError for a head that could not run, whatever the number of steps."""
    if head is None:
        if config.mode == "core":
            raise ValueError(
                "mode 'core' needs a weak head, got none: pass head=, or use "
                "core2=Core2Config(mode='cfg')"
            )
        return
    head.check_family(network.family)
    head.check_gap(None)
    head.check_latents(network.latent_channels)
    if head.needs_negative is not None:
        raise ValueError(
            "a head must not read the negative prompt ahead of the steps, got a released "
            f"{type(head).__name__}: use {_OWN_PIPELINES[network.family]}"
        )
    check_kind(type(head), network)
    if head.in_model:
        with head.attached(network.module):
            pass


def check_kind(kind: type[WeakHead], network: Network) -> None:
    """Raise ValueError for a kind of head that no training would make fit a network."""
    if kind.needs_features and network.denoiser is None:
        raise ValueError(
            f"a head must not read features of {network.family}, which has no adapter of ours, "
            f"got {kind.__name__}: use another kind of head, such as conv"
        )
    if kind.in_model and network.networks > 1:
        raise ValueError(
            "a head inside the denoiser must have one denoiser to be in, got two networks and "
            f"{kind.__name__}: use a head on outputs"
        )
    if kind.in_model and network.layout.reads_cond:
        raise ValueError(
            f"a head must work on outputs for {network.family}, whose loop uses cond itself, got "
            f"{kind.__name__}: use conv, affine, last_gap or cond"
        )
