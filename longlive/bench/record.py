"""The record of a benchmark: what it ran on and how, and one entry per case, on disk after every case.

An entry is written as "started" before its case runs, so that a case that ends the process leaves a trace; `resume` goes on after it.
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
    """Hardware, versions, commit and time, for the head of a record."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "longlive": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processes": processes,
        "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": f"{processes} x {card.name}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


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
    """`path` None: nothing is written (other ranks, or no file asked for). `resume`: entries of an earlier run in `path` stay and count as done."""

    def __init__(self, path: Path | None, head: dict, *, resume: bool = False, writes: bool = True):
        self.path, self.writes, self.head, self.cases = path, writes, head, []
        if resume and path is not None and path.is_file():
            self.cases = _read_cases(path)

    def done(self, key: dict) -> bool:
        """Whether a case with these identifying values has an entry."""
        return any(all(entry.get(name) == value for name, value in key.items()) for entry in self.cases)

    def start(self, key: dict) -> None:
        self.cases.append({**key, "status": STARTED})
        self._write()

    def finish(self, values: dict) -> None:
        """Completes the entry that was started last."""
        self.cases[-1] |= {"status": "done", **values}
        self._write()

    def _write(self) -> None:
        if self.path is not None and self.writes:
            write_json(self.path, {**self.head, "cases": self.cases})


def _read_cases(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a record of a benchmark; give --json another file, or leave --resume out") from None
