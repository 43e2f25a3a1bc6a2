"""Options declared once: a dataclass field with its help text serves YAML, overrides and the CLI.

A config is a frozen dataclass. Each field's ``metadata`` carries ``help`` and, where they apply,
``min`` and ``max`` (inclusive bounds), ``short`` (a one-letter flag) and ``positional`` (takes the
command's arguments; a bare text for it is one of them, commas and all). A field that is itself a
config lends its options to the outer one. Values come, from weak to strong, from the field's
default, a YAML file, the command line's options, ``key=value`` overrides.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from core2_sampler.registry import unknown_name

Config = TypeVar("Config")


class ConfigError(ValueError):
    """The user's input is wrong; the command line shows the text as one line and exits with 2."""


@contextmanager
def user_input() -> Iterator[None]:
    """Turn the errors of checks inside the context into ConfigErrors: the input was wrong."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def check_folder(path: Path, name: str = "output") -> None:
    """Check that a folder can be written to, or made, before the work whose results go there.

    Args:
        path: the folder; it need not exist.
        name: of the option, for the error.

    Raises:
        ConfigError: if a file is in its place or on the way to it, or writing is not allowed.
    """
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    if there == path and not there.is_dir():
        raise ConfigError(f"{name} must be a folder, got the file {path}")
    reason = "cannot be written to" if there.is_dir() else "is not a folder"
    raise ConfigError(
        f"{name} must be a folder that can be written to, got {path}: {there} {reason}"
    )


def option(default: Any = dataclasses.MISSING, *, help: str, **metadata: Any) -> Any:
    """Declare an option: a dataclass field with its help text.

    Args:
        default: the value without any input; left out, the option is required.
        help: one sentence, shown by ``--help``.
        metadata: ``min``, ``max``, ``short``, ``positional``, as in the module's docstring.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def load_config(
    config_class: type[Config],
    *,
    file: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Build a config from defaults, a YAML file, given values and ``key=value`` overrides.

    Args:
        config_class: a dataclass whose fields were declared with :func:`option`.
        file: a YAML file with one mapping.
        given: values by field name; strings are converted.
        overrides: ``key=value`` texts, the strongest.

    Raises:
        ConfigError: on an unknown key, a value of the wrong type or out of bounds, a missing
            required option, or a file that cannot be read.
    """
    layers = [
        (str(file), read_yaml(file) if file is not None else {}),
        ("the options", dict(given or {})),
        ("the overrides", dict(split_override(text) for text in overrides)),
    ]
    known = options_of(config_class)
    values: dict[str, Any] = {}
    for source, layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise ConfigError(f"{unknown_name('option', key, known)} (in {source})")
            values[key] = convert(_argument(value, known[key]), known[key].kind, key)
            check_bounds(values[key], known[key].metadata, key)
    for name, each in known.items():
        if each.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{name} must be given: {each.metadata['help']}")
    return _build(config_class, values)


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A declared option: its name, resolved type, default (or MISSING) and metadata."""

    name: str
    kind: Any
    default: Any
    metadata: Mapping[str, Any]


def options_of(config_class: type) -> dict[str, Option]:
    """Return the options of a config by name; those of a nested config count as its own."""
    hints = typing.get_type_hints(config_class)
    found: dict[str, Option] = {}
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        inner = {field.name: Option(field.name, kind, field.default, field.metadata)}
        if dataclasses.is_dataclass(kind):
            inner = options_of(typing.cast(type, kind))
        if twice := sorted(inner.keys() & found.keys()):
            raise TypeError(f"options of {config_class.__name__} must be unique, got {twice} twice")
        found |= inner
    return found


def _argument(value: Any, option: Option) -> Any:
    """Return one of the command's arguments as a list of one: a prompt may have commas."""
    bare = isinstance(value, str) and not value.lstrip().startswith("[")
    several = typing.get_origin(option.kind) is tuple
    return [value] if bare and several and option.metadata.get("positional") else value


def _build(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    try:
        return config_class(**arguments)
    except ValueError as error:  # options that do not go together
        raise ConfigError(str(error)) from None


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; an empty file is an empty mapping."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config must be a readable file, got {file} ({error.strerror})"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{file} must be valid YAML: {text}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping `key: value`, got {type(content).__name__}")
    return content


def split_override(text: str) -> tuple[str, str]:
    """Split ``key=value`` at its first equals sign."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f"an override must look like key=value, got {text!r}")
    return key, value


def check_bounds(value: Any, metadata: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError where a number leaves the bounds that its field declares."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if "min" in metadata and number < metadata["min"]:
                raise ConfigError(f"{name} must be at least {metadata['min']}, got {number}")
            if "max" in metadata and number > metadata["max"]:
                raise ConfigError(f"{name} must be at most {metadata['max']}, got {number}")


def convert(value: Any, kind: Any, name: str) -> Any:
    """Convert a YAML value or a text to the type of a field.

    Args:
        value: what the user gave.
        kind: the field's type: bool, int, float, str, Path, Literal, tuple[X, ...] or a union.
        name: the field's name, for the error.

    Raises:
        ConfigError: if the value is not of that type.
    """
    try:
        return _convert(value, kind)
    except (ValueError, TypeError):
        pass
    if typing.get_origin(kind) is Literal and isinstance(value, str):
        raise ConfigError(str(unknown_name(name, value, typing.get_args(kind))))
    raise ConfigError(f"{name} must be {describe(kind)}, got {value!r}")


def describe(kind: Any) -> str:
    """Name a field's type in plain words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list of {describe(args[0]).removeprefix('an ').removeprefix('a ')}s"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a text",
        Path: "a path",
        types.NoneType: "none",
    }
    return names[kind]


def _convert(value: Any, kind: Any) -> Any:
    """Convert or raise ValueError or TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        if value not in args:
            raise ValueError
        return value
    if origin is tuple:
        return tuple(_convert(item, args[0]) for item in _as_list(value))
    if kind is types.NoneType:
        if value is not None and str(value).lower() not in ("none", "null"):
            raise ValueError
        return None
    if kind is bool:
        return _as_bool(value)
    if kind in (str, Path):
        if not isinstance(value, (str, Path)):
            raise TypeError
        return kind(value)
    return _as_number(value, kind)


def _convert_union(value: Any, kinds: Sequence[Any]) -> Any:
    """Convert to the first type that fits; texts stay texts where a text is allowed."""
    if isinstance(value, str) and str in kinds:
        return value
    for kind in kinds:
        try:
            return _convert(value, kind)
        except (ValueError, TypeError):
            continue
    raise ValueError


def _as_list(value: Any) -> list[Any]:
    """Read a list: a YAML list, a text ``[a, b]`` or ``a,b``."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError from None
        else:
            value = value.split(",")
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return list(value)


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in ("true", "yes", "false", "no"):
        raise ValueError
    return text in ("true", "yes")


def _as_number(value: Any, kind: type[int] | type[float]) -> int | float:
    """Read an int or a finite float; never a bool, never a rounded value."""
    if isinstance(value, bool) or not isinstance(value, (str, int, kind)):
        raise TypeError
    number = kind(value)
    if not math.isfinite(number):
        raise ValueError
    return number
