"""A film on one page: the right frames, under the right words, and nothing half written."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from longlive.core.errors import InputError
from longlive.engine.sinks import Mp4Sink
from longlive.evaluation.contact_sheet import LINE_HEIGHT, MARGIN, SheetRow, contact_sheet, picked_frames

HEIGHT, WIDTH, FRAMES = 48, 64, 12


@pytest.fixture
def film(tmp_path):
    """Frames 0-5 red, 6-11 blue."""
    frames = torch.zeros(FRAMES, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    frames[:6, ..., 0] = 220
    frames[6:, ..., 2] = 220
    sink = Mp4Sink(tmp_path / "film.mp4")
    sink.write(frames)
    return sink.close()


def test_each_row_shows_its_own_shot(film, tmp_path):
    rows = [SheetRow(text="one", first=0, last=6), SheetRow(text="two", first=6, last=12)]
    page = Image.open(contact_sheet(film, rows, tmp_path / "new" / "sheet.png", columns=3)).convert("RGB")
    assert page.size == (MARGIN + 3 * (WIDTH + MARGIN), MARGIN + 2 * (LINE_HEIGHT + HEIGHT + MARGIN))
    for column in range(3):
        x = MARGIN + column * (WIDTH + MARGIN) + WIDTH // 2
        y = MARGIN + LINE_HEIGHT + HEIGHT // 2
        red, blue = page.getpixel((x, y)), page.getpixel((x, y + LINE_HEIGHT + HEIGHT + MARGIN))
        assert red[0] > 150 and red[2] < 90 and blue[2] > 150 and blue[0] < 90


def test_frames_are_spread_over_the_shot_and_stay_inside():
    assert picked_frames(SheetRow(text="", first=10, last=20), 5) == [11, 13, 15, 17, 19]
    assert picked_frames(SheetRow(text="", first=7, last=8), 5) == [7] * 5


def test_a_shot_outside_the_film_is_refused(film, tmp_path):
    with pytest.raises(InputError, match="12 frames"):
        contact_sheet(film, [SheetRow(text="", first=6, last=13)], tmp_path / "sheet.png")
    assert not list(tmp_path.glob("sheet*"))


def test_an_unwritable_place_is_said(film, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        contact_sheet(film, [SheetRow(text="", first=0, last=12)], tmp_path / "file" / "sheet.png")
