"""A process's share of the work, and files that several processes change."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Shard:
    """This process's share of the work.

    Attributes:
        index: its number, from 0.
        total: how many share the work.
    """

    index: int = 0
    total: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.index < self.total:
            raise ValueError(
                f"a shard must be i/n with i from 0 to n - 1, got {self.index}/{self.total}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Raises:
            ValueError: if it is something else.
        """
        index, _, total = text.partition("/")
        if not (index.isdecimal() and total.isdecimal()):
            raise ValueError(f"a shard must be i/n with i from 0 to n - 1, got {text!r}")
        return cls(int(index), int(total))

    def split(self, index: int, total: int) -> Shard:
        """Return the share of one of several processes that work on this shard.

        Its items are items of this shard, so other shards may be split into other numbers.
        """
        return Shard(self.index + index * self.total, self.total * total)

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return every n-th item, from this shard's number on."""
        return items[self.index :: self.total]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that lock the same file waiting; a killed one keeps nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
