"""Frames show the truth, are independent of their batch, and move continuously inside a shot."""

import torch

from longlive.world.render import frame_parameters, render, render_masked
from longlive.world.story import evaluation_story, sample_story
from longlive.world.vocabulary import COLOURS, PALETTE


def test_frames_do_not_depend_on_their_batch():
    story = sample_story(3, chunks=3)
    rows = frame_parameters(story, range(20, 44))
    assert torch.equal(rows, frame_parameters(story)[20:44])
    whole = render(rows)
    assert whole.shape == (24, 3, 192, 320) and whole.abs().max() <= 1 and whole.isfinite().all()
    assert torch.equal(whole[7:8], render(rows[7:8]))


def test_characters_have_their_colour_where_the_mask_is():
    for index in range(6):
        story = evaluation_story(1, index)
        rows = frame_parameters(story, range(10, 11))
        image, mask = (part[0] for part in render_masked(rows))
        assert torch.equal(image, render(rows)[0])
        image, mask = (image + 1) * 127.5, mask[0]
        for role in story.shots[0].roles:
            wanted = torch.tensor(PALETTE[COLOURS.index(role.character.colour)])[:, None, None]
            hits = (image - wanted).abs().amax(0) < 12
            assert hits[mask > 0.9].sum() > 300
            assert hits[mask == 0].sum() == 0


def test_motion_is_continuous_inside_a_shot_and_breaks_at_cuts():
    story = sample_story(8, chunks=4, shots=(2, 2), characters=(1, 1))
    picture = render(frame_parameters(story), 48, 80)
    step = (picture[1:] - picture[:-1]).abs().mean((1, 2, 3))
    cut = story.shot_starts[1] - 1
    assert step.argmax() == cut
    assert step[cut] > 3 * torch.cat([step[:cut], step[cut + 1 :]]).max()
