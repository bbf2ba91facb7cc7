"""How a run shows where it is: bars with ETA on a terminal, one line per stage in a log, on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Told what a run is doing."""

    def stage(self, name: str, total: int) -> None:
        """A new stage of `total` steps has begun."""

    def advance(self, done: int, detail: str = "") -> None:
        """`done` steps of the stage are finished; `detail` is what comes now."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """Tells nobody."""

    def stage(self, name: str, total: int) -> None:
        """Ignore."""

    def advance(self, done: int, detail: str = "") -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


class Bars:
    """Bars of rich, one per stage."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.task: Any = None

    def stage(self, name: str, total: int) -> None:
        """Finish the bar of the stage before, and start one."""
        if self.task is not None:
            self.bars.update(self.task, completed=self.bars.tasks[self.task].total, detail="")
        self.task = self.bars.add_task(name, total=total, detail="")

    def advance(self, done: int, detail: str = "") -> None:
        """Move the bar."""
        if self.task is not None:
            self.bars.update(self.task, completed=done, detail=detail)

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.bars.console.print(text, highlight=False, markup=False)


class Lines(Silent):
    """Notes only: a log is no place for bars."""

    def note(self, text: str) -> None:
        """A line on stderr."""
        sys.stderr.write(text + "\n")


@contextmanager
def reporter() -> Iterator[Progress]:
    """Bars when stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield Bars(bars)


def staged(progress: Progress) -> Callable[[str, int, int], None]:
    """A callback (what, done, total) that opens a stage whenever `what` is new."""
    seen: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen.append(what)
            progress.stage(what, total)
        progress.advance(done)

    return tell
