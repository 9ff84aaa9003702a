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


def loop_of(folder, logdir, strategy, resume=False, sp_size=1, training={}, **sections):
    from dmd_toys import toy_task

    from longlive.train.launch import loop_settings
    from longlive.train.trainer import Loop

    mesh = Mesh.launch(sp_size, "cpu")
    infra = {"sharding_strategy": strategy, "gradient_checkpointing": True, "sequence_parallel_size": sp_size}
    training = {"max_iters": 3, "log_iters": 2, "dfake_gen_update_ratio": 2, "lr": 1e-3, "lr_critic": 1e-3} | training
    task = toy_task(folder, mesh, infra=infra, training=training, **sections)
    settings = loop_settings(task.config, True)
    return Loop(task, settings, logdir, config=config_table(task.config), replicas=Replicas.launch("cpu"), stream=mesh.dp_rank, auto_resume=resume)


def weights(loop):
    return {f"{p.name}.{name}": fsdp.whole(t.detach()).clone() for p in loop.players for name, t in p.trained.state_dict().items()}


def moments(loop):
    """What the optimizers keep of every parameter."""
    kept = [[fsdp.whole(player.optimizer.state[p]["exp_avg"]).clone() for p in player.trained.parameters()] for player in loop.players]
    return torch.cat([moment.flatten() for player in kept for moment in player])


def shared(folder, sp_size):
    """A step that regresses and one that compares scores, of a LoRA student: (columns, gradients) of every turn, the tokens of each forward, the weights."""
    how = {"algorithm": {"regression_steps": 1, "same_step_across_blocks": False}, "training": {"max_iters": 2, "dfake_gen_update_ratio": 1}}
    loop = loop_of(folder, folder / f"sp{sp_size}", "no_shard", sp_size=sp_size, **how)
    turns, learn, tokens = [], loop.learn, []

    def learned(number, player):
        stepping = player.optimizer.register_step_pre_hook(lambda *_: turns.append(torch.cat([p.grad.flatten() for p in player.trained.parameters()])))
        columns, refused = learn(number, player)
        stepping.remove()
        turns[-1] = ({name: float(value) for name, value in columns.items()}, turns[-1])
        return columns, refused

    loop.learn = learned
    loop.task.module.blocks[0].register_forward_pre_hook(lambda block, given: tokens.append(given[0].shape[1]))
    loop.fit()
    return turns, tokens, weights(loop)


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
    found["arrived"], found["began"], found["moments"] = loop.state.step, weights(loop), moments(loop)
    loop.fit()
    found["resumed"] = weights(loop)
    found["shared"] = shared(folder, 2)
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


def test_a_run_of_two_ranks_goes_on_on_one(found):
    folder, (first, _) = found
    loop = loop_of(folder, folder / "one", "full", resume=True)
    assert loop.state.step == 2 and not loop.sharded
    began = weights(loop)
    assert all(torch.equal(began[name], first["began"][name]) for name in first["began"]) and torch.equal(moments(loop), first["moments"])
    loop.fit()
    ended = weights(loop)
    assert loop.state.step == 3 and all(tensor.isfinite().all() for tensor in ended.values())
    assert any(not torch.equal(ended[name], began[name]) for name in began)


def test_ranks_that_share_films_learn_what_one_learns(found):
    """Student and critic, with the teacher's answers and with scores; each rank computes its half of every forward."""
    folder, ranks = found
    turns, tokens, alone = shared(folder, 1)
    assert [set(columns) & {"dmdtrain_gradient_norm", "distance"} for columns, _ in turns[::2]] == [{"distance"}, {"distance", "dmdtrain_gradient_norm"}]
    for rank in ranks:
        ours, halves, learned = rank["shared"]
        assert [2 * count for count in halves] == tokens and close(learned, alone)
        for (columns, gradients), (one, whole) in zip(ours, turns, strict=True):
            assert columns == pytest.approx(one, rel=1e-4) and columns.keys() == one.keys()
            assert whole.abs().max() > 0 and (gradients - whole).norm() < 1e-4 * whole.norm()
