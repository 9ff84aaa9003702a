"""The record of a benchmark: a list of rows, one per case, each with how it was measured and on what; on disk after every case.

A row is written as "started" before its case runs, so that a case that ends the process leaves a trace; `resume` goes on after it.
"""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from .. import __version__
from ..core.errors import InputError
from ..engine.json_file import write_json

STARTED = "started"
PACKAGE = Path(__file__).resolve().parents[1]


def surroundings(device: torch.device, processes: int) -> dict:
    """`hardware`, `commit`, `date` and `versions`, as every row of a benchmark has them."""
    hardware = f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    versions = {
        "longlive": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processes": processes,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        hardware = f"{processes} x {card.name}"
        versions |= {
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return {"hardware": hardware, "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions}


def commit() -> str:
    """The commit of the running code, with "+" where files differ from it; "unknown" outside a repository."""
    try:
        here = {"cwd": PACKAGE, "capture_output": True, "text": True, "check": True, "timeout": 20}
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **here).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "."], **here).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name + "+" * bool(changed)


class Record:
    """A row is what names its case, a status, what was measured, then `head` and what it ran on (`surroundings`).

    `path` None: nothing is written (other ranks, or no file asked for). `resume`: rows of an earlier run in `path` stay as they are and count as done.
    """

    def __init__(self, path: Path | None, head: dict, *, resume: bool = False, writes: bool = True):
        self.path, self.writes, self.head, self.rows = path, writes, head, []
        self.key: dict = {}
        if resume and path is not None and path.is_file():
            self.rows = _read_rows(path, head["benchmark"])

    def done(self, key: dict) -> bool:
        """Whether a case with these identifying values has a row."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def start(self, key: dict) -> None:
        self.key = key
        self.rows.append({**key, "status": STARTED, **self.head})
        self._write()

    def finish(self, values: dict) -> None:
        """Completes the row that was started last."""
        self.rows[-1] = {**self.key, "status": "done", **values, **self.head}
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.writes:
            write_json(self.path, self.rows)


def _read_rows(path: Path, benchmark: str) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("benchmark") == benchmark and "status" in row for row in rows):
        raise InputError(f"{path} is not a record of bench {benchmark}: a list of its rows; give --json another file, or leave --resume out")
    return rows
