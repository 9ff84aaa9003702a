"""How long the films of a source are, and how a configuration reads sources.

`inference.num_output_frames` counts when it was written down; else a storyboard's own durations; else `SENTENCE_CHUNKS`, or
`SHOT_CHUNKS` for each shot, whichever is more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.load import OVERRIDE
from ..core.errors import ConfigError
from ..core.schedule import chunk_schedule
from ..core.story import Storyboard
from ..data.prompts import SourceSettings, fitted, read_path, read_source

SENTENCE_CHUNKS = 4  # 5.2 seconds
SHOT_CHUNKS = 2


def source_settings(config) -> SourceSettings:
    """What the configuration says about reading sources. Without `i2v`, a folder's own contents decide."""
    d = config.data
    return SourceSettings(
        chunk_frames=config.chunk_frames,
        chunks_per_shot=d.chunks_per_shot,
        i2v=config.algorithm.i2v or None,
        allow_padding=d.allow_padding,
        min_latent_frames=d.min_latent_frames,
        uniform_prompt=d.uniform_prompt,
        max_chunks_per_shot=d.max_chunks_per_shot,
    )


def boards_for_generate(config, source: str | Path) -> list[Storyboard]:
    """The storyboards of `longlive generate`: every shot has its duration. A seed given on the command line beats a storyboard's own."""
    settings = source_settings(config)
    if length_is_given(config):
        boards = read_source(source, config_chunks(config), settings)
    else:
        boards = [fitted(board, usual_chunks(board)) for board in read_source(source, None, settings)]
    if config.provenance["logging.seed"] == OVERRIDE:
        boards = [replace(board, seed=None) for board in boards]
    return boards


def boards_for_inference(config) -> list[Storyboard]:
    """The storyboards of `inference.py`: `data.data_path`, each film `num_output_frames` long, as documented."""
    if config.data.data_path is None:
        raise ConfigError(f"{config.source}: data.data_path is not set; set it to a prompts file or a folder of captions")
    return read_path(config.data.data_path, config_chunks(config), source_settings(config))


def config_chunks(config) -> int:
    """Chunks of a film by `num_output_frames`. Raises InputError with the equation unless it is whole chunks."""
    return len(chunk_schedule(config.num_output_frames, config.chunk_frames))


def length_is_given(config) -> bool:
    """Whether someone wrote num_output_frames down, rather than leaving it to the model's usual size."""
    return config.provenance["num_output_frames"] not in ("default", "as data.image_or_video_shape[1]")


def usual_chunks(board: Storyboard) -> int:
    """Length of a film that nobody gave a length: the sum of its durations, or a default by its shots."""
    durations = [shot.chunks for shot in board.shots]
    if None in durations:
        return max(SENTENCE_CHUNKS, SHOT_CHUNKS * len(durations))
    return sum(durations)
