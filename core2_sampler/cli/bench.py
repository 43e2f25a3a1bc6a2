"""``core2 bench``: the commands of `core2_sampler.benchmarks`."""

from __future__ import annotations

import typer

from core2_sampler.benchmarks.cli import COMMANDS
from core2_sampler.cli.options import add_command

app = typer.Typer(
    help="Measure ways of sampling against each other.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _name, (_config_class, _run) in COMMANDS.items():
    add_command(app, _name, _config_class, _run)
