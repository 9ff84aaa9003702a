"""Exactly the frames that were asked for, whatever the container; damage is never concealed."""

import pytest
import torch
from clip_toys import HEIGHT, WIDTH, damage, numbers, write_clip

from longlive.core.errors import InputError
from longlive.data import video_reader
from longlive.data.video_reader import count_frames, read_frames

ASKED = ([0, 1, 2], [5, 5, 7], [99, 100, 100, 149], [47, 49], [49], [72, 73], [71, 72, 96], list(range(60, 90)))
KINDS = {
    "plain.mp4": {},
    "open-gop.mp4": {"extra": "open-gop=1:bframes=3"},
    "irregular.mp4": {"irregular": True},
    "plain.mkv": {},
    "plain.avi": {"codec": "mpeg4"},
    "fast.mov": {"fps": 60},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_exact(tmp_path, name):
    path = write_clip(tmp_path / name, 150, **KINDS[name])
    whole = read_frames(path, list(range(150)), HEIGHT, WIDTH)
    assert whole.dtype == torch.uint8 and whole.shape == (150, HEIGHT, WIDTH, 3) and numbers(whole) == list(range(150))
    for asked in ASKED:
        frames = read_frames(path, asked, HEIGHT, WIDTH)
        assert torch.equal(frames, whole[asked]), asked


def test_a_late_frame_is_sought_not_counted_to(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "long.mp4", 400)
    decoded = []
    original = video_reader._sought

    def spy(*args):
        for item in original(*args):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video_reader, "_sought", spy)
    assert numbers(read_frames(path, [350, 351], HEIGHT, WIDTH)) == [350, 351]
    assert decoded and decoded[0] > 300 and decoded[-1] == 351


def test_frames_are_stretched_to_the_size(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3, size=(48, 144))
    frames = read_frames(path, [0, 1, 2], 96, 128)
    assert frames.shape == (3, 96, 128, 3)
    assert frames[1, :, :10].float().mean() > 200 and frames[1, :, 18:].float().mean() < 40


def test_damage_is_an_error(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100)
    damage(path)
    with pytest.raises(InputError, match="is damaged"):
        read_frames(path, list(range(100)), HEIGHT, WIDTH)
    with pytest.raises(InputError, match="is damaged"):
        count_frames(path)


def test_a_file_that_ends_early_is_an_error(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60)
    assert count_frames(path) == 60
    for asked in ([0, 60], [70]):
        with pytest.raises(InputError, match="ends after 60 frames"):
            read_frames(path, asked, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="does not exist"):
        read_frames(tmp_path / "b.mp4", [0], HEIGHT, WIDTH)


def test_numbers_must_not_decrease(tmp_path):
    for wrong in ([], [-1], [2, 1]):
        with pytest.raises(ValueError):
            read_frames(tmp_path / "a.mp4", wrong, HEIGHT, WIDTH)
