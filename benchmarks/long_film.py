"""A long film as a user makes it, watched from outside: memory while it is generated, then how well it holds up over its length.

    python benchmarks/long_film.py OUTPUT [--chunks 450] [--shots 75] [--seed 7] [key=value ...]

450 chunks are ten minutes. The film is one held-out story of the small world; `longlive generate` runs as a process of its own, its resident set is
read every ten seconds, and the finished file is judged chunk by chunk. Memory swings within every chunk, so growth is that of its peaks: the largest
sample after the third minute less the largest of the second and third. Writes OUTPUT/long_film.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml

from longlive.core.geometry import chunk_pixel_range
from longlive.data.videos import decode_frames
from longlive.evaluation.drift import DriftMeter, curve
from longlive.world.judge import Judge
from longlive.world.story import evaluation_story

SAMPLE_SECONDS = 10.0
INTERRUPTED = 130  # a shorter film, closed and playable


def watch(command: list[str]) -> tuple[int, list[tuple[float, float]]]:
    """Runs `command`; returns its exit code and (seconds since start, resident MB) samples."""
    started, samples = time.monotonic(), []
    with subprocess.Popen(command) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            samples.append((round(time.monotonic() - started, 1), round(process.memory_info().rss / 2**20, 1)))
            try:
                child.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return child.returncode, samples


def drift(film: Path, story, window: float = 20.0) -> list[dict[str, float]]:
    """The judge's scores per `window` seconds, read from the film's file at constant memory."""
    meter, frames, chunk = DriftMeter(judge=Judge.load(), story=story, window=window), [], 0
    for picture in decode_frames(film):
        frames.append(np.asarray(picture))
        first, last = chunk_pixel_range(chunk)
        if len(frames) == last - first:
            meter.feed(torch.from_numpy(np.stack(frames)))
            frames, chunk = [], chunk + 1
    return curve([meter])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--chunks", type=int, default=450)
    parser.add_argument("--shots", type=int, default=75)
    parser.add_argument("--seed", type=int, default=7)
    args, overrides = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    story = evaluation_story(args.seed, 0, chunks=args.chunks, shots=(args.shots, args.shots))
    board = args.output / "long_film.yaml"
    shots = [{"prompt": shot.caption, "chunks": shot.chunks} for shot in story.shots]
    board.write_text(yaml.safe_dump({"title": "Long film", "seed": args.seed, "shots": shots}), encoding="utf-8")
    films = args.output / "film"
    command = [sys.executable, "-m", "longlive", "generate", str(board), "--output", str(films), "--overwrite", "--quiet", *overrides]
    started = time.monotonic()
    code, samples = watch(command)
    seconds = time.monotonic() - started
    if code not in (0, INTERRUPTED):
        return code
    early = [megabytes for at, megabytes in samples if 60 <= at < 180]
    later = [megabytes for at, megabytes in samples if at >= 180]
    film = next(films.glob("*.mp4"))
    result = {"command": " ".join(command[1:]), "seconds": round(seconds, 1), "chunks": args.chunks, "resident_megabytes": samples}
    result["growth_after_first_minute"] = round(max(later) - max(early), 1) if early and later else None
    result["curve"] = drift(film, story)
    (args.output / "long_film.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{film}: {seconds:.0f} s, memory after the first minute grew by {result['growth_after_first_minute']} MB; {args.output / 'long_film.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
