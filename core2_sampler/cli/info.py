"""``core2 info``: what this machine and installation can do."""

from __future__ import annotations

import typer

from core2_sampler.config import ConfigError, user_input
from core2_sampler.model_files import EMBEDDED, ModelFiles, find_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("info")
def show() -> None:
    """Show versions, device, attention backends and the models found."""
    from core2_sampler import info
    from core2_sampler.cli.console import print_table

    print_table(("", ""), info.versions().items())
    with user_input():
        info.check_torchvision()
    rows = [("device", info.describe_device(info.pick_device()))]
    rows.append(("attention", ", ".join(info.attention_backends())))
    rows += [(name, _describe(name)) for name in EMBEDDED]
    print_table(("", ""), rows)


def _describe(name: str) -> str:
    try:
        model: ModelFiles = find_model(name)
    except ConfigError as error:
        return f"missing ({error})"
    return f"{model.source} ({model.size} px)"
