"""``core2 demo``: the options, and every check that needs no weights."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import typer

from core2_sampler.cli.loading import DEVICE_HELP, MODEL_HELP
from core2_sampler.cli.options import add_command
from core2_sampler.config import ConfigError, option

HOST = "127.0.0.1"
"""The page is for this machine alone: it has no password and no limit on work."""


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Options of ``core2 demo``."""

    model: str = option("shapes-sd3", help=MODEL_HELP)
    head: str | None = option(
        None, help="A weak head's folder or a control's name; by default the model's own."
    )
    port: int = option(7860, help="Port of the page on this machine.", min=1, max=65535)
    device: str = option("auto", help=DEVICE_HELP)


def demo(config: DemoConfig) -> None:
    """Serve a web page that draws stock CFG and another mode side by side."""
    check_port(config.port)
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs gradio, got no {error.name}: pip install 'core2-sampler[demo]'"
        ) from error

    from core2_sampler.demo import Demo, build_page

    loaded = Demo.load(config.model, config.head, config.device)
    build_page(loaded).launch(server_name=HOST, server_port=config.port)


def check_port(port: int) -> None:
    """Raise ConfigError if no page can be served at this port."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        raise ConfigError(f"port must be free, got {port}: take another with --port") from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
add_command(app, "demo", DemoConfig, demo)
