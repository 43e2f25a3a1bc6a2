"""Collect: run the base model with guidance and keep the states that it visits.

Round 0 is driven by classifier-free guidance. A later, on-policy round is driven by the fast
sampler with a trained head, so that the head meets the states that it will lead to itself; the
true cond and gap are measured at each of them (DAgger).

Reference:
    CoRe^2, arXiv 2503.09662 (the Collect stage); DAgger, arXiv 1011.0686.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from core2_sampler.config import option
from core2_sampler.guidance import make_predict
from core2_sampler.plan import Plan, Step
from core2_sampler.recording import Recorder, Unit, encodings_by_file, kept_steps
from core2_sampler.rows import stable_hash
from core2_sampler.samplers import sample_euler
from core2_sampler.trajectory import Record, TrajectoryStore
from core2_sampler.types import Conditioning, Denoiser, InModelHead, OutputHead

Encode = Callable[[list[str]], tuple[Conditioning, Conditioning]]
"""``cond, uncond = encode(prompts)``: both sides of guidance for a batch of prompts."""

Head = OutputHead | InModelHead


@dataclass(frozen=True, slots=True)
class Job:
    """One trajectory to collect."""

    prompt: str
    prompt_id: str
    seed: int


@dataclass(frozen=True, slots=True)
class CollectConfig:
    """What to collect of each trajectory."""

    guidance_scales: tuple[float, ...] = option(
        (4.5,), help="scales that drive the trajectories, one drawn for each", min=1.0
    )
    steps_per_trajectory: int | None = option(
        None, help="steps kept of each trajectory, drawn at random; none keeps all", min=1
    )
    batch_size: int = option(32, help="trajectories of one work unit, run together", min=1)
    round: int = option(0, help="0, or the number of an on-policy round", min=0, max=999)
    features: bool = option(False, help="store the denoiser's last hidden states too")


def initial_latents(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> Tensor:
    """Return standard normal latents [B, C, H, W], each from its own CPU generator."""
    noise = [torch.randn(latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise)


def _record(job: Job, config: CollectConfig) -> Record:
    draw = stable_hash("scale", job.prompt_id, job.seed, config.round)
    scale = config.guidance_scales[draw % len(config.guidance_scales)]
    return Record(job.prompt_id, job.prompt, job.seed, config.round, float(scale))


def make_units(jobs: Sequence[Job], config: CollectConfig) -> list[list[Record]]:
    """Cut the jobs into work units: at most ``batch_size`` trajectories of one guidance scale."""
    by_scale: dict[float, list[Record]] = {}
    for job in jobs:
        record = _record(job, config)
        by_scale.setdefault(record.guidance_scale, []).append(record)
    size = config.batch_size
    return [
        records[start : start + size]
        for _, records in sorted(by_scale.items())
        for start in range(0, len(records), size)
    ]


def collect(
    denoiser: Denoiser,
    encode: Encode,
    jobs: Sequence[Job],
    store: TrajectoryStore,
    config: CollectConfig,
    *,
    sigmas: Tensor,
    latent_shape: tuple[int, int, int],
    noise_scale: float = 1.0,
    policy: Head | None = None,
    about: dict[str, Any] | None = None,
    **sharing: Any,
) -> int:
    """Run the jobs that the store does not hold yet, and store them; see `fill_store`.

    Args:
        denoiser: the base model.
        encode: encodes prompts.
        jobs: trajectories; prompt id and seed together must be unique.
        store: where the rows go.
        config: what to keep.
        sigmas: noise levels, [S + 1], decreasing, the last 0.
        latent_shape: (C, H, W) of one sample.
        noise_scale: the initial latents are unit noise times this.
        policy: the head of an on-policy round; None lets CFG drive.
        about: facts on the model and the prompts, pinned to the round and checked on resume.
        **sharing: further arguments of `fill_store`.

    Returns:
        The number of trajectories that this call added.

    Raises:
        ValueError: if a job occurs twice, the round was collected with other settings, or a
            prediction is not finite.
    """

    def run(records: Sequence[Record]) -> Unit:
        start = (latent_shape, noise_scale)
        return run_unit(denoiser, encode, records, config, sigmas, *start, policy)

    facts = {"sigmas": sigmas.tolist(), "policy": driver(policy), **(about or {})}
    return fill_store(run, jobs, store, config, about=facts, **sharing)


def driver(policy: Head | None) -> str:
    """Return what a store calls the driver of a round."""
    return "cfg" if policy is None else type(policy).__name__


def fill_store(
    run: Callable[[Sequence[Record]], Unit],
    jobs: Sequence[Job],
    store: TrajectoryStore,
    config: CollectConfig,
    *,
    about: dict[str, Any],
    num_processes: int = 1,
    process_index: int = 0,
    on_unit: Callable[[int, int], None] | None = None,
) -> int:
    """Run the work units that the store does not hold yet, and store them.

    The same call after a kill, with any batch size and any number of processes, ends in the same
    records. Each process runs every ``num_processes``-th unit and writes files of its own.

    Args:
        run: makes the trajectories of a unit.
        jobs: trajectories; prompt id and seed together must be unique.
        store: where the rows go.
        config: what to keep.
        about: facts, pinned to the round and checked on resume.
        num_processes: how many processes share the jobs.
        process_index: which of them this is.
        on_unit: called after each unit with (trajectories done, trajectories of this process).

    Returns:
        The number of trajectories that this call added.

    Raises:
        ValueError: if a job occurs twice or the round was collected with other settings.
    """
    if len({(job.prompt_id, job.seed) for job in jobs}) < len(jobs):
        raise ValueError("prompt id and seed of a job must be unique together, got one twice")
    store = TrajectoryStore(store.root, writer=process_index)
    store.remove_leftovers(num_processes)
    pinned = {key: value for key, value in asdict(config).items() if key != "batch_size"}
    store.pin_settings(config.round, pinned | about)
    done = store.records()
    mine = make_units(jobs, config)[process_index::num_processes]
    finished, added = 0, 0
    for unit in mine:
        missing = [record for record in unit if record.key not in done]
        if missing:
            store.write_unit(missing, *run(missing))
        finished, added = finished + len(unit), added + len(missing)
        if on_unit is not None:
            on_unit(finished, sum(map(len, mine)))
    return added


@torch.no_grad()
def run_unit(
    denoiser: Denoiser,
    encode: Encode,
    records: Sequence[Record],
    config: CollectConfig,
    sigmas: Tensor,
    latent_shape: tuple[int, int, int],
    noise_scale: float = 1.0,
    policy: Head | None = None,
) -> Unit:
    """Sample the trajectories of one unit and return (rows, encodings) as a store takes them."""
    cond, uncond = encode([record.prompt for record in records])
    num_steps, scale = len(sigmas) - 1, records[0].guidance_scale
    # A slow step with w2s_scale 0 goes where the fast step goes, and has measured the gap.
    step = Step("cfg", scale) if policy is None else Step("slow", scale, w2s_scale=0.0)
    recorder = Recorder(
        sigmas.tolist(),
        [kept_steps(record, num_steps, config.steps_per_trajectory) for record in records],
        config.features,
    )
    predict = make_predict(
        denoiser,
        sigmas,
        Plan((step,) * num_steps, in_model=policy is not None and policy.in_model),
        cond,
        uncond,
        policy,
        on_pair=recorder,
        capture_features=config.features,
    )
    noise = initial_latents([record.seed for record in records], latent_shape)
    x = (noise_scale * noise).to(cond.prompt_embeds)
    inside = policy.attached(denoiser.module) if isinstance(policy, InModelHead) else nullcontext()
    with inside:
        sample_euler(predict, x, sigmas)
    return recorder.rows(), encodings_by_file(records, cond)
