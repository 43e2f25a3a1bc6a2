"""Run Collect or Reflect on a tiny model in a process of its own and kill it at random moments.

Usage: python kill_and_rerun.py collect|reflect|shard FOLDER SEED. Every attempt is a forked
process, so that it ends by a real SIGKILL without the seconds that importing costs. The last line
of the output is the number of attempts that were killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from core2_sampler.collect import CollectConfig, Job, collect
from core2_sampler.reflect import ReflectConfig, reflect
from core2_sampler.testing import tiny_sd3_pipeline
from core2_sampler.trajectory import TrajectoryStore
from core2_sampler.weak_heads import HEADS

KILLS = 6
STEPS = 60
LIMIT = 200  # seconds that one process may take
JOBS = [Job(f"{a} {b}", a + b, seed) for a in "abc" for b in "defghi" for seed in (0, 1)]


def run_collect(pipe: object, folder: Path, processes: int = 1, index: int = 0) -> None:
    """Collect all jobs, or one process's share of them."""
    collect(
        pipe.family.denoiser(pipe),
        partial(pipe.family.encode, pipe, max_sequence_length=8),
        JOBS,
        TrajectoryStore(folder),
        CollectConfig((2.0, 4.0), steps_per_trajectory=3, batch_size=2),
        sigmas=pipe.family.schedule(pipe, 5, (8, 8)).sigmas,
        latent_shape=(4, 8, 8),
        num_processes=processes,
        process_index=index,
    )


def run_reflect(pipe: object, folder: Path) -> None:
    """Train a head on the collected rows and save it."""
    denoiser = pipe.family.denoiser(pipe)
    head = HEADS.get("adapter").for_denoiser(denoiser)
    config = ReflectConfig(
        steps=STEPS, batch_size=8, precision="fp32", save_seconds=0.02, evaluations=2
    )
    source = TrajectoryStore(folder / "store").source(0.3, held_out_rows=16)
    report = reflect(head, source, config, denoiser=denoiser, folder=folder / "training")
    head.save_pretrained(folder / "head")
    (folder / "steps").write_text(str(report.progress.step))


def fork(work: Callable[[], None]) -> int:
    """Start ``work`` in a child process, which ends at the limit, and return its id."""
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def finish(child: int) -> None:
    """Wait for a child that must end well."""
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a run failed without being killed")


def kill_and_rerun(
    work: Callable[[], None], share: Callable[[], float], seconds: float, rng: random.Random
) -> int:
    """Kill ``work`` at random moments, spread over its course, then let it end; count the kills.

    Args:
        work: what to run.
        share: how much of it is done, 0 to 1, by what is on disk.
        seconds: how long it takes, so that the exact moment of a kill can be anywhere in a unit.
        rng: decides the moments.
    """
    kills = 0
    for attempt in range(KILLS):
        wanted = rng.uniform(attempt, attempt + 0.8) / (KILLS + 1)
        child = fork(work)
        while share() < wanted:
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended and share() < wanted:
                raise SystemExit(f"a run ended before its kill, with status {ended.si_status}")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1 * seconds / KILLS))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    finish(fork(work))
    return kills


def collected(folder: Path) -> float:
    """Return the share of the units that are complete."""
    return len(list(folder.glob("shards/*.json"))) / (len(JOBS) / 2)


def trained(folder: Path) -> float:
    """Return the share of the steps that the checkpoint has behind it."""
    path = folder / "training" / "checkpoint.safetensors"
    if not path.exists():
        return 0
    data = path.read_bytes()  # at once: safe_open opens a file twice, and it is replaced meanwhile
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["about"])["progress"]["step"] / STEPS


def main(what: str, folder: Path, seed: int) -> int:
    """Run one scenario next to an uninterrupted run, in ``killed`` and ``whole``."""
    torch.set_num_threads(1)
    pipe = tiny_sd3_pipeline()
    whole, killed = folder / "whole", folder / "killed"
    if what == "shard":
        for child in [fork(partial(run_collect, pipe, killed, 2, i)) for i in range(2)]:
            finish(child)
        return 0
    run, share = (run_collect, collected) if what == "collect" else (run_reflect, trained)
    if what == "reflect":
        for path in (whole, killed):
            finish(fork(partial(run_collect, pipe, path / "store")))
    started = time.monotonic()
    finish(fork(partial(run, pipe, whole)))
    seconds = time.monotonic() - started
    work, done = partial(run, pipe, killed), partial(share, killed)
    return kill_and_rerun(work, done, seconds, random.Random(seed))


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
