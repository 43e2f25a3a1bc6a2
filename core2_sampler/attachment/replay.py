"""Make a pass of a stock loop again, for other latents and prompts: what a head is trained in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core2_sampler.attachment.layouts import BY_TAP, EMBEDS, SAMPLE_NAMES, SHARED, Call
from core2_sampler.attachment.networks import Network
from core2_sampler.rows import TOKEN_MASK
from core2_sampler.types import Conditioning

TIMESTEP = "timestep"
"""What a row's timestep is called in ``Conditioning.extra``, and by networks."""


@dataclass(slots=True, eq=False)
class Replay:
    """A network as a `Denoiser`, called as a stock loop has called it.

    What the loop told it of prompt and timestep comes from ``Conditioning.extra``, under the names
    of `prompt_tensors`; all else is as in the pass that it was made of.

    Attributes:
        network: of the pipeline.
        call: a pass of one prompt.
    """

    network: Network
    call: Call

    @property
    def family(self) -> str:
        """Family of the network."""
        return self.network.family

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self.network.module

    @property
    def latent_channels(self) -> int:
        """Channels of ``x``."""
        return self.network.latent_channels

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what heads are shown of a pass, [B, C, H, W], for ``x`` at ``sigma`` [B].

        Raises:
            ValueError: the network takes lists, is one of two, or was told more than the latents,
                the timestep and what stays the same for a prompt.
        """
        if self.network.networks > 1:
            raise ValueError(
                "a pass must be of the one network of a pipeline to be made again, got "
                f"{self.network.networks}, and rows do not tell which: "
                "use a head on outputs, such as conv"
            )
        if self.network.layout.lists:
            raise ValueError(
                "a network must be given its samples as one tensor to make its passes again, got "
                f"{type(self.module).__name__}, which takes lists: "
                "use a head on outputs, such as conv"
            )
        told = {**conditioning.extra, EMBEDS: conditioning.prompt_embeds}
        told[self.network.pooled_path(self.call)] = conditioning.pooled
        told[_sample_name(self.call)] = self.network.unshow(x, sigma, self.call).to(
            self.network.sample(self.call).dtype
        )
        if len(self.call.args) > 1:
            told["1"] = told.pop(TIMESTEP)
        lacking = [name for name in _row_tensors(self.call) if name not in told]
        if lacking:
            raise ValueError(
                f"a pass must be told {lacking[0]} to be made again, which each step has anew and "
                f"no store keeps, as what a ControlNet says: {BY_TAP}"
            )
        call = _filled(self.call, told)
        output = self.module(*call.args, **call.kwargs)
        return self.network.show(self.network.prediction(output), call, sigma).cond

    def capture_features(self) -> AbstractContextManager[Callable[[], Tensor]]:
        """Record the last hidden state, for the families that have adapters.

        Raises:
            ValueError: this one has none.
        """
        if self.network.denoiser is None:
            raise ValueError(f"features are known of sdxl, sd3 and flux, got {self.family}")
        return self.network.denoiser.capture_features()


def timesteps(call: Call, rows: int) -> Tensor:
    """Return which timestep each row of a pass was told, [B].

    Raises:
        ValueError: a row was told several, as one for each of its tokens.
    """
    given = torch.as_tensor(call.args[1] if len(call.args) > 1 else call.kwargs[TIMESTEP])
    if given.ndim > 1:
        raise ValueError(
            "a network must be told one timestep for each sample, which is what a store keeps, got "
            f"{tuple(given.shape)}: Collect knows no loop that tells each token its own"
        )
    return given.flatten().expand(rows)


def token_mask(call: Call) -> Tensor:
    """Return which token embeddings of a pass are of its prompts, [B, T]: all if it is not told."""
    mask, embeds = call.kwargs[TOKEN_MASK], call.kwargs[EMBEDS]
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return mask.bool()


def prompt_tensors(network: Network, call: Call, like: Call) -> dict[str, Tensor]:
    """Return by name what a pass was told of each prompt, beside its embeddings.

    Args:
        network: that was called.
        call: a pass, B rows.
        like: a pass of one prompt: what has one row there and B here belongs to the prompts.
    """
    known = {EMBEDS, network.pooled_path(call), _sample_name(call), TIMESTEP, "1"}
    rows, found = len(network.sample(call)), _tensors(call)
    names = [name for name in _row_tensors(like) if name in found and name not in known]
    return {name: found[name] for name in names if len(found[name]) == rows}


def _sample_name(call: Call) -> str:
    return "0" if call.args else next(name for name in SAMPLE_NAMES if name in call.kwargs)


def _row_tensors(call: Call) -> list[str]:
    """Return the names of the tensors that have one row, in a pass of one prompt."""
    return [name for name, tensor in _tensors(call).items() if tensor.ndim and len(tensor) == 1]


def _tensors(call: Call) -> dict[str, Tensor]:
    """Return the tensors of a pass by name: ``0``, ``timestep``, ``added_cond_kwargs/time_ids``."""
    found: dict[str, Tensor] = {}

    def collect(name: str, tensor: Tensor) -> Tensor:
        return found.setdefault(name, tensor)

    _map(call, collect)
    return found


def _filled(call: Call, tensors: Mapping[str, Tensor]) -> Call:
    """Return the call told other tensors, a mask also where it was told none."""
    filled = _map(call, lambda name, tensor: tensors.get(name, tensor))
    if TOKEN_MASK in call.kwargs and TOKEN_MASK in tensors:
        return Call(filled.args, {**filled.kwargs, TOKEN_MASK: tensors[TOKEN_MASK]})
    return filled


def _map(call: Call, function: Callable[[str, Tensor], Tensor]) -> Call:
    """Return the call with a function of name and tensor applied to each of its tensors."""

    def value(name: str, x: Any) -> Any:
        last = name.rpartition("/")[2]
        if isinstance(x, Tensor):
            return x if last in SHARED else function(name, x)
        if isinstance(x, Mapping):
            return {key: value(f"{name}/{key}", each) for key, each in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(value(f"{name}/{i}", each) for i, each in enumerate(x))
        return x

    args = tuple(value(str(i), x) for i, x in enumerate(call.args))
    return Call(args, {name: value(name, x) for name, x in call.kwargs.items()})
