"""``core2 heads``: what weak heads there are."""

from __future__ import annotations

import inspect

import typer

from core2_sampler.config import ConfigError
from core2_sampler.model_files import EMBEDDED, UNTRAINED, find_head, find_model

app = typer.Typer(
    help="Show the weak heads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Show the weak heads."""


@app.command("list")
def list_heads() -> None:
    """List the kinds of weak heads, and the trained ones that are shipped."""
    from core2_sampler.cli.console import print_table
    from core2_sampler.weak_heads import HEADS

    rows = []
    for name in HEADS.names():
        kind = HEADS.get(name)
        where = "inside the denoiser" if kind.in_model else "on cond"
        use = f"--head {name}" if name in UNTRAINED else "--head FOLDER"
        rows.append((name, where, use, (inspect.getdoc(kind) or "").splitlines()[0]))
    print_table(("name", "works", "to use it", "what it is"), rows)
    for model in EMBEDDED:
        try:
            head = find_head(None, find_model(model))
        except ConfigError:
            head = None
        print(f"{model}: {head.folder if head else 'no head here'}")
