"""``core2 heads``: what weak heads there are, import of the authors' own, export of a LoRA."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import typer

from core2_sampler.cli.options import add_command
from core2_sampler.config import ConfigError, check_folder, option, user_input
from core2_sampler.fitting import UNTRAINED, find_head
from core2_sampler.model_files import EMBEDDED, find_model

app = typer.Typer(
    help="Show the weak heads, import the authors' own, export an adapter as a LoRA.",
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


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of ``core2 heads export``."""

    heads: tuple[str, ...] = option(
        help="Folder or hub id of a trained adapter; `core2 heads list` shows those of the "
        "embedded models.",
        positional=True,
    )
    lora: Path = option(help="The LoRA file, *.safetensors, for load_lora_weights.")
    guidance_scale: float | None = option(
        None, help="Scale that it guides at; by default the adapter's reference scale.", min=1
    )


@app.callback()
def _group() -> None:
    """Show the weak heads, import the authors' own, export an adapter as a LoRA."""


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


def export_head(options: ExportOptions) -> None:
    """Write an adapter at one guidance scale as a LoRA that stock pipelines load and fuse."""
    if len(options.heads) != 1:
        raise ConfigError(f"heads must be one adapter, got {len(options.heads)}")
    check_folder(options.lora.parent, "the folder of lora")
    from core2_sampler.weak_heads import load_head
    from core2_sampler.weak_heads.lora import write_lora

    with user_input():
        head = load_head(options.heads[0])
        scale = options.guidance_scale or head.config.get("reference_scale", 1.0)
        write_lora(head, scale, options.lora)
    print(f"{options.lora}: guidance scale {scale:g} in one pass, without guidance of the call")


add_command(app, "import", ImportOptions, import_head)
add_command(app, "export", ExportOptions, export_head)
