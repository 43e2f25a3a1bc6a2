"""What a guider can be asked for, known before it meets a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from core2_sampler.attachment.answers import has_own_scales
from core2_sampler.attachment.checks import check_config, is_placed
from core2_sampler.plan import OPTION_MODES, Core2Config


def makes_zigzags(config: Core2Config) -> bool:
    """Say whether a config's mode is one of zigzag steps that blocks can make: not ``z2``."""
    return config.mode in OPTION_MODES["zig_steps"] and config.mode != "z2"


def check_guider(config: Core2Config, guidance_scale: float, head: Any) -> None:
    """Refuse what no network and no number of steps could make right.

    Args:
        config: how to spend the passes.
        guidance_scale: of the guider.
        head: as it was given.

    Raises:
        ValueError: see above.
    """
    mode = "cfg" if makes_zigzags(config) else config.mode
    check_config(replace(config, mode=mode, zig_steps=None, inversion_scale=None))
    if config.mode in ("core", "zcore", "zfast") and head is None:
        raise ValueError(
            f"head must be given for mode '{config.mode}', got none: pass head=, or use "
            "core2=Core2Config(mode='cfg')"
        )
    if is_placed(config):
        raise ValueError(
            "slow_steps must be a count or positions in a guider, which is not told the noise "
            f"levels ahead of the steps, got {config.slow_steps!r}: use core2_sampler.attach or a "
            "CoRe2 pipeline"
        )
    if callable(config.scale_rule):
        raise ValueError(
            "scale_rule must be a text in a guider, which has to be saved, got a callable: "
            "write it as list:5,3,1"
        )
    if has_own_scales(config) and not guidance_scale > 1:
        raise ValueError(
            "guidance_scale must be above 1 where the config has the scale of each step, got "
            f"{guidance_scale}: without guidance it is in vain"
        )
