"""What the judge bears: blur and noise do not move its scores, cuts stay exact, and it is as sure as it is right."""

import pytest
import torch

from longlive.cli.app import app, run
from longlive.core.errors import InputError
from longlive.evaluation.calibration import calibration_error
from longlive.evaluation.degrade import Degradation, degraded_chunks
from longlive.evaluation.world import judge_films, truth_chunks, whole_films
from longlive.world.judge import WEIGHTS, Judge
from longlive.world.story import evaluation_story


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the judge's weights are not here")
def test_blur_and_noise_do_not_move_the_scores():
    stories = [evaluation_story(8, index, chunks=3) for index in (2,)]
    how = Degradation(blur=1.0, noise=8.0)
    films = whole_films(stories, degraded_chunks(stories, truth_chunks(stories), how))
    report = judge_films(Judge.load(), stories, films, seed=8, source="truth")
    assert set(report.scores.values()) == {1.0}
    for story, film in zip(stories, report.films):
        assert list(film.reading.cuts) == story.shot_starts[1:]
    for row in report.calibration.values():
        assert row["characters"] == 6 and row["right"] == 1 and row["error"] < 0.05


def test_noise_belongs_to_the_story_and_the_chunk():
    stories = [evaluation_story(8, index, chunks=3) for index in (0, 1)]
    grey = torch.full((2, 32, 48, 3), 128, dtype=torch.uint8)
    how = Degradation(noise=8.0)
    mixed = [frames for index, frames in degraded_chunks(stories, iter([(1, grey), (0, grey), (1, grey)]), how) if index == 1]
    alone = [frames for _, frames in degraded_chunks(stories, iter([(1, grey), (1, grey)]), how)]
    assert all(map(torch.equal, mixed, alone)) and not torch.equal(*alone)
    assert (alone[0].float() - 128).std() == pytest.approx(8, rel=0.05)


def test_blur_spreads_a_point_by_its_sigma():
    point = torch.zeros(1, 192, 320, 3, dtype=torch.uint8)
    point[:, 92:101, 160] = 255  # a short line, so that rounding takes little
    rows = Degradation(blur=2.0)(point, 0)[0, 96, :, 0].float()
    x = torch.arange(320) - 160.0
    assert ((rows * x**2).sum() / rows.sum()).sqrt() == pytest.approx(2.0, rel=0.08)
    assert torch.equal(Degradation(blur=3.0)(point + 9, 0).float().mean((1, 2, 3)).round(), (point + 9).float().mean((1, 2, 3)).round())


def test_calibration_error_is_the_gap():
    assert calibration_error([0.9] * 10, [True] * 9 + [False]) == pytest.approx(0)
    assert calibration_error([1.0] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.5)
    assert calibration_error([0.95, 0.55], [True, False]) == pytest.approx((0.05 + 0.55) / 2)


def test_strengths_that_make_no_sense_are_refused(capsys):
    for bad in ({"blur": -1.0}, {"noise": 300.0}):
        with pytest.raises(InputError):
            Degradation(**bad)
    assert run(app, ["eval", "world", "--films", "1", "--noise", "8"]) == 2
    assert "--truth" in capsys.readouterr().err
