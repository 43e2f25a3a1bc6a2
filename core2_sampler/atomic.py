"""Write files whole."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes, writer: int = 0) -> None:
    """Write a file so that it is there complete, and durable, or not at all.

    Args:
        path: the file; its folder is made.
        data: its content.
        writer: number of the process, so that two may write one file at the same time; a killed
            process leaves at most ``<name>.<writer>.tmp``, which its next write replaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{writer}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
