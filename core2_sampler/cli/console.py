"""Progress bars on stderr and tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core2_sampler.progress import rich_progress

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@dataclass(frozen=True, slots=True)
class Bars:
    """Named progress bars; they appear with the first progress."""

    progress: Progress
    tasks: Mapping[str, TaskID]

    def advance(self, name: str, count: int) -> None:
        """Move a bar on by ``count``."""
        self.progress.start()
        self.progress.advance(self.tasks[name], count)

    def set(self, name: str, done: int, total: int) -> None:
        """Set a bar to ``done`` of ``total``."""
        self.progress.start()
        self.progress.update(self.tasks[name], completed=done, total=total)


@contextmanager
def progress_bars(totals: Mapping[str, int | None], shown: bool = True) -> Iterator[Bars]:
    """Show a bar for each name.

    Args:
        totals: what each bar counts up to; None is not known yet.
        shown: False shows nothing, as in all processes but the first.
    """
    progress = rich_progress(shown)
    try:
        yield Bars(progress, {name: progress.add_task(name, total=totals[name]) for name in totals})
    finally:
        if progress.live.is_started:
            progress.stop()


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; cells are shown as they are, brackets included."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, show_header=any(header))
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)
