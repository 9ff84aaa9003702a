"""Saved latents -> videos: one file after another, a few latent frames at a time.

A file is what `save_latents_only` writes: a tensor [F, 48, h, w] (a leading axis of 1 is accepted). The receipt beside it, when there is one,
says which model made it.

Legend: F latent frames, C latent channels.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from ..core.errors import InputError
from ..core.geometry import FPS, Geometry
from .decode import Inline
from .sinks import Mp4Sink

PATTERN = "*.pt"
PIECE = 8  # latent frames decoded and written at a time


def latent_files(path: Path, pattern: str = PATTERN) -> list[Path]:
    """The file itself, or the files of a folder that match, sorted. Raises InputError when there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a file of latents or a folder with {pattern}")
    files = sorted(p for p in path.glob(pattern) if p.is_file())
    if not files:
        raise InputError(f"{path} holds no {pattern}; make latents with save_latents_only=true, or give another --pattern")
    return files


def load_latents(path: Path, channels: int = 48) -> torch.Tensor:
    """float32 [F, C, h, w]. Raises InputError for a file that holds anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            z = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or no tensor file"
        raise InputError(f"{path} is not a file of latents ({reason}); give what save_latents_only wrote") from None
    if not isinstance(z, torch.Tensor):
        raise InputError(f"{path} holds a {type(z).__name__}, not latents; give what save_latents_only wrote")
    z_FCHW = z[0] if z.dim() == 5 and z.shape[0] == 1 else z
    if z_FCHW.dim() != 4 or z_FCHW.shape[1] != channels or not z_FCHW.shape[0] or not z_FCHW.is_floating_point():
        raise InputError(f"{path} holds {z.dtype} {list(z.shape)}; latents are floats [frames, {channels}, height / 16, width / 16]")
    Geometry.of_latent(*z_FCHW.shape[2:])
    return z_FCHW.float()


def model_of(path: Path) -> tuple[str, str] | None:
    """(model, vae_type) by the receipt beside a file of latents, or None where there is no readable receipt."""
    receipt = path.with_suffix(".json")
    try:
        record = json.loads(receipt.read_text(encoding="utf-8"))
        return record["model"], record["config"]["inference"]["vae_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def decode_file(codec, path: Path, target: Path, fps: int = FPS) -> int:
    """Decodes `path` into the video `target` and returns its number of frames. Nothing is left behind on failure."""
    z_FCHW, stage, sink, frames = load_latents(path), Inline(codec), Mp4Sink(target, fps=fps), 0
    try:
        for start in range(0, len(z_FCHW), PIECE):
            stage.submit(z_FCHW[None, start : start + PIECE])
            for video in stage.collect():
                sink.write(video[0])
                frames += video.shape[1]
        sink.close()
    except BaseException:
        sink.abort()
        raise
    return frames
