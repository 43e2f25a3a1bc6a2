"""Several processes on the CPU, where ``accelerate launch`` starts only one.

accelerate (tried: 1.15) leaves the processes of a CPU run to mpirun. Without a hostfile for it,
``accelerate launch --cpu --num_processes 2`` starts a single process and says nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

from core2_sampler.config import ConfigError

_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_on_cpu() -> bool:
    """Return whether ``accelerate launch --cpu`` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def start_missing_processes() -> None:
    """Start the processes that ``accelerate launch`` was asked for; exit with their status.

    Returns at once where nothing is missing.

    Raises:
        ConfigError: if processes are missing and nobody says how many.
    """
    if not launched_on_cpu() or any(name in os.environ for name in _WORLD):
        return
    if "MASTER_PORT" not in os.environ:  # accelerate sets it where it is asked for several
        return
    count = asked_processes(_parent_command())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    if count is None:
        raise ConfigError(
            "accelerate has started one process of several: give --num_processes on its command "
            "line, or start them with torchrun --nproc_per_node N -m core2_sampler ..."
        )
    done = subprocess.run([*command, str(count), "-m", "core2_sampler", *sys.argv[1:]], check=False)
    sys.exit(done.returncode)


def asked_processes(command: Sequence[str]) -> int | None:
    """Read ``--num_processes`` from the command line of ``accelerate launch``."""
    text = "\0".join(command)
    found = re.search(r"\0--num[_-]processes[=\0](\d+)(?:\0|$)", text)
    return int(found[1]) if found else None


def _parent_command() -> list[str]:
    import psutil  # a dependency of accelerate

    parent = psutil.Process().parent()
    return parent.cmdline() if parent is not None else []
