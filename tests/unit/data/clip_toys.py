"""Small videos whose frames carry their number, and folders of them in the documented layout."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, BITS = 32, 64, 9


def write_clip(path: Path, frames: int, *, fps: int = 24, codec: str = "libx264", irregular: bool = False, extra: str = "", size=(HEIGHT, WIDTH)) -> Path:
    """Frame i shows the binary digits of i as vertical bars. `irregular`: times with no fixed distance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "8", "g": "24", "preset": "ultrafast"} if codec == "libx264" else {"qscale": "2", "g": "24"}
    if extra:
        options["x264-params"] = extra
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if irregular else fps)
        time = 0
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            time += (41 if number % 5 else 90) if irregular else 1
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def picture(number: int, size=(HEIGHT, WIDTH)) -> np.ndarray:
    image = np.full((*size, 3), 20, np.uint8)
    bar = size[1] // BITS
    for bit in range(BITS):
        if number >> bit & 1:
            image[:, bit * bar : (bit + 1) * bar] = 235
    return image


def numbers(frames_THW3) -> list[int]:
    """What `picture` wrote, read back from frames of any size."""
    height, width = frames_THW3.shape[1:3]
    bar = width / BITS if width % BITS == 0 else (width * (WIDTH // BITS) / WIDTH)
    middle = frames_THW3[:, height // 4 : -height // 4].float().mean(dim=(1, 3))
    centres = [int((bit + 0.5) * bar) for bit in range(BITS)]
    return [sum((int(row[x]) > 128) << bit for bit, x in enumerate(centres)) for row in middle]


def write_dataset(root: Path, folders: dict[str, list], fps: int = 24) -> Path:
    """`folders`: name -> the frames of its clips; clip k has the caption "<name> <k>"."""
    for name, lengths in folders.items():
        for k, frames in enumerate(lengths):
            write_clip(root / "video" / name / f"{k}.mp4", frames, fps=fps)
            write_caption(root, name, k, f"{name} {k}")
    return root


def write_caption(root: Path, name: str, k: int | str, text: str) -> Path:
    path = root / "caption" / name / f"{k}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"caption": text}))
    return path


def damage(path: Path) -> None:
    """Cuts pictures out of a file and leaves its header whole."""
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 900
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
