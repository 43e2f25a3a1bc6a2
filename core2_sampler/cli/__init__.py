"""The command ``core2``.

Each subcommand is a typer app of its own that is imported when it is called, so that
``core2 --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import typer

from core2_sampler.config import ConfigError

COMMANDS = {
    "generate": ("core2_sampler.cli.generate", "Generate images."),
    "collect": ("core2_sampler.cli.collect", "Collect guided trajectories of a model."),
    "reflect": ("core2_sampler.cli.reflect", "Train a weak head on them."),
    "heads": ("core2_sampler.cli.heads", "Show the weak heads."),
    "evaluators": ("core2_sampler.cli.evaluators", "Train what an online scale listens to."),
    "shapes": ("core2_sampler.cli.shapes", "Render, judge and train the embedded world."),
    "bench": ("core2_sampler.cli.bench", "Measure ways of sampling against each other."),
    "demo": ("core2_sampler.cli.demo", "Serve a web page that compares CFG with another mode."),
    "info": ("core2_sampler.cli.info", "Show versions, device, attention backends, models."),
}
"""Each subcommand's module, which has a typer ``app``, and its line in ``core2 --help``."""

app = typer.Typer(
    help="Text-to-image at half the denoiser passes: collect, reflect, generate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback()
def _group() -> None:
    """Keep subcommands, however few there are."""


for _name, (_module, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)  # the list of `core2 --help`; main() runs them


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is not for our users
    called, name = app, "core2"
    try:
        if args and args[0] in COMMANDS:
            name = f"core2 {args[0]}"
            called = importlib.import_module(COMMANDS[args.pop(0)][0]).app
        code = called(args=args, prog_name=name, standalone_mode=False)
    except ConfigError as error:
        _fail(str(error), 2)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        _fail(str(error), 2)
    except typer.TyperException as error:
        _fail(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int) -> None:
    if text:
        print(f"core2: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)
