"""``core2 bench``: the commands of `core2_sampler.benchmarks`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import typer

from core2_sampler.benchmarks.cli import COMMANDS
from core2_sampler.benchmarks.options import RunConfig
from core2_sampler.cli.launch import launched_on_cpu, start_missing_processes
from core2_sampler.cli.options import add_command

SHARED = ("generate", "run")
"""The commands whose work several processes share."""


def _with_all_processes(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a command that first starts the processes that ``accelerate launch`` did not."""

    @functools.wraps(run)
    def started(config: Any) -> None:
        start_missing_processes()
        run(_on_cpu(config) if launched_on_cpu() else config)

    return started


def _on_cpu(config: Any) -> Any:
    """Return a config of `SHARED` with its device on the CPU."""
    if isinstance(config, RunConfig):
        return dataclasses.replace(config, generate=_on_cpu(config.generate))
    return dataclasses.replace(config, device="cpu")


app = typer.Typer(
    help="Measure ways of sampling against each other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, (_config_class, _run) in COMMANDS.items():
    add_command(app, _name, _config_class, _with_all_processes(_run) if _name in SHARED else _run)
