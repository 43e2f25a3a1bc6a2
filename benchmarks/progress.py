"""Progress bars on stderr with the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(slots=True)
class Bar:
    """One progress bar."""

    progress: Any
    task: Any
    total: int

    def advance(self, count: int) -> None:
        """Move on by ``count``."""
        self.progress.advance(self.task, count)

    def add(self, count: int) -> None:
        """Make the way longer by ``count``."""
        self.total += count
        self.progress.update(self.task, total=self.total)


@contextmanager
def progress_bar(name: str, total: int, shown: bool = True) -> Iterator[Bar]:
    """Show a bar.

    Args:
        name: what it counts.
        total: what it counts up to.
        shown: False shows nothing, as in all processes but the first.
    """
    with progress_bars(shown) as progress:
        yield Bar(progress, progress.add_task(name, total=total), total)


def progress_bars(shown: bool = True) -> Progress:
    """Return rich's progress bars with the columns that all of ours have."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
