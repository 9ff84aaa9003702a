"""From storyboards to files: names, contents, refusals, interruption, and memory that does not grow. Random networks, real code."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from longlive.config import default_config
from longlive.core.errors import InputError, Interrupted
from longlive.core.story import Shot, Storyboard
from longlive.data.videos import decode_frames, probe
from longlive.engine.films import generate_films

SMALL = [
    "model_kwargs.num_frame_per_block=2",
    "model_kwargs.local_attn_size=8",
    "model_kwargs.sink_size=2",
    "data.image_or_video_shape=[1,8,48,2,4]",
]
BOARD = Storyboard(shots=(Shot(prompt="a red/blue 'circle'", chunks=2), Shot(prompt="night", chunks=1)), name="b")


def config(*words):
    return default_config("tiny", [*SMALL, *words])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_film_its_prompts_and_its_receipt(pipeline, tmp_path):
    (film,) = generate_films(config("logging.seed=7"), [BOARD], tmp_path, pipeline=pipeline)
    base = "rank0-a red_blue _circle_-0_regular"
    assert names(tmp_path) == sorted([f"{base}.mp4", f"{base}.json", f"{base}_prompts.txt"])
    info = probe(film.film)
    assert (info.frames, info.fps) == (21, 24.0) and film.frames == 21
    assert next(iter(decode_frames(film.film))).size == (64, 32)
    assert film.prompts.read_text() == "[0,1] a red/blue 'circle'\n[2] The scene transitions. night\n"
    receipt = json.loads(film.receipt.read_text())
    assert receipt["complete"] and receipt["noise"] == {"seed": 7, "prompt_index": 0, "sample": 0}
    assert receipt["config"]["logging"]["seed"] == 7 and receipt["film"]["frames"] == 21
    assert len(receipt["timings"]["chunks"]) == 3 and receipt["versions"]["torch"] == torch.__version__


def test_a_film_that_exists_is_kept_unless_told(pipeline, tmp_path):
    (film,) = generate_films(config(), [BOARD], tmp_path, pipeline=pipeline)
    before, files = film.film.read_bytes(), names(tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        generate_films(config("logging.seed=9"), [BOARD], tmp_path, pipeline=pipeline)
    assert film.film.read_bytes() == before and names(tmp_path) == files
    generate_films(config("logging.seed=9"), [BOARD], tmp_path, pipeline=pipeline, overwrite=True)
    assert film.film.read_bytes() != before and names(tmp_path) == files


def test_every_prompt_belongs_to_one_rank_and_films_do_not_depend_on_ranks(pipeline, tmp_path):
    boards = [Storyboard(shots=(Shot(prompt=f"prompt {i}", chunks=1),)) for i in range(5)]
    words = ("save_latents_only=true",)
    alone = generate_films(config(*words), boards, tmp_path / "one", pipeline=pipeline)
    spread = [f for rank in range(3) for f in generate_films(config(*words), boards, tmp_path / "three", rank=rank, world=3, pipeline=pipeline)]
    assert sorted(f.index for f in spread) == [0, 1, 2, 3, 4]
    for film in spread:
        assert torch.equal(torch.load(film.film), torch.load(alone[film.index].film))
    assert generate_films(config(*words), boards, tmp_path, rank=7, world=8, pipeline=pipeline) == []


def test_latents_are_bfloat16_frames_first(pipeline, tmp_path):
    films = generate_films(config("save_latents_only=true", "inference.num_samples=2"), [BOARD], tmp_path, pipeline=pipeline)
    first, second = (torch.load(film.film) for film in films)
    assert first.shape == (6, 48, 2, 4) and first.dtype == torch.bfloat16 and not torch.equal(first, second)
    assert films[1].film.name.endswith("-1_regular.pt") and not list(tmp_path.glob("*.mp4"))


def test_names_with_index_and_names_that_collide(pipeline, tmp_path):
    boards = [Storyboard(shots=(Shot(prompt="x" * 100 + tail, chunks=1),)) for tail in ("a", "b")] * 2
    films = generate_films(config("save_latents_only=true"), boards, tmp_path, pipeline=pipeline)
    assert len({film.film for film in films}) == 4
    films = generate_films(config("save_latents_only=true", "save_with_index=true", "inference_iter=1"), boards, tmp_path, pipeline=pipeline)
    assert [film.film.name for film in films] == ["rank0-0-0_regular.pt", "rank0-1-0_regular.pt"]


def test_a_storyboard_has_its_own_size_and_seed(pipeline, tmp_path):
    board = Storyboard(shots=BOARD.shots, size=(64, 32), seed=3)
    (film,) = generate_films(config(), [board], tmp_path, pipeline=pipeline)
    assert next(iter(decode_frames(film.film))).size == (32, 64)
    assert json.loads(film.receipt.read_text())["noise"]["seed"] == 3


@pytest.mark.parametrize("place", ["file/inside", "file"])
def test_a_folder_that_cannot_be(pipeline, tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="--output"):
        generate_films(config(), [BOARD], tmp_path / place, pipeline=pipeline)
    assert names(tmp_path) == ["file"]


def test_an_image_that_is_none_is_refused_before_anything_is_written(pipeline, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    with pytest.raises(InputError, match="not a readable image"):
        generate_films(config(), [Storyboard(shots=BOARD.shots, image=str(bad))], tmp_path / "out", pipeline=pipeline)
    assert names(tmp_path) == ["bad.png"]


class Stop:
    """A listener that presses Ctrl-C after the first chunk."""

    def __init__(self):
        self.stopped = False

    def loading(self, model): ...

    def film(self, *_): ...

    def chunk(self, result):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    def stopping(self):
        self.stopped = True

    def done(self, files): ...


def test_ctrl_c_closes_a_playable_film(pipeline, tmp_path):
    listener, before = Stop(), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        generate_films(config(), [BOARD], tmp_path, pipeline=pipeline, listener=listener)
    (film,) = tmp_path.glob("*.mp4")
    assert listener.stopped and probe(film).frames == 5 == sum(1 for _ in decode_frames(film))
    assert not json.loads(next(tmp_path.glob("*.json")).read_text())["complete"]
    assert next(tmp_path.glob("*_prompts.txt")).read_text() == "[0] a red/blue 'circle'\n"
    assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.glob("*.tmp"))


def test_a_failure_leaves_nothing_of_the_film(pipeline, tmp_path):
    class Broken(Stop):
        def chunk(self, result):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        generate_films(config(), [BOARD], tmp_path / "new" / "folder", pipeline=pipeline, listener=Broken())
    assert names(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
from longlive.engine.sinks import LatentsSink, Mp4Sink
from longlive.core.errors import InputError
folder = Path(sys.argv[1])
for sink in (Mp4Sink(folder / "film.mp4"), LatentsSink(folder / "film.pt")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    try:
        for _ in range(20):
            sink.write(torch.randint(0, 255, (16, 64, 96, 3), dtype=torch.uint8), torch.randn(8, 48, 12, 20))
        sink.close()
    except InputError as error:
        assert "cannot write" in str(error) and "\\n" not in str(error) and "File too large" in str(error), error
        sink.abort()
    else:
        raise SystemExit("the disk was not full")
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == []


def test_memory_does_not_grow_with_the_film(pipeline, tmp_path):
    import psutil

    process, seen, threads = psutil.Process(), [], threading.active_count()

    class Watch(Stop):
        def chunk(self, result):
            seen.append(process.memory_info().rss)

    board = Storyboard(shots=tuple(Shot(prompt=f"shot {i}", chunks=6) for i in range(25)))
    generate_films(config(), [board], tmp_path, pipeline=pipeline, listener=Watch())
    assert len(seen) == 150 and max(seen[60:]) - seen[60] < 10e6
    assert threading.active_count() < threads + 20 and Path(tmp_path).exists()
