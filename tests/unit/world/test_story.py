"""Stories are the same everywhere, legal, and the two splits share no combination."""

import dataclasses
import hashlib
import itertools
import re

import pytest

from longlive.core.errors import InputError
from longlive.core.geometry import chunk_pixel_range
from longlive.core.story import plan
from longlive.world.captions import COLOUR_WORDS, HELD_OUT_FRAMES, MARKING_WORDS, RECALLED_WORDS, SHAPE_WORDS, SIZE_WORDS, TRAIN_FRAMES
from longlive.world.story import evaluation_story, memory_story, reworded, sample_story
from longlive.world.vocabulary import ACTIONS, CAMERAS, COLOURS, SETTINGS, SHAPES, held_out


FIRST = (
    73198622700834,
    [False, True, False, False, False, True],
    "The camera pans left while in a city at night a mid-sized spotted pink crescent twirls.",
)


def test_first_story_is_fixed():
    story = evaluation_story(0, 0)
    assert (story.seed, story.cuts, story.shots[0].caption) == FIRST


def test_stories_are_those_of_the_recorded_hash():
    stories = [sample_story(seed, chunks=8, shots=(2, 5)) for seed in range(40)]
    stories += [sample_story(seed, split="held-out") for seed in range(20)]
    stories += [evaluation_story(7, index, chunks=12, shots=(5, 5)) for index in range(20)]
    rows = []
    for shot in (shot for story in stories for shot in story.shots):
        roles = [(r.character, r.action, r.home_x, r.home_y, r.direction, r.known) for r in shot.roles]
        rows.append((shot.setting, shot.camera, shot.chunks, shot.offset, shot.caption, roles))
    assert hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest() == "9303bae308ae846f"


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


def _untold(story):
    """The story without its captions' words."""
    return [dataclasses.replace(s, caption="", roles=tuple(dataclasses.replace(r, recalled=False) for r in s.roles)) for s in story.shots]


def test_memory_changes_names_in_captions_and_nothing_else():
    shapes_sizes_markings = {word for words in (*SHAPE_WORDS.values(), *SIZE_WORDS.values()) for word in words}
    shapes_sizes_markings |= {part.split()[-1] for pairs in MARKING_WORDS.values() for pair in pairs for part in pair if part}
    assert not shapes_sizes_markings & {word for words in RECALLED_WORDS for word in words.split()}
    recalled = known = 0
    for seed in range(200):
        full, story = (sample_story(seed, chunks=8, shots=(3, 5), memory=memory) for memory in (0.0, 0.5))
        assert _untold(full) == _untold(story)
        for a, b in zip(full.shots, story.shots):
            assert not any(r.recalled for r in a.roles) and all(r.known for r in b.roles if r.recalled)
            assert (a.caption == b.caption) == (not any(r.recalled for r in b.roles)) and len(b.caption.split()) <= 45
            known, recalled = known + sum(r.known for r in b.roles), recalled + sum(r.recalled for r in b.roles)
            if all(r.recalled for r in b.roles):
                said = set(re.findall(r"[\w-]+", b.caption.lower()))
                assert not said & shapes_sizes_markings, b.caption
                assert all(said & set(COLOUR_WORDS[r.character.colour]) for r in b.roles)
    assert abs(recalled / known - 0.5) < 0.05


def test_memory_stories_leave_and_come_back():
    for index in range(40):
        story = memory_story(3, index)
        first, *between, last = story.shots
        assert story == memory_story(3, index) and (story.chunks, len(story.shots)) == (16, 4) and sum(s.chunks for s in between) >= 8
        (told,), (back,) = first.roles, last.roles
        assert told.character == back.character and not told.known and back.recalled and held_out(told.character.shape, told.character.colour)
        assert all(role.character.colour != told.character.colour for shot in between for role in shot.roles)
    assert memory_story(3, 0) != memory_story(3, 1) != memory_story(4, 1)
    for bad in ({"shots": 2}, {"chunks": 7}):
        with pytest.raises(InputError):
            memory_story(0, 0, **bad)


def test_away_is_the_chance_to_miss_one():
    stories = [sample_story(seed, chunks=8, shots=(3, 5), away=0.4) for seed in range(400)]
    between = [(shot, story) for story in stories for shot in story.shots[1:-1]]
    cast = [{r.character for r in story.shots[0].roles} for _, story in between]
    missing = [{r.character for r in shot.roles} != told for (shot, _), told in zip(between, cast)]
    assert abs(sum(missing) / len(missing) - 0.4) < 0.05


@pytest.mark.parametrize(
    "bad", [{"shots": (4, 4), "chunks": 3}, {"characters": (1, 3)}, {"split": "test"}, {"memory": 1.5}, {"away": -0.1}]
)
def test_impossible_stories_are_refused(bad):
    with pytest.raises(InputError):
        sample_story(0, **bad)


def test_other_wordings_tell_the_same_film():
    story = sample_story(11, chunks=6, shots=(3, 3), characters=(2, 2), memory=0.5)
    others = [reworded(story, n, 0.5) for n in range(1, 5)]
    assert others == [reworded(story, n, 0.5) for n in range(1, 5)]
    assert len({shot.caption for other in [story, *others] for shot in other.shots}) > 8
    for other in others:
        for a, b in zip(story.shots, other.shots):
            assert (a.setting, a.camera, a.chunks, a.offset) == (b.setting, b.camera, b.chunks, b.offset)
            assert [dataclasses.replace(r, recalled=False) for r in a.roles] == [dataclasses.replace(r, recalled=False) for r in b.roles]
            assert all(r.known for r in b.roles if r.recalled)
    assert any(r.recalled for other in others for shot in other.shots for r in shot.roles)
