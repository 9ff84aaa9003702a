"""Long tuning: films that go on from step to step, what scores see of them, and when others begin."""

import pytest
import torch
from dmd_toys import draw_of, gradients, toy_task
from train_toys import shrink_tiny

from longlive.cache.attend import visible_tensor
from longlive.models import spec
from longlive.train.teacher_forcing import frame_positions

LONG = {"streaming_frames": 80, "min_num_training_frames": 16, "num_training_frames": 24, "slice_last_frames": 24, "visibility": "window"}


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


@pytest.fixture
def task(tmp_path):
    return toy_task(tmp_path, training=LONG, world={"clips": 4, "min_shots": 4, "max_shots": 5})


def test_films_go_on_until_they_are_long_enough(task):
    made, streams = [], []
    for number in range(9):
        player = number % 2
        step = task.batch(draw_of(task, number, player))
        loss, _ = task.loss(step)
        assert loss.isfinite() and step.chunks <= 3
        made.append(step.stream.made)
        streams.append(step.stream)
    first = [m for m, s in zip(made, streams) if s is streams[0]]
    assert first == sorted(first) and first[-1] == 10 and streams[-1] is not streams[0]
    assert streams[0].latents_BFCHW.shape[1] == 80 and not streams[0].latents_BFCHW.requires_grad


def test_scores_see_the_segment_where_it_is(task):
    """Chunks, positions, prompts and visibility of the clip are those of the whole film."""
    for number in range(4):
        gradients(task, 1, number)
    stream, (carried, count) = task.stream, task.stream.segment
    film, clip = stream.shown(task.view, window=True, offset=8.0)
    cuts, policy = stream.films.cuts, task.rollout.policy
    every, position = visible_tensor(cuts, policy), frame_positions(cuts, 8, 8.0)
    assert carried == policy.pages and clip.shape[1] == 8 * (carried + count)
    for b, own in enumerate(stream.seen_Bm):
        assert own[carried:] == list(range(stream.made - count, stream.made))
        for place, chunk in enumerate(own):
            frames = slice(8 * chunk, 8 * chunk + 8)
            assert torch.equal(clip[b, 8 * place : 8 * place + 8], stream.latents_BFCHW[b, frames])
            assert torch.equal(film.position_BF[b, 8 * place : 8 * place + 8], position[b, frames])
            assert film.prompt_Bc[b, place] == b * stream.chunks + chunk
            if place >= carried:  # what the new chunks see is all there
                seen = [own[i] for i in film.visible_BcP[b, place].tolist() if i >= 0]
                assert seen == [c for c in every[b, chunk].tolist() if c >= 0]


def test_only_the_new_segment_counts(task):
    for number in range(3):
        gradients(task, 1, number)
    step = task.batch(draw_of(task, 7, 0))
    rolled = task._rolled(step)
    x, (_, noised) = rolled.x_BFCHW, task._shown(step, rolled)
    carried = step.stream.segment[0]
    assert carried > 0 and noised.mask_BF[:, : 8 * carried].abs().max() == 0 and noised.mask_BF[:, 8 * carried :].min() == 1
    assert x.shape[1] == 8 * step.chunks and torch.equal(noised.last(x.shape[1], noised.x_BFCHW)[0], x.detach())


def test_a_stream_goes_on_from_its_state(task, tmp_path):
    for number in range(3):
        gradients(task, 1, number)
    again = toy_task(tmp_path, training=LONG, world={"clips": 4, "min_shots": 4, "max_shots": 5})
    again.restore(task.state())
    assert again.stream.made == task.stream.made > 0
    for player in (1, 0):
        (loss, ours), (other, theirs) = (gradients(each, player, 3) for each in (task, again))
        assert loss == other and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "stream" not in task.merged([task.state()])
