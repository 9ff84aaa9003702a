"""How long the films of a source are, and how a configuration reads sources.

`inference.num_output_frames` counts when it was written down; else a storyboard's own durations; else `SENTENCE_CHUNKS`, or
`SHOT_CHUNKS` for each shot, whichever is more.
"""

from __future__ import annotations

from pathlib import Path

from ..core.schedule import chunk_schedule
from ..core.story import Storyboard
from ..data.prompts import SourceSettings, fitted, read_path, read_source

SENTENCE_CHUNKS = 4  # 5.2 seconds
SHOT_CHUNKS = 2


def source_settings(config, i2v: bool | None = None) -> SourceSettings:
    """What the configuration says about reading sources. `i2v` None: decided by what a folder holds."""
    d = config.data
    return SourceSettings(
        chunk_frames=config.chunk_frames,
        chunks_per_shot=d.chunks_per_shot,
        i2v=i2v,
        allow_padding=d.allow_padding,
        min_latent_frames=d.min_latent_frames,
        uniform_prompt=d.uniform_prompt,
        max_chunks_per_shot=d.max_chunks_per_shot,
    )


def boards_for_generate(config, source: str | Path) -> list[Storyboard]:
    """The storyboards of `longlive generate`: every shot has its duration."""
    settings = source_settings(config, True if config.algorithm.i2v else None)
    if length_is_given(config):
        return read_source(source, config_chunks(config), settings)
    return [fitted(board, usual_chunks(board)) for board in read_source(source, None, settings)]


def boards_for_inference(config) -> list[Storyboard]:
    """The storyboards of `inference.py`: `data.data_path`, each film `num_output_frames` long, as documented."""
    if config.data.data_path is None:
        from ..core.errors import ConfigError

        raise ConfigError("data.data_path is not set; give a prompts file, a caption folder or a storyboard file")
    return read_path(config.data.data_path, config_chunks(config), source_settings(config, config.algorithm.i2v))


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
