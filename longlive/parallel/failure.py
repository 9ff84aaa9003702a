"""A rank that fails ends all ranks, soon and with its message, whoever launched them.

A failing rank writes its message into the processes' key-value store before it goes. The others look there every few seconds: one that waits in a collective
for the rank that is gone would otherwise wait for minutes. A rank whose collective breaks because of another says so in one line instead of a traceback.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from ..core.errors import Interrupted, LongLiveError
from ..core.log import environment, logger
from .data_parallel import Replicas

EVERY = 2.0  # seconds between looks
GRACE = 5.0  # for the main thread to notice by itself
LAST = 30.0  # until a failed process ends, whatever holds it
LOST = 3  # looks in a row that the store did not answer
BROKEN = ("connection", "timed out", "timeout", "nccl", "gloo", "socket", "broken pipe")


class Watch:
    """Looks whether another rank has failed. `store`: a connection of its own to the store of the launch."""

    def __init__(self, replicas: Replicas):
        self.rank = replicas.rank
        run = [environment(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
        self.key = "/".join(["longlive", *run, "failed"])
        host, port = environment("MASTER_ADDR", "127.0.0.1"), int(environment("MASTER_PORT", "0"))
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LAST))
        self.lock, self.done = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._look, name="failure watch", daemon=True)

    def message(self) -> str | None:
        """What a failed rank has said, if any has."""
        with self.lock:
            return self.store.get(self.key).decode() if self.store.check([self.key]) else None

    def announce(self, error: BaseException) -> None:
        """Tells the others, unless one was faster. Afterwards this process ends within LAST seconds, even if something holds it."""
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        try:
            with self.lock:
                if not self.store.check([self.key]):
                    self.store.set(self.key, f"rank {self.rank} failed: {words}")
        except RuntimeError as lost:
            logger.debug("the store is gone: %s", lost)
        _end_after(LAST)

    def _look(self) -> None:
        lost = 0
        while not self.done.wait(EVERY):
            try:
                message, lost = self.message(), 0
            except RuntimeError:
                message, lost = "the process that holds the key-value store is gone", lost + 1
            if message is not None and lost in (0, LOST):
                if not self.done.wait(GRACE):
                    logger.error("rank %d ends: %s", self.rank, message)
                    _end_now()
                return


def _end_now() -> None:
    os._exit(1)


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, _end_now)
    timer.daemon = True
    timer.start()


@contextmanager
def together(replicas: Replicas) -> Iterator[None]:
    """Inside, the first rank to fail ends all. Every rank of a launch must open it; alone it does nothing.

    Raises LongLiveError in the place of an error that another rank's end has caused.
    """
    if replicas.size == 1:
        yield
        return
    watch = Watch(replicas)
    watch.thread.start()
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        cause = _cause(watch, error)
        watch.announce(error)
        if cause is not None:
            raise LongLiveError(cause) from error
        raise
    finally:
        watch.done.set()


def _cause(watch: Watch, error: BaseException) -> str | None:
    """Whose end `error` follows from; None where it is this rank's own."""
    if isinstance(error, LongLiveError) or not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in BROKEN):
        return None
    waiting = threading.Event()
    try:
        for _ in range(6):
            if (message := watch.message()) is not None:
                return f"ended with another process ({message})"
            waiting.wait(0.5)
    except RuntimeError:
        return "ended with another process (the one that holds the key-value store is gone)"
    return f"another process does not answer ({str(error).strip().splitlines()[0][:160]}); it was killed, is stuck, or its host is gone: see its output"
