"""The documented launcher: the documented command on two ranks, SIGTERM to torchrun, and a rank that fails under it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import documented_places
import pytest

from longlive.cli.app import app
from longlive.cli.app import run as command
from longlive.train.checkpoint import folders

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "data.data_path=videos", "data.eval_data_path=videos", "data.image_or_video_shape=[1,16,48,4,4]", "data.num_workers=1", "model_num_heads=2",
    "infra.sequence_parallel_size=2", "evaluation.interval=0", "training.max_iters=100000",
]  # fmt: skip


def torchrun(folder, *words):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # a group of its own, as a terminal or a batch system gives it
    return subprocess.Popen(
        [*launcher, *map(str, words)], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = documented_places.write(tmp_path_factory.mktemp("places"))
    assert command(app, ["world", "export", str(folder / "videos"), "--clips", "2", "--chunks", "2", "--max-shots", "2", "--seed", "1"]) == 0
    return folder


def test_sigterm_to_torchrun_saves_and_exits(places):
    """Of a real run, with its data workers, which get the signal too."""
    config = ROOT / "configs" / "train_ar.yaml"
    process = torchrun(places, ROOT / "train.py", "--config_path", config, "--logdir", "logs", "--disable-wandb", *OVERRIDES)
    try:
        before = []
        while not before or "warm-up 2" not in before[-1]:
            before.append(process.stdout.readline())
            assert before[-1], "".join(before)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    (saved,) = folders(places / "logs")
    step = json.loads((saved / "run.json").read_text())["step"]
    assert said.count(f"error: stopped at step {step}; weights and state are in logs") == 2, said
    assert process.returncode not in (0, None) and step >= 1
    assert len((places / "logs" / "metrics.jsonl").read_text().splitlines()) == step
    assert list((places / "logs").glob("dit-*")) and not list((places / "logs").glob("*.tmp"))


def test_a_rank_that_fails_ends_torchrun_with_its_message(tmp_path):
    began = time.monotonic()
    process = torchrun(tmp_path, ROOT / "tests" / "dist" / "loop_process.py", tmp_path / "logs", "fail")
    try:
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode not in (0, None) and time.monotonic() - began < 60
    assert "error: clip 17 cannot be read; remove it" in said, said
