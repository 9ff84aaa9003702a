"""Batches by number: the same for any workers, ranks and stops; broken clips are named, counted and limited."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from clip_toys import HEIGHT, WIDTH, damage, numbers, write_dataset

from longlive.core.errors import InputError
from longlive.core.geometry import Geometry
from longlive.data.loader import BatchLoader, LoaderSettings
from longlive.data.manifest import index_dataset
from longlive.data.samples import VideoSample, collate, to_pixels
from longlive.data.sampling import SamplingRules
from longlive.data.sources import Fetched, VideoSource

RULES = SamplingRules(chunks=3, chunk_frames=2, scene_cut_prefix="CUT ")  # 5 + 8 + 8 frames
SIZE = Geometry(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"), {"a": [40], "b": [14, 30], "c": [60], "d": [21], "short": [9]})


def source(root, rules=RULES, seed=4, max_broken=0):
    return VideoSource(index_dataset(root), rules, SIZE, seed=seed, max_broken=max_broken)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def same(one, other):
    return (one.numbers, one.prompts, one.cuts, one.names) == (other.numbers, other.prompts, other.cuts, other.names) and torch.equal(
        one.frames_BTHW3, other.frames_BTHW3
    )


def test_a_batch_shows_what_was_planned(root):
    videos = source(root)
    loader = BatchLoader(videos, LoaderSettings(batch=4, workers=0, i2v=True))
    batch = next(loader)
    assert batch.frames_BTHW3.shape == (4, 21, HEIGHT, WIDTH, 3) and batch.frames_BTHW3.dtype == torch.uint8
    assert (len(batch), batch.chunks, batch.latent_frames, batch.valid_latents, batch.i2v) == (4, 3, 6, (6, 6, 6, 6), True)
    for b, number in enumerate(batch.numbers):
        stream = videos.planner.stream(number)
        expected = [s.start + i for s in stream.segments for i in range(s.count)]
        assert numbers(batch.frames_BTHW3[b]) == expected
        assert batch.prompts[b] == tuple(("CUT " if s.cut else "") + f"{stream.sample.name} {s.clip}" for s in stream.segments)
        assert batch.names[b] == stream.title and batch.part(b).names == (stream.title,)
    assert torch.equal(batch.first_pixels_B3HW(), to_pixels(batch.frames_BTHW3, "cpu")[:, :, 0])


def test_workers_do_not_change_the_samples(root):
    alone = take(BatchLoader(source(root), LoaderSettings(batch=2, workers=0)), 4)
    many = BatchLoader(source(root), LoaderSettings(batch=2, workers=2))
    assert all(same(one, other) for one, other in zip(alone, take(many, 4)))
    many.close()


def test_a_run_goes_on_from_its_position(root):
    settings = LoaderSettings(batch=2, workers=0)
    loader = BatchLoader(source(root), settings)
    take(loader, 2)
    assert loader.position == 4
    again = BatchLoader(source(root), settings, position=loader.position)
    assert all(same(one, other) for one, other in zip(take(loader, 2), take(again, 2)))


def test_ranks_share_the_numbers_of_a_step(root):
    whole = BatchLoader(source(root), LoaderSettings(batch=4, workers=0))
    parts = [BatchLoader(source(root), LoaderSettings(batch=2, workers=0), stream=k, streams=2) for k in range(2)]
    for _ in range(2):
        batch = next(whole)
        pieces = [next(part) for part in parts]
        assert batch.numbers == pieces[0].numbers + pieces[1].numbers
        assert torch.equal(batch.frames_BTHW3, torch.cat([p.frames_BTHW3 for p in pieces]))
    assert whole.position == parts[0].position == parts[1].position == 8


def test_the_generators_of_training_are_left_alone(root):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(BatchLoader(source(root), LoaderSettings(workers=1)), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_padding_is_masked(root):
    rules = SamplingRules(chunks=5, chunk_frames=2, allow_padding=True, deterministic=True)
    batch = next(BatchLoader(source(root, rules), LoaderSettings(batch=5, workers=0)))
    assert batch.valid_chunks == (5, 5, 5, 3, 1)  # a, b, c, d, short
    assert batch.mask_BF().sum(1).tolist() == [10, 10, 10, 6, 2] and batch.chunk_mask_Bc().sum(1).tolist() == [5, 5, 5, 3, 1]
    assert batch.mask_BF()[3].tolist() == [1.0] * 6 + [0.0] * 4
    assert numbers(batch.frames_BTHW3[3])[20:] == [20] * 17 and batch.prompts[3] == ("d 0",) * 5


def test_short_folders_are_named_once(root, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(source(root)) == 4
    assert "1 folders are too short: short (1 of 3 chunks)" in caplog.text
    with pytest.raises(InputError, match=r"no folder fills 40 chunks .* the longest fills 7; lower data.image_or_video_shape\[1\]"):
        source(root, SamplingRules(chunks=40, chunk_frames=2))


@pytest.fixture
def broken_root(tmp_path):
    root = write_dataset(tmp_path, {name: [40] for name in "abcd"})
    index_dataset(root)
    for name in "bd":
        damage(root / "video" / name / "0.mp4")
    index_dataset(root)
    return root


def test_broken_clips_are_named_counted_and_replaced_alike(broken_root, caplog):
    with caplog.at_level(logging.WARNING):
        loader = BatchLoader(source(broken_root, max_broken=3), LoaderSettings(batch=4, workers=0))
        batches = take(loader, 2)
    assert set(loader.broken) == {"video/b/0.mp4", "video/d/0.mp4"}
    assert {clip.file for clip in batches[0].broken} == set(loader.broken)
    assert caplog.text.count("broken clip video/b/0.mp4") == 1 and "2 of at most 3" in caplog.text
    shown = [prompts[0] for batch in batches for prompts in batch.prompts]
    assert set(shown) == {"a 0", "c 0"}
    again = BatchLoader(source(broken_root, max_broken=3), LoaderSettings(batch=2, workers=1))
    assert [prompts[0] for batch in take(again, 4) for prompts in batch.prompts] == shown
    again.close()


def test_too_many_broken_clips_end_the_run(broken_root):
    with pytest.raises(InputError, match=r"2 clips are broken: video/\w/0.mp4 .*video/\w/0.mp4 .*data.max_broken_clips\(1\)"):
        take(BatchLoader(source(broken_root, max_broken=1), LoaderSettings(batch=4, workers=0)), 2)
    with pytest.raises(InputError, match="could not be read|broken"):
        take(BatchLoader(source(broken_root, max_broken=0), LoaderSettings(batch=4, workers=1)), 1)


def test_where_every_folder_is_broken_each_clip_counts_once(tmp_path):
    """More attempts than folders: no further attempt would find another."""
    root = write_dataset(tmp_path, {"b": [40], "d": [40]})
    videos = source(root, max_broken=100)
    for name in "bd":
        damage(root / "video" / name / "0.mp4")
    with pytest.raises(InputError, match=r"^2 clips are broken, and every folder was tried: .*; repair or remove them \(.*\)$") as error:
        next(BatchLoader(videos, LoaderSettings(workers=0)))
    assert all(str(error.value).count(f"video/{name}/0.mp4 (") == 1 for name in "bd") and "max_broken_clips" not in str(error.value)


def test_clips_that_never_opened_count_too(broken_root):
    (broken_root / "video" / "a" / "0.mp4").write_bytes(b"nothing")
    with pytest.raises(InputError, match="1 clips are broken: video/a/0.mp4"):
        BatchLoader(source(broken_root), LoaderSettings(workers=0))


class Slow:
    """A source that takes its time."""

    max_broken, unreadable = 0, ()

    def __len__(self):
        return 1

    def fetch(self, number):
        time.sleep(0.35)
        frames = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
        return Fetched(VideoSample(number=number, name="x", prompts=("x",), cuts=(False,), valid_chunks=1, frames_THW3=frames), ())


def test_slow_data_are_complained_about(caplog):
    with caplog.at_level(logging.WARNING):
        next(BatchLoader(Slow(), LoaderSettings(workers=0, slow_after=0.1, slow_every=0.1)))
    assert caplog.text.count("waiting for sample 0 for") >= 2


class Deadly(Slow):
    """A source whose process dies."""

    def fetch(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_an_error_of_one_line():
    with pytest.raises(InputError, match=r"a data worker was killed.*data.num_workers\(1\)") as error:
        next(BatchLoader(Deadly(), LoaderSettings(workers=1)))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a group's SIGTERM ends workers")
def test_signals_to_the_group_do_not_end_a_worker_and_its_parent_does(root):
    """torchrun and Slurm send SIGTERM to every process, a terminal Ctrl-C; the training that saves on them still reads its data."""
    loader = BatchLoader(source(root), LoaderSettings(workers=1))
    next(loader)
    (worker,) = loader._batches._workers
    sender = [sys.executable, "-c", f"import os, signal; [os.kill({worker.pid}, s) for s in (signal.SIGTERM, signal.SIGINT)]"]
    subprocess.run(sender, check=True)
    take(loader, 6)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=5)
    assert worker.exitcode == 0
    loader._batches._workers_status[0] = False  # it is gone: nothing to wait for


def test_bytes_become_pixels_on_the_device():
    frames = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 1, 16, 16, 3)
    pixels = to_pixels(frames, "cpu")
    assert pixels.shape == (1, 3, 1, 16, 16)
    assert torch.allclose(pixels[0, 0, 0].flatten(), (torch.arange(256) / 255 - 0.5) / 0.5, atol=1e-6)
    assert to_pixels(frames, "cpu", torch.bfloat16).dtype == torch.bfloat16


def test_latents_batch_like_frames():
    samples = [
        VideoSample(number=n, name=str(n), prompts=("a", "b"), cuts=(False, True), valid_chunks=2 - n, latents_FCHW=torch.full((4, 48, 2, 2), float(n)))
        for n in range(2)
    ]
    batch = collate(samples).to("cpu")
    assert batch.frames_BTHW3 is None and batch.latents_BFCHW[1, 0, 0, 0, 0] == 1 and batch.valid_latents == (4, 2)
    assert batch.part(1).valid_chunks == (1,) and batch.part(1).latents_BFCHW.shape == (1, 4, 48, 2, 2)
