"""The example storyboards: what `make demo` renders can be judged, and the judge knows a right film from a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlive.core.geometry import FPS
from longlive.data.storyboard_file import read_storyboard
from longlive.engine.sinks import Mp4Sink
from longlive.evaluation.contact_sheet import contact_sheet
from longlive.evaluation.film import judge_film, sheet_rows
from longlive.world.judge import Judge
from longlive.world.reader import read_story
from longlive.world.render import frame_parameters, render

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


def rendered(story, path):
    """The story as the world itself shows it, in a video file."""
    pixels = render(frame_parameters(story, None))
    frames = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    sink = Mp4Sink(path)
    sink.write(frames)
    return sink.close()


def test_there_is_an_example():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_film_of_several_shots(path):
    story = read_story(read_storyboard(path))
    assert len(story.shots) >= 4 and story.frames / FPS >= 10
    assert len({shot.setting for shot in story.shots}) >= 3


def test_the_judge_tells_the_told_film_from_another(tmp_path):
    story = read_story(read_storyboard(EXAMPLES[0]))
    film = rendered(story, tmp_path / "film.mp4")
    judge = Judge.load()
    right = judge_film(film, story, judge)
    assert min(right.values()) >= 0.75 and sum(right.values()) / len(right) >= 0.9, right
    turned = type(story)(shots=story.shots[1:] + story.shots[:1], seed=0, split="train")
    wrong = judge_film(film, turned, judge)
    assert wrong["setting"] == 0 and wrong["action"] < right["action"], wrong
    assert contact_sheet(film, sheet_rows(story), tmp_path / "sheet.png").stat().st_size > 1000
