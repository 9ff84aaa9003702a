"""Given frames of a video file, as bytes: exactly those, whatever the container, in one pass.

Frame number i is the i-th that the decoder shows. A late first frame is reached by seeking where the file tells the time of every frame; wherever the
times and the decoded frames disagree, the file is read from its beginning and counted. Damage is an error, never a concealed picture.

Legend: T frames, H W pixels. Frames are stretched to H x W without cropping (spec training §2.2), bicubic, RGB.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import InputError
from .videos import damaged, open_video

NEAR = 48  # frames that are decoded rather than sought over
STRICT = {"err_detect": "explode"}  # damage raises instead of being painted over


class _Lost(Exception):
    """Seeking did not lead to a frame whose number is known."""


def read_frames(path: str | Path, numbers: Sequence[int], height: int, width: int) -> Tensor:
    """Frames `numbers` (not decreasing, repeats allowed) of a video as uint8 [T, height, width, 3] on the CPU.

    Raises InputError where the file is damaged or shorter than its header promises.
    """
    import av

    if any(b < a for a, b in zip(numbers, numbers[1:])) or not len(numbers) or numbers[0] < 0:
        raise ValueError("numbers must be given, from 0 on, not decreasing")
    if numbers[0] > NEAR:
        try:
            return _read(path, numbers, height, width, seek=True)
        except (_Lost, av.FFmpegError, OSError, ValueError):
            pass  # the file is counted through instead, and its damage reported there
    try:
        return _read(path, numbers, height, width, seek=False)
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(path, error) from None


def count_frames(path: str | Path) -> int:
    """Decodes a whole video. Returns its frames. Raises InputError where one of them is damaged."""
    import av

    last = -1
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = STRICT
            for last, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise InputError(f"video {path} is damaged at frame {last}; give a file that plays to its end")
    except (av.FFmpegError, OSError) as error:
        raise damaged(path, error) from None
    return last + 1


def _read(path: str | Path, numbers: Sequence[int], height: int, width: int, *, seek: bool) -> Tensor:
    from av.video.reformatter import VideoReformatter

    frames_THW3 = torch.empty(len(numbers), height, width, 3, dtype=torch.uint8)
    filled, last, scaler = 0, -1, VideoReformatter()
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = STRICT
        for last, frame in _sought(container, stream, numbers[0]) if seek else enumerate(container.decode(stream)):
            if last < numbers[filled]:
                continue
            if frame.is_corrupt:
                raise InputError(f"video {path} is damaged at frame {last}; give a file that plays to its end")
            picture = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC").planes[0]
            rows = torch.frombuffer(picture, dtype=torch.uint8).view(height, picture.line_size)[:, : 3 * width]  # rows may be padded
            while numbers[filled] == last:
                frames_THW3[filled].view(height, 3 * width).copy_(rows)
                filled += 1
                if filled == len(numbers):
                    return frames_THW3
    if seek:
        raise _Lost
    raise InputError(f"video {path} ends after {last + 1} frames and frame {numbers[-1]} was promised; give a file that plays to its end")


def _sought(container, stream, first: int) -> Iterator[tuple[int, object]]:
    """(number, frame) from a key frame at or before frame `first` on. Raises _Lost where a number is not certain."""
    opening = next(container.decode(stream), None)
    times = frame_times(container, stream)
    if opening is None or first >= len(times) or times[0] != opening.pts:
        raise _Lost
    container.seek(times[first], stream=stream, backward=True, any_frame=False)
    number = -1
    for frame in container.decode(stream):
        if number < 0:
            number = bisect_left(times, frame.pts) if frame.pts is not None else first + 1
            if number > first:
                raise _Lost
        else:
            number += 1
        if number >= len(times) or times[number] != frame.pts:
            raise _Lost
        yield number, frame


def frame_times(container, stream) -> Sequence[int]:
    """The time of every frame in the order shown, in units of the stream's time base; empty where the file does not tell.

    From the index of the container where it holds all frames at one distance, else by reading the packets (no picture is decoded).
    """
    index = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    steps = {b - a for a, b in zip(index, index[1:])}
    if stream.frames and len(index) == stream.frames and len(steps) == 1 and stream.start_time is not None:
        step = steps.pop()
        return range(stream.start_time, stream.start_time + step * len(index), step)
    container.seek(stream.start_time or 0, stream=stream)
    times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    return [] if None in times or len(set(times)) != len(times) else sorted(times)
