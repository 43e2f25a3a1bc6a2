"""The stock modular pipelines of each family, made ready for `CoRe2Guidance` in all its modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from diffusers import FluxAutoBlocks, StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InsertableDict

from core2_sampler.guider import CoRe2Guidance
from core2_sampler.modular.flux import GuidedLoopDenoiser, NegativeTextEncoder, NegativeTextInput
from core2_sampler.modular.zigzag import ZigZagDenoiser
from core2_sampler.registry import unknown_name


class _Core2Blocks(SequentialPipelineBlocks):
    """A stock pipeline's blocks, with zigzag steps in their loops and a guider to start with."""

    family: str
    sub_blocks: InsertableDict

    def __init__(self, guider: CoRe2Guidance | None = None) -> None:
        super().__init__()
        # diffusers shares blocks between all pipelines of a class
        self.sub_blocks = copy.deepcopy(self.sub_blocks)
        self._guider = None if guider is None else _spec(guider)
        self._prepare()
        for loop in _loops(self):
            _ask_by_zigzag(loop, self.family)

    def _prepare(self) -> None:
        """Change what a family needs before its loops."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The stock pipeline's components, the guider by its config if one was given."""
        found = super().expected_components
        if self._guider is None:
            return found
        return [*(spec for spec in found if spec.name != "guider"), self._guider]


class CoRe2StableDiffusionXLBlocks(_Core2Blocks, StableDiffusionXLAutoBlocks):
    """Stable Diffusion XL: text and image to image, inpainting, ControlNet."""

    family = "sdxl"


class CoRe2StableDiffusion3Blocks(_Core2Blocks, StableDiffusion3AutoBlocks):
    """Stable Diffusion 3 and 3.5: text and image to image."""

    family = "sd3"


class CoRe2FluxBlocks(_Core2Blocks, FluxAutoBlocks):
    """FLUX.1: text and image to image, with a guider for true CFG and a negative prompt."""

    family = "flux"

    def _prepare(self) -> None:
        self.sub_blocks.insert("negative_text_encoder", NegativeTextEncoder(), 1)
        self.sub_blocks["denoise"].sub_blocks.insert("negative_input", NegativeTextInput(), 1)
        for loop in _loops(self):
            loop.sub_blocks["denoiser"] = GuidedLoopDenoiser()


_BLOCKS: dict[str, type[_Core2Blocks]] = {
    each.family: each
    for each in (CoRe2StableDiffusionXLBlocks, CoRe2StableDiffusion3Blocks, CoRe2FluxBlocks)
}


def core2_blocks(family: str, guider: CoRe2Guidance | None = None) -> SequentialPipelineBlocks:
    """Return a stock modular pipeline's blocks that run every mode of `CoRe2Guidance`.

    They are the stock ones but for two things: zigzag steps are made where the guider's mode has
    them, and FLUX.1 has a guider and takes ``negative_prompt``. `CoRe2Guidance` needs no blocks of
    ours for the other modes of SDXL and SD3, nor for Qwen-Image, Wan or Z-Image.

    A pipeline that is saved does not hold its blocks: load it by the same ones, as
    ``core2_blocks(...).init_pipeline(folder)``.

    Args:
        family: ``sdxl``, ``sd3`` or ``flux``.
        guider: that their pipelines start with, made anew from its config, so its head must be
            given by its folder or by name; None is diffusers' own, FLUX.1 without guidance.

    Returns:
        The blocks; ``init_pipeline`` makes the pipeline.

    Raises:
        ValueError: the family is another, or the guider's head is in no folder.
    """
    if family not in _BLOCKS:
        raise unknown_name("family", family, _BLOCKS)
    return _BLOCKS[family](guider)


def _spec(guider: CoRe2Guidance) -> ComponentSpec:
    guider.check_head_is_saved()
    return ComponentSpec(
        "guider",
        CoRe2Guidance,
        config=FrozenDict(guider.config),
        default_creation_method="from_config",
    )


def _loops(blocks: ModularPipelineBlocks) -> Iterator[Any]:
    for block in blocks.sub_blocks.values():
        if isinstance(block, LoopSequentialPipelineBlocks):
            yield block
        else:
            yield from _loops(block)


def _ask_by_zigzag(loop: Any, family: str) -> None:
    """Let one block stand for all that ask the network; the same loop may come twice."""
    *asked, update = loop.sub_blocks.values()
    if isinstance(asked[0], ZigZagDenoiser):
        return
    loop.sub_blocks = InsertableDict(denoiser=ZigZagDenoiser(family, asked), after_denoiser=update)
