"""Curves of drift are flat and one for the truth, and each falls for the fault it is there for."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from longlive.cli.app import app, run
from longlive.evaluation.degrade import Degradation
from longlive.evaluation.drift import CURVES, LOOKS, DriftMeter, curve, losses
from longlive.evaluation.drift_plot import plot_curves
from longlive.evaluation.picture import measure
from longlive.evaluation.world import truth_chunks
from longlive.world import perception
from longlive.world.judge import WEIGHTS, Judge
from longlive.world.story import Character, Role, ShotTruth, WorldStory

pytestmark = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the judge's weights are not here")
RED = Character(shape="circle", colour="red", size="large", marking="eyes")
BLUE = Character(shape="star", colour="blue", size="large", marking="plain")


def story(*shots):
    told = [
        ShotTruth(
            setting=setting,
            camera=camera,
            chunks=chunks,
            offset=0.0,
            roles=(Role(character=who, action=action, home_x=160.0, home_y=108.0, direction=1),),
        )
        for setting, camera, who, action, chunks in shots
    ]
    return WorldStory(shots=tuple(told), seed=1, split="train")


TWO = story(("meadow", "left", RED, "bounces", 3), ("beach", "zoom", RED, "orbits", 1))


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


@pytest.fixture(scope="module")
def truth():
    return [frames for _, frames in truth_chunks([TWO])]


def rows(judge, chunks, told=TWO, **settings):
    """One window per chunk."""
    meter = DriftMeter(judge=judge, story=told, window=1.2, **settings)
    for frames in chunks:
        meter.feed(frames)
    found = curve([meter])
    assert [row["chunks"] for row in found] == [1] * len(found)
    return found


def test_the_truth_is_one_everywhere(judge, truth):
    found = rows(judge, truth)
    for name in CURVES:
        assert [row[name] for row in found if row[name] is not None] == pytest.approx([1.0] * sum(r[name] is not None for r in found)), name
    assert [row["boundary"] is None for row in found] == [True, False, False, True]  # the film's start and its cut
    assert [row["identity"] is None for row in found] == [True, True, True, False]
    assert all(abs(loss["lost"]) < 1e-3 for loss in losses(found)) and [loss["name"] for loss in losses(found)] == list(CURVES)


def test_a_frozen_film_does_not_move_even_when_it_flickers(judge, truth):
    still = [truth[0], *(truth[0][-1:].expand_as(frames) for frames in truth[1:3])]
    assert [row["motion"] for row in rows(judge, still)] == pytest.approx([1, 0, 0], abs=0.02)
    noisy = [Degradation(noise=8)(frames, seed) for seed, frames in enumerate(still)]
    found = [row["motion"] for row in rows(judge, noisy)]
    assert found[0] > 0.9 and found[1] < 0.05 and found[2] < 0.05


def test_truth_that_stands_still_is_asked_for_no_motion(judge):
    told = story(("night", "still", RED, "waits", 2))
    assert [row["motion"] for row in rows(judge, [f for _, f in truth_chunks([told])], told)] == [None, None]


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "heart", "cross", "diamond", "crescent"])
def test_a_spin_is_seen_as_motion(shape):
    told = story(("meadow", "still", dataclasses.replace(RED, shape=shape, size="small"), "spins", 1))
    frames = next(truth_chunks([told]))[1]
    assert measure(frames, perception.half_size(frames)).movement > 4e-4


def test_blur_takes_sharpness_only(judge, truth):
    found = rows(judge, [Degradation(blur=blur)(frames, 0) for blur, frames in zip((0, 0.5, 1.0), truth)])
    sharp = [row["sharpness"] for row in found]
    assert sharp[0] == pytest.approx(1) and sharp[0] > sharp[1] + 0.1 > sharp[2] + 0.2
    assert all(row["colour"] == row["setting"] == 1 and row["motion"] > 0.9 for row in found)
    noisy = rows(judge, [Degradation(noise=8)(frames, 0) for frames in truth[:1]])
    assert noisy[0]["sharpness"] == pytest.approx(1, abs=0.05)


def turned(frames, degrees):
    """Hues turned about the grey axis."""
    a = math.radians(degrees)
    c, s, third = math.cos(a), math.sin(a), 1 / 3
    one, other = (1 - c) * third, math.sqrt(third) * s
    matrix = torch.tensor([[c + one, one - other, one + other], [one + other, c + one, one - other], [one - other, one + other, c + one]])
    return (frames.float() @ matrix.T).round().clamp(0, 255).to(torch.uint8)


def test_a_hue_that_drifts_takes_tone_first_and_then_colour(judge, truth):
    found = rows(judge, [turned(frames, degrees) for degrees, frames in zip((0, 12, 120), truth)])
    tone = [row["tone"] for row in found]
    assert tone[0] > 0.98 and 0.4 < tone[1] < 0.9 and tone[2] == 0
    assert [row["colour"] for row in found] == [1, 1, 0]
    assert losses(found)[0]["lost"] == pytest.approx(100)


def test_a_film_that_fades_loses_saturation(judge, truth):
    grey = [torch.lerp(f.float(), f.float().mean(3, keepdim=True).expand_as(f).contiguous(), a).round().to(torch.uint8) for a, f in zip((0, 0.5), truth)]
    assert [row["saturation"] for row in rows(judge, grey)] == pytest.approx([1.0, 0.5], abs=0.02)


def test_a_jump_at_a_boundary_raises_boundary(judge, truth):
    jumpy = [truth[0], truth[1].roll(12, dims=2), truth[2].roll(12, dims=2)]
    found = [row["boundary"] for row in rows(judge, jumpy)]
    assert found[0] is None and found[1] > 2 and found[2] == pytest.approx(1, abs=0.1)
    assert next(loss for loss in losses(rows(judge, jumpy[:2])) if loss["name"] == "boundary")["lost"] == pytest.approx(0)


def test_identity_is_what_was_seen_first_not_what_was_told(judge):
    told = story(("meadow", "still", RED, "waits", 2), ("beach", "still", RED, "waits", 1))
    shown = story(("meadow", "still", BLUE, "waits", 2), ("beach", "still", RED, "waits", 1))
    found = rows(judge, [f for _, f in truth_chunks([shown])], told)
    assert [row["shape"] for row in found] == [0, 0, 1]
    assert [row["identity"] for row in found] == [None, None, 0]


def test_every_other_chunk_still_knows_its_boundary(judge, truth):
    found = rows(judge, truth[:3], every=2)
    assert [row["boundary"] for row in found] == [None, pytest.approx(1)]


def test_a_short_last_window_is_no_loss():
    made = [{"from_second": 0.0, "chunks": 15, **dict.fromkeys(CURVES, 1.0)}, {"from_second": 20.0, "chunks": 15, **dict.fromkeys(CURVES, 0.9)}]
    made.append({"from_second": 40.0, "chunks": 1, **dict.fromkeys(CURVES, 0.0)})
    lost = {row["name"]: row["lost"] for row in losses(made)}
    assert lost["colour"] == pytest.approx(10) and lost["boundary"] == pytest.approx(-10)


def test_the_plot_is_a_picture(tmp_path: Path):
    from PIL import Image

    made = [{"from_second": 20.0 * n, "chunks": 15, **dict.fromkeys(CURVES, 1.0 - 0.1 * n), "motion": None} for n in range(4)]
    blank = [dict(row, **dict.fromkeys((*CURVES,), None)) for row in made]
    full, empty = (Image.open(plot_curves(values, tmp_path / f"{n}.png")).convert("RGB") for n, values in enumerate((made, blank)))
    line = (30, 90, 200)
    colours = [{colour for _, colour in page.getcolors(1 << 20)} for page in (full, empty)]
    assert line in colours[0] and line not in colours[1] and sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png"]
    assert set(LOOKS) < set(CURVES)


def test_the_plot_must_be_a_png(tmp_path, capsys):
    assert run(app, ["eval", "drift", "--truth", "--plot", str(tmp_path / "x.jpg")]) == 2
    assert ".png" in capsys.readouterr().err
