"""Distillation on several processes: they agree on lengths and exits, average what they learn, shard what trains, and go on on other numbers of them."""

import shutil

import pytest
import torch
from ranks import run_ranks

from longlive.config.show import config_table
from longlive.parallel import fsdp
from longlive.parallel.data_parallel import Replicas
from longlive.parallel.mesh import Mesh
from longlive.train.cast import Merged


def loop_of(folder, logdir, strategy, resume=False, sp_size=1, **sections):
    from dmd_toys import toy_task

    from longlive.train.launch import loop_settings
    from longlive.train.trainer import Loop

    mesh = Mesh.launch(sp_size, "cpu")
    infra = {"sharding_strategy": strategy, "gradient_checkpointing": True, "sequence_parallel_size": sp_size}
    training = {"max_iters": 3, "log_iters": 2, "dfake_gen_update_ratio": 2, "lr": 1e-3, "lr_critic": 1e-3}
    task = toy_task(folder, mesh, infra=infra, training=training, **sections)
    settings = loop_settings(task.config, True)
    return Loop(task, settings, logdir, config=config_table(task.config), replicas=Replicas.launch("cpu"), stream=mesh.dp_rank, auto_resume=resume)


def weights(loop):
    return {f"{p.name}.{name}": fsdp.whole(t.detach()).clone() for p in loop.players for name, t in p.trained.state_dict().items()}


def two(folder):
    found = {}
    for strategy in ("no_shard", "full"):
        loop = loop_of(folder, folder / strategy, strategy)
        loop.fit()
        found[strategy] = weights(loop)
        found[strategy + " shards"] = loop.sharded
        merged = Merged(loop.task.module, "generator", loop.players[0].trained.state_dict())
        found[strategy + " merged"] = {name: merged[name].clone() for name in merged}
    if loop.replicas.rank == 0:
        shutil.copytree(folder / "full" / "checkpoint_model_000002", folder / "resumed" / "checkpoint_model_000002")
        shutil.copytree(folder / "full" / "checkpoint_model_000002", folder / "one" / "checkpoint_model_000002")
    torch.distributed.barrier()
    loop = loop_of(folder, folder / "resumed", "full", resume=True)
    found["arrived"] = loop.state.step
    loop.fit()
    found["resumed"] = weights(loop)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    from dmd_toys import write_generator
    from train_toys import shrink_tiny

    folder = tmp_path_factory.mktemp("distil")
    shrink_tiny()
    write_generator(folder)
    return folder, run_ranks(two, 2, folder, folder)


def close(ours, theirs):
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs) and ours.keys() == theirs.keys()


def test_ranks_hold_the_same_weights(found):
    _, (first, second) = found
    for strategy in ("no_shard", "full"):
        assert first[strategy].keys() == second[strategy].keys()
        assert all(torch.equal(first[strategy][name], second[strategy][name]) for name in first[strategy])


def test_sharded_or_not_they_learn_the_same(found):
    _, (first, _) = found
    assert first["full shards"] and not first["no_shard shards"]
    assert close(first["full"], first["no_shard"])
    assert close(first["full merged"], first["no_shard merged"])  # what an evaluation sees


def test_a_sharded_run_goes_on(found):
    _, (first, _) = found
    assert first["arrived"] == 2
    assert all(torch.equal(first["resumed"][name], first["full"][name]) for name in first["full"])
