"""``core2 bench merge``: several results tables on one page, each with its source."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic
from core2_sampler.benchmarks.options import check_out
from core2_sampler.benchmarks.report import (
    Row,
    markdown_table,
    provenance_notes,
    sources,
    write_rows,
)
from core2_sampler.config import ConfigError, option, user_input

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
    check_out(config.out)
    blocks = [read_rows(Path(name)) for name in config.tables]
    rows = [row for block in blocks for row in block]
    with user_input():
        page = "\n\n".join([f"# {config.title}", *map(_block, blocks)]) + "\n"
    write_rows(config.out.with_suffix(".json"), rows)
    write_atomic(config.out, page.encode())
    print(f"{len(rows)} numbers of {len(blocks)} tables in {config.out}")


def read_rows(file: Path) -> list[Sourced]:
    """Read what ``write_rows`` wrote.

    Raises:
        ConfigError: if the file is not there, is no results table, or has scores, whose units no
            row tells.
    """
    names = [field.name for field in fields(Row)]
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        rows = [(_row({n: each[n] for n in names}), each["provenance"]) for each in records]
        has_scores = any("scorer" in about for _, about in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"a table must be the JSON file of a results table, got {file}: {error}"
        ) from error
    if has_scores:
        raise ConfigError(
            "a table must be of a study of Shapes or of costs, got the scores of `core2 bench "
            f"report` in {file}: that report is a page of its own"
        )
    return rows


def _row(record: dict[str, Any]) -> Row:
    numbers: dict[str, Any] = {name: math.nan for name, value in record.items() if value is None}
    return Row(**record | numbers)


def _block(rows: Iterable[Sourced]) -> str:
    """Return the tables of one file, one for each provenance, and what made them."""
    groups: dict[str, list[Row]] = {}
    for row, about in rows:
        groups.setdefault(provenance_notes(about), []).append(row)
    families = dict.fromkeys(row.family for own in groups.values() for row in own)
    parts = [f"## {', '.join(families)}"]
    for notes, own in groups.items():
        parts += [markdown_table(own), *sources(own, notes)]
    return "\n\n".join(parts)
