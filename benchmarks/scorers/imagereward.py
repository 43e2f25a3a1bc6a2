"""ImageReward v1.0 (arXiv 2304.05977), ported onto transformers' BLIP.

Its own package pins libraries of 2023. The network is BLIP's vision encoder, its text encoder with
cross-attention to the image, and an affine map of the first token; the published checkpoint is read
as it is, with its vision weights renamed from timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.scorers.base import (
    AffineMlp,
    Images,
    Source,
    first_file,
    loading,
    make_key,
    model_parts,
    pairs,
    place,
    read_state,
)

CHECKPOINT = "hf:THUDM/ImageReward/ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MAX_TOKENS = 35
MEAN = 0.16717362830052426
STD = 1.0333394966054072

_RENAMED = (  # in this order
    ("blip.text_encoder.", "text."),
    ("blip.visual_encoder.", "vision."),
    ("vision.cls_token", "vision.embeddings.class_embedding"),
    ("vision.pos_embed", "vision.embeddings.position_embedding"),
    ("vision.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("vision.norm.", "vision.post_layernorm."),
    ("vision.blocks.", "vision.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


class ImageRewardModel(nn.Module):
    """BLIP's two encoders and the reward's affine map.

    Args:
        config: a ``BlipConfig``; None takes that of the published checkpoint.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.config = published_config() if config is None else config
        self.vision = BlipVisionModel(self.config.vision_config)
        self.text = BlipTextModel(self.config.text_config, add_pooling_layer=False)
        self.mlp = AffineMlp(self.config.text_config.hidden_size)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the reward of each pair, [B].

        Args:
            pixels: prepared images, [B, 3, H, W].
            input_ids: tokens, [B, T].
            attention_mask: 1 where there is a token, [B, T].
        """
        image = self.vision(pixel_values=pixels).last_hidden_state  # [B, patches + 1, D]
        text = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            is_decoder=False,  # every token sees every other
        ).last_hidden_state
        return (self.mlp(text[:, 0].float()) - MEAN) / STD


class ImageRewardScorer:
    """Scores human preference; about normal over common images.

    Args:
        model: the network.
        tokenizer: BERT's.
        processor: CLIP's image processor at the network's image size.
    """

    def __init__(self, model: ImageRewardModel, tokenizer: Any, processor: Any) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.key = make_key(
            "imagereward",
            formula=f"(mlp-{MEAN:.4f})/{STD:.4f}",
            vocabulary=len(tokenizer),
            **model_parts(model, processor),
        )

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer, as ``Loader`` says.

        Args:
            source: folder with ``ImageReward.pt`` or ``.safetensors``, BERT's tokenizer and, for
                other sizes than the published, the ``config.json`` of a ``BlipConfig``.
            device: of the model.
            dtype: of both encoders.
        """
        from transformers import BertTokenizer, BlipConfig, CLIPImageProcessorPil

        folder = None if source is None else Path(source).expanduser()
        path = fetch(CHECKPOINT) if folder is None else first_file(folder, "ImageReward.*")
        config = None
        if folder is not None and (folder / "config.json").is_file():
            config = BlipConfig.from_pretrained(folder)
        with loading(str(folder or TOKENIZER)):
            tokenizer = BertTokenizer.from_pretrained(folder or TOKENIZER)
        model = ImageRewardModel(config)
        model.load_state_dict(rename_weights(read_state(path)))
        model = place(model, device, dtype)
        model.mlp.float()
        size = model.config.vision_config.image_size
        crop = {"height": size, "width": size}
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
        return cls(model, tokenizer, processor)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says; prompts are cut at 35 tokens."""
        pixels = self.processor(pairs(images, prompts), return_tensors="pt").pixel_values
        weight = next(self.model.vision.parameters())
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(weight.device)
        return self.model(pixels.to(weight), tokens.input_ids, tokens.attention_mask).cpu()


def published_config() -> Any:
    """Return the sizes of the published checkpoint: ViT-L/16 at 224 px, BERT base."""
    from transformers import BlipConfig

    text = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "is_decoder": True,  # builds the cross-attention
    }
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
        "image_size": 224,
        "layer_norm_eps": 1e-6,  # timm's; transformers' default is 1e-5
    }
    return BlipConfig(text_config=text, vision_config=vision)


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published checkpoint's weights under the names of ``ImageRewardModel``.

    Only what the score does not use is left out: BLIP's two contrastive projections, and position
    ids that are no weights. Loading is strict about the rest.
    """
    renamed = {}
    for name, tensor in state.items():
        if _UNUSED.search(name):
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
