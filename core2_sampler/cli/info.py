"""``core2 info``: what this machine and installation can do."""

from __future__ import annotations

import typer

from core2_sampler.cli.models import EMBEDDED, ModelFiles, find_model
from core2_sampler.config import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def info() -> None:
    """Show versions, device, attention backends and the models found."""
    from rich.console import Console
    from rich.table import Table

    from core2_sampler.info import attention_backends, describe_device, pick_device, versions

    table = Table(show_header=False, box=None)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("device", describe_device(pick_device()))
    table.add_row("attention", ", ".join(attention_backends()))
    for name in EMBEDDED:
        table.add_row(name, _describe(name))
    Console().print(table)


def _describe(name: str) -> str:
    try:
        model: ModelFiles = find_model(name)
    except ConfigError as error:
        return f"missing ({error})"
    return f"{model.source} ({model.size} px)"
