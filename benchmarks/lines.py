"""Files of JSON lines that only grow: a killed writer leaves at most a line without its end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core2_sampler.atomic import write_atomic


def digest_bytes(data: bytes) -> str:
    """Return the sha256 of bytes in hex digits."""
    return hashlib.sha256(data).hexdigest()


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines to a file, durably; half a line that a killed writer left goes first."""
    append_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file, as `append_lines` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of such a file; none if it is not there."""
    data = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def drop_torn_line(path: Path) -> None:
    """Remove the line without an end that a killed writer may have left."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        data = path.read_bytes()
        write_atomic(path, data[: data.rfind(b"\n") + 1])
