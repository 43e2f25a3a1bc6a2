"""The text encoders that the speed benchmark times. Truth: the layers, counted once more."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, T5Config

from core2_sampler.benchmarks import speed_text
from core2_sampler.benchmarks.speed_text import ENCODERS, build_encoder, text_seconds


def clip(d, layers):
    """Tokens, positions, blocks of four projections and a feed-forward, a norm, a projection."""
    block = 4 * (d * d + d) + (2 * 4 * d * d + 5 * d) + 2 * 2 * d
    return (49408 + 77) * d + layers * block + 2 * d + d * d


def t5(d, inner, wide, layers):
    """Tokens, blocks without biases, of a gated feed-forward, positions of the first, a norm."""
    return 32128 * d + layers * (4 * d * inner + 3 * d * wide + 2 * d) + 32 * 64 + d


L, G, XXL = clip(768, 12), clip(1280, 32), t5(4096, 4096, 10240, 24)
PARAMETERS = {"sdxl": [L, G], "sd3": [L, G, XXL], "flux": [L, XXL]}


@pytest.mark.parametrize("family", ENCODERS)
def test_the_encoders_are_the_published_ones(family):
    built = [build_encoder(config, "meta", torch.bfloat16) for config, _ in ENCODERS[family]]
    found = [sum(weight.numel() for weight in encoder.parameters()) for encoder in built]
    assert found == PARAMETERS[family]


def test_encoding_is_timed(monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    small = CLIPTextConfig(**sizes, num_hidden_layers=1, vocab_size=40)
    t5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40)
    monkeypatch.setitem(speed_text.ENCODERS, "sd3", ((small, 7), (t5, 9)))
    found = text_seconds("sd3", "cpu", torch.float32, 5, 0.0)
    assert found["runs"] == 3 and found["median"] > 0
    encoder = build_encoder(small, "cpu", torch.float32)
    with torch.no_grad():
        out = encoder(torch.ones(1, 7, dtype=torch.int64)).last_hidden_state
    assert torch.isfinite(out).all() and out.std() > 0.1
    assert not torch.allclose(out[0, 0], out[0, 1])  # it knows positions
