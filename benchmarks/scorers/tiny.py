"""Random models of the scorers' real classes, tiny: they run the whole path, and mean nothing.

Each is written in the layout that the scorer's ``load`` takes, so nothing but the sizes and the
weights differs from the published one.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core2_sampler.benchmarks.scorers.base import AffineMlp
from core2_sampler.benchmarks.scorers.blipvqa import CHUNKS_FILE
from core2_sampler.benchmarks.scorers.clip import ClipVariant
from core2_sampler.registry import unknown_name

SIZE = 32  # px
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_VISION = {"image_size": SIZE, "patch_size": 8}
_PLUGIN = """\
import json
import sys

print(json.dumps({"key": "letters"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    score = len(asked["prompt"]) + len(open(asked["image"], "rb").read()) / 1000
    print(json.dumps({"id": asked["id"], "score": score}), flush=True)
"""


def write_tiny(
    name: str, folder: Path, prompts: Sequence[str] = (), *, seed: int = 0
) -> str | None:
    """Write a tiny model for a scorer and return the ``source`` that loads it.

    Args:
        name: a name of ``SCORERS``.
        folder: where it goes; it is made.
        prompts: those that will be judged, for the scorer that needs their noun phrases.
        seed: of the weights; the global random state is left alone.

    Returns:
        The source; None for a scorer that is tiny and embedded itself.

    Raises:
        ValueError: if there is no such scorer.
    """
    from core2_sampler.benchmarks.scorers import SCORERS

    if name in ("shapes", "shapes-clip"):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path], None]] = {
        "aes": _write_aes,
        "blipvqa": lambda folder: _write_blipvqa(folder, prompts),
        "hpsv21": _write_hpsv21,
        "imagereward": _write_imagereward,
        "plugin": lambda folder: _write(folder / "judge.py", _PLUGIN),
    }
    if name not in writers and not isinstance(SCORERS.get(name), ClipVariant):
        raise unknown_name("tiny scorer", name, writers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        writers.get(name, write_clip)(folder)
    if name == "plugin":
        return shlex.join([sys.executable, str(folder / "judge.py")])
    return str(folder)


def write_clip(folder: Path) -> None:
    """Write a CLIP model, the tokenizer of the Shapes world and an image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    text = _TOWER | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=_TOWER | _VISION, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=crop).save_pretrained(folder)


def _write_aes(folder: Path) -> None:
    write_clip(folder / "clip")
    torch.save(AffineMlp(16).state_dict(), folder / "tiny-linearMSE.pth")


def _write_imagereward(folder: Path) -> None:
    from core2_sampler.benchmarks.scorers.imagereward import ImageRewardModel

    config = _blip_config(len(_write_bert(folder)), vision_width=24)
    config.save_pretrained(folder)
    save_file(ImageRewardModel(config).state_dict(), folder / "ImageReward.safetensors")


def _write_blipvqa(folder: Path, prompts: Sequence[str]) -> None:
    from transformers import BlipForQuestionAnswering

    config = _blip_config(len(_write_bert(folder)), vision_width=16)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    chunks = {prompt: prompt.split(" and ") if prompt else [] for prompt in prompts}
    _write(folder / CHUNKS_FILE, json.dumps(chunks))


def _write_hpsv21(folder: Path) -> None:
    from core2_sampler.benchmarks.scorers.hpsv21 import open_clip

    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8}
        | {"patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2}
        | {"layers": 2},
    }
    state: dict[str, Tensor] = open_clip().CLIP(**config).state_dict()
    save_file(state, folder / "open_clip_model.safetensors")
    _write(
        folder / "open_clip_config.json", json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )


def _blip_config(words: int, vision_width: int) -> Any:
    """Return a BLIP config whose vocabulary ends in [DEC] and [ENC], as BLIP's does."""
    from transformers import BlipConfig

    text = _TOWER | {
        "vocab_size": words + 2,
        "bos_token_id": words,
        "encoder_hidden_size": vision_width,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,  # loud enough that every token and patch counts
        "is_decoder": True,
    }
    vision = (
        _TOWER
        | _VISION
        | {"hidden_size": vision_width, "layer_norm_eps": 1e-6, "initializer_range": 0.3}
    )
    return BlipConfig(text_config=text, vision_config=vision)


def _write_bert(folder: Path) -> Any:
    """Write BERT's tokenizer with a vocabulary of letters and the two answers; return it."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "yes", "no", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
