"""``core2 bench merge``: several results tables on one page, each with its source."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from core2_sampler.benchmarks.report import Row, markdown_table, provenance_notes, write_rows
from core2_sampler.config import ConfigError, option
from core2_sampler.trajectory import write_atomic

Sourced = tuple[Row, dict[str, Any]]
"""A row and its provenance."""


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """Options of ``core2 bench merge``."""

    tables: tuple[str, ...] = option(
        help="JSON files of results tables, in the order of the page.", positional=True
    )
    title: str = option("Results", help="Heading of the page.")
    out: Path = option(Path("out/merged.md"), help="The page; its JSON lies beside it.")


def bench_merge(config: MergeConfig) -> None:
    """Put the rows of several results tables on one page, each with its source."""
    if config.out.suffix != ".md" or config.out.is_dir():
        raise ConfigError(f"out must be a file that ends in .md, got {config.out}")
    blocks = [read_rows(Path(name)) for name in config.tables]
    rows = [row for block in blocks for row in block]
    write_rows(config.out.with_suffix(".json"), rows)
    page = "\n\n".join([f"# {config.title}", *map(_block, blocks)]) + "\n"
    write_atomic(config.out, page.encode())
    print(f"{len(rows)} numbers of {len(blocks)} tables in {config.out}")


def read_rows(file: Path) -> list[Sourced]:
    """Read what ``write_rows`` wrote.

    Raises:
        ConfigError: if the file is not there or is no results table.
    """
    names = [field.name for field in fields(Row)]
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        return [(_row({n: each[n] for n in names}), each["provenance"]) for each in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"a table must be the JSON file of a results table, got {file}: {error}"
        ) from error


def _row(record: dict[str, Any]) -> Row:
    numbers: dict[str, Any] = {name: math.nan for name, value in record.items() if value is None}
    return Row(**record | numbers)


def _block(rows: Iterable[Sourced]) -> str:
    """Return one table and what made it."""
    own = list(rows)
    families = ", ".join(dict.fromkeys(row.family for row, _ in own))
    table = markdown_table([row for row, _ in own])
    commands = "\n".join(f"    {each}" for each in dict.fromkeys(row.command for row, _ in own))
    notes = dict.fromkeys(provenance_notes(about) for _, about in own)
    return "\n\n".join([f"## {families}", table, "Made by", commands, *notes])
