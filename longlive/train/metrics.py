"""metrics.jsonl: one row per step, written in batches so that reading a loss never stalls the device.

Rows are kept as device tensors and read together every few seconds; that is also when a loss that is not a number stops the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..core.errors import LongLiveError

EVALUATIONS = "evaluations.jsonl"


class Metrics:
    """Appends rows to `path` (None: only keeps the last ones) and hands them to `tracker`.

    `resume_step`: the run goes on after that step; later rows in the file are dropped. None: the file starts anew.
    """

    def __init__(self, path: Path | None, resume_step: int | None = None, tracker: Callable[[dict], None] | None = None):
        self.path, self.tracker, self.pending, self.last = path, tracker, [], {}
        for file in (path, path.with_name(EVALUATIONS)) if path is not None else ():
            kept = []
            if resume_step is not None and file.exists():
                kept = [line for line in file.read_text(encoding="utf-8").splitlines() if line and json.loads(line)["step"] <= resume_step]
            if kept or file == path or file.exists():
                file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        """`tensors`: scalars on the device (read later); `numbers`: known on the host."""
        self.pending.append((step, list(tensors), torch.stack([t.detach().float() for t in tensors.values()]), numbers))

    def note(self, step: int, columns: dict[str, float]) -> None:
        """A row of its own, written at once: measurements that are not of a step."""
        self.flush()
        row = {"step": step, **columns}
        if self.path is not None:
            with self.path.with_name(EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _number(v) for k, v in row.items()}) + "\n")
        if self.tracker is not None:
            self.tracker(row)

    def flush(self) -> dict[str, float]:
        """Writes what is pending and returns the means of its losses. Raises LongLiveError when one is not finite and its step was not skipped.

        Skipped (a column of its own) is a step with a gradient that is not finite.
        """
        if not self.pending:
            return self.last
        values = torch.cat([tensors for _, _, tensors, _ in self.pending]).cpu().split([len(names) for _, names, _, _ in self.pending])
        rows = [{"step": step, **dict(zip(names, value.tolist())), **numbers} for (step, names, _, numbers), value in zip(self.pending, values)]
        rows = [row if all(map(math.isfinite, _of(row, "grad_norm").values())) else row | {"skipped": 1} for row in rows]
        self.pending = []
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({k: _number(v) for k, v in row.items()}) + "\n" for row in rows)
        for row in rows if self.tracker is not None else ():
            self.tracker(row)
        broken = next((row for row in rows if not all(map(math.isfinite, _of(row, "loss").values())) and "skipped" not in row), None)
        if broken:
            (name, value), *_ = ((k, v) for k, v in _of(broken, "loss").items() if not math.isfinite(v))
            raise LongLiveError(
                f"the {name.replace('_', ' ')} of step {broken['step']} is {value}: training stopped, the last saved weights are kept; "
                "use a lower training.lr or a longer training.warmup_steps"
            )
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        self.last = {name: _mean([row[name] for row in rows if name in row]) for name in names}
        return self.last


def _of(row: dict[str, float], kind: str) -> dict[str, float]:
    """The columns of this kind, "loss" or "grad_norm", of every player of the run."""
    return {name: value for name, value in row.items() if name in (kind, f"critic_{kind}")}


def _number(value: float) -> float | None:
    return value if isinstance(value, int) else round(value, 6) if math.isfinite(value) else None


def _mean(values: list[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan
