"""The progress bar of film making: chunks, frames per second, time left, and where each result was written."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..core.geometry import FPS


class FilmProgress:
    """A listener of `generate_films`. The bar goes to stderr when that is a terminal, the names of results to stdout."""

    def __init__(self):
        console = Console(stderr=True)
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("chunk {task.completed}/{task.total}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.out = Console(soft_wrap=True, highlight=False, markup=False)
        self.task = None
        self.frames, self.started, self.note = 0, 0.0, ""

    def __enter__(self) -> "FilmProgress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def loading(self, model: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, speed=f"loading {model}")

    def film(self, number: int, films: int, title: str, chunks: int) -> None:
        words = " ".join(title.split())
        text = words if len(words) <= 40 else words[:37] + "..."
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(f"{f'film {number + 1}/{films} ' if films > 1 else ''}{text}", total=chunks, speed="")
        self.frames, self.started, self.note = 0, time.perf_counter(), ""

    def chunk(self, result) -> None:
        if self.frames == 0:
            self.started = time.perf_counter() - result.seconds["total"]
        count = 0 if result.frames is None else result.frames.shape[0] * result.frames.shape[1]
        self.frames += count
        speed = f"{self.frames / max(time.perf_counter() - self.started, 1e-9):.1f} frames/s" if count else "latents"
        self.bar.update(self.task, completed=result.index + 1, speed=speed + self.note)

    def stopping(self) -> None:
        self.note = "  stopping after this chunk"
        if self.task is not None:
            self.bar.update(self.task, speed=self.note.strip())

    def done(self, files) -> None:
        for film in files:
            self.out.print(f"{film.film}  ({film.frames} frames, {film.frames / FPS:.1f} s)")
