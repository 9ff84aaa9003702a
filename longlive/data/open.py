"""From a configuration to samples: the one place that reads the `data` keys of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..core.geometry import Geometry
from .loader import LoaderSettings
from .manifest import Manifest, index_dataset
from .sampling import SamplingRules
from .shards import ShardSource, check_index
from .sources import Source, VideoSource

if TYPE_CHECKING:
    from ..config.root import Config


def sampling_rules(config: "Config", *, deterministic: bool = False) -> SamplingRules:
    """The rules that `config` asks for; `deterministic` for validation: every folder from its first frame, in order."""
    data, n = config.data, config.chunk_frames
    if data.image_or_video_shape[1] % n:
        raise InputError(f"data.image_or_video_shape[1]({data.image_or_video_shape[1]}) is not whole chunks of {n} latent frames")
    return SamplingRules(
        chunks=data.image_or_video_shape[1] // n,
        chunk_frames=n,
        max_chunks_per_shot=data.max_chunks_per_shot,
        allow_padding=data.allow_padding,
        min_latent_frames=data.min_latent_frames,
        uniform_prompt=data.uniform_prompt,
        scene_cut_prefix=data.scene_cut_prefix,
        deterministic=deterministic,
    )


def sample_size(config: "Config") -> Geometry:
    """Pixels of a training sample."""
    return Geometry.of_latent(*config.data.image_or_video_shape[3:])


def open_manifest(config: "Config", root: str | Path | None = None) -> Manifest:
    """The manifest of `data.data_path`, kept where `data.manifest_path` says, or of another `root`, kept beside it.

    With several ranks, let one call this before the others do: it opens the files, they read the cache. Raises InputError.
    """
    if root is not None:
        return index_dataset(root)
    if config.data.data_path is None:
        raise InputError("data.data_path is not set; give a folder with video/ and caption/, or the shards of `longlive encode`")
    return index_dataset(config.data.data_path, config.data.manifest_path)


def open_source(config: "Config", seed: int, *, root: str | Path | None = None, deterministic: bool = False, codec: str | None = None) -> Source:
    """The samples of `root` (default `data.data_path`): videos, or shards with `data.load_raw_video: false`.

    `codec`: hash of the weights of the VAE (`models.weights.weights_hash`) that shards must have been written with. Raises InputError.
    """
    rules, size = sampling_rules(config, deterministic=deterministic), sample_size(config)
    if config.data.load_raw_video:
        return VideoSource(open_manifest(config, root), rules, size, seed=seed, max_broken=config.data.max_broken_clips)
    root = root if root is not None else config.data.data_path
    if root is None:
        raise InputError("data.data_path is not set; with data.load_raw_video: false give the folder that `longlive encode` wrote")
    source = ShardSource(root, seed=seed, max_broken=config.data.max_broken_clips)
    check_index(root, source.index, rules=rules, height=size.height, width=size.width, codec=codec)
    return source


def loader_settings(config: "Config", *, pin: bool = False) -> LoaderSettings:
    """How batches are loaded; `pin` where they go to a GPU."""
    data = config.data
    return LoaderSettings(
        batch=config.training.batch_size,
        workers=data.num_workers,
        prefetch=data.prefetch_factor,
        pin=pin,
        i2v=config.algorithm.i2v,
        slow_after=data.dataset_sample_warning_seconds,
        slow_every=data.dataset_sample_warning_interval_seconds,
    )
