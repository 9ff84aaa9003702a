"""Batches for one stream of ranks, decoded ahead by workers; where a run stands in the data is one number.

`position` counts the samples that all streams have consumed. From it, a stream (a data-parallel rank) takes `batch` numbers of every
`streams` x `batch`, so that the samples of a step do not depend on how they are spread, and a run that is resumed on other ranks goes on with the next
number. Workers hand over bytes; the device normalises them (`samples.to_pixels`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from ..core.errors import InputError
from ..core.log import logger
from .samples import Broken, VideoBatch, collate
from .sources import Source, few

REPAIR = "repair or remove them (`longlive data check ROOT --decode` finds all)"


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """`workers` 0 decodes in the calling process; `prefetch` batches each are decoded ahead. Times in seconds."""

    batch: int = 1
    workers: int = 2
    prefetch: int = 2
    pin: bool = False
    i2v: bool = False
    slow_after: float = 60.0
    slow_every: float = 60.0


class _Batches(Dataset):
    """Batch number k from a start: the numbers that a stream takes, fetched and collated (in a worker)."""

    def __init__(self, source: Source, i2v: bool):
        self.source, self.i2v = source, i2v

    def __getitem__(self, numbers: tuple[int, ...]) -> VideoBatch | tuple[Broken, ...]:
        fetched = [self.source.fetch(number) for number in numbers]
        broken = tuple(clip for one in fetched for clip in one.broken)
        if any(one.sample is None for one in fetched):
            return broken
        return collate([one.sample for one in fetched], broken, i2v=self.i2v)


class _Numbers:
    """The sampler: endless tuples of sample numbers."""

    def __init__(self, position: int, batch: int, stream: int, streams: int):
        self.position, self.batch, self.stream, self.streams = position, batch, stream, streams

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        start = self.position + self.stream * self.batch
        while True:
            yield tuple(range(start, start + self.batch))
            start += self.batch * self.streams


class BatchLoader:
    """An endless iterator of `VideoBatch`. `position` is its whole state: give it to another loader and that one goes on.

    Raises InputError from `next` when more than `source.max_broken` different clips could not be read, or nothing stood in for one, naming them.
    """

    def __init__(self, source: Source, settings: LoaderSettings, *, stream: int = 0, streams: int = 1, position: int = 0):
        if position < 0 or not 0 <= stream < streams:
            raise InputError(f"position {position}, stream {stream} of {streams}: a position is at least 0 and streams count from 0")
        self.source, self.settings, self.streams, self.position = source, settings, streams, position
        self.broken: dict[str, str] = {}
        self._note(source.unreadable)
        loader = DataLoader(
            _Batches(source, settings.i2v),
            batch_size=None,
            sampler=_Numbers(position, settings.batch, stream, streams),
            num_workers=settings.workers,
            prefetch_factor=settings.prefetch if settings.workers else None,
            pin_memory=settings.pin,
            collate_fn=_unchanged,
            worker_init_fn=_obey_parent_only,
            generator=torch.Generator(),  # one of its own: making a loader must not draw from the generator that training draws from
        )
        self._batches = iter(loader)

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> VideoBatch:
        if self._batches is None:
            raise StopIteration
        settings = self.settings
        with _patience(settings.slow_after, settings.slow_every, self.position):
            try:
                batch = next(self._batches)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                remedy = f"lower data.num_workers({settings.workers}) or data.prefetch_factor({settings.prefetch}), or give it more (shared) memory"
                raise InputError(f"a data worker was killed, most likely for memory; {remedy}") from error
        if not isinstance(batch, VideoBatch):
            self._count(batch)
            raise self._nothing_read()
        self._note(batch.broken)
        self.position += settings.batch * self.streams
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None

    def _note(self, broken: tuple[Broken, ...]) -> None:
        """Names and counts clips that other folders stood in for."""
        self._count(broken)
        if len(self.broken) > self.source.max_broken:
            raise InputError(f"{len(self.broken)} clips are broken: {_named(self.broken)}; {REPAIR}{self._or_raise}")

    def _count(self, broken: tuple[Broken, ...]) -> None:
        for clip in broken:
            if clip.file not in self.broken:
                self.broken[clip.file] = clip.reason
                use = f"sample {clip.number} takes another folder; " if clip.number >= 0 else ""
                logger.warning("broken clip %s (%s); %s%d of at most %d", clip.file, clip.reason, use, len(self.broken), self.source.max_broken)

    @property
    def _or_raise(self) -> str:
        return f", or raise data.max_broken_clips({self.source.max_broken})"

    def _nothing_read(self) -> InputError:
        """A sample has max_broken + 1 attempts, each at the next folder: raising max_broken helps while there are more folders than that."""
        everywhere = self.source.max_broken + 1 >= len(self.source)
        found = f"{len(self.broken)} clips are broken{', and every folder was tried' if everywhere else ''}: {_named(self.broken)}"
        return InputError(f"{found}; {REPAIR}{'' if everywhere else self._or_raise}")


def _unchanged(batch):
    return batch


def _obey_parent_only(worker: int) -> None:
    """In a worker: Ctrl-C and SIGTERM go to a whole group of processes (a terminal, torchrun, Slurm), and the training that saves on them needs its data.

    A SIGTERM of the parent ends the worker, whatever it is doing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, name="end of the worker", daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _named(broken: dict[str, str]) -> str:
    return few([f"{file} ({reason})" for file, reason in broken.items()])


@contextmanager
def _patience(first: float, again: float, position: int):
    """Warns when what is inside takes longer than `first` seconds, and after every `again` more."""
    done = threading.Event()

    def watch() -> None:
        waited, step = 0.0, first
        while not done.wait(step):
            waited, step = waited + step, again
            logger.warning("waiting for sample %d for %.0f s; the data are slower than the training, or a file system hangs", position, waited)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
