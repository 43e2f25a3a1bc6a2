"""The network of every latent evaluator: a small vision transformer that knows the noise level."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.evaluators.kinds import KINDS, Kind
from core2_sampler.precision import wide
from core2_sampler.samplers import Path as NoisePath
from core2_sampler.types import Conditioning

P = ParamSpec("P")
R = TypeVar("R")

_STEM = 32  # channels of the first convolution
_HEAD = 64  # width of an attention head
_TOKENS = 16  # a side, at the model's own size
_HIGHEST_SCALE = math.log(100)  # of cosines, as in CLIP


def _without_autocast(
    method: Callable[Concatenate[LatentEvaluator, P], R],
) -> Callable[Concatenate[LatentEvaluator, P], R]:
    """Let a method compute in the precision of the weights."""

    @wraps(method)
    def run(self: LatentEvaluator, *args: P.args, **kwargs: P.kwargs) -> R:
        kind = self.device.type
        if not torch.amp.is_autocast_available(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return run


class LatentEvaluator(ModelMixin, ConfigMixin):
    """Scores noisy latents; higher is better.

    The latents of every family are brought to the flow ``(1 - s) x0 + s noise`` first, so one
    network serves any noise schedule of a latent space. The score is a scaled cosine of what it
    sees in the latents and reads in the prompt, a linear reading of the latents alone, or both, as
    its kind says. It is saved with ``save_pretrained`` as ``config.json`` and safetensors, and
    loaded in float32. It computes in the precision of its weights, whatever autocast is on:
    candidates one step ahead differ by less than bfloat16 can tell.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        family: str,
        latent_channels: int,
        prompt_dim: int,
        pooled_dim: int,
        patch_size: int = 8,
        width: int = 384,
        num_layers: int = 6,
    ) -> None:
        """Build the evaluator.

        Args:
            kind: a name of `core2_sampler.evaluators.kinds.KINDS`.
            family: family of the denoiser.
            latent_channels: C.
            prompt_dim: width of the prompt's token embeddings.
            pooled_dim: width of the pooled prompt embedding.
            patch_size: side of the square of latents behind one token.
            width: of the network, a multiple of 64, the width of an attention head.
            num_layers: transformer blocks.

        Raises:
            ValueError: unknown kind, or another width.
        """
        super().__init__()
        if width < _HEAD or width % _HEAD:
            raise ValueError(f"width must be a multiple of {_HEAD}, got {width}")
        asked, num_heads = self.kind, width // _HEAD
        self.stem = nn.Sequential(
            nn.Conv2d(latent_channels, _STEM, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(_STEM, width, patch_size, stride=patch_size),
        )
        self.level_in = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        if asked.reads_prompt:
            self.image_out = nn.Linear(width, width, bias=False)
            self.pooled_in = nn.Sequential(nn.LayerNorm(pooled_dim), nn.Linear(pooled_dim, width))
            self.prompt_in = nn.Sequential(nn.LayerNorm(prompt_dim), nn.Linear(prompt_dim, width))
            self.gather = nn.MultiheadAttention(width, num_heads, batch_first=True)
            self.prompt_out = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
            )
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if asked.judges_alone:
            self.quality = nn.Linear(width, 1)

    @classmethod
    def for_model(
        cls, kind: str, family: str, x: Tensor, prompt: Conditioning, *, seed: int = 0, **sizes: Any
    ) -> Self:
        """Build an untrained evaluator that fits a model, on the device of its latents.

        Args:
            kind: a name of `core2_sampler.evaluators.kinds.KINDS`.
            family: family of the denoiser.
            x: latents of the model's own size, [B, C, H, W].
            prompt: encoded prompts.
            seed: of the initial weights; the global random state is left alone.
            sizes: the constructor's arguments that do not follow from these.
        """
        sizes.setdefault("patch_size", max(2, min(x.shape[2:]) // _TOKENS))
        dims = (x.shape[1], prompt.prompt_embeds.shape[-1], prompt.pooled.shape[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with torch.device("meta" if x.is_meta else "cpu"):
                evaluator = cls(kind, family, *dims, **sizes)
        return evaluator.to(x.device)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """Load as ``ModelMixin`` does, but from safetensors only, never from a pickle."""
        return super().from_pretrained(path, **(kwargs | {"use_safetensors": True}))

    @property
    def kind(self) -> Kind:
        """What it is asked."""
        return KINDS.get(self.config.kind)

    def check_family(self, family: str) -> None:
        """Raise ValueError unless it was made for this family."""
        if self.config.family != family:
            raise ValueError(
                f"the {self.config.kind} evaluator must be made for {family}, got one for "
                f"{self.config.family}: train one for this model with `core2 evaluators train`"
            )

    def check_latents(self, channels: int) -> None:
        """Raise ValueError unless it was made for latents with so many channels."""
        if self.config.latent_channels != channels:
            raise ValueError(
                f"latents must have {self.config.latent_channels} channels for this "
                f"{self.config.kind} evaluator, got {channels}: train one for this model"
            )

    def start_from(self, other: LatentEvaluator) -> None:
        """Take over the weights that both have, such as those of another kind.

        Raises:
            ValueError: if `other` is of another family or size.
        """
        other.check_family(self.config.family)
        given = other.state_dict()
        own = self.state_dict()
        shared = {name: tensor for name, tensor in given.items() if name in own}
        odd = [name for name, tensor in shared.items() if tensor.shape != own[name].shape]
        if odd or len(other.blocks) != len(self.blocks):
            raise ValueError(
                "an evaluator must start from one of the same sizes, got other "
                f"{odd[0] if odd else 'num_layers'}: give the sizes of the one to start from"
            )
        self.load_state_dict(shared, strict=False)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the score of each sample, [B], in float32.

        Args:
            x: latents, [B, C, H, W].
            sigma: noise levels, [B].
            conditioning: the prompts, B rows.

        Raises:
            ValueError: latents or prompts of another space, or latents on another device.
        """
        widths = conditioning.prompt_embeds.shape[-1], conditioning.pooled.shape[-1]
        if widths != (self.config.prompt_dim, self.config.pooled_dim):
            raise ValueError(
                f"prompts must have the widths {self.config.prompt_dim} and "
                f"{self.config.pooled_dim} for this {self.config.kind} evaluator, got {widths[0]} "
                f"and {widths[1]}: train one for this model"
            )
        return self.score(self.see(x, sigma), self.read(conditioning))

    @_without_autocast
    def see(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return what it sees in latents, [B, W]."""
        self.check_latents(x.shape[1])
        if x.device != self.device:
            raise ValueError(
                f"an evaluator must be on the device of the latents ({x.device}), got one on "
                f"{self.device}: call evaluator.to(...)"
            )
        side, dtype = self.config.patch_size, self.norm_out.weight.dtype
        x, share = to_flow(wide(x), wide(sigma), path_of(self.config.family))
        missing = [-length % side for length in x.shape[2:]]
        x = F.pad(x.to(dtype), (0, missing[1], 0, missing[0]), mode="replicate")
        grid = self.stem(x)  # [B, W, H/p, W/p]
        level = self.level_in(self._waves(share, self.config.width).to(dtype))
        tokens = grid.flatten(2).mT + self._places(grid).to(dtype) + level[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm_out(tokens).mean(1)

    @_without_autocast
    def read(self, conditioning: Conditioning) -> Tensor | None:
        """Return what it reads in prompts, [B, W]; None where its kind reads none."""
        if not self.kind.reads_prompt:
            return None
        dtype = self.norm_out.weight.dtype
        query = self.pooled_in(conditioning.pooled.to(dtype))[:, None]  # [B, 1, W]
        words = self.prompt_in(conditioning.prompt_embeds.to(dtype))  # [B, T, W]
        gathered = self.gather(query, words, words, need_weights=False)[0]
        return self.prompt_out(query + gathered)[:, 0]

    @_without_autocast
    def score(self, seen: Tensor, read: Tensor | None) -> Tensor:
        """Return the score [B] of what `see` and `read` returned, [B, W] each."""
        total = torch.zeros(len(seen), device=seen.device)
        if read is not None:
            total = total + (self._unit_image(seen) * _unit(read)).sum(-1) * self._scale()
        if self.kind.judges_alone:
            total = total + self.quality(seen)[:, 0].float()
        return total

    @_without_autocast
    def match(self, seen: Tensor, read: Tensor) -> Tensor:
        """Return the scaled cosine of each image with each prompt, [B, B]."""
        return self._unit_image(seen) @ _unit(read).mT * self._scale()

    def _unit_image(self, seen: Tensor) -> Tensor:
        return _unit(self.image_out(seen))

    def _scale(self) -> Tensor:
        return self.log_scale.float().clamp(max=_HIGHEST_SCALE).exp()

    def _places(self, grid: Tensor) -> Tensor:
        """Return the position embedding of a grid [B, W, h, w], [h * w, W]: places in 0 to 1."""
        height, width = grid.shape[2:]
        rows, columns = (
            self._waves((torch.arange(n, device=grid.device) + 0.5) / n, self.config.width // 2)
            for n in (height, width)
        )
        pairs = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
        return torch.cat(pairs, -1).flatten(0, 1)

    @staticmethod
    def _waves(share: Tensor, width: int) -> Tensor:
        return get_timestep_embedding(1000 * share, width)


def path_of(family: str) -> NoisePath:
    """Return how a family adds noise: ``ve`` is ``x0 + sigma noise``."""
    return "ve" if family == "sdxl" else "flow"


def to_flow(x: Tensor, sigma: Tensor, path: NoisePath) -> tuple[Tensor, Tensor]:
    """Return latents and noise levels on the flow ``(1 - s) x0 + s noise``.

    Args:
        x: latents, [B, C, H, W].
        sigma: noise levels, [B].
        path: the family's.

    Returns:
        Latents, and ``s`` in 0 to 1, [B].
    """
    if path == "flow":
        return x, sigma
    return x / (1 + sigma)[:, None, None, None], sigma / (1 + sigma)


def from_flow(x: Tensor, share: Tensor, path: NoisePath) -> tuple[Tensor, Tensor]:
    """Undo `to_flow`: return the family's latents and noise levels; ``ve`` has none at share 1."""
    if path == "flow":
        return x, share
    return x / (1 - share)[:, None, None, None], share / (1 - share)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)
