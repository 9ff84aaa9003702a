"""Full training state on disk: what a stopped run needs to go on exactly as if it had not stopped.

Layout: LOGDIR/checkpoint_model_{step:06d}/ with torch.distributed.checkpoint's files (every rank writes its own shards; `generator.*`, `generator_ema.*`,
`generator_optimizer.*`, the same of every further player, and `rank.{r}.*` for what belongs to one rank) and `run.json`: step, clock, trainer,
configuration, topology, plain values of the ranks, and the size of every file. A save copies the state to host memory and returns; it is written beside
training into a folder of another name, which is renamed when it is complete. So a folder of that name is whole, or damaged: it is never passed over for
an older one.

Resuming (same run, everything restored) and starting from a checkpoint (`checkpoints.generator_ckpt`, weights only) are two things (spec training §9.1, D13).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ..core.errors import CheckpointError, InputError
from ..core.log import logger
from ..models.files import RUN_FILE, read_sharded, run_record, sharded_sizes
from .players import Player
from .state import entry, optimizer_targets, optimizer_tensors, set_optimizer

SINGLE_FILE = "model.pt"
PATIENCE = timedelta(hours=1)  # for the slowest rank's writing
RESUMED = ("elapsed", "topology", "config", "config_hash", "ranks")  # of run.json: what going on needs besides
_FOLDER = re.compile(r"checkpoint_model_(\d+)$")


@dataclass(frozen=True)
class RunState:
    """Where a run stands: optimiser steps done and seconds on the training clock."""

    step: int = 0
    elapsed: float = 0.0


def folders(logdir: Path) -> list[Path]:
    """The checkpoints in `logdir`, oldest first."""
    found = [p for p in logdir.glob("checkpoint_model_*") if _FOLDER.match(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(_FOLDER.match(folder.name)[1])


def config_hash(config: Mapping) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


class Writer:
    """Writes the checkpoints of one run, one at a time, beside training. Every rank makes one and calls it alike."""

    def __init__(self, logdir: Path, keep: int = 0):
        """`keep`: the newest so many stay, 0 = all. Removes what an interrupted save of an earlier run left behind."""
        self.logdir, self.keep = logdir, keep
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.job: Future | None = None
        self.saved_step = -1
        if self.rank == 0:
            for partial in logdir.glob("checkpoint_model_*.tmp"):
                shutil.rmtree(partial, ignore_errors=True)

    def save(self, state: RunState, tensors: dict[str, torch.Tensor], own: tuple[Any, dict[str, torch.Tensor]], about: dict) -> None:
        """Copies the state to host memory and begins to write it; waits first for a save that is still being written.

        `tensors`: the run's, the same names on every rank. `own`: this rank's (plain values, tensors). `about`: further entries of run.json.
        """
        if state.step == self.saved_step:
            return
        self.wait()
        folder = self.logdir / f"checkpoint_model_{state.step:06d}"
        partial = folder.with_name(folder.name + ".tmp")
        plain, own_tensors = own
        everything = {**tensors, **{f"rank.{self.rank}.{name}": tensor for name, tensor in own_tensors.items()}}
        ranks = self._gathered(plain)
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            self.logdir.mkdir(parents=True, exist_ok=True)
        self._gathered(None)  # nobody writes before the old folder is gone
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        written = dcp.async_save(everything, checkpoint_id=partial, process_group=self.group, no_dist=self.size == 1)
        run = {"step": state.step, "elapsed": state.elapsed, "world": self.size, "torch": torch.__version__, **about, "ranks": ranks}
        self.job = self.executor.submit(self._publish, written, partial, folder, run)
        self.saved_step = state.step

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, on rank 0. A barrier, too."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _publish(self, written: Future, partial: Path, folder: Path, run: dict) -> None:
        """In the writing thread: when all ranks have written, rank 0 makes the folder appear and removes the oldest."""
        written.result()
        if self.rank:
            return
        run["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        with (partial / RUN_FILE).open("w", encoding="utf-8") as file:
            json.dump(run, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        earlier = [f for f in folders(self.logdir) if step_of(f) <= run["step"]]  # a later step is another run's
        for old in earlier[: -self.keep] if self.keep else []:
            shutil.rmtree(old, ignore_errors=True)

    def poll(self) -> None:
        """Raises the error of a save that has failed meanwhile."""
        if self.job is not None and self.job.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises InputError where the checkpoint could not be written."""
        if self.job is None:
            return
        job, self.job = self.job, None
        try:
            job.result()
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise InputError(f"a checkpoint could not be written to {self.logdir} ({reason}); check the free space, or train with --no_save") from error


def read_run(folder: Path, trainer: str) -> dict:
    """run.json of a complete checkpoint. Raises CheckpointError for one that is damaged or of another trainer."""
    try:
        run = run_record(folder, RESUMED)
    except (OSError, ValueError) as error:
        raise damaged(folder, str(error)) from error
    if run["trainer"] != trainer:
        raise CheckpointError(f"{folder} was written by trainer {run['trainer']!r}, not {trainer!r}; use another --logdir or --no-auto-resume")
    return run


def damaged(folder: Path, reason: str) -> CheckpointError:
    """The newest checkpoint cannot be read. An older one is the user's choice, not ours."""
    older = [f for f in folders(folder.parent) if step_of(f) < step_of(folder)]
    remedy = f"remove it to go on from {older[-1].name}" if older else "remove it to start from the beginning"
    return CheckpointError(f"checkpoint {folder} is damaged ({reason}); {remedy}, or use --no-auto-resume")


def player_tensors(player: Player) -> dict[str, torch.Tensor]:
    """A player's state by name: shards where parameters are sharded, sharing memory with what trains."""
    tensors = {f"{player.name}.{name}": tensor.detach() for name, tensor in player.trained.state_dict().items()}
    tensors |= {f"{player.name}_ema.{name}": tensor for name, tensor in player.ema.tensors().items()}
    return tensors | optimizer_tensors(player.optimizer, player.trained, player.name)


def load(folder: Path, players: Sequence[Player]) -> None:
    """Restores weights, EMA and optimizer state in place, whatever topology wrote them. Every rank must call it.

    An EMA that the checkpoint lacks starts from its weights. Raises CheckpointError for another model or a damaged file.
    """
    sizes, targets, states = sizes_in(folder), {}, []
    for player in players:
        own = {f"{player.name}.{name}": tensor.detach() for name, tensor in player.trained.state_dict().items()}
        theirs = {name: shape for name, (shape, _) in sizes.items() if name.startswith(f"{player.name}.")}
        _check_model(folder, {name: tuple(t.shape) for name, t in own.items()}, theirs)
        targets |= own
        if _has_ema(player, sizes):
            targets |= {f"{player.name}_ema.{name}": tensor for name, tensor in player.ema.tensors().items()}
        kept = {name: size for name, size in sizes.items() if name.startswith(entry(player.name))}
        states.append(optimizer_targets(player.trained, kept, player.name))
    _read(folder, {**targets, **{name: tensor for state in states for name, tensor in state.items()}})
    for player, state in zip(players, states):
        set_optimizer(player.optimizer, player.trained, state, player.name)
        if not _has_ema(player, sizes):
            for name, tensor in player.ema.tensors().items():
                tensor.copy_(targets[f"{player.name}.{name}"])


def _has_ema(player: Player, sizes: Mapping) -> bool:
    return any(name.startswith(f"{player.name}_ema.") for name in sizes)


def sizes_in(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        return sharded_sizes(folder)
    except CheckpointError as error:
        raise damaged(folder, str(error)) from error


def _check_model(folder: Path, ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> None:
    wrong = [name for name in ours if theirs.get(name) != ours[name]] + [name for name in theirs if name not in ours]
    if wrong:
        name = wrong[0]
        here, there = (f"{list(side[name])}" if name in side else "absent" for side in (ours, theirs))
        raise CheckpointError(f"{folder} holds another model: {name} is {there} there and {here} here; use another --logdir or --no-auto-resume")


def _read(folder: Path, targets: dict[str, torch.Tensor]) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.load(targets, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise damaged(folder, reason) from error


class RankStates(Sequence):
    """What every rank of the run that wrote `folder` kept for itself; one is read when it is asked for."""

    def __init__(self, folder: Path, run: dict, key: str):
        self.folder, self.ranks, self.key = folder, run["ranks"], key

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, rank: int) -> Any:
        prefix = f"rank.{rank}."
        sizes = {n: s for n, s in sizes_in(self.folder).items() if n.startswith(f"{prefix}{self.key}.")}
        tensors = read_sharded(self.folder, sizes) if sizes else {}
        return join(self.ranks[rank][self.key], {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})


def split(tree: Any, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tree of dictionaries with string keys, as JSON with the names of its tensors in their places, and those tensors under `name`.*"""
    tensors: dict[str, torch.Tensor] = {}

    def plain(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[path] = node.detach()
            return {"tensor": path}
        if isinstance(node, Mapping):
            return {"tree": {key: plain(value, f"{path}.{key}") for key, value in node.items()}}
        return node

    return plain(tree, name), tensors


def join(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `split`."""
    if isinstance(plain, Mapping):
        return tensors[plain["tensor"]] if "tensor" in plain else {key: join(value, tensors) for key, value in plain["tree"].items()}
    return plain


def changed_keys(before: Mapping, now: Mapping, prefix: str = "") -> Iterator[str]:
    """Dotted names of values that differ between two nested configurations."""
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key


def note_changes(run: dict, config: Mapping) -> None:
    """Says once what of the configuration is not as the checkpoint knew it."""
    if run["config_hash"] != config_hash(config):
        changed = list(changed_keys(run["config"], json.loads(json.dumps(config, default=str))))
        logger.warning("the configuration has changed since the checkpoint: %s", ", ".join(changed) or "in form only")
