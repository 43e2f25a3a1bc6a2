"""Fixtures of tests and experiments: a denoiser with a known solution, tiny real pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from core2_sampler.pipelines.sd3 import CoRe2StableDiffusion3Pipeline
from core2_sampler.types import Conditioning
from core2_sampler.weak_heads.base import WeakHead


class GaussianDenoiser:
    """The exact denoiser of data drawn from ``N(mean, spread**2)``, prompt by prompt.

    The prompt is the mean: ``conditioning.pooled`` [B, C]. All prompts have the same spread, so
    classifier-free guidance at scale s is exactly the denoiser of the mean
    ``uncond + s * (cond - uncond)``, and `solution` is the truth for every solver.

    Args:
        spread: standard deviation of the data.
        path: ``flow`` is ``x = (1 - sigma) x0 + sigma noise``, ``ve`` is ``x = x0 + sigma noise``.
    """

    family = "gaussian"

    def __init__(self, spread: float = 0.5, path: Literal["flow", "ve"] = "flow") -> None:
        self.module: nn.Module = _GaussianField(spread, path)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        return self.module(x, sigma, conditioning.pooled)

    @contextmanager
    def capture_features(self) -> Iterator[Callable[[], Tensor]]:
        """Record the standardised latents, [B, H * W, C]."""
        latest: list[Tensor] = []
        proj_out = self.module.get_submodule("proj_out")
        handle = proj_out.register_forward_pre_hook(lambda _m, inputs: latest.insert(0, inputs[0]))
        try:
            yield lambda: latest[0].flatten(2).transpose(1, 2)
        finally:
            handle.remove()

    def prompt(self, mean: Tensor) -> Conditioning:
        """Return the prompt that stands for a mean [B, C]."""
        return Conditioning(mean[:, None], mean)

    def solution(self, x: Tensor, sigma: float, sigma_next: float, mean: Tensor) -> Tensor:
        """Return where the ODE takes ``x`` from one noise level to another.

        Args:
            x: latents at `sigma`, [B, C, H, W].
            sigma: noise level of `x`.
            sigma_next: noise level wanted.
            mean: of the data, [B, C].

        Returns:
            Latents at `sigma_next`.

        Reference:
            Gaussian marginals N(a m, v) with a the signal's factor and v = a^2 spread^2 + sigma^2:
            the flow keeps ``(x - a m) / sqrt(v)``.
        """
        field: Any = self.module
        m = mean[:, :, None, None]
        a, v = field.marginal(torch.tensor(sigma, dtype=x.dtype))
        a_next, v_next = field.marginal(torch.tensor(sigma_next, dtype=x.dtype))
        return a_next * m + (v_next / v).sqrt() * (x - a * m)


class _GaussianField(nn.Module):
    """``dx/dsigma`` by Bayes' rule, independent of `GaussianDenoiser.solution`."""

    def __init__(self, spread: float, path: str) -> None:
        super().__init__()
        self.spread, self.path = spread, path
        self.proj_out = nn.Identity()

    def marginal(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's factor and the variance of x at a noise level."""
        signal = 1 - sigma if self.path == "flow" else torch.ones_like(sigma)
        return signal, (signal * self.spread) ** 2 + sigma**2

    def forward(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        s, m = sigma[:, None, None, None].to(x), mean[:, :, None, None].to(x)
        a, v = self.marginal(s)
        residual = self.proj_out((x - a * m) / v)
        noise = s * residual  # E[noise | x]
        if self.path == "ve":
            return noise
        return noise - (m + a * self.spread**2 * residual)  # E[noise - x0 | x]


def tiny_sd3_pipeline(
    *, weak_head: WeakHead | None = None, seed: int = 0, **scheduler: Any
) -> CoRe2StableDiffusion3Pipeline:
    """Build a random Stable Diffusion 3 pipeline of the real classes: 16x16 px, no T5, under 1 s.

    Args:
        weak_head: the pipeline's head.
        seed: of the weights; the global random state is left alone.
        **scheduler: config of the flow-match Euler scheduler.

    Returns:
        The pipeline, on the CPU in float32, without a progress bar.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = CoRe2StableDiffusion3Pipeline(
            transformer=_tiny_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=_tiny_vae(),
            text_encoder=_tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=_tiny_text_encoder(),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
            weak_head=weak_head,
        )
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of single letters, made in memory, 16 tokens long."""
    tokens = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocab = [*tokens, *(f"{t}</w>" for t in tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=16
    )


def _tiny_transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    # A random network hardly hears its prompt: make it loud, so that guidance matters.
    with torch.no_grad():
        transformer.time_text_embed.text_embedder.linear_2.weight.mul_(5)
    return transformer


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _tiny_text_encoder() -> CLIPTextModelWithProjection:
    tokenizer = tiny_tokenizer()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
