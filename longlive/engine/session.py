"""A film being made: an iterator of chunks that owns all that changes.

Everything else (weights, settings) belongs to the pipeline and never changes. What changes is explicit: the pages of the rollout, the place in the
story, the decoder's stream. So a session can be steered between chunks (`add_shot`, `set_prompt`, `cancel`) and copied exactly
(`snapshot`, `restore`). Noise is a function of (seed, prompt index, sample, chunk) and is never stored.

Legend: B batch = films x samples, film-major; F latent frames of a chunk, C latent channels, T pixel frames, H, W pixels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..core.errors import InputError
from ..core.geometry import pixel_frames
from ..core.story import ChunkPlan, Shot, Storyboard, plan
from .conditioning import Conditioning
from .decode import NoDecode, OnFrames
from .memory import trim_heap
from .rollout import Rollout, RolloutSnapshot, chunk_noise
from .text_rows import TextRows


@dataclass(frozen=True, kw_only=True)
class Request:
    """Films to make together, as one batch. All have the same number of chunks.

    chunks    length of every film; None: the sum of the shots' durations
    samples   films per storyboard, with different noise
    seed      used where a storyboard has none of its own
    indices   place of each storyboard in its source, part of the noise's identity; default 0, 1, ...
    decode    False: latents only
    """

    storyboards: tuple[Storyboard, ...]
    chunks: int | None = None
    samples: int = 1
    seed: int = 0
    indices: tuple[int, ...] | None = None
    decode: bool = True

    def __post_init__(self):
        if not self.storyboards or self.samples < 1:
            raise InputError(f"{len(self.storyboards)} storyboards x {self.samples} samples: a request makes at least one film")
        if self.indices is not None and len(self.indices) != len(self.storyboards):
            raise InputError(f"{len(self.indices)} indices for {len(self.storyboards)} storyboards; give one each")


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """One finished chunk.

    latents_BFCHW  float32, normalised, on the model's device
    frames         uint8 [B, T, H, W, 3] on the host; None when the request asked for latents only
    plans          what each film of the batch shows here (prompt, cut, shot)
    seconds        "denoise": sampling and commit; "total": since the previous result
    """

    index: int
    latents_BFCHW: torch.Tensor
    frames: torch.Tensor | None
    plans: tuple[ChunkPlan, ...]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SessionSnapshot:
    """An exact copy of where a session stands. Good for the session it came from, and for any other with the same request and pipeline."""

    cursor: int
    plans: tuple[tuple[ChunkPlan, ...], ...]
    images: dict[tuple[int, int], str | None]
    rollout: RolloutSnapshot
    decoder: object
    ready: tuple[ChunkResult, ...]


class Session:
    """`for chunk in session` yields `ChunkResult`s in order. Use it as a context manager, or call `close`.

    `on_frames`, when set, is told the film's next frames, uint8 [B, T, H, W, 3] on the host, as soon as a part of a chunk is decoded (by the decoder's
    thread where it has one).
    """

    def __init__(self, pipeline, request: Request):
        self.pipeline, self.request = pipeline, request
        self.prefix = pipeline.scene_cut_prefix
        self.plans = [list(plan(board, request.chunks, self.prefix)) for board in request.storyboards]
        self._same_length()
        indices = request.indices if request.indices is not None else range(len(request.storyboards))
        seeds = [request.seed if board.seed is None else board.seed for board in request.storyboards]
        self.noise_keys = [(seed, index, sample) for seed, index in zip(seeds, indices) for sample in range(request.samples)]
        g = pipeline.geometry
        self.shape = (pipeline.settings.chunk_frames, pipeline.dit.dims.channels, g.latent_height, g.latent_width)
        self.known = Conditioning(pipeline, request.storyboards, request.samples, pixel_frames(self.shape[0] * self.chunks))
        if self.known.extension_frames >= self.shape[0] * self.chunks:
            raise InputError(
                f"the given clip has {self.known.extension_frames} latent frames and the film {self.shape[0] * self.chunks}: "
                "nothing is left to make; make the film longer"
            )
        self.known.check(self.plans)
        self.rollout = Rollout(
            pipeline.dit,
            pipeline.settings,
            token_height=g.token_height,
            token_width=g.token_width,
            batch=len(self.noise_keys),
            device=pipeline.device,
            dtype=pipeline.dtype,
            fixed=pipeline.records(len(self.noise_keys)),
            mesh=pipeline.mesh,
        )
        guided = pipeline.settings.guidance != 1.0
        self.text = TextRows(pipeline.dit, pipeline.text_encoder, pipeline.negative_prompt if guided else None)
        self.decoder = pipeline.decode_stage() if request.decode else NoDecode()
        self.cursor, self.cancelled, self._stopped = 0, False, False
        self._under_way: deque[tuple[ChunkResult, object]] = deque()
        self._ready: deque[ChunkResult] = deque()
        self._ahead: tuple[int, torch.Tensor] | None = None  # noise of a coming chunk
        self._last = time.perf_counter()

    @property
    def on_frames(self) -> OnFrames | None:
        return self.decoder.on_frames

    @on_frames.setter
    def on_frames(self, told: OnFrames | None) -> None:
        self.decoder.on_frames = told

    @property
    def chunks(self) -> int:
        """Chunks of each film, as planned so far."""
        return len(self.plans[0])

    # ------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[ChunkResult]:
        return self

    def __next__(self) -> ChunkResult:
        """The next chunk. After the last one StopIteration; a shot added later makes the iterator go on."""
        while not self._ready:
            if self._goes_on():
                self._generate()
                self._take(self.decoder.collect())
            else:
                self._take(self.decoder.drain())
                if not self._ready:
                    raise StopIteration
        now = time.perf_counter()
        result = self._ready.popleft()
        result = replace(result, seconds={**result.seconds, "total": now - self._last})
        self._last = now
        return result

    def _goes_on(self) -> bool:
        """Whether another chunk is begun: one answer for all ranks that make the film together, which ask once for each chunk."""
        if self.cursor >= self.chunks or self._stopped:
            return False
        self._stopped = self.pipeline.mesh.any(self.cancelled)
        return not self._stopped

    def _generate(self) -> None:
        films = [film[self.cursor] for film in self.plans]
        plans = tuple(plan for plan in films for _ in range(self.request.samples))
        text, rows, negative = self.text.rows([p.prompt for p in plans])
        noise = self._noise(self.cursor)
        clock = Clock(self.pipeline.device)
        z = self.rollout.step(
            noise,
            text,
            rows,
            [p.cut for p in plans],
            negative=negative,
            known=self.known.of_chunk(self.cursor, films),
        )
        clock.stop()
        self._under_way.append((ChunkResult(index=self.cursor, latents_BFCHW=z, frames=None, plans=plans), clock))
        self.cursor += 1
        if self.pipeline.device.type == "cuda" and self.cursor < self.chunks:
            self._ahead = self.cursor, self._noise(self.cursor)  # drawn while the device is busy
        self.decoder.submit(z)
        if self.pipeline.device.type == "cpu":
            trim_heap()

    def _noise(self, chunk: int) -> torch.Tensor:
        if self._ahead is not None and self._ahead[0] == chunk:
            return self._ahead[1]
        return torch.stack([chunk_noise(*key, chunk, self.shape) for key in self.noise_keys])

    def _take(self, frames_of_chunks: list) -> None:
        for frames in frames_of_chunks:
            result, clock = self._under_way.popleft()
            self._ready.append(replace(result, frames=frames, seconds={"denoise": clock.seconds()}))

    # ------------------------------------------------------------ steering

    def add_shot(self, shot: Shot | str, chunks: int | None = None) -> None:
        """Adds a shot at the end of every film of the batch. `chunks`, or the shot's own duration, in chunks."""
        shot = shot if isinstance(shot, Shot) else Shot(prompt=shot, chunks=chunks)
        count = shot.chunks if chunks is None else chunks
        if count is None or count < 1:
            raise InputError(f"the added shot {shot.prompt[:32]!r} lasts {count} chunks; give chunks= of at least 1")
        for index, film in enumerate(self.plans):
            number = film[-1].shot + 1
            film.extend(ChunkPlan((self.prefix if k == 0 else "") + shot.prompt, k == 0, number) for k in range(count))
            self.known.add_shot(index, number, shot)

    def set_prompt(self, prompt: str, film: int | None = None) -> None:
        """From the next chunk that is begun to the end of its shot, `film` (None: every film) shows `prompt`, without a cut of its own."""
        if not prompt.strip():
            raise InputError("the prompt is empty; say what the film shows from here on")
        if self.cursor >= self.chunks:
            raise InputError(f"all {self.chunks} chunks of the film are made; add a shot with add_shot instead")
        if film is not None and not 0 <= film < len(self.plans):
            raise InputError(f"film {film} of a batch of {len(self.plans)}; give 0 to {len(self.plans) - 1}, or None for all")
        for plans in self.plans if film is None else [self.plans[film]]:
            for index in range(self.cursor, len(plans)):
                old = plans[index]
                if old.shot != plans[self.cursor].shot:
                    break
                plans[index] = ChunkPlan((self.prefix if old.cut else "") + prompt, old.cut, old.shot)

    def cancel(self) -> None:
        """Stops after the chunk that is being made; chunks that are finished are still given out. May be called from a signal handler."""
        self.cancelled = True

    # ------------------------------------------------------------ copies

    def snapshot(self) -> SessionSnapshot:
        """An exact copy; finishes the decoding that is under way first."""
        self._take(self.decoder.drain())
        return SessionSnapshot(
            cursor=self.cursor,
            plans=tuple(map(tuple, self.plans)),
            images=dict(self.known.images),
            rollout=self.rollout.snapshot(),
            decoder=self.decoder.state(),
            ready=tuple(self._ready),
        )

    def restore(self, snapshot: SessionSnapshot) -> None:
        """Goes back to `snapshot`: the chunks that follow are the same again."""
        self._take(self.decoder.drain())
        self._under_way.clear()
        self._ready = deque(snapshot.ready)
        self.cursor, self.cancelled, self._stopped = snapshot.cursor, False, False
        self.plans, self.known.images = [list(film) for film in snapshot.plans], dict(snapshot.images)
        self.rollout.restore(snapshot.rollout)
        self.decoder.restore(snapshot.decoder)

    def close(self) -> None:
        """Ends the decoder's thread or stream. Chunks that were not taken are lost."""
        self.decoder.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _same_length(self) -> None:
        lengths = sorted({len(film) for film in self.plans})
        if len(lengths) > 1:
            raise InputError(f"films of {' and '.join(map(str, lengths))} chunks in one batch; give `chunks`, or make them one by one")


class Clock:
    """Seconds that the device worked between creation and `stop`, read once the work is known to be finished."""

    def __init__(self, device: torch.device):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.marks = [self._mark()]

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def stop(self) -> None:
        self.marks.append(self._mark())

    def seconds(self) -> float:
        start, end = self.marks
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000.0
