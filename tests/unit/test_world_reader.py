"""Captions say everything, so reading them back gives the truth."""

from __future__ import annotations

import pytest

from longlive.core.errors import InputError
from longlive.core.story import Shot, Storyboard
from longlive.world.reader import read_shot, read_story
from longlive.world.story import evaluation_story, sample_story


def said(story):
    """What captions can say of a story."""
    return [(s.setting, s.camera, s.chunks, [(r.character, r.action) for r in s.roles]) for s in story.shots]


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_captions_read_back_as_the_truth(split):
    for seed in range(150):
        story = sample_story(seed, chunks=8, shots=(1, 4), split=split)
        assert said(read_story(story.storyboard())) == said(story), story.shots


def test_evaluation_stories_read_back():
    for index in range(60):
        story = evaluation_story(3, index)
        assert said(read_story(story.storyboard())) == said(story)


def test_durations_come_from_the_plan():
    board = Storyboard(shots=tuple(Shot(prompt=f"A red {s} waits in a meadow. The camera is fixed.") for s in ("circle", "star", "heart")))
    story = read_story(board, chunks=4)
    assert [shot.chunks for shot in story.shots] == [2, 1, 1] and story.chunks == 4


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("A knight rides through a meadow. The camera is fixed.", "0 characters"),
        ("A red circle waits. The camera is fixed.", "0 settings"),
        ("A red circle waits on a beach and in a desert. The camera is fixed.", "2 settings"),
        ("A red circle waits on a beach.", "0 cameras"),
    ],
)
def test_what_is_not_said_is_named(prompt, what):
    with pytest.raises(InputError, match=what):
        read_shot(prompt)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_recalled_characters_are_those_of_earlier_shots(split):
    recalled = 0
    for seed in range(100):
        story = sample_story(seed, chunks=8, shots=(2, 5), split=split, memory=0.6, away=0.5)
        again = read_story(story.storyboard())
        assert said(again) == said(story), story.shots
        assert [r.recalled for s in again.shots for r in s.roles] == [r.recalled for s in story.shots for r in s.roles]
        recalled += sum(r.recalled for s in story.shots for r in s.roles)
    assert recalled > 50


def test_nobody_is_recalled_who_was_not_there():
    with pytest.raises(InputError, match="recalls a green character"):
        read_shot("In a meadow, the same green character waits. The camera is fixed.")
