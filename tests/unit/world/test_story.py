"""Stories are the same everywhere, legal, and the two splits share no combination."""

import itertools

import pytest

from longlive.core.errors import InputError
from longlive.core.geometry import chunk_pixel_range
from longlive.core.story import plan
from longlive.world.captions import HELD_OUT_FRAMES, TRAIN_FRAMES
from longlive.world.story import evaluation_story, sample_story
from longlive.world.vocabulary import ACTIONS, CAMERAS, COLOURS, SETTINGS, SHAPES, held_out


FIRST = (
    73198622700834,
    [False, True, False, False, False, True],
    "The camera pans left while in a city at night a mid-sized spotted pink crescent twirls.",
)


def test_first_story_is_fixed():
    story = evaluation_story(0, 0)
    assert (story.seed, story.cuts, story.shots[0].caption) == FIRST


def _looks(stories):
    return {(r.character.shape, r.character.colour) for s in stories for shot in s.shots for r in shot.roles}


def test_splits_share_no_pair_and_cover_all():
    train = _looks(sample_story(i, chunks=8, shots=(1, 4)) for i in range(800))
    test = _looks(evaluation_story(0, i) for i in range(300))
    pairs = set(itertools.product(SHAPES, COLOURS))
    assert not train & test and train | test == pairs and len(test) == 16
    assert all(held_out(*p) for p in test)
    assert not set(HELD_OUT_FRAMES) & set(TRAIN_FRAMES)


def test_evaluation_stories_are_as_promised():
    stories = [evaluation_story(3, i) for i in range(90)]
    assert sum(max(len(s.roles) for s in story.shots) == 2 for story in stories) == 30
    for story in stories:
        assert story.chunks >= 6 and len(story.shots) >= 3
        first, last = ({r.character for r in story.shots[k].roles} for k in (0, -1))
        assert first & last
        for a, b in zip(story.shots, story.shots[1:]):
            assert a.setting != b.setting
        for shot in story.shots:
            assert len(shot.caption.split()) <= 45
            assert len({r.character.colour for r in shot.roles}) == len(shot.roles)
            assert all(r.action != "spins" or r.character.marking != "plain" for r in shot.roles)


def test_attributes_are_uniform():
    shots = [shot for i in range(900) for shot in evaluation_story(5, i).shots]
    for names, values in (
        (SETTINGS, [s.setting for s in shots]),
        (CAMERAS, [s.camera for s in shots]),
        (ACTIONS, [r.action for s in shots for r in s.roles]),
        (SHAPES, [r.character.shape for s in shots for r in s.roles]),
        (COLOURS, [r.character.colour for s in shots for r in s.roles]),
    ):
        for name in names:
            assert abs(values.count(name) / len(values) * len(names) - 1) < 0.25, name


def test_storyboard_plans_to_the_same_cuts():
    story = sample_story(11, chunks=9, shots=(4, 4))
    planned = plan(story.storyboard())
    assert [p.cut for p in planned] == story.cuts and [p.prompt.split("transitions. ")[-1] for p in planned] == story.captions
    assert story.shot_starts[1] == chunk_pixel_range(story.shots[0].chunks)[0]


@pytest.mark.parametrize("bad", [{"shots": (4, 4), "chunks": 3}, {"characters": (1, 3)}, {"split": "test"}])
def test_impossible_stories_are_refused(bad):
    with pytest.raises(InputError):
        sample_story(0, **bad)
