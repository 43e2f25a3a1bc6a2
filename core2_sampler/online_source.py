"""Collect while training: rows that come from a running model and are never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from core2_sampler.collect import CollectConfig, Encode, run_unit
from core2_sampler.rows import Rows, is_held_out, widen
from core2_sampler.trajectory import Record
from core2_sampler.types import Denoiser


class OnlineSource:
    """A ``RowSource`` that collects what it returns and stores nothing; each row is used once."""

    def __init__(
        self,
        denoiser: Denoiser,
        encode: Encode,
        prompts: Sequence[tuple[str, str]],
        config: CollectConfig,
        *,
        sigmas: Tensor,
        latent_shape: tuple[int, int, int],
        noise_scale: float = 1.0,
        held_out_share: float = 0.1,
        held_out_trajectories: int = 32,
    ) -> None:
        """Take the arguments of ``collect``, with prompts as (prompt id, text) and no jobs.

        Raises:
            ValueError: if the prompts leave nothing to train on or nothing to hold out.
        """
        self._parts: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
        for prompt in prompts:
            self._parts[is_held_out(prompt[0], held_out_share)].append(prompt)
        if not (self._parts[True] and self._parts[False]):
            raise ValueError(
                f"prompts must fill a training and a held-out part, got {len(prompts)} prompts at "
                f"a held-out share of {held_out_share}: give more prompts or another share"
            )
        self._denoiser, self._encode, self._config = denoiser, encode, config
        self._grid, self._start = sigmas, (latent_shape, noise_scale)
        self._held_out_trajectories = held_out_trajectories
        self._pool: Rows | None = None
        self._evaluation: list[Rows] = []

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the sampling grid, [S]."""
        return self._grid[:-1].float()

    def train(self, batch_size: int, generator: torch.Generator) -> Rows:
        """Return rows of fresh trajectories, shuffled over as many as run together."""
        while self._pool is None or len(self._pool) < batch_size:
            fresh = self._run(False, self._config.batch_size, generator)
            fresh = _take(fresh, torch.randperm(len(fresh), generator=generator))
            self._pool = fresh if self._pool is None else _join([self._pool, fresh])
        batch = _take(self._pool, slice(None, batch_size))
        self._pool = _take(self._pool, slice(batch_size, None))
        return batch

    def held_out(self, batch_size: int) -> Iterator[Rows]:
        """Yield the rows of a fixed set of trajectories of held-out prompts."""
        if not self._evaluation:
            generator = torch.Generator().manual_seed(0)
            left = self._held_out_trajectories
            while left > 0:
                count = min(left, self._config.batch_size)
                self._evaluation.append(self._run(True, count, generator))
                left -= count
        rows = _join(self._evaluation)
        for start in range(0, len(rows), batch_size):
            yield _take(rows, slice(start, start + batch_size))

    def describe(self) -> dict[str, Any]:
        """Return what a head's card says about its data."""
        prompts = {"training_prompts": len(self._parts[False])}
        return {"online": True, **prompts, **asdict(self._config), "sigmas": self._grid.tolist()}

    def _run(self, held_out: bool, count: int, generator: torch.Generator) -> Rows:
        """Collect ``count`` random trajectories of one guidance scale."""
        prompts, scales = self._parts[held_out], self._config.guidance_scales
        scale = scales[int(torch.randint(len(scales), (), generator=generator))]
        picks = torch.randint(len(prompts), (count,), generator=generator).tolist()
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        records = [
            Record(prompt_id, prompt, seed, self._config.round, float(scale))
            for (prompt_id, prompt), seed in zip((prompts[i] for i in picks), seeds, strict=True)
        ]
        rows, encodings = run_unit(
            self._denoiser, self._encode, records, self._config, self._grid, *self._start
        )
        owner = [encodings[records[index].prompt_file] for index in rows.pop("record").tolist()]
        encoded = {name: torch.stack([each[name] for each in owner]) for name in owner[0]}
        return Rows.from_tensors(rows | encoded).map(widen)


def _take(rows: Rows, index: slice | Tensor) -> Rows:
    return rows.map(lambda tensor: tensor[index])


def _join(parts: Sequence[Rows]) -> Rows:
    tensors = [part.tensors() for part in parts]
    return Rows.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})
