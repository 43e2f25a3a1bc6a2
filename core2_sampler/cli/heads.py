"""``core2 heads``: what weak heads there are, and the import of the authors' own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import typer

from core2_sampler.cli.options import add_command
from core2_sampler.config import ConfigError, option, user_input
from core2_sampler.fitting import UNTRAINED, find_head
from core2_sampler.model_files import EMBEDDED, find_model

app = typer.Typer(
    help="Show the weak heads, and import the authors' own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """Options of ``core2 heads import``."""

    files: tuple[str, ...] = option(
        help="The authors' sd35_noise_model.pth or sdxl_noise_model.pth.", positional=True
    )
    out: Path = option(help="Folder of the head.", short="-o")
    upstream: bool = option(
        False, help="Reproduce the numbers of the released code, its errors included."
    )


@app.callback()
def _group() -> None:
    """Show the weak heads, and import the authors' own."""


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


def import_head(options: ImportOptions) -> None:
    """Make a weak head of a checkpoint of the authors; nothing but tensors is read from it."""
    if len(options.files) != 1:
        raise ConfigError(f"files must be one checkpoint, got {len(options.files)}")
    from core2_sampler.weak_heads.official_import import import_official

    with user_input():
        head = import_official(options.files[0], options.out, upstream=options.upstream)
    print(
        f"{options.out}: official head for {head.config.family}, {head.num_parameters()} "
        f"parameters, guidance scale {head.config.reference_scale:g}"
    )


add_command(app, "import", ImportOptions, import_head)
