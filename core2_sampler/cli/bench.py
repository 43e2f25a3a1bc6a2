"""``core2 bench``: the commands of `core2_sampler.benchmarks`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from core2_sampler.benchmarks.cli import COMMANDS
from core2_sampler.cli.launch import start_missing_processes
from core2_sampler.cli.options import add_command

SHARED = ("generate", "run")
"""The commands whose work several processes share."""


def _with_all_processes(run: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a command that first starts the processes that ``accelerate launch`` did not."""

    @functools.wraps(run)
    def started(config: Any) -> None:
        start_missing_processes()
        run(config)

    return started


app = typer.Typer(
    help="Measure ways of sampling against each other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, (_config_class, _run) in COMMANDS.items():
    add_command(app, _name, _config_class, _with_all_processes(_run) if _name in SHARED else _run)
