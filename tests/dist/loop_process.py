"""A real process that trains the toy task, for tests that kill it: python loop_process.py FOLDER MODE, in an environment as torchrun sets it."""

import os
import sys
import time
from pathlib import Path

import torch
import typer

from longlive.cli.app import run
from longlive.core.errors import InputError
from longlive.parallel.data_parallel import Replicas
from longlive.parallel.failure import together
from longlive.train.checkpoint import Writer

STEPS, EVERY, SLOW = 6, 2, 4


def slow_publish(publish):
    """Step 4's checkpoint is written and never appears."""

    def held(self, written, partial, folder, about):
        written.result()
        time.sleep(600 if about["step"] == SLOW else 0)
        publish(self, written, partial, folder, about)

    return held


def failing(task, replicas):
    """At the second step rank 1 fails; rank 0 does not look, rank 2 waits in a collective."""
    batch = task.batch

    def second(draw):
        if draw.step == 1 and replicas.rank == 1:
            raise InputError("clip 17 cannot be read; remove it")
        if draw.step == 1 and replicas.rank == 0:
            time.sleep(600)
        return batch(draw)

    task.batch = second


def main(folder: Path, mode: str) -> None:
    from loop_toys import toy_loop

    torch.set_num_threads(1)
    if mode == "slow":
        Writer._publish = slow_publish(Writer._publish)
    replicas = Replicas.launch("cpu")
    with together(replicas):
        loop = toy_loop(folder, max_steps=STEPS, checkpoint_every=EVERY)
        if mode == "fail":
            failing(loop.task, replicas)
        loop.fit()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("WORLD_SIZE", "1")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(run(app))
