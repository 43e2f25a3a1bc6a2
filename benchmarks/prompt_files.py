"""Files of prompts, in every format that a prompt list is published in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_PARQUET = (
    " (with pandas and pyarrow: pandas.read_parquet(FILE)[['caption']].to_json('list.jsonl', "
    "orient='records', lines=True))"
)

Row = dict[str, Any]
"""One row of a list, by column."""


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a prompt list: csv, tsv, json, jsonl or txt with one prompt a line.

    Raises:
        ValueError: if the file is of another kind, or is not what its name says.
    """
    readers: dict[str, Callable[[str], Iterable[Any]]] = {
        ".csv": _read_csv,
        ".tsv": lambda text: csv.DictReader(io.StringIO(text), delimiter="\t"),
        ".json": json.loads,
        ".jsonl": lambda text: map(json.loads, _lines(text)),
        ".txt": _lines,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"a prompt list must be one of {', '.join(readers)}, got {path.name}: write its "
            f"column of prompts to one of them{_PARQUET if path.suffix == '.parquet' else ''}"
        )
    try:
        items = list(readers[path.suffix](path.read_text(encoding="utf-8-sig")))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a {path.suffix[1:]} file in UTF-8: {error}") from None
    rows = [{"prompt": item} if isinstance(item, str) else item for item in items]
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or None in row:
            raise ValueError(
                f"{path} must have texts or named columns in every row, got something else in row "
                f"{index}"
            )
    return rows


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _read_csv(text: str) -> Iterable[Row]:
    """Read a CSV file, or the HPDv2 subset ``index,caption`` whose commas are not quoted."""
    first, *rest = _lines(text) or [""]
    if "caption_zh" in first.split(","):
        return [{"caption": line.partition(",")[2]} for line in rest]
    return csv.DictReader(io.StringIO(text))
