"""One film against the clock, through the `Session` and `DecodeStage` of every other film.

The clock of a film starts with its text embeddings ready and runs to its last uint8 frame on the host. The first chunks see a smaller window; a chunk counts as
steady once the window is full. Ranks that make a film together begin together, and the first of them decodes. Kernels are timed by the profiler for one
steady chunk, apart from the film that is timed.

Legend: B batch, F latent frames of a chunk, C latent channels, H, W latent rows and columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import torch

from ..core.geometry import FPS, chunk_pixel_range
from ..core.story import Shot, Storyboard
from ..engine.decode import Inline
from ..engine.pipeline import Pipeline
from ..engine.session import Request, Session
from .timing import Kernel, kernels, timed

PROMPT = "a lighthouse on a cliff in the evening, waves below, the camera circles slowly"
BESIDE_WINDOW = 1  # chunks after the window is full that do not count yet


@dataclass(frozen=True)
class Arrivals:
    """When the chunks of a film were on the host: seconds since the film began, of every chunk; the first `warm` are not steady.

    `frames` of a steady chunk; `denoise` device seconds of every chunk's sampling and commit.
    """

    at: tuple[float, ...]
    denoise: tuple[float, ...]
    warm: int
    frames: int

    @property
    def steady(self) -> list[float]:
        """Seconds between one steady chunk and the chunk before it."""
        return [b - a for a, b in zip(self.at[self.warm - 1 :], self.at[self.warm :])]

    @property
    def fps(self) -> float:
        return self.frames / median(self.steady)

    @property
    def mean_fps(self) -> float:
        return self.frames / fmean(self.steady)

    def percentiles_ms(self) -> dict[str, float]:
        return {f"p{p}": 1000 * float(np.percentile(self.steady, p)) for p in (50, 95, 99)}

    def attainment(self, fps: float = FPS) -> float:
        """Share of the chunks after the first that are there when a playback of `fps`, begun with the first chunk, needs them."""
        due = [self.at[0] + chunk_pixel_range(c, self._chunk_frames)[0] / fps for c in range(1, len(self.at))]
        return sum(at <= limit for at, limit in zip(self.at[1:], due)) / max(1, len(due))

    @property
    def _chunk_frames(self) -> int:
        return self.frames // 4

    @property
    def real_time(self) -> float:
        """Seconds of film per second, steady."""
        return self.mean_fps / FPS


def warm_chunks(pipeline: Pipeline) -> int:
    """Chunks until the window is full, and one more."""
    return pipeline.settings.pages + BESIDE_WINDOW


def film_session(pipeline: Pipeline, chunks: int, *, decode: bool, prompt: str = PROMPT) -> Session:
    return pipeline.session(Request(storyboards=(Storyboard(shots=(Shot(prompt=prompt, chunks=chunks),)),), decode=decode))


def run_film(pipeline: Pipeline, chunks: int, *, decode: bool, prompt: str = PROMPT) -> Arrivals:
    """Makes a film whose last `chunks` chunks are steady. `decode` False: latents only, and "on the host" means that the device is done."""
    warm = warm_chunks(pipeline)
    pipeline.text_encoder.encode([prompt])
    _wait(pipeline)
    began, at, denoise = time.perf_counter(), [], []
    with film_session(pipeline, warm + chunks, decode=decode and pipeline.mesh.sp_rank == 0, prompt=prompt) as session:
        for result in session:
            at.append(time.perf_counter() - began)
            denoise.append(result.seconds["denoise"])
    first, last = chunk_pixel_range(warm, pipeline.settings.chunk_frames)
    return Arrivals(tuple(at), tuple(denoise), warm, last - first)


def first_seconds(pipeline: Pipeline, prompt: str = PROMPT) -> tuple[float, float]:
    """From embeddings ready to the first frames on the host, and to the whole first chunk, of a fresh film of one chunk.

    On a rank that does not decode both mean the chunk's latents.
    """
    pipeline.text_encoder.encode([prompt])
    _wait(pipeline)
    told: list[float] = []
    began = time.perf_counter()
    with film_session(pipeline, 1, decode=pipeline.mesh.sp_rank == 0, prompt=prompt) as session:
        session.on_frames = lambda frames: told.append(time.perf_counter() - began)
        next(session)
        chunk = time.perf_counter() - began
        return told[0] if told else chunk, chunk


class ChunkDecoder:
    """Steady chunks of latents through a decode stage, without the way to the host."""

    def __init__(self, pipeline: Pipeline):
        self.device = pipeline.codec.device
        g, s = pipeline.geometry, pipeline.settings
        shape = (1, s.chunk_frames, pipeline.dit.dims.channels, g.latent_height, g.latent_width)
        self.z_BFCHW = torch.randn(shape, generator=torch.Generator(self.device).manual_seed(1), device=self.device)
        self.stage = Inline(pipeline.codec)
        self.take()  # the first chunk of a stream is shorter

    def take(self) -> None:
        for _ in self.stage.groups(self.z_BFCHW):
            pass

    def seconds(self, repeats: int) -> list[float]:
        """Device seconds of `repeats` chunks, after one that is not counted."""
        self.take()
        return [timed(self.take, self.device)[1] for _ in range(repeats)]


def film_kernels(pipeline: Pipeline) -> list[Kernel]:
    """The kernels of one steady chunk, sampling and commit."""
    warm = warm_chunks(pipeline)
    with film_session(pipeline, warm + 1, decode=False) as session:
        for _ in range(warm):
            next(session)
        return kernels(lambda: next(session), pipeline.device)


def with_steps(pipeline: Pipeline, steps: int) -> Pipeline:
    return replace(pipeline, settings=replace(pipeline.settings, steps=steps))


def _wait(pipeline: Pipeline) -> None:
    """Until the device is done, on all ranks that make the film."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    pipeline.mesh.any(False)
