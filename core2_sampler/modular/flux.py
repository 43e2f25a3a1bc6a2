"""FLUX.1 with a guider, which its stock modular blocks have no place for: true CFG.

The guidance that the network itself embeds is not touched: it is still the call's
``guidance_scale``. The scale of true CFG is the guider's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.flux.denoise import FluxLoopDenoiser
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.modular_pipeline_utils import (
    ComponentSpec,
    InputParam,
    OutputParam,
)
from torch import Tensor

_SIDES = {
    "prompt_embeds": "negative_prompt_embeds",
    "pooled_prompt_embeds": "negative_pooled_prompt_embeds",
}
"""Inputs of the network that the prompt decides, and their names for the negative prompt."""

_NEGATIVE = [OutputParam(name, type_hint=Tensor) for name in _SIDES.values()]


def _guider() -> ComponentSpec:
    """Return the guider that FLUX.1 has by default: none, as its stock blocks."""
    return ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        config=FrozenDict({"guidance_scale": 1.0}),
        default_creation_method="from_config",
    )


class NegativeTextEncoder(ModularPipelineBlocks):
    """Encodes the negative prompt where the guider wants one; left out it is the empty prompt."""

    model_name = "flux"

    @property
    def description(self) -> str:
        """What the block does, as modular pipelines print it."""
        return "encodes the negative prompt, if the guider asks for guidance"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Those of the stock encoder, and the guider."""
        return [*FluxTextEncoderStep().expected_components, _guider()]

    @property
    def inputs(self) -> list[InputParam]:
        """The negative prompt, and what tells how many there have to be."""
        return [
            InputParam("negative_prompt"),
            InputParam("prompt_embeds", required=True, type_hint=Tensor),
            InputParam("max_sequence_length", type_hint=int, default=512),
            InputParam("joint_attention_kwargs"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The negative prompt's embeddings, or None."""
        return _NEGATIVE

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Encode.

        Args:
            components: the pipeline.
            state: of the call.

        Raises:
            ValueError: there are neither one nor as many negative prompts as prompts.
        """
        block_state = self.get_block_state(state)
        embeds = pooled = None
        if components.guider.num_conditions > 1:
            embeds, pooled = FluxTextEncoderStep.encode_prompt(
                components,
                prompt=_as_many(block_state.negative_prompt, len(block_state.prompt_embeds)),
                prompt_2=None,
                device=components._execution_device,
                max_sequence_length=block_state.max_sequence_length,
                lora_scale=(block_state.joint_attention_kwargs or {}).get("scale"),
            )
        block_state.negative_prompt_embeds = embeds
        block_state.negative_pooled_prompt_embeds = pooled
        self.set_block_state(state, block_state)
        return components, state


def _as_many(negative: str | list[str] | None, count: int) -> list[str]:
    given = negative if isinstance(negative, list) else [negative or ""] * count
    if len(given) != count:
        raise ValueError(
            f"negative_prompt must be one text or a list of {count}, one for each prompt, got "
            f"{len(given)}"
        )
    return given


class NegativeTextInput(ModularPipelineBlocks):
    """Repeats the negative prompt's embeddings for each image, as the stock block the prompt's."""

    model_name = "flux"

    @property
    def description(self) -> str:
        """What the block does, as modular pipelines print it."""
        return "repeats the negative prompt's embeddings for each image of a prompt"

    @property
    def inputs(self) -> list[InputParam]:
        """The embeddings, and how many images there are of each prompt."""
        names = _SIDES.values()
        return [
            InputParam("num_images_per_prompt", default=1),
            *(InputParam(name, type_hint=Tensor) for name in names),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The embeddings, one row for each image."""
        return _NEGATIVE

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Repeat.

        Args:
            components: the pipeline.
            state: of the call.
        """
        block_state = self.get_block_state(state)
        for name in _SIDES.values():
            if (rows := getattr(block_state, name)) is not None:
                repeated = rows.repeat_interleave(block_state.num_images_per_prompt, 0)
                setattr(block_state, name, repeated)
        self.set_block_state(state, block_state)
        return components, state


class GuidedLoopDenoiser(FluxLoopDenoiser):
    """The stock denoiser block, asked for each prompt that the guider wants."""

    @property
    def description(self) -> str:
        """What the block does, as modular pipelines print it."""
        return "asks the transformer for each prompt, and lets the guider make one prediction"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Those of the stock block, and the guider."""
        return [*super().expected_components, _guider()]

    @property
    def inputs(self) -> list[InputParam]:
        """Those of the stock block, and the negative prompt's embeddings."""
        return [
            *super().inputs,
            InputParam("num_inference_steps", required=True, type_hint=int),
            *(InputParam(name, type_hint=Tensor) for name in _SIDES.values()),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Leave the guided prediction in ``block_state.noise_pred``.

        Args:
            components: the pipeline.
            block_state: the loop's state.
            i: number of the step.
            t: its timestep.

        Raises:
            ValueError: a step of `CoRe2Guidance` needs the negative prompt's embeddings and there
                are none.
        """
        guider, state = components.guider, block_state.as_dict()
        guider.set_state(step=i, num_inference_steps=state["num_inference_steps"], timestep=t)
        batches = guider.prepare_inputs({n: (state[n], state[side]) for n, side in _SIDES.items()})
        for batch in batches:
            given = {name: getattr(batch, name) for name in _SIDES}
            guider.prepare_models(components.transformer)
            _, asked = super().__call__(components, BlockState(**{**state, **given}), i, t)
            batch.noise_pred = asked.noise_pred
            guider.cleanup_models(components.transformer)
        block_state.noise_pred = guider(batches).pred
        return components, block_state
