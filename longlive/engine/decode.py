"""Latents -> frames while the next chunk is being generated.

A stage takes chunks in order and gives frames in order: `submit(z)`, then `collect()` what is ready, `drain()` for the rest. Frames are uint8
on the host, converted where they were decoded, so that a quarter of the bytes travels. At most `DEPTH` chunks are under way; a failure
surfaces at the next call. The stream state of the VAE is explicit: `state()` finishes what is under way and returns a copy. `on_frames`, where it is set,
is told a film's next frames as soon as some of a chunk are on the host.

Stages: Inline (any device), SameStream (a GPU, queued), SideStream (same GPU, second stream), OtherDevice (own thread and GPU), NoDecode (latents only).
Legend: B batch, C latent channels, F latent frames, T pixel frames, H, W pixels.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from ..core.geometry import TEMPORAL_STRIDE

DEPTH = 2


OnFrames = Callable[[torch.Tensor], None]


class DecodeStage(Protocol):
    """Decodes one film's stream of chunks. Frames come out as uint8 [B, T, H, W, 3] on the host, or None where nothing is decoded."""

    on_frames: OnFrames | None

    def submit(self, z_BFCHW: torch.Tensor) -> None: ...

    def collect(self) -> list[torch.Tensor | None]: ...

    def drain(self) -> list[torch.Tensor | None]: ...

    def state(self): ...

    def restore(self, state) -> None: ...

    def close(self) -> None: ...


class NoDecode:
    """Latents only."""

    on_frames: OnFrames | None = None

    def __init__(self):
        self.waiting = 0

    def submit(self, z_BFCHW: torch.Tensor) -> None:
        self.waiting += 1

    def collect(self) -> list[None]:
        ready, self.waiting = [None] * self.waiting, 0
        return ready

    drain = collect

    def state(self) -> None:
        return None

    def restore(self, state) -> None:
        self.waiting = 0

    def close(self) -> None:
        return None


class Inline:
    """Decodes in place, at once, on the codec's device."""

    on_frames: OnFrames | None = None

    def __init__(self, codec):
        self.codec, self.device = codec, codec.device
        self.stream = None
        self.ready: deque[torch.Tensor] = deque()

    @torch.no_grad()
    def groups(self, z_BFCHW: torch.Tensor) -> Iterator[torch.Tensor]:
        """uint8 [B, T, H, W, 3] on the codec's device, some frames at a time; advances the stream."""
        for self.stream, frames_BTHWC in self.codec.byte_groups(self.stream, z_BFCHW):
            yield frames_BTHWC

    def submit(self, z_BFCHW: torch.Tensor) -> None:
        self.ready.append(self.decode(z_BFCHW))

    def decode(self, z_BFCHW: torch.Tensor) -> torch.Tensor:
        """The chunk's frames on the host."""
        parts = []
        for frames in self.groups(z_BFCHW):
            parts.append(frames.cpu())
            self._tell(parts[-1])
        return _joined(parts)

    def _tell(self, frames: torch.Tensor) -> None:
        if self.on_frames is not None:
            self.on_frames(frames)

    def collect(self) -> list[torch.Tensor]:
        ready = list(self.ready)
        self.ready.clear()
        return ready

    drain = collect

    def state(self):
        return None if self.stream is None else self.stream.clone()

    def restore(self, state) -> None:
        self.ready.clear()
        self.stream = None if state is None else state.clone()

    def close(self) -> None:
        self.stream = None


class SideStream(Inline):
    """The same GPU, a second stream of higher priority: decoding overlaps the next chunk. Two pinned buffers are reused in turn."""

    def __init__(self, codec):
        super().__init__(codec)
        self.side = torch.cuda.Stream(device=self.device, priority=-1)  # frames are wanted sooner than the next chunk's latents
        self.under_way: deque[list[tuple[torch.Tensor, torch.cuda.Event]]] = deque()
        self.pinned: list[torch.Tensor | None] = [None] * DEPTH
        self.turn = 0

    def submit(self, z_BFCHW: torch.Tensor) -> None:
        if len(self.under_way) == DEPTH:
            self._finish_one()
        self.turn = (self.turn + 1) % DEPTH
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        pieces, at = [], 0
        with torch.cuda.stream(self.side):
            for frames in self.groups(z_BFCHW):
                host = self._buffer(frames, z_BFCHW.shape[1], at)
                at += frames.numel()
                host.copy_(frames, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self.side)
                pieces.append((host, done))
        if z_BFCHW.is_cuda:
            z_BFCHW.record_stream(self.side)  # its memory may be reused only after the decode has read it
        self.under_way.append(pieces)

    def _buffer(self, frames: torch.Tensor, latents: int, at: int) -> torch.Tensor:
        """Pinned memory for `frames`, which begin at value `at` of a chunk of so many latent frames."""
        buffer, needed = self.pinned[self.turn], frames[:, 0].numel() * TEMPORAL_STRIDE * latents
        if buffer is None or buffer.numel() < needed:
            buffer = self.pinned[self.turn] = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
        return buffer[at : at + frames.numel()].view(frames.shape)

    def _finish_one(self) -> None:
        parts = []
        for host, done in self.under_way.popleft():
            done.synchronize()
            parts.append(host.clone())
            self._tell(parts[-1])
        self.ready.append(_joined(parts))

    def collect(self) -> list[torch.Tensor]:
        while self.under_way and self.under_way[0][-1][1].query():
            self._finish_one()
        return super().collect()

    def drain(self) -> list[torch.Tensor]:
        while self.under_way:
            self._finish_one()
        return super().collect()

    def state(self):
        self.side.synchronize()
        return super().state()

    def restore(self, state) -> None:
        self.side.synchronize()
        self.under_way.clear()
        self.side.wait_stream(torch.cuda.current_stream(self.device))  # `state` is a copy that may still be queued there
        with torch.cuda.stream(self.side):  # so that the copy's memory belongs to the stream that reads it
            super().restore(state)
        self.side.synchronize()

    def close(self) -> None:
        self.side.synchronize()
        self.under_way.clear()
        super().close()


class SameStream(SideStream):
    """The same GPU and the same stream, without a wait for the host: decoding and the next chunk follow each other, and none slows the other."""

    def __init__(self, codec):
        super().__init__(codec)
        self.side = torch.cuda.current_stream(self.device)


class OtherDevice:
    """A second device with a thread of its own. The queue holds at most `DEPTH` chunks; then `submit` waits."""

    def __init__(self, codec):
        self.worker = Inline(codec)
        self.jobs: queue.Queue = queue.Queue(maxsize=DEPTH)
        self.done: queue.Queue = queue.Queue()
        self.failure = None
        self.copies: torch.cuda.Stream | None = None
        self.thread = threading.Thread(target=self._work, name="longlive-decode", daemon=True)
        self.thread.start()

    @property
    def on_frames(self) -> OnFrames | None:
        """Called by the decoding thread."""
        return self.worker.on_frames

    @on_frames.setter
    def on_frames(self, told: OnFrames | None) -> None:
        self.worker.on_frames = told

    def _work(self) -> None:
        if self.worker.device.type == "cuda":
            torch.cuda.set_device(self.worker.device)  # of this thread: kernels are launched on the current device
        while (job := self.jobs.get()) is not None:
            z_BFCHW, produced = job
            try:
                if self.failure is None:
                    self.done.put(self.worker.decode(self._fetch(z_BFCHW, produced)))
            except BaseException as error:  # handed over to the thread that generates, which raises it
                self.failure = error
            finally:
                self.jobs.task_done()

    def _fetch(self, z_BFCHW: torch.Tensor, produced: torch.cuda.Event | None) -> torch.Tensor:
        """The latents on the codec's device, by a stream of their own: the generating stream is already full of the next chunk's work."""
        if produced is None:
            return z_BFCHW
        if self.copies is None:
            self.copies = torch.cuda.Stream(device=z_BFCHW.device)
        produced.synchronize()
        with torch.cuda.stream(self.copies):
            there = z_BFCHW.to(self.worker.device)
        self.copies.synchronize()
        return there

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def submit(self, z_BFCHW: torch.Tensor) -> None:
        self._raise_failure()
        produced = None
        if z_BFCHW.is_cuda:
            produced = torch.cuda.Event()
            produced.record(torch.cuda.current_stream(z_BFCHW.device))
        self.jobs.put((z_BFCHW, produced))

    def collect(self) -> list[torch.Tensor]:
        self._raise_failure()
        ready = []
        while not self.done.empty():
            ready.append(self.done.get())
        return ready

    def drain(self) -> list[torch.Tensor]:
        self.jobs.join()
        return self.collect()

    def state(self):
        self.jobs.join()
        self._raise_failure()
        return self.worker.state()

    def restore(self, state) -> None:
        self.jobs.join()
        self.collect()
        self.worker.restore(state)

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()
        self.worker.close()


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


STAGES = {"inline": Inline, "same-stream": SameStream, "side-stream": SideStream, "other-device": OtherDevice}


def decode_stage(kind: str, codec) -> DecodeStage:
    """A fresh stage for one film: "inline", "same-stream", "side-stream", "other-device", or "none"."""
    return NoDecode() if kind == "none" else STAGES[kind](codec)
