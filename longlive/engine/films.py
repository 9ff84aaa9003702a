"""Storyboards in, films out: the one loop behind `longlive generate` and `inference.py`.

Names are settled and checked before a weight is read; then every storyboard of this rank becomes one session whose samples run as a batch,
written while it is made. Ranks that make a film together walk through the same session, and the first of them decodes and writes. Ctrl-C finishes the
chunk at hand and closes a playable film; any other failure leaves nothing of the film behind.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..core.errors import Interrupted
from ..core.geometry import FPS, Geometry, pixel_frames
from ..core.story import ChunkPlan, Storyboard, plan
from ..data.videos import check_start
from ..parallel.mesh import Mesh
from .naming import base_name, check_folder, check_free, film_tag, film_texts, make_folder, prompts_text, remove_empty, shared_tag
from .pipeline import Pipeline, choose_device
from .receipt import Timings, receipt_text
from .session import ChunkResult, Request, Session
from .sinks import LatentsSink, Mp4Sink, VideoSink, write_text


@dataclass(frozen=True, kw_only=True)
class FilmFiles:
    """Where one film is. `film` is the video, or the latents when those were asked for."""

    film: Path
    prompts: Path
    receipt: Path
    index: int
    sample: int
    chunks: int
    frames: int


class Listener(Protocol):
    """Hears how far the work is; all methods may do nothing. The command line shows a progress bar."""

    def loading(self, model: str) -> None: ...

    def film(self, number: int, films: int, title: str, chunks: int) -> None: ...

    def chunk(self, result: ChunkResult) -> None: ...

    def stopping(self) -> None: ...

    def done(self, files: list[FilmFiles]) -> None: ...


class Silent:
    """A listener that says nothing."""

    def loading(self, model: str) -> None: ...

    def film(self, number: int, films: int, title: str, chunks: int) -> None: ...

    def chunk(self, result: ChunkResult) -> None: ...

    def stopping(self) -> None: ...

    def done(self, files: list[FilmFiles]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """One storyboard with the place of its files: a base path per sample."""

    index: int
    board: Storyboard
    plans: tuple[ChunkPlan, ...]
    geometry: Geometry
    bases: tuple[Path, ...]
    suffix: str

    def targets(self) -> list[Path]:
        return [base.with_name(base.name + self.suffix) for base in self.bases]


def generate_films(
    config,
    boards: Sequence[Storyboard],
    output: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    mesh: Mesh | None = None,
    overwrite: bool = False,
    pipeline: Pipeline | None = None,
    listener: Listener | None = None,
    names: Sequence[str] | None = None,
) -> list[FilmFiles]:
    """Makes the films of `boards` that fall to `rank` of `world` (board i belongs to rank i % world) and returns their files.

    `mesh`: ranks make films in groups, instead. Board i belongs to group i % dp_size; all ranks of a group must call this, the first of them gets files.
    `names`, one for each board, stand in the names of files where else the first prompt does.
    The length of each film is the sum of its shots' durations. Raises InputError for anything that cannot work, before anything is written,
    and Interrupted after Ctrl-C, when the film that was being made has been closed.
    """
    listener = listener or Silent()
    jobs = make_jobs(config, boards, Path(output), rank, world, mesh, names)
    for job in jobs:
        check_free(job.targets(), overwrite)
        check_pictures(job.board)
    if not jobs:
        return []
    check_folder(Path(output))
    maker = FilmMaker(config=config, listener=listener, pipeline=pipeline, mesh=mesh)
    files = []
    for number, job in enumerate(jobs):
        listener.film(number, len(jobs), job.board.title or job.board.name or job.plans[0].prompt, len(job.plans))
        chunks, made = maker.make(job)
        listener.done(made)
        files += made
        if chunks < len(job.plans):
            seconds = pixel_frames(chunks * maker.pipeline.settings.chunk_frames) / FPS
            raise Interrupted(f"stopped: {job.targets()[0]} holds the first {seconds:.1f} s")
    return files


def make_jobs(
    config, boards: Sequence[Storyboard], output: Path, rank: int, world: int, mesh: Mesh | None = None, names: Sequence[str] | None = None
) -> list[Job]:
    """The jobs of this rank. Names are unique over all ranks, because every rank names all films. Ranks of one group have the same jobs."""
    mesh, tag = mesh or Mesh(rank, world), film_tag(config)
    last = len(boards) if config.inference_iter < 0 else config.inference_iter + 1
    boards = list(boards)[:last]
    plans = [plan(board, prefix=config.data.scene_cut_prefix) for board in boards]
    texts = film_texts((names or [p[0].prompt for p in plans])[:last], range(len(boards)), config.save_with_index)
    _, _, _, height, width = config.data.image_or_video_shape
    usual, tag = Geometry.of_latent(height, width), shared_tag(tag, mesh.dp_rank, mesh.dp_size, mesh.sp_size)
    jobs = []
    for index in range(mesh.dp_rank, len(boards), mesh.dp_size):
        bases = tuple(output / base_name(mesh.dp_rank, texts[index], sample, tag) for sample in range(config.inference.num_samples))
        size = boards[index].size
        jobs.append(
            Job(
                index=index,
                board=boards[index],
                plans=plans[index],
                geometry=Geometry(*size) if size else usual,
                bases=bases,
                suffix=".pt" if config.save_latents_only else ".mp4",
            )
        )
    return jobs


def check_pictures(board: Storyboard) -> None:
    """Raises InputError when an image or clip of the storyboard cannot be read."""
    for path in [board.image, *(shot.image for shot in board.shots)]:
        if path is not None:
            check_start(path)
    if board.video is not None:
        check_start(board.video, clip=True)


@dataclass(kw_only=True)
class FilmMaker:
    """Makes one film after another with one pipeline, which is loaded for the first of them."""

    config: object
    listener: Listener
    pipeline: Pipeline | None = None
    mesh: Mesh | None = None
    load_seconds: float = 0.0
    hashes: dict[str, str] = field(default_factory=dict)

    def make(self, job: Job) -> tuple[int, list[FilmFiles]]:
        """(finished chunks, the files of one storyboard); fewer chunks than planned when it was interrupted. The files are one per sample, none for ranks
        that do not write."""
        pipeline = self._loaded().at_size(job.geometry)
        if pipeline.mesh.sp_rank > 0:
            return self._help(job, pipeline), []
        return self._write(job, pipeline)

    def _help(self, job: Job, pipeline: Pipeline) -> int:
        """Makes the film with the rank that writes it; the number of finished chunks."""
        with pipeline.session(self._request(job, decode=False)) as session:
            return self._roll(session, [], Timings())

    def _request(self, job: Job, decode: bool) -> Request:
        return Request(storyboards=(job.board,), samples=len(job.bases), seed=self.config.logging.seed, indices=(job.index,), decode=decode)

    def _write(self, job: Job, pipeline: Pipeline) -> tuple[int, list[FilmFiles]]:
        made = make_folder(job.bases[0].parent)
        sinks = [LatentsSink(path) if self.config.save_latents_only else Mp4Sink(path) for path in job.targets()]
        timings, written = Timings(load=self.load_seconds), []
        try:
            with pipeline.session(self._request(job, decode=not self.config.save_latents_only)) as session:
                chunks = self._roll(session, sinks, timings)
            return chunks, [self._finish(job, pipeline, sample, sink, chunks, timings, written) for sample, sink in enumerate(sinks)]
        except BaseException:
            for sink in sinks:
                sink.abort()
            for path in written:
                path.unlink(missing_ok=True)
            remove_empty(made)
            raise

    def _loaded(self) -> Pipeline:
        if self.pipeline is None:
            start = time.perf_counter()
            self.listener.loading(self.config.model_kwargs.model_name)
            self.pipeline = Pipeline.load(self.config, choose_device(self.config), mesh=self.mesh)
            self.load_seconds = time.perf_counter() - start
        if self.pipeline.weights and not self.hashes:
            from ..models.weights import weights_hash

            self.hashes = {part: weights_hash(Path(path)) for part, path in self.pipeline.weights.items()}
        return self.pipeline

    def _roll(self, session: Session, sinks: list[VideoSink], timings: Timings) -> int:
        """Runs the session into the sinks and returns the number of finished chunks."""
        chunks = 0

        def stop() -> None:
            session.cancel()
            self.listener.stopping()

        with on_interrupt(stop):
            for result in session:
                for sample, sink in enumerate(sinks):
                    sink.write(None if result.frames is None else result.frames[sample], result.latents_BFCHW[sample])
                chunks += 1
                timings.add(result.seconds)
                self.listener.chunk(result)
        return chunks

    def _finish(self, job: Job, pipeline: Pipeline, sample: int, sink: VideoSink, chunks: int, timings: Timings, written: list[Path]) -> FilmFiles:
        base, plans = job.bases[sample], list(job.plans[:chunks])
        prompts = write_text(base.with_name(base.name + "_prompts.txt"), prompts_text(plans))
        written.append(prompts)
        receipt = write_text(
            base.with_name(base.name + ".json"),
            receipt_text(
                config=self.config.model_dump(mode="json"),
                board=job.board,
                plans=plans,
                seed=self.config.logging.seed if job.board.seed is None else job.board.seed,
                index=job.index,
                sample=sample,
                samples=len(job.bases),
                pipeline=pipeline,
                hashes=self.hashes,
                timings=timings,
                file=job.targets()[sample].name,
                interrupted=chunks < len(job.plans),
            ),
        )
        written.append(receipt)
        film = sink.close()
        written.append(film)
        frames = pixel_frames(chunks * pipeline.settings.chunk_frames)
        return FilmFiles(film=film, prompts=prompts, receipt=receipt, index=job.index, sample=sample, chunks=chunks, frames=frames)


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM calls `stop`; a second one interrupts at once. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(number, frame):
        for each in before:
            signal.signal(each, signal.default_int_handler)
        stop()

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
