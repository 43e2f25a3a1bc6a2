"""Collect while training: rows that come from a running model and are never stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from core2_sampler.collect import CollectConfig, Encode, run_unit
from core2_sampler.rows import Rows, is_held_out, stable_hash, widen
from core2_sampler.trajectory import Record
from core2_sampler.types import Denoiser


class OnlineSource:
    """A ``RowSource`` that collects what it returns and stores nothing; each row is used once.

    Trajectories that run together make a pool. A training reads the pools one after another, each
    shuffled. A pool depends on its number and the seed alone, so does a batch on its step.
    """

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
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the arguments of ``collect``, with prompts as (prompt id, text) and no jobs.

        ``about``, facts on the model, goes into what ``describe`` returns.

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
        self._pools: dict[tuple[int, int], Rows] = {}  # those of the latest batch
        self._about = {"prompts": f"{stable_hash(*prompts):016x}", **(about or {})}
        self._evaluation: list[Rows] = []

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the sampling grid, [S]."""
        return self._grid[:-1].float()

    def train(self, step: int, batch_size: int, seed: int) -> Rows:
        """Return rows of fresh trajectories, shuffled over as many as run together."""
        num_steps = len(self._grid) - 1
        size = self._config.batch_size * min(
            self._config.steps_per_trajectory or num_steps, num_steps
        )
        start, end = step * batch_size, (step + 1) * batch_size
        wanted = [(seed, number) for number in range(start // size, -(-end // size))]
        self._pools = {key: self._pools.get(key) or self._pool(*key) for key in wanted}
        return _join(
            [
                _take(pool, slice(max(start - number * size, 0), end - number * size))
                for (_, number), pool in self._pools.items()
            ]
        )

    def _pool(self, seed: int, number: int) -> Rows:
        generator = torch.Generator().manual_seed(stable_hash("pool", seed, number))
        fresh = self._run(False, self._config.batch_size, generator)
        return _take(fresh, torch.randperm(len(fresh), generator=generator))

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
        prompts = {"training_prompts": len(self._parts[False]), **self._about}
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
