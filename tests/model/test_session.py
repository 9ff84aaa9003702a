"""Sessions: the same film however it is batched, interrupted, copied or decoded."""

import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from longlive.core.errors import InputError
from longlive.core.story import Shot, Storyboard
from longlive.engine.decode import DEPTH, OtherDevice
from longlive.engine.session import Request
from tiny_pipeline import random_pipeline

STORY = Storyboard(shots=(Shot(prompt="a red circle", chunks=2), Shot(prompt="a blue star", chunks=2)), name="story")
OTHER = Storyboard(shots=(Shot(prompt="a long green meadow", chunks=1), Shot(prompt="night", chunks=3)), name="other")


def film(pipeline, *boards, **request):
    with pipeline.session(Request(storyboards=boards, **request)) as session:
        return list(session)


def latents(chunks, sample=0):
    return torch.cat([c.latents_BFCHW[sample] for c in chunks])


def frames(chunks, sample=0):
    return torch.cat([c.frames[sample] for c in chunks])


def test_a_film_has_one_plus_four_frames_per_latent(pipeline):
    chunks = film(pipeline, STORY)
    assert [c.frames.shape[1] for c in chunks] == [5, 8, 8, 8]
    assert chunks[0].frames.dtype == torch.uint8 and chunks[0].frames.shape[2:] == (32, 64, 3)
    assert [c.plans[0].cut for c in chunks] == [False, False, True, False]
    assert chunks[2].plans[0].prompt == "The scene transitions. a blue star"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompts_in_a_batch_equal_the_same_prompts_alone(guidance):
    pipeline = random_pipeline(guidance=guidance)
    both = film(pipeline, STORY, OTHER, samples=2, seed=5, indices=(3, 8))
    for index, board in ((3, STORY), (8, OTHER)):
        row = 0 if index == 3 else 2
        alone = film(pipeline, board, samples=2, seed=5, indices=(index,))
        for sample in (0, 1):
            torch.testing.assert_close(latents(both, row + sample), latents(alone, sample), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latents(both, 0), latents(both, 1))


def test_streamed_frames_equal_decoding_the_whole_film(pipeline):
    chunks = film(pipeline, STORY)
    whole = pipeline.codec.to_uint8(pipeline.codec.decode(latents(chunks)[None]))[0]
    assert (whole.int() - frames(chunks).int()).abs().max() <= 1


def test_the_seed_of_a_storyboard_wins(pipeline):
    first = latents(film(pipeline, STORY, seed=4, decode=False))
    assert torch.equal(first, latents(film(pipeline, replace(STORY, seed=4), seed=9, decode=False)))
    assert not torch.equal(first, latents(film(pipeline, STORY, seed=9, decode=False)))


@pytest.mark.parametrize("kind", ["inline", "other-device"])
def test_a_snapshot_is_exact(kind):
    pipeline = random_pipeline()
    pipeline.decode_kind = kind
    story = Storyboard(shots=(Shot(prompt="a red circle", chunks=4), Shot(prompt="a blue star", chunks=8)))  # longer than a decoder runs behind
    with pipeline.session(Request(storyboards=(story,))) as session:
        next(session)
        copy = session.snapshot()
        first = list(session)
        session.restore(copy)
        session.set_prompt("something else")
        assert not torch.equal(latents(first), latents(list(session)))
        session.restore(copy)
        again = list(session)
    with pipeline.session(Request(storyboards=(story,))) as another:
        another.restore(copy)
        elsewhere = list(another)
    for chunks in (again, elsewhere):
        assert torch.equal(latents(first), latents(chunks)) and torch.equal(frames(first), frames(chunks))


def test_steering_between_chunks(pipeline):
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
        next(session)
        session.set_prompt("a green square")
        session.add_shot("the end", chunks=1)
        plans = [c.plans[0] for c in session]
    assert [p.prompt for p in plans] == ["a green square", "The scene transitions. a blue star", "a blue star", "The scene transitions. the end"]
    assert [p.cut for p in plans] == [False, True, False, True]
    longer = Storyboard(shots=(*STORY.shots, Shot(prompt="the end", chunks=1)))
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
        list(session)
        session.add_shot("the end", chunks=1)
        added = list(session)
    assert torch.equal(latents(added), film(pipeline, longer, decode=False)[-1].latents_BFCHW[0])


def test_cancel_keeps_what_is_finished(pipeline):
    with pipeline.session(Request(storyboards=(STORY,))) as session:
        next(session)
        copy = session.snapshot()
        session.cancel()
        assert list(session) == []
        session.restore(copy)
        assert [chunk.index for chunk in session] == [1, 2, 3]


def test_an_image_is_the_first_frame_and_a_clip_goes_on(pipeline, tmp_path):
    import numpy as np
    from PIL import Image

    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)).save(path)
    from longlive.data.images import load_image

    z = pipeline.codec.encode(load_image(path, pipeline.geometry)[None, :, None])
    chunks = film(pipeline, replace(STORY, image=str(path)), samples=2)
    for sample in (0, 1):
        torch.testing.assert_close(latents(chunks, sample)[:1], z[0], rtol=1e-4, atol=1e-5)
    inside = Storyboard(shots=(STORY.shots[0], replace(STORY.shots[1], image=str(path))))
    plain = film(pipeline, STORY, decode=False)
    given = film(pipeline, inside, decode=False)
    assert torch.equal(latents(plain)[:4], latents(given)[:4])
    standing = pipeline.codec.encode(load_image(path, pipeline.geometry)[None, :, None].expand(-1, -1, 5, -1, -1))[0, 1]
    torch.testing.assert_close(latents(given)[4], standing, rtol=1e-4, atol=1e-5)  # not the latent of a film's first frame


def test_a_clip_that_fills_the_film_leaves_nothing_to_make(pipeline, tmp_path):
    from longlive.engine.sinks import Mp4Sink

    sink = Mp4Sink(tmp_path / "clip.mp4")
    clip = torch.randint(0, 255, (15, 32, 64, 3), dtype=torch.uint8)
    sink.write(clip)
    sink.close()
    board = replace(STORY, video=str(tmp_path / "clip.mp4"))
    chunks = film(pipeline, board)
    from longlive.data.videos import load_clip

    pixels = load_clip(tmp_path / "clip.mp4", pipeline.geometry, 13)
    torch.testing.assert_close(latents(chunks)[:4], pipeline.codec.encode(pixels[None])[0])
    with pytest.raises(InputError, match="nothing is left"):
        film(pipeline, board, chunks=2)


def test_requests_that_cannot_be_one_batch(pipeline):
    short = Storyboard(shots=(Shot(prompt="x", chunks=1),))
    with pytest.raises(InputError, match="1 and 4 chunks"):
        film(pipeline, STORY, short)
    with pytest.raises(InputError):
        Request(storyboards=(), samples=1)
    with pytest.raises(InputError, match="no duration"):
        film(pipeline, Storyboard(shots=(Shot(prompt="x"),)))


@pytest.mark.parametrize("kind", ["inline", "other-device"])
def test_frames_are_told_as_soon_as_a_part_of_a_chunk_is_there(kind):
    pipeline, told = random_pipeline(), []
    pipeline.decode_kind, pipeline.codec.group = kind, 1
    with pipeline.session(Request(storyboards=(STORY,))) as session:
        session.on_frames = told.append
        first = next(session)
        assert told and told[0].shape[1] == 1 and torch.equal(told[0], first.frames[:, :1])
        frames = torch.cat([first.frames, *(chunk.frames for chunk in session)], dim=1)
    assert len(told) == 2 * len(session.plans[0]) and torch.equal(torch.cat(told, dim=1), frames)


def test_a_session_is_freed_with_its_last_name():
    session = random_pipeline().session(Request(storyboards=(STORY,)))
    session.on_frames = lambda frames: None
    next(session)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(session.rollout)  # its pages are most of a card's memory
        del session
        assert gone() is None
    finally:
        gc.enable()


class SlowCodec:
    """Counts what is under way; fails at chunk `fail_at`."""

    def __init__(self, fail_at=None):
        self.device, self.calls, self.fail_at = torch.device("cpu"), 0, fail_at

    def byte_groups(self, state, z):
        time.sleep(0.02)
        if self.calls == self.fail_at:
            raise InputError("the decoder broke")
        self.calls += 1
        yield None, z.to(torch.uint8)


def test_the_other_device_keeps_order_and_bounds_its_queue():
    codec = SlowCodec()
    stage = OtherDevice(codec)
    submitted, given = 0, []
    for index in range(8):
        stage.submit(torch.full((1, 1), index))
        submitted += 1
        assert submitted - codec.calls <= DEPTH + 2
        given += stage.collect()
    given += stage.drain()
    stage.close()
    assert [int(f[0, 0]) for f in given] == list(range(8)) and not stage.thread.is_alive()


def test_a_failing_decoder_surfaces_at_the_next_chunk():
    stage = OtherDevice(SlowCodec(fail_at=1))
    with pytest.raises(InputError, match="the decoder broke"):
        for index in range(8):
            stage.submit(torch.full((1, 1), index))
            stage.collect()
    stage.close()
    assert threading.active_count() < 50


def test_an_added_shot_may_begin_with_an_image(pipeline, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 32), (200, 30, 30)).save(tmp_path / "red.png")
    plain, given = [], []
    for image, kept in ((None, plain), (str(tmp_path / "red.png"), given)):
        with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
            session.add_shot(Shot(prompt="the end", chunks=1, image=image))
            kept += list(session)
    assert torch.equal(latents(plain)[:8], latents(given)[:8]) and not torch.equal(latents(plain)[8:], latents(given)[8:])


def picture(path, colour):
    from PIL import Image

    Image.new("RGB", (64, 32), colour).save(path)
    return str(path)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_films_from_images_in_a_batch_equal_the_same_films_alone(tmp_path, guidance, steps):
    """Given frames, guidance, several samples and cuts at different chunks, all at once."""
    pipeline = random_pipeline(guidance=guidance, steps=steps)
    boards = [replace(STORY, image=picture(tmp_path / "red.png", (200, 30, 30))), replace(OTHER, image=picture(tmp_path / "blue.png", (30, 30, 200)))]
    both = film(pipeline, *boards, samples=2, seed=5, decode=False)
    for index, board in enumerate(boards):
        alone = film(pipeline, board, samples=2, seed=5, indices=(index,), decode=False)
        for sample in (0, 1):
            torch.testing.assert_close(latents(both, 2 * index + sample), latents(alone, sample), rtol=1e-4, atol=1e-5)
    assert torch.equal(latents(both, 0)[0], latents(both, 1)[0]) and not torch.equal(latents(both, 0)[1], latents(both, 1)[1])
    assert not torch.equal(latents(both, 0)[0], latents(both, 2)[0])


def test_a_snapshot_carries_added_shots_and_their_images_into_another_session(pipeline, tmp_path):
    end = Shot(prompt="the end", chunks=1, image=picture(tmp_path / "red.png", (200, 30, 30)))
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
        next(session)
        session.add_shot(end)
        copy = session.snapshot()
        first = list(session)
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as another:
        another.restore(copy)
        assert torch.equal(latents(first), latents(list(another)))
        another.restore(copy)
        another.add_shot("and after it", chunks=1)
        list(another)
        another.restore(copy)
        assert torch.equal(latents(first), latents(list(another)))


def test_given_frames_that_contradict_each_other_are_refused_before_the_first_chunk(pipeline, tmp_path):
    from longlive.engine.sinks import Mp4Sink

    image, sink = picture(tmp_path / "red.png", (200, 30, 30)), Mp4Sink(tmp_path / "clip.mp4")
    sink.write(torch.randint(0, 255, (21, 32, 64, 3), dtype=torch.uint8))  # 6 latent frames: chunks 0, 1 and 2
    sink.close()
    later = replace(STORY, shots=(STORY.shots[0], replace(STORY.shots[1], image=image)))
    clip = {"video": str(tmp_path / "clip.mp4")}
    for boards, message in (
        ((later, STORY), "at chunk 2 some films"),
        ((replace(later, **clip),), "where the given clip still runs"),
        ((replace(STORY, image=image, **clip),), "give it one start"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.session(Request(storyboards=boards, decode=False))


def test_steering_that_would_change_nothing_is_refused(pipeline):
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
        with pytest.raises(InputError, match="film 1 of a batch of 1"):
            session.set_prompt("a green square", film=1)
        with pytest.raises(InputError, match="lasts 0 chunks"):
            session.add_shot(STORY.shots[0], chunks=0)
        list(session)
        with pytest.raises(InputError, match="add_shot"):
            session.set_prompt("a green square")


def test_a_session_of_ever_new_shots_keeps_the_text_of_one_chunk(pipeline):
    with pipeline.session(Request(storyboards=(STORY,), decode=False)) as session:
        for number in range(6):
            session.add_shot(f"shot {number}", chunks=1)
        for _ in session:
            assert len(session.text.embeds) == 1 and session.text.context.prompts == 1
