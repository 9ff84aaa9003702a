"""The progress bar says how fast it goes and how long it will take; results are named on stdout."""

import io
import time
from pathlib import Path

import torch
from rich.console import Console

from longlive.cli import progress
from longlive.engine.films import FilmFiles
from longlive.engine.session import ChunkResult


def result(index):
    return ChunkResult(
        index=index, latents_BFCHW=torch.zeros(1), frames=torch.zeros(1, 32, 2, 2, 3, dtype=torch.uint8), plans=(), seconds={"total": 0.02}
    )


def test_frames_per_second_and_time_left(monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **how: Console(file=screen, force_terminal=True, width=160) if how.get("stderr") else Console(**how))
    with progress.FilmProgress() as bar:
        bar.film(0, 2, "a [red] circle\nwalks", 500)
        for index in range(4):
            time.sleep(0.02)
            bar.chunk(result(index))
        bar.stopping()
        bar.chunk(result(4))
        bar.bar.refresh()
        shown = screen.getvalue()
        bar.done([FilmFiles(film=Path("a.mp4"), prompts=Path("p"), receipt=Path("r"), index=0, sample=0, chunks=5, frames=157)])
    assert "film 1/2 a [red] circle walks" in shown and "chunk 5/500" in shown and "stopping after this chunk" in shown
    speed = float(shown.split(" frames/s")[-2].split()[-1])
    assert 100 < speed <= 5 * 32 / 0.08
    assert 0 < bar.bar.tasks[0].time_remaining < 600
    assert capsys.readouterr().out.strip() == "a.mp4  (157 frames, 6.5 s)"
