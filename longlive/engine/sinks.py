"""Where frames go while a film is being made: a video file or latents.

A sink writes to a temporary name beside its target; the target appears whole, in `close`, or not at all, in `abort`.
Frames are uint8 [T, H, W, 3]; latents [F, C, h, w].
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..core.errors import InputError
from ..core.geometry import FPS


class VideoSink(Protocol):
    """Takes a film chunk by chunk. `close` returns where it is; after `abort` nothing is left behind."""

    def write(self, frames_THW3: torch.Tensor | None, z_FCHW: torch.Tensor | None) -> None: ...

    def close(self) -> Path | None: ...

    def abort(self) -> None: ...


def beside(path: Path) -> Path:
    """The temporary name of a file that is being written."""
    return path.with_name(path.name + ".tmp")


def write_failed(path: Path, error: Exception) -> InputError:
    reason = (error.strerror if isinstance(error, OSError) else "") or " ".join(str(error).split())
    return InputError(f"cannot write {path} ({reason}); free some space or give another folder with --output")


def disk_errors() -> tuple[type[Exception], ...]:
    """What a refusing disk raises, from Python and from the video library."""
    import av

    return OSError, av.FFmpegError


class Mp4Sink:
    """H.264 in MP4 through PyAV: libx264, yuv420p, crf 23, 24 fps, encoded as chunks arrive. Memory does not grow with the film."""

    def __init__(self, path: Path, *, fps: int = FPS, crf: int = 23, preset: str = "medium"):
        self.path, self.fps = Path(path), fps
        self.options = {"crf": str(crf), "preset": preset}
        self.container = self.stream = None
        self.frames = 0

    def write(self, frames_THW3: torch.Tensor | None, z_FCHW: torch.Tensor | None = None) -> None:
        if frames_THW3 is None or not len(frames_THW3):
            return
        import av

        array = np.ascontiguousarray(frames_THW3.cpu().numpy())
        try:
            if self.container is None:
                self._open(array.shape[2], array.shape[1])
            for image in array:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = self.frames
                self.frames += 1
                for packet in self.stream.encode(frame):
                    self.container.mux(packet)
        except disk_errors() as error:
            raise write_failed(self.path, error) from None

    def _open(self, width: int, height: int) -> None:
        import av

        self.container = av.open(str(beside(self.path)), mode="w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=self.fps, options=self.options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, self.fps)

    def close(self) -> Path | None:
        """Finishes the file and gives it its name. None when no frame came."""
        if self.container is None:
            return None
        try:
            for packet in self.stream.encode():
                self.container.mux(packet)
            self.container.close()
            os.replace(beside(self.path), self.path)
        except disk_errors() as error:
            raise write_failed(self.path, error) from None
        self.container = None
        return self.path

    def abort(self) -> None:
        if self.container is not None:
            try:
                self.container.close()
            except disk_errors():
                pass  # the disk is full or gone; the half file is removed next
            self.container = None
        beside(self.path).unlink(missing_ok=True)


class LatentsSink:
    """Keeps the latents and writes `{base}.pt`, a bfloat16 tensor [F, C, h, w], as documented. Memory grows by the latents only."""

    def __init__(self, path: Path):
        self.path, self.parts = Path(path), []

    def write(self, frames_THW3: torch.Tensor | None, z_FCHW: torch.Tensor | None = None) -> None:
        if z_FCHW is not None:
            self.parts.append(z_FCHW.to("cpu", torch.bfloat16))

    def close(self) -> Path | None:
        if not self.parts:
            return None
        try:
            with beside(self.path).open("wb") as file:
                torch.save(torch.cat(self.parts), file)
            os.replace(beside(self.path), self.path)
        except (OSError, RuntimeError) as error:  # torch.save turns what a full disk raises into a RuntimeError
            self.abort()
            raise write_failed(self.path, error.__context__ if isinstance(error.__context__, OSError) else error) from None
        return self.path

    def abort(self) -> None:
        self.parts.clear()
        beside(self.path).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """A UTF-8 text file, whole or not at all. Raises InputError when the disk refuses."""
    try:
        beside(path).write_text(text, encoding="utf-8")
        os.replace(beside(path), path)
    except OSError as error:
        beside(path).unlink(missing_ok=True)
        raise write_failed(path, error) from None
    return path
