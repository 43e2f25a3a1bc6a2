"""Collect and Reflect survive SIGKILL. Truth: the same command, never interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core2_sampler.trajectory import TrajectoryStore

SCRIPT = Path(__file__).with_name("kill_and_rerun.py")
NUM_JOBS = 36


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python beside the script, with this process's packages."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=SCRIPT.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(what: str, folder: Path, seed: int = 0) -> int:
    """Run a scenario and return the number of kills."""
    result = python(SCRIPT, what, folder, seed)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


def contents(store: TrajectoryStore) -> dict[str, list[float]]:
    """Return the rows of each record as text, sorted; equal if and only if bit-identical."""
    rows = store.rows()
    batch = rows.take(torch.arange(len(rows)))
    columns = [batch.sigma[:, None], batch.pooled, batch.x.flatten(1), batch.gap.flatten(1)]
    return sorted(torch.cat(columns, 1).tolist())


@pytest.mark.slow
def test_a_killed_collect_ends_in_the_same_records(tmp_path):
    assert run("collect", tmp_path) == 6
    whole, killed = (TrajectoryStore(tmp_path / name) for name in ("whole", "killed"))
    killed.verify()
    assert len(whole.records()) == NUM_JOBS
    assert killed.records() == whole.records()  # and records() refuses one that is there twice
    assert contents(killed) == contents(whole)
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_a_killed_reflect_ends_in_the_same_head(tmp_path):
    assert run("reflect", tmp_path) == 6
    file = "head/diffusion_pytorch_model.safetensors"
    heads = [load_file(tmp_path / name / file) for name in ("whole", "killed")]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert {(tmp_path / n / "steps").read_text() for n in ("whole", "killed")} == {"60"}


@pytest.mark.slow
def test_two_processes_at_once_share_the_jobs(tmp_path):
    run("shard", tmp_path)
    store = TrajectoryStore(tmp_path / "killed")
    store.verify()
    assert len(store.records()) == NUM_JOBS
    assert sum(len(entry["records"]) for _, entry in store.entries()) == NUM_JOBS


@pytest.mark.slow
def test_a_run_that_dies_before_its_kill_is_told():
    dying = "kill_and_rerun(lambda: 1 / 0, lambda: 0.0, 1.0, random.Random(0))"
    result = python("-c", f"import random; from kill_and_rerun import *; {dying}")
    assert result.returncode == 1 and "a run ended before its kill" in result.stderr
