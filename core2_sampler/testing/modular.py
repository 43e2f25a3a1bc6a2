"""Modular pipelines in miniature, each with what its call needs: what the guider is tried on.

Where a text encoder would not be cheap, the part between it and the VAE, which is given embeddings.
One image of 8 x 8 latents (video: two frames), and a negative prompt that differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from core2_sampler.testing.parts import FLOW, FLOW_BY_SIZE, WIDTH, Arguments
from core2_sampler.testing.pipelines import seeded
from core2_sampler.testing.stock import STOCK

_NETWORKS = ("transformer", "transformer_2", "unet")


@dataclass(slots=True)
class TinyModular:
    """A modular pipeline class in miniature.

    Attributes:
        name: of the class in diffusers.
        parts: makes its components.
        arguments: what its call needs, but for steps and generator.
        path: sub-blocks that lead to the part that is tried; none is the whole pipeline.
        left_out: sub-block of that part that its arguments stand for.
        passes: rows of each pass of the latest call, counted below all hooks.
    """

    name: str
    parts: Callable[[], Arguments]
    arguments: Arguments
    path: tuple[str, ...] = ("denoise",)
    left_out: str | None = None
    passes: list[int] = field(default_factory=list)

    def pipe(self) -> Any:
        """Build the pipeline, on the CPU in float32, without a progress bar."""
        blocks = getattr(diffusers, getattr(diffusers, self.name).default_blocks_name)()
        for name in self.path:
            blocks = blocks.sub_blocks[name]
        if self.left_out is not None:
            del blocks.sub_blocks[self.left_out]
        pipe = blocks.init_pipeline()
        with seeded(0):
            parts = self.parts()
        known = {**pipe._component_specs, **pipe._config_specs}
        pipe.update_components(**{k: v for k, v in parts.items() if k in known and v is not None})
        pipe.set_progress_bar_config(disable=True)
        for name in _NETWORKS:
            if (network := getattr(pipe, name, None)) is not None:
                self._count(network.eval())
        return pipe

    def _count(self, network: nn.Module) -> None:
        forward = network.forward

        @functools.wraps(forward)
        def counting(*args: Any, **kwargs: Any) -> Any:
            x: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            self.passes.append(len(x))
            return forward(*args, **kwargs)

        network.forward = counting

    def sample(self, pipe: Any, guider: Any = None, **options: Any) -> Tensor:
        """Return the final latents of a call.

        Args:
            pipe: of `pipe`.
            guider: takes the place of the pipeline's first one.
            **options: further arguments of the call, or others than usual.
        """
        if guider is not None:
            pipe.update_components(guider=guider)
        self.passes.clear()
        call = {"num_inference_steps": 3, "output": "latents", "output_type": "latent"}
        generator = torch.Generator().manual_seed(1)
        return pipe(**{**call, "generator": generator, **self.arguments, **options})


def _noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _embeds(**others: Any) -> Arguments:
    """Return one prompt's embeddings and the negative one's."""
    both = 3 * _noise(2, 1, 8, WIDTH)
    return {"prompt_embeds": both[0], "negative_prompt_embeds": both[1], **others}


def _of_stock(name: str) -> Arguments:
    return STOCK[f"{name}Pipeline"].parts()


def _wan(count: int = 1, kind: str = "WanTransformer3DModel", **config: Any) -> Arguments:
    """Return the components of a Wan pipeline of one or two networks, of 16 channels."""
    parts = _of_stock("Wan")
    known = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    given = {**known, "in_channels": 16, "out_channels": 16, **config}
    networks = {name: getattr(diffusers, kind)(**given) for name in _NETWORKS[:count]}
    return {"scheduler": parts["scheduler"], "boundary_ratio": 0.8, **networks}


_TRANSFORMERS: dict[str, Arguments] = {
    "CosmosTransformer3DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "mlp_ratio": 1.0,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "extra_pos_embed_type": None,
        "concat_padding_mask": False,  # it is resized by torchvision
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 1,
        "ffn_hidden_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "text_in_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    },
    "Flux3Transformer2DModel": {
        "in_channels": 16,
        "cond_in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "timestep_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "timestep_embed_dim": 16,
        "text_hidden_dim": WIDTH,
        "num_text_layers": 2,
        "text_num_attention_heads": 1,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
}
"""Configs of networks that have no stock pipeline here; sizes that do not matter are small."""


def _alone(transformer: str, scheduler: Callable[[], Any] = FLOW) -> Arguments:
    """Return a network, none of whose layers is silent, and its scheduler."""
    network = getattr(diffusers, transformer)(**_TRANSFORMERS[transformer])
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return {"transformer": network, "scheduler": scheduler()}


_TEXTS: Arguments = {"prompt": "a red circle", "negative_prompt": "dark", "height": 16, "width": 16}
_MASK = torch.ones(1, 8, dtype=torch.bool)
_MASKS: Arguments = {"prompt_embeds_mask": _MASK, "negative_prompt_embeds_mask": _MASK.clone()}
_SIZED: Arguments = {"height": 64, "width": 64}
_LISTS: Arguments = {name: list(rows) for name, rows in _embeds().items()}
_VIDEO: Arguments = {"num_frames": 5, **_SIZED}
_BOTH = ("prompt_embeds", "negative_prompt_embeds")
_FIRST_FRAME: Arguments = {"image_condition_latents": _noise(1, 20, 2, 8, 8, seed=6)}
_VACE: Arguments = {
    "kind": "WanVACETransformer3DModel",
    "vace_layers": [0],
    "vace_in_channels": 24,
}
_CONTROL: Arguments = {"control_hidden_states": _noise(1, 24, 2, 8, 8, seed=6)}

MODULAR = {
    tiny.name.removesuffix("ModularPipeline"): tiny
    for tiny in (
        TinyModular(
            "StableDiffusionXLModularPipeline",
            partial(_of_stock, "StableDiffusionXL"),
            _TEXTS,
            path=(),
        ),
        TinyModular(
            "StableDiffusion3ModularPipeline",
            partial(_of_stock, "StableDiffusion3"),
            {**_TEXTS, "max_sequence_length": 8},
            path=(),
        ),
        TinyModular(
            "QwenImageModularPipeline", partial(_of_stock, "QwenImage"), _embeds(**_MASKS, **_SIZED)
        ),
        TinyModular(
            "QwenImageEditModularPipeline",
            partial(_of_stock, "QwenImage"),
            _embeds(**_MASKS, **_SIZED, image_latents=_noise(1, 4, 1, 8, 8)),
            path=("denoise", "edit"),
        ),
        TinyModular(
            "QwenImageEditPlusModularPipeline",
            partial(_of_stock, "QwenImage"),
            _embeds(
                **_MASKS,
                **_SIZED,
                image_latents=[_noise(1, 4, 1, 8, 8, seed=seed) for seed in (6, 7)],
            ),
        ),
        TinyModular(
            "QwenImageLayeredModularPipeline",
            partial(_of_stock, "QwenImage"),
            _embeds(**_MASKS, layers=2, image_latents=_noise(1, 1, 4, 8, 8)),
        ),
        TinyModular("WanModularPipeline", _wan, _embeds(**_VIDEO)),
        TinyModular(
            "WanImage2VideoModularPipeline",
            partial(_wan, in_channels=36, image_dim=8, added_kv_proj_dim=24),
            _embeds(**_VIDEO, **_FIRST_FRAME, image_embeds=_noise(1, 4, 8)),
        ),
        TinyModular("Wan22ModularPipeline", partial(_wan, 2), _embeds(**_VIDEO)),
        TinyModular(
            "Wan22Image2VideoModularPipeline",
            partial(_wan, 2, in_channels=36),
            _embeds(**_VIDEO, **_FIRST_FRAME),
        ),
        TinyModular(
            "Wan22VaceModularPipeline",
            partial(_wan, 2, **_VACE),
            _embeds(**_VIDEO, denoiser_input_fields=_CONTROL),
        ),
        TinyModular(
            "ZImageModularPipeline",
            partial(_of_stock, "ZImage"),
            {**_LISTS, "height": 128, "width": 128},
        ),
        TinyModular(
            "LTXModularPipeline",
            partial(_of_stock, "LTX"),
            _embeds(
                prompt_attention_mask=_MASK,
                negative_prompt_attention_mask=_MASK.clone(),
                num_frames=9,
                height=256,
                width=256,
            ),
        ),
        TinyModular(
            "Flux2KleinBaseModularPipeline",
            partial(_alone, "Flux2Transformer2DModel", FLOW_BY_SIZE),
            _embeds(**_SIZED),
            path=("denoise", "text2image"),
        ),
        TinyModular(
            "Flux3ModularPipeline",
            partial(_alone, "Flux3Transformer2DModel"),
            _embeds(**_SIZED),
            path=("denoise", "text2image"),
        ),
        TinyModular(
            "Krea2ModularPipeline",
            partial(_alone, "Krea2Transformer2DModel", FLOW_BY_SIZE),
            {
                **dict(zip(_BOTH, 3 * _noise(2, 1, 8, 2, WIDTH), strict=True)),
                **_MASKS,
                **_SIZED,
            },
        ),
        TinyModular(
            "AnimaModularPipeline",
            partial(_alone, "CosmosTransformer3DModel"),
            _embeds(**_SIZED),
            path=("denoise", "text2image"),
            left_out="text_conditioning",
        ),
        TinyModular(
            "ErnieImageModularPipeline",
            partial(_alone, "ErnieImageTransformer2DModel"),
            {**_LISTS, "height": 128, "width": 128},
        ),
    )
}
"""The pipelines by the name of their class, without its end."""
