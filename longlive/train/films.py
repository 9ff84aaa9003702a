"""What distillation films: prompts and cuts, without video where none is needed. The trainer knows the protocol and nothing behind it.

`world_films` tells stories of the procedural world; here are prompt files and caption folders, and clips of a video set, whose first latent frame is
given (image to video) or whose latents are noised (off-policy distillation).

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns, R = B c rows of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..config.root import Config
from ..core.errors import ConfigError, InputError
from ..core.story import plan
from ..data.prompts import read_path
from ..engine.sources import source_settings
from ..models.spec import DiTDims, ModelSpec
from ..models.text import TextEncoder, text_encoder
from ..parallel.mesh import Mesh
from .clips import PaddedText, Words
from .trainer import Draw, seed_of

PROMPT_ORDER = 3  # in seeds of the order of prompts


@dataclass(frozen=True, kw_only=True)
class Films:
    """One micro-batch. `words`: rows of the prompts, film after film and chunk by chunk. `latents_BFCHW`: the films as they are, or None.

    `first_B1CHW`: the first latent frame of every film, or None.
    """

    cuts: tuple[tuple[bool, ...], ...]
    words: Words
    latents_BFCHW: torch.Tensor | None = None
    first_B1CHW: torch.Tensor | None = None


class FilmSource(Protocol):
    """Where films come from. Making one opens the data and reads no weights; `load` comes before everything else."""

    title: str  # what the data are, for reports
    frames: int  # latent frames of the longest film
    text: PaddedText

    def load(self, dims: DiTDims) -> None: ...

    def prepare(self) -> None:
        """What takes long and is done once, before the clock starts."""

    def example(self, number: int, chunks: int) -> Films:
        """A batch of the run's shape that takes nothing from the data."""

    def draw(self, draw: Draw, chunks: int) -> Films:
        """The films of this micro-step, `chunks` long: equal on the ranks that share a sample."""

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


def open_films(config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh) -> FilmSource:
    """The source that `config` names: a set of videos where a first frame or whole clips are needed, prompts, or the procedural world."""
    if config.data.data_path is None and not spec.folder:
        from .world_films import WorldFilms

        return WorldFilms(config, spec, device, mesh)
    if config.algorithm.i2v or not config.algorithm.backward_simulation:
        return ClipFilms(config, spec, device, mesh)
    return PromptFilms(config, spec, device, mesh)


def film_frames(config: Config) -> int:
    """Latent frames of the longest film of a run."""
    return config.training.streaming_frames or config.training.num_training_frames


def film_dtype(config: Config, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if config.infra.mixed_precision and device.type == "cuda" else torch.float32


class PromptFilms:
    """A text file, a caption folder or storyboards. Every epoch shows each film once, in an order that follows from the seed."""

    def __init__(self, config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh):
        self.config, self.spec, self.device, self.mesh = config, spec, device, mesh
        if config.data.data_path is None:
            raise InputError("data.data_path is not set; give a file of prompts or a folder of captions")
        self.frames = film_frames(config)
        self.chunks = self.frames // config.chunk_frames
        boards = read_path(Path(config.data.data_path), self.chunks, source_settings(config))
        self.plans = [plan(board, self.chunks, config.data.scene_cut_prefix) for board in boards]
        self.title = f"{len(self.plans)} films in {config.data.data_path}"
        self.taken = 0

    def load(self, dims: DiTDims) -> None:
        self.text = PaddedText(dims, film_text_encoder(self.config, self.spec, self.device), film_dtype(self.config, self.device), self.device)

    def prepare(self) -> None:
        pass

    def example(self, number: int, chunks: int) -> Films:
        return self._films(range(number, number + self.config.training.batch_size), chunks)

    def draw(self, draw: Draw, chunks: int) -> Films:
        batch, streams = self.config.training.batch_size, self.mesh.dp_size
        first = self.taken * batch * streams + self.mesh.dp_rank * batch
        self.taken += 1
        return self._films([self._shuffled(first + n) for n in range(batch)], chunks)

    def _shuffled(self, number: int) -> int:
        epoch, place = divmod(number, len(self.plans))
        generator = torch.Generator().manual_seed(seed_of(self.config.logging.seed, PROMPT_ORDER, epoch))
        return int(torch.randperm(len(self.plans), generator=generator)[place])

    def _films(self, numbers, chunks: int) -> Films:
        plans = [self.plans[number % len(self.plans)][:chunks] for number in numbers]
        words = self.text.rows([chunk.prompt for film in plans for chunk in film])
        return Films(cuts=tuple(tuple(chunk.cut for chunk in film) for film in plans), words=words)

    def state(self) -> dict:
        return {"taken": self.taken}

    def restore(self, state: dict) -> None:
        self.taken = state["taken"]


class ClipFilms:
    """Films of a video set, encoded: their prompts and cuts, their latents, and the first of these as the image that a film starts from."""

    def __init__(self, config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh):
        from .video_clips import VideoClips

        if config.data.image_or_video_shape[1] < film_frames(config):
            equation = f"data.image_or_video_shape[1]({config.data.image_or_video_shape[1]}) < training.streaming_frames({film_frames(config)})"
            raise ConfigError(f"{equation}: clips are not that long; raise the former")
        self.clips, self.config, self.device = VideoClips(config, spec, device, mesh), config, device
        self.title, self.frames = self.clips.title, film_frames(config)

    def load(self, dims: DiTDims) -> None:
        self.clips.load(dims)
        self.text = self.clips.text

    def prepare(self) -> None:
        self.clips.prepare()

    def example(self, number: int, chunks: int) -> Films:
        return self._films(self.clips.example(number), chunks)

    def draw(self, draw: Draw, chunks: int) -> Films:
        return self._films(self.clips.draw(draw), chunks)

    def _films(self, clips, chunks: int) -> Films:
        latents = clips.latents_BFCHW[:, : chunks * self.config.chunk_frames]
        cuts = tuple(film[:chunks] for film in clips.cuts)
        words = self.text.rows([prompt for film in clips.prompts for prompt in film[:chunks]])
        first = latents[:, :1] if self.config.algorithm.i2v else None
        return Films(cuts=cuts, words=words, latents_BFCHW=latents, first_B1CHW=first)

    def state(self) -> dict:
        return self.clips.state()

    def restore(self, state: dict) -> None:
        self.clips.restore(state)


def film_text_encoder(config: Config, spec: ModelSpec, device: torch.device) -> TextEncoder:
    """The model's text encoder where the configuration wants it."""
    if config.infra.text_encoder_cpu_offload or device.type == "cpu":
        return text_encoder(spec, device="cpu")
    return text_encoder(spec, device=device, dtype=torch.bfloat16)
