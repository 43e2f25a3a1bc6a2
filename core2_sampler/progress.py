"""Progress bars on stderr with the time that is left, and host libraries that keep quiet."""

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

    def set(self, done: int) -> None:
        """Say how far it is."""
        self.progress.update(self.task, completed=done)

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
    with rich_progress(shown) as progress:
        yield Bar(progress, progress.add_task(name, total=total), total)


def rich_progress(shown: bool = True) -> Progress:
    """Return rich's progress bars with the columns that all of ours have."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def hide_loading() -> None:
    """Turn off the bars that diffusers and transformers show while they load or write weights."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep both host libraries from warnings, such as the text of every prompt that is cut."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
