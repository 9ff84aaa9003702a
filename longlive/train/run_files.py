"""A run's checkpoints seen from the loop: what is saved of it, and how it goes on from one.

A task that keeps more than weights (its place in the data, error buffers) has `state()` and `restore(state)`: dictionaries with string keys, of
tensors and plain values, of this rank. Where a run is resumed on other ranks, `merged(states)` makes one state from those of all ranks that
wrote; without it, rank r takes the state of rank r modulo their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..core.errors import CheckpointError
from ..core.log import logger
from ..parallel.data_parallel import Replicas
from . import checkpoint
from .checkpoint import SINGLE_FILE, RankStates, RunState, Writer
from .players import Player
from .single_file import resume_single_file
from .state import random_state, set_random_state


@runtime_checkable
class Keeps(Protocol):
    """A task with a state beside its weights."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Merges(Protocol):
    """A task whose states of several ranks make one that any rank can restore."""

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]: ...


@runtime_checkable
class Descends(Protocol):
    """A task whose weights come from others. `origin`: what those said of themselves that holds for all that come of them (JSON)."""

    origin: dict[str, Any]


class RunFiles:
    """Saves and resumes one run of one task. Every rank makes one and calls it alike."""

    def __init__(self, task, players: Sequence[Player], logdir: Path, *, config: dict, replicas: Replicas, keep: int):
        self.task, self.players, self.logdir, self.config, self.replicas, self.keep = task, players, logdir, config, replicas, keep
        self.writer: Writer | None = None

    @property
    def topology(self) -> dict[str, int]:
        return {"world": self.replicas.size, "sp": self.config.get("infra", {}).get("sequence_parallel_size", 1)}

    def save(self, state: RunState) -> None:
        """Begins to write a checkpoint of everything; training may go on as soon as this returns."""
        if self.writer is None:
            self.writer = Writer(self.logdir, self.keep)
        own = {"random": random_state(self.task.device), "task": self.task.state() if isinstance(self.task, Keeps) else {}}
        plain, tensors = {}, {}
        for key, value in own.items():
            plain[key], found = checkpoint.split(value, key)
            tensors |= found
        about = {"trainer": self.task.name, "topology": self.topology, "config": self.config, "config_hash": checkpoint.config_hash(self.config)}
        about |= {"origin": self.task.origin} if isinstance(self.task, Descends) else {}
        trained = {name: tensor for player in self.players for name, tensor in checkpoint.player_tensors(player).items()}
        self.writer.save(state, trained, (plain, tensors), about)

    def poll(self) -> None:
        if self.writer is not None:
            self.writer.poll()

    def wait(self) -> None:
        if self.writer is not None:
            self.writer.wait()

    def resume(self) -> RunState | None:
        """Restores the newest checkpoint of the logdir; None where there is none. Raises CheckpointError for one that is damaged or of another run."""
        folder = self._newest()
        if folder is None:
            return None
        if (folder / SINGLE_FILE).is_file():
            (player,) = self.players
            state = resume_single_file(folder, player.trained, player.optimizer, player.ema, trainer=self.task.name)
        else:
            run = checkpoint.read_run(folder, self.task.name)
            checkpoint.note_changes(run, self.config)
            checkpoint.load(folder, self.players)
            self._resume_rank(folder, run)
            state = RunState(run["step"], run["elapsed"])
        logger.info("resumed from %s at step %d", folder, state.step)
        return state

    def note_others(self) -> None:
        """Says that the logdir of a run which starts afresh holds checkpoints, the highest of which a later run would go on from."""
        if found := checkpoint.folders(self.logdir):
            logger.warning(
                "%s holds checkpoints of another run; the next run there without --no-auto-resume goes on from the highest step (now %s)",
                self.logdir,
                found[-1].name,
            )

    def _newest(self) -> Path | None:
        """The same on every rank, or CheckpointError."""
        found = checkpoint.folders(self.logdir)
        own = checkpoint.step_of(found[-1]) if found else -1
        step = int(self.replicas.maximum(float(own))[0])
        missing = self.replicas.maximum(float(own != step))[0]
        if missing:
            there = f"some processes find step {step} in {self.logdir} and some do not"
            raise CheckpointError(f"{there}; put --logdir on a file system that all hosts share, or use --no-auto-resume")
        return found[-1] if found else None

    def _resume_rank(self, folder: Path, run: dict) -> None:
        """On the topology that wrote it, a rank gets exactly what it had."""
        rank, same = self.replicas.rank, run["topology"] == self.topology
        if same:
            set_random_state(RankStates(folder, run, "random")[rank], self.task.device)
        if not isinstance(self.task, Keeps):
            return
        states = RankStates(folder, run, "task")
        if same:
            self.task.restore(states[rank])
        else:
            self.task.restore(self.task.merged(states) if isinstance(self.task, Merges) else states[rank % len(states)])
