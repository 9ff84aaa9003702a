"""Real processes that die: a killed run loses at most what follows its last checkpoint; a rank that fails ends the others, soon and with its message."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loop_process import EVERY, SLOW, STEPS
from loop_toys import toy_loop
from ranks import _free_port

from longlive.train.checkpoint import folders

SCRIPT = Path(__file__).with_name("loop_process.py")


def start(folder, mode, **environment):
    root = str(SCRIPT.parents[2])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), mode], env=variables, stderr=subprocess.PIPE, text=True)


def until(condition, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def curve(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def test_a_run_killed_while_it_writes_goes_on_along_the_same_curve(tmp_path):
    process = start(tmp_path / "killed", "slow")
    partial = tmp_path / "killed" / f"checkpoint_model_{SLOW:06d}.tmp"
    until(lambda: (partial / ".metadata").is_file(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [f.name for f in folders(tmp_path / "killed")] == [f"checkpoint_model_{SLOW - EVERY:06d}"] and partial.is_dir()
    again = toy_loop(tmp_path / "killed", max_steps=STEPS, checkpoint_every=EVERY)
    assert again.state.step == SLOW - EVERY
    again.fit()
    toy_loop(tmp_path / "whole", max_steps=STEPS, checkpoint_every=EVERY).fit()
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == STEPS
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_two_ranks_killed_while_they_write_go_on_along_the_same_curve(tmp_path):
    def both(mode):
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        return [start(tmp_path / "killed", mode, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]

    processes = both("slow")
    until(lambda: (tmp_path / "killed" / f"checkpoint_model_{SLOW:06d}.tmp" / ".metadata").is_file(), processes[0])
    for process in processes:
        process.kill()
        process.wait()
    assert [f.name for f in folders(tmp_path / "killed")] == [f"checkpoint_model_{SLOW - EVERY:06d}"]
    again = both("train")
    said = [process.communicate(timeout=120)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    toy_loop(tmp_path / "whole", max_steps=STEPS, checkpoint_every=EVERY).fit()
    killed, whole = curve(tmp_path / "killed"), curve(tmp_path / "whole")
    assert list(killed) == list(whole) and all(killed[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_a_failed_rank_ends_all_ranks_with_its_message(tmp_path):
    """Nobody else is there to end them: rank 0 sleeps, rank 2 waits in a collective."""
    port, began = str(_free_port()), time.monotonic()
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(tmp_path, "fail", RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(3)]
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 2, 1] and time.monotonic() - began < 60
    assert said[1].splitlines()[-1] == "error: clip 17 cannot be read; remove it"
    assert all("rank 1 failed: clip 17 cannot be read" in said[rank] and "Traceback" not in said[rank] for rank in (0, 2))
