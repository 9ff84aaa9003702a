"""Checkpoints of 4 ranks: resumed on the same ranks bit for bit; on 2 and on 1 with the same weights, optimizer, average and place in the data."""

import json
import os
import shutil
import signal

import pytest
import torch
from loop_toys import toy_loop
from ranks import run_ranks

from longlive.core.errors import CheckpointError, Interrupted
from longlive.parallel import fsdp
from longlive.train import checkpoint
from longlive.train.checkpoint import player_tensors

HALF = "checkpoint_model_000002"


def state_of(loop, part=fsdp.whole):
    """Everything that a run carries: whole, or (`part` fsdp.local) this rank's shards."""
    tensors = player_tensors(loop.players[0])
    return {name: part(tensor).clone() for name, tensor in tensors.items()}


def losses(folder):
    return {row["step"]: (row["loss"], row["grad_norm"], row["luck"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def go_on(folder, part=fsdp.whole, **how):
    """(state, step, position and own errors on arrival, state at the end, evaluations) of a run that is resumed from the checkpoint in `folder`."""
    torch.manual_seed(99)  # what a new process would draw
    loop = toy_loop(folder, **how)
    arrived = state_of(loop, part), loop.state.step, loop.task.position, loop.task.errors.clone()
    loop.fit()
    return *arrived, state_of(loop, part), loop.task.evaluated


def four(folder):
    loop, saved = toy_loop(folder / "whole", sp_size=2), {}
    torch.manual_seed(loop.replicas.rank)
    save = loop.files.save

    def remember(state):
        saved[state.step] = {"whole": state_of(loop), "local": state_of(loop, fsdp.local), "errors": loop.task.errors.clone()}
        save(state)

    loop.files.save = remember
    loop.fit()
    if loop.replicas.rank == 0:
        for name in ("same", "two", "one"):
            shutil.copytree(folder / "whole" / HALF, folder / name / HALF)
    torch.distributed.barrier()
    return {"saved": saved, "same": go_on(folder / "same", fsdp.local, sp_size=2, evaluate_every=1), "disturbed": disturbed(folder / "disturbed")}


def disturbed(folder):
    """One step in which rank 1's gradient is not finite and rank 2 gets SIGTERM: (how it ended, skipped, whether all is as before).

    A first step makes the optimizer's state; refused, it leaves it at zero.
    """
    loop = toy_loop(folder, sp_size=2, checkpoint_every=0)
    loss, before = loop.task.loss, state_of(loop, fsdp.local)

    def disturbing(batch):
        if loop.replicas.rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        value, columns = loss(batch)
        return value * (torch.nan if loop.replicas.rank == 1 else 1.0), columns

    loop.task.loss = disturbing
    try:
        loop.fit()
    except Interrupted as stopped:
        after = state_of(loop, fsdp.local)
        return str(stopped), loop.skipped.row, all(torch.equal(after[name], before.get(name, 0 * after[name])) for name in after)


def two(folder):
    return go_on(folder / "two", sp_size=2, strategy="no_shard")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    ranks = run_ranks(four, 4, tmp_path_factory.mktemp("four"), folder)
    return folder, ranks, run_ranks(two, 2, tmp_path_factory.mktemp("two"), folder), go_on(folder / "one")


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance)


def test_the_same_ranks_go_on_bit_for_bit(found):
    folder, ranks, _, _ = found
    for rank in ranks:
        arrived, step, position, errors, end, _ = rank["same"]
        assert step == 2 and position == 8 and torch.equal(errors, rank["saved"][2]["errors"])
        close(arrived, rank["saved"][2]["local"], rtol=0, atol=0)
        close(end, rank["saved"][4]["local"], rtol=0, atol=0)
    whole, same = losses(folder / "whole"), losses(folder / "same")  # with a number from the process-wide generator
    assert list(whole) == [1, 2, 3, 4] and same == {step: whole[step] for step in (3, 4)}
    assert "generator_optimizer.exp_avg_sq.blocks.0.ffn.0.weight" in ranks[0]["saved"][2]["whole"]


def test_the_evaluation_in_between_was_one(found):
    """The run that went on bit for bit was also evaluated: random numbers drawn, modes changed, units gathered (`ToyTask.evaluate`)."""
    folder, ranks, _, _ = found
    assert all([call[:2] for call in rank["same"][-1]] == [(3, False), (4, False)] and rank["same"][-1][0][2] > 10 for rank in ranks)
    rows = [json.loads(line) for line in (folder / "same" / "evaluations.jsonl").read_text().splitlines()]
    assert rows == [{"step": 3, "score": 3.0}, {"step": 4, "score": 4.0}]


def test_other_ranks_go_on_with_the_same_state(found):
    _, ranks, on_two, on_one = found
    half, end = (ranks[0]["saved"][step]["whole"] for step in (2, 4))
    for arrived, step, position, errors, last, _ in (*on_two, on_one):
        assert step == 2 and position == 8 and errors.tolist() == [3.0, 3.0]  # the mean of what the two ranks of a sample kept
        close(arrived, half, rtol=0, atol=0)
        close(last, end, rtol=1e-6, atol=1e-7)


def test_one_rank_decides_for_all(found):
    """A gradient that is not finite on one rank is a step that all skip; a signal to one rank stops and saves all."""
    folder, ranks, _, _ = found
    for rank in ranks:
        said, skipped, unchanged = rank["disturbed"]
        assert said.startswith("stopped at step 1; weights and state are in") and skipped == 1 and unchanged
    assert [f.name for f in checkpoint.folders(folder / "disturbed")] == ["checkpoint_model_000001"]


def test_what_is_on_disk(found):
    folder, _, _, _ = found
    run = json.loads((folder / "whole" / HALF / "run.json").read_text())
    assert run["topology"] == {"world": 4, "sp": 2} and run["trainer"] == "toy" and run["step"] == 2 and len(run["ranks"]) == 4
    assert len([name for name in run["files"] if name.endswith(".distcp")]) == 4 and not list((folder / "whole").glob("*.tmp"))


def test_a_missing_shard_is_seen_before_anything_is_loaded(found, tmp_path):
    folder, _, _, _ = found
    shutil.copytree(folder / "whole" / HALF, tmp_path / HALF)
    next((tmp_path / HALF).glob("__2_*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="damaged.*__2_0.distcp.*remove it to start from the beginning"):
        checkpoint.read_run(tmp_path / HALF, "toy")
