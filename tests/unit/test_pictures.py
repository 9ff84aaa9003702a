"""Images and clips: exact size, 24 frames a second, and one line for what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from longlive.core.errors import InputError
from longlive.core.geometry import Geometry
from longlive.data.images import load_image, to_pixels
from longlive.data.videos import clip_frames, first_frame, load_clip, probe
from longlive.engine.sinks import Mp4Sink

SIZE = Geometry(32, 64)


def clip(path, frames, fps=24):
    sink = Mp4Sink(path, fps=fps, crf=1)
    ramp = torch.arange(frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 64, 3) * 2
    for part in ramp.split(5):
        sink.write(part.contiguous(), None)
    return sink.close()


def test_an_image_is_stretched_to_the_film(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "same.png")
    pixels = load_image(tmp_path / "same.png", SIZE)
    torch.testing.assert_close((pixels.permute(1, 2, 0) + 1) * 127.5, torch.from_numpy(array).float(), atol=1e-3, rtol=0)
    half = to_pixels(Image.new("RGB", (640, 20), (255, 0, 51)), SIZE)
    assert half.shape == (3, 32, 64)
    torch.testing.assert_close(half[:, 5, 5], torch.tensor([1.0, -1.0, -0.6]))


def test_grey_palette_and_alpha_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (10, 10)).save(path)
        assert load_image(path, SIZE).shape == (3, 32, 64)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", None])
def test_what_is_no_image_gets_one_line(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_image(path, SIZE)
    assert "x.png" in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_image_is_no_image(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:3000])
    with pytest.raises(InputError, match="not a readable image"):
        load_image(tmp_path / "x.png", SIZE)


@pytest.mark.parametrize("fps, frames, expected", [(24, 13, 13), (48, 26, 13), (12, 7, 14), (30, 30, 24)])
def test_clips_are_read_at_24_frames_a_second(tmp_path, fps, frames, expected):
    path = clip(tmp_path / "c.mp4", frames, fps)
    assert probe(path).frames == frames and probe(path).fps == fps
    video = load_clip(path, SIZE)
    assert abs(video.shape[1] - expected) <= 1
    shown = ((video[0, :, 16, 32] + 1) * 127.5 / 2).round().int().tolist()
    wanted = [min(frames - 1, round(i * fps / 24)) for i in range(len(shown))]
    assert max(abs(a - b) for a, b in zip(shown, wanted)) <= 1
    assert len(list(clip_frames(path, SIZE, 5))) == 5
    torch.testing.assert_close(first_frame(path, SIZE), video[:, 0])


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_gets_one_line(tmp_path, content):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (probe, lambda p: first_frame(p, SIZE)):
        with pytest.raises(InputError) as caught:
            read(path)
        assert "x.mp4" in str(caught.value) and "\n" not in str(caught.value)
