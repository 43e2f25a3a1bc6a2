"""The rows of a trajectory store as Reflect reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core2_sampler.rows import EXTRA, TOKEN_MASK, Rows, stable_hash, widen


@lru_cache(maxsize=8192)
def _encoding(path: Path) -> dict[str, Tensor]:
    return load_file(path)


class StoredRows:
    """Random access to rows that stay in memory-mapped files until they are asked for."""

    def __init__(
        self,
        shards: list[tuple[dict[str, Tensor], list[Path]]],
        places: Tensor,
        sigmas: Tensor,
    ) -> None:
        """Take (tensors, prompt file of each record) per shard and (shard, row) per row [N, 2]."""
        self._shards = shards
        self._places = places
        self.sigmas = sigmas

    def __len__(self) -> int:
        return len(self._places)

    def take(self, index: Tensor) -> Rows:
        """Return the rows at ``index`` [N], floating-point tensors in float32.

        Prompts that have a mask of their tokens are filled up with zeros to the longest of them.
        """
        rows: dict[str, list[Tensor]] = {}
        prompts: dict[str, list[Tensor]] = {}
        for shard, row in self._places[index].tolist():
            tensors, files = self._shards[shard]
            for name, tensor in tensors.items():
                rows.setdefault(name, []).append(tensor[row])
            for name, tensor in _encoding(files[int(tensors["record"][row])]).items():
                prompts.setdefault(name, []).append(tensor)
        del rows["record"]
        masked = ("prompt_embeds", EXTRA + TOKEN_MASK) if EXTRA + TOKEN_MASK in prompts else ()
        stacked = {
            name: pad_sequence(tensors, batch_first=True)
            if name in masked
            else torch.stack(tensors)
            for name, tensors in (rows | prompts).items()
        }
        return Rows.from_tensors({name: widen(tensor) for name, tensor in stacked.items()})

    def sample(self, batch_size: int, generator: torch.Generator) -> Rows:
        """Return ``batch_size`` rows drawn with replacement."""
        return self.take(torch.randint(len(self), (batch_size,), generator=generator))


@dataclass(frozen=True, slots=True)
class StoreSource:
    """A ``RowSource`` that reads a store."""

    training: StoredRows
    evaluation: StoredRows
    held_out_rows: int
    about: dict[str, Any]

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the training rows, [N]."""
        return self.training.sigmas

    def train(self, step: int, batch_size: int, seed: int) -> Rows:
        """Return random rows of the training prompts, a function of the arguments alone."""
        generator = torch.Generator().manual_seed(stable_hash("batch", seed, step))
        return self.training.sample(batch_size, generator)

    def held_out(self, batch_size: int) -> Iterator[Rows]:
        """Yield the same random rows of the held-out prompts each time."""
        order = torch.randperm(len(self.evaluation), generator=torch.Generator().manual_seed(0))
        for index in order[: self.held_out_rows].split(batch_size):
            yield self.evaluation.take(index)

    def describe(self) -> dict[str, Any]:
        """Return what a head's card says about its data."""
        return self.about
