"""The training loop: a clock, a step, a row of metrics, weights written now and then. It knows neither models nor data.

A `Task` brings a module, batches and a loss. Every random draw of step k comes from a generator seeded by (seed, stream, k), so that a resumed run
draws what the stopped one would have drawn. Ranks that share a sample are one stream: they draw the same.
The clock of `training.max_seconds` starts after `Task.warm_up`: compiling and filling caches is not training.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Protocol, runtime_checkable

import torch
from torch import nn

from ..core.errors import Interrupted, LongLiveError
from ..core.log import logger
from ..parallel.data_parallel import Replicas
from ..parallel.fsdp import gradient_norm, is_sharded, reduce_gradients
from ..precision.training import weights_changed
from .checkpoint import RunState
from .garbage import Garbage
from .guards import SKIPS_IN_A_ROW, Late, SkippedSteps
from .metrics import Metrics
from .optim import guarded_step, learning_rate
from .players import Player, Role
from .run_files import RunFiles
from .state import parts, untouched

WEIGHTS_EVERY = 60.0
REPORT_EVERY = 5.0
SMALL_ENOUGH = 2**30  # bytes of weights that are written for use now and then; larger ones at the end only (`longlive export` serves in between)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long and how fast. `max_steps`, `max_seconds` 0: no limit by that measure (one of them must be given)."""

    optimizer: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    accumulation: int
    warmup_steps: int
    schedule: str
    ema_decay: float
    ema_start_step: int
    max_steps: int
    max_seconds: float
    checkpoint_every: int
    keep: int
    seed: int
    save: bool = True
    evaluate_every: int = 0
    gc_interval: int = 100

    def progress(self, state: RunState) -> float:
        """0 at the start, 1 at the end, by whichever limit is nearer."""
        by_step = state.step / self.max_steps if self.max_steps else 0.0
        by_time = state.elapsed / self.max_seconds if self.max_seconds else 0.0
        return max(by_step, by_time)


@dataclass(frozen=True)
class Draw:
    """Randomness and place of one micro-step: `generator` on the task's device, `host` on the CPU, `progress` 0..1, `step` and `micro` from 0,
    and the `player` that learns."""

    generator: torch.Generator
    host: torch.Generator
    progress: float
    step: int = 0
    micro: int = 0
    player: str = "generator"


class Task(Protocol):
    """What is trained. `name` goes into checkpoints."""

    name: str
    module: nn.Module
    device: torch.device

    def warm_up(self) -> Iterator[Any]:
        """Batches, one of every shape that the run will see (most memory first is kind)."""

    def batch(self, draw: Draw) -> Any: ...

    def loss(self, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and other scalars worth a column; all on the device."""

    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor]) -> None:
        """Writes weights for use (not for resuming). Called on rank 0; on all ranks where the module is sharded, and then rank 0 writes."""

    def finish(self, folder: Path) -> dict[str, float]:
        """Last measurements; they are logged and returned by `fit`."""


@runtime_checkable
class Plays(Protocol):
    """A task with several players: at every step each that is due learns, in this order. `module` is the first one's network."""

    roles: Sequence[Role]


@runtime_checkable
class Evaluates(Protocol):
    """A task that measures itself now and then."""

    def evaluate(self, step: int, ema: dict[str, torch.Tensor]) -> dict[str, float]:
        """After step number `step`, on every rank; `ema` as the EMA keeps it (sharded as the parameters). Returns columns for the metrics."""


def seed_of(*parts: int) -> int:
    """A 63-bit seed from integers, the same on every machine (splitmix64 over the parts)."""
    mask, state = (1 << 64) - 1, 0
    for part in parts:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


class StopRequest:
    """While open, SIGTERM and Ctrl-C set `made` instead of killing the step that runs; a second Ctrl-C kills."""

    def __enter__(self) -> "StopRequest":
        self.made, self.old = False, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.made and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.made = True

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


class Loop:
    """One run of one task in `logdir`. `fit` trains to the limit, or raises Interrupted after saving."""

    def __init__(
        self,
        task: Task,
        settings: LoopSettings,
        logdir: Path,
        *,
        config: dict,
        replicas: Replicas,
        stream: int,
        auto_resume: bool = True,
        tracker: Callable | None = None,
    ):
        self.task, self.settings, self.logdir, self.config, self.replicas, self.stream = task, settings, logdir, config, replicas, stream
        how = {"optimizer": settings.optimizer, "weight_decay": settings.weight_decay, "ema_start_step": settings.ema_start_step}
        self.players = [Player(role, **how) for role in (task.roles if isinstance(task, Plays) else [self._only_role()])]
        self.ema = self.players[0].ema
        self.writes, self.sharded = replicas.rank == 0, is_sharded(task.module)
        self.small = sum(p.numel() * p.element_size() for p in task.module.parameters()) < SMALL_ENOUGH
        self.skipped = SkippedSteps()
        self.unsettled: list[tuple[Late, Player]] = []  # who learned in the last step, and whether that was refused, not yet read
        logdir.mkdir(parents=True, exist_ok=True)
        self.files = RunFiles(task, self.players, logdir, config=config, replicas=replicas, keep=settings.keep)
        resumed = self.files.resume() if auto_resume else None
        if not auto_resume and settings.save and self.writes:
            self.files.note_others()
        self.state = resumed or RunState()
        self.metrics = Metrics(logdir / "metrics.jsonl" if self.writes else None, self.state.step if resumed else None, tracker)

    def _only_role(self) -> Role:
        s, module = self.settings, self.task.module
        return Role(name="generator", network=module, trained=module, lr=s.lr, betas=s.betas, max_grad_norm=s.max_grad_norm, ema_decay=s.ema_decay)

    def fit(self) -> dict[str, float]:
        """Trains, writes weights and measurements, returns the latter."""
        with StopRequest() as stop:
            self._warm_up()
            with Garbage(self.settings.gc_interval) as garbage:
                self._train(stop, garbage)
            self._report()
            self._export()
            self._save()
            self.files.wait()
        results = self.task.finish(self.logdir) if self.writes else {}
        self.replicas.maximum(0.0)
        return results

    def _train(self, stop: StopRequest, garbage: Garbage) -> None:
        """Steps to the limit. What happens at which step is decided by numbers that are equal on all ranks."""
        settings = self.settings
        start = time.perf_counter() - self.state.elapsed
        saved, reported = self.state.elapsed, time.perf_counter()
        while settings.progress(self.state) < 1:
            self._step()
            garbage.after(self.state.step)
            elapsed, asked = self.replicas.maximum(time.perf_counter() - start, float(stop.made))
            self.state = RunState(self.state.step, elapsed)
            now = time.perf_counter()
            if now - reported > REPORT_EVERY:
                reported = now
                self._report()
            self.files.poll()
            if settings.checkpoint_every and self.state.step % settings.checkpoint_every == 0:
                self._save()
            if asked:
                self._stop()
            if settings.evaluate_every and self.state.step % settings.evaluate_every == 0:
                with garbage.as_usual():
                    start += self.evaluate()
            if self.small and elapsed - saved > WEIGHTS_EVERY:
                saved = elapsed
                self._export()

    def rehearse(self) -> dict[str, float]:
        """Warms up and takes one step; returns its measurements, `ms` until the device has done it. Nothing is exported or saved."""
        self._warm_up()
        began = time.perf_counter()
        self._step()
        self._settle()
        row = self.metrics.flush()
        return row | {"ms": 1000 * (time.perf_counter() - began)}

    def _warm_up(self) -> None:
        start = time.perf_counter()
        for count, batch in enumerate(self.task.warm_up()):
            loss, _ = self.task.loss(batch)
            loss.backward()
            for player in self.players:
                player.optimizer.zero_grad(set_to_none=True)
            logger.info("warm-up %d: loss %.4f, %.1f s", count + 1, loss.item(), time.perf_counter() - start)
        self.replicas.maximum(0.0)

    def _draw(self, micro: int, number: int) -> Draw:
        parts = (self.settings.seed, self.stream, self.state.step, micro)
        generator = torch.Generator(self.task.device).manual_seed(seed_of(*parts, 2 * number))
        host = torch.Generator().manual_seed(seed_of(*parts, 2 * number + 1))
        return Draw(generator, host, self.settings.progress(self.state), self.state.step, micro, self.players[number].name)

    def _step(self) -> None:
        began, learned, columns = time.perf_counter(), [], {}
        for number, player in enumerate(self.players):
            if player.due(self.state.step):
                found, refused = self.learn(number, player)
                columns |= {player.role.prefix + name: value for name, value in found.items()}
                learned.append((refused, player))
        rate = self.players[0].optimizer.param_groups[0]["lr"]
        self.state, self.unsettled = RunState(self.state.step + 1, self.state.elapsed), [(Late(refused), player) for refused, player in learned]
        numbers = {"lr": rate, "seconds": self.state.elapsed, "ms": 1000 * (time.perf_counter() - began)}
        self.metrics.add(self.state.step, columns, numbers)

    def learn(self, number: int, player: Player) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One optimizer step of one player: its columns, and 1 on the device where the step was refused."""
        settings, progress, total, columns = self.settings, self.settings.progress(self.state), 0.0, {}
        rate = learning_rate(self.state.step, progress, lr=player.role.lr, warmup_steps=settings.warmup_steps, schedule=settings.schedule)
        for group in player.optimizer.param_groups:
            group["lr"] = rate
        for micro in range(settings.accumulation):
            reduce_gradients(player.network, micro == settings.accumulation - 1)
            loss, columns = self.task.loss(self.task.batch(self._draw(micro, number)))
            (loss / settings.accumulation).backward()
            total = total + loss.detach() / settings.accumulation
        if not self.sharded:
            self.replicas.average_gradients(player.network)
        norm = gradient_norm(player.parameters)
        self._settle()
        refused = norm.isfinite().logical_not().float()
        nn.utils.clip_grads_with_norm_(player.parameters, player.role.max_grad_norm, norm)
        guarded_step(parts(player.optimizer), refused)
        weights_changed(player.network)
        player.optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm, **columns}, refused

    def _settle(self) -> None:
        """What the last step left to the host: counting it when one who learned was refused, the average of those who were not.

        Weights must still be those of that step: called before the next one changes them, and before anything reads the average.
        """
        if not self.unsettled:
            return
        unsettled, self.unsettled = self.unsettled, []
        learned = [player for refused, player in unsettled if not refused.read()]
        for player in learned:
            player.ema.update(player.network, self.state.step)
        sound = len(learned) == len(unsettled)
        if self.skipped.count(sound, self.state.step) == SKIPS_IN_A_ROW:
            self.metrics.flush()
            self.files.wait()
            raise LongLiveError(self.skipped.message())

    def evaluate(self) -> float:
        """Measures, leaving the next step as it would have been. Returns the seconds it took, which are not on the training clock."""
        if not isinstance(self.task, Evaluates):
            return 0.0
        self._settle()
        began = time.perf_counter()
        with untouched(self.task.module, self.task.device):
            columns = self.task.evaluate(self.state.step, self.ema.tensors())
        self.metrics.note(self.state.step, columns)
        return self.replicas.maximum(time.perf_counter() - began)[0]

    def _report(self) -> None:
        count = len(self.metrics.pending)
        if not count:
            return
        seconds = self.state.elapsed - self.metrics.pending[0][3]["seconds"]
        row, settings = self.metrics.flush(), self.settings
        left = self.state.elapsed * (1 / max(settings.progress(self.state), 1e-9) - 1)
        told = {k: v for k, v in row.items() if math.isfinite(v) or k.endswith(("loss", "grad_norm"))}  # a quarter of sigma without frames has no error
        columns = ", ".join(f"{k} {v:.4g}" for k, v in told.items() if k not in ("seconds", "ms", "lr", "loss"))
        loss = f"  loss {row['loss']:.4f}" if "loss" in row else ""  # a player's turn may not have come
        timing = f"lr {row.get('lr', 0.0):.2e}  {1000 * seconds / count:.1f} ms/step  {max(left, 0.0):.0f} s left"
        logger.info("step %d%s  %s  (%s)", self.state.step, loss, timing, columns)

    def _export(self) -> None:
        self._settle()
        if self.writes or self.sharded:
            self.task.export(self.logdir, self.state.step, self.ema.tensors())

    def _save(self) -> None:
        self._settle()
        self.metrics.flush()
        if self.settings.save:
            self.files.save(self.state)

    def _stop(self) -> None:
        self._report()
        self._export()
        self._save()
        self.files.wait()
        raise Interrupted(f"stopped at step {self.state.step}; weights{' and state' if self.settings.save else ''} are in {self.logdir}")
