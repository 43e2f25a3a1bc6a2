"""CoRe^2 for diffusers: Collect, Reflect, Refine (arXiv 2503.09662)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from core2_sampler.attachment import attach as attach
    from core2_sampler.attachment import attached as attached
    from core2_sampler.attachment import detach as detach
    from core2_sampler.guider import CoRe2Guidance as CoRe2Guidance
    from core2_sampler.modular.blocks import core2_blocks as core2_blocks
    from core2_sampler.pipelines.auto import CoRe2Pipeline as CoRe2Pipeline
    from core2_sampler.pipelines.flux import CoRe2FluxPipeline as CoRe2FluxPipeline
    from core2_sampler.pipelines.sd3 import (
        CoRe2StableDiffusion3Pipeline as CoRe2StableDiffusion3Pipeline,
    )
    from core2_sampler.pipelines.sdxl import (
        CoRe2StableDiffusionXLPipeline as CoRe2StableDiffusionXLPipeline,
    )
    from core2_sampler.plan import PRESETS as PRESETS
    from core2_sampler.plan import Core2Config as Core2Config
    from core2_sampler.plan import make_plan as make_plan
    from core2_sampler.weak_heads import load_head as load_head

_HOMES = {
    "CoRe2FluxPipeline": "core2_sampler.pipelines.flux",
    "CoRe2Guidance": "core2_sampler.guider",
    "CoRe2Pipeline": "core2_sampler.pipelines.auto",
    "CoRe2StableDiffusion3Pipeline": "core2_sampler.pipelines.sd3",
    "CoRe2StableDiffusionXLPipeline": "core2_sampler.pipelines.sdxl",
    "Core2Config": "core2_sampler.plan",
    "PRESETS": "core2_sampler.plan",
    "attach": "core2_sampler.attachment",
    "attached": "core2_sampler.attachment",
    "core2_blocks": "core2_sampler.modular.blocks",
    "detach": "core2_sampler.attachment",
    "load_head": "core2_sampler.weak_heads",
    "make_plan": "core2_sampler.plan",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import core2_sampler` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
