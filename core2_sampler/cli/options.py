"""Make typer commands out of config dataclasses, so that no option is declared twice."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from core2_sampler.config import Config, ConfigError, Option, describe, load_config, options_of
from core2_sampler.registry import unknown_name

RECIPES = Path(__file__).parent.parent / "recipes"


def add_command(
    app: typer.Typer, name: str, config_class: type[Config], run: Callable[[Config], None]
) -> None:
    """Add a command whose options are those of ``config_class``.

    Every option is optional to typer: what the user leaves out may come from ``--config`` or from
    a ``key=value`` argument, and else from the declared default. An option with ``positional`` in
    its metadata takes the arguments that are no overrides.

    Args:
        app: where to add it.
        name: the command's name; its help is the docstring of ``run``.
        config_class: declares the options.
        run: called with the finished config.
    """
    options = options_of(config_class)
    positional = next((o for o in options.values() if o.metadata.get("positional")), None)

    def command(**values: Any) -> None:
        arguments, file = values.pop("arguments") or [], values.pop("config")
        given = {key: value for key, value in values.items() if value is not None}
        words = [text for text in arguments if positional and not is_override(text)]
        if positional and words:
            given[positional.name] = words
        overrides = [text for text in arguments if text not in words]
        file = find_recipe(file) if file is not None else None
        run(load_config(config_class, file=file, given=given, overrides=overrides))

    parameters = [_arguments(positional)]
    parameters += [_option(each) for each in options.values() if each is not positional]
    parameters.append(_config_option())
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, help=inspect.getdoc(run))(command)


def find_recipe(name: str) -> Path:
    """Return the YAML file that ``--config`` names: a path, or the name of a shipped recipe."""
    if Path(name).is_file():
        return Path(name)
    recipes = {file.stem: file for file in RECIPES.glob("*.yaml")}
    if name not in recipes:
        raise ConfigError(f"{unknown_name('recipe', name, recipes)}, or a YAML file that exists")
    return recipes[name]


def is_override(text: str) -> bool:
    """Tell ``key=value`` from a prompt: an identifier stands before the equals sign."""
    key, equals, _ = text.partition("=")
    return bool(equals) and key.isidentifier()


def _arguments(positional: Option | None) -> inspect.Parameter:
    metavar, text = "[KEY=VALUE]...", "Options as key=value; they win over --options and --config."
    if positional is not None:
        metavar = f"[{positional.name.rstrip('s').upper()}]... {metavar}"
        text = f"{_help(positional)} {text}"
    kind = Annotated[Optional[list[str]], typer.Argument(metavar=metavar, help=text)]  # noqa: UP045
    return _parameter("arguments", kind)


def _config_option() -> inspect.Parameter:
    text = "A YAML file of options, or the name of a shipped recipe."
    return _parameter("config", Annotated[Optional[str], typer.Option(metavar="FILE", help=text)])  # noqa: UP045


def _option(option: Option) -> inspect.Parameter:
    """Declare one option; its text is converted by the config, not by typer."""
    flag = "--" + option.name.replace("_", "-")
    names = [flag, *([option.metadata["short"]] if "short" in option.metadata else [])]
    shown = None if option.default in (None, dataclasses.MISSING) else _text(option.default)
    help = _help(option)
    if option.kind is bool:
        names[0] = f"{flag}/--no-{flag[2:]}"
        info = typer.Option(*names, help=help, show_default=False)
        return _parameter(option.name, Annotated[Optional[bool], info])  # noqa: UP045
    metavar = _metavar(option.kind)
    info = typer.Option(*names, help=help, metavar=metavar, show_default=shown or False)
    return _parameter(option.name, Annotated[Optional[str], info])  # noqa: UP045


def _help(option: Option) -> str:
    """Return an option's help text, which says where it must be given."""
    required = option.default is dataclasses.MISSING
    return f"{option.metadata['help']}{' (required)' if required else ''}"


def _text(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(kind: Any) -> str:
    args = [arg for arg in typing.get_args(kind) if arg is not type(None)]
    if typing.get_origin(kind) is Literal:
        return "NAME"
    short = {"an integer": "INT", "a number": "FLOAT", "a text": "TEXT", "a path": "PATH"}
    kinds = args if args and typing.get_origin(kind) is not tuple else [kind]
    return "|".join(short.get(describe(each), "LIST") for each in kinds)


def _parameter(name: str, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
