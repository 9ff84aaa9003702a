"""A progress bar on stderr for work whose length shows while it runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Nothing is shown before the first step, nor where stderr is no terminal."""

    def __init__(self, label: str):
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.label, self.task, self.done = label, None, 0

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def at(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self.done = done
        if self.task is None:
            self.task = self.progress.add_task(self.label, total=total)
        self.progress.update(self.task, completed=done, total=total)

    def step(self, total: int) -> None:
        """One more of `total` is done."""
        self.at(self.done + 1, total)
