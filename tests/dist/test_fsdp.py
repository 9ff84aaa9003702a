"""Sharded parameters over 4 ranks: each strategy, with any sp size, takes the same steps as one process that holds everything, in float64."""

import os

import pytest
import torch
from ranks import run_ranks
from sp_toys import BATCH, CASES, FRAMES, batch_of, toy_dit
from torch.distributed.tensor import DTensor

from longlive.core.errors import ConfigError, LongLiveError
from longlive.parallel import fsdp
from longlive.parallel.apply import Plan, apply
from longlive.parallel.mesh import Mesh
from longlive.train.compiled import checkpoint_blocks
from longlive.train.muon import muon
from longlive.train.optim import EMA, adamw
from longlive.train.sharded import film_layout, sharded_loss, sharded_velocity

CASE = CASES["masked"]
SAMPLES = (0, 1, 2, 3), (3, 1, 0, 2)  # of both micro-steps
STEPS, CLIP = 1, 0.5
# strategy, processes on a "host", sp size, wrap
WAYS = {
    "full": ("full", 4, 2, "transformer"),
    "hybrid_full on two hosts": ("hybrid_full", 2, 1, "transformer"),
    "hybrid_zero2 on one host, small blocks as one unit": ("hybrid_zero2", 4, 4, "size"),
}
BLOCKS, ENTRIES = ("blocks.*",), ("text_embedding",)


def train(dit, mesh, reduced=None):
    """A step of two micro-steps; (gradient norms, weights, their EMA), all whole."""
    parameters = list(dit.parameters())
    optimizer, ema = adamw(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), EMA(dit, 0.9)
    norms = []
    for _ in range(STEPS):
        for micro, order in enumerate(SAMPLES):
            fsdp.reduce_gradients(dit, micro == len(SAMPLES) - 1)
            share = BATCH // mesh.dp_size
            batch = batch_of(CASE, list(order[mesh.dp_rank * share : (mesh.dp_rank + 1) * share]))
            layout = film_layout(FRAMES, CASE.copies, mesh, CASE.kind)
            velocity = sharded_velocity(dit, dit.text(batch.embeds), batch.film, batch.context, batch.copies, mesh, layout)
            loss, _ = sharded_loss(velocity, batch.flows, mesh, layout)
            (loss / len(SAMPLES)).backward()
            if reduced is not None:
                reduced.append(parameters[0].grad is not None)
        norm = fsdp.gradient_norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(dit, len(norms) + 1)
        norms.append(norm)
    named = {name: fsdp.whole(p.detach()).clone() for name, p in dit.named_parameters()}
    return torch.stack(norms), named, {name: fsdp.whole(t).clone() for name, t in ema.tensors().items()}


def way(strategy, host, sp_size, wrap):
    os.environ["LOCAL_WORLD_SIZE"] = str(host)
    mesh, reduced = Mesh.launch(sp_size, "cpu"), []
    dit = apply(toy_dit(), torch.device("cpu"), Plan(blocks=BLOCKS, entries=ENTRIES, strategy=strategy, wrap=wrap, recompute=checkpoint_blocks))
    sizes = {"all": sum(p.numel() for p in dit.parameters()), "own": sum(fsdp.local(p).numel() for p in dit.parameters())}
    with torch.no_grad():
        dit.text(batch_of(CASE, [0]).embeds)  # an entry may run first
    units = sum(isinstance(part, fsdp.FSDPModule) for part in dit.modules())
    return {**dict(zip(("norms", "weights", "ema"), train(dit, mesh, reduced))), **sizes, "reduced": reduced, "units": units}


def refused(function):
    try:
        function()
    except LongLiveError as error:
        return str(error)


def everything():
    found = {name: way(*ways) for name, ways in WAYS.items()}
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    found["uneven hosts"] = refused(lambda: fsdp.shard_mesh("hybrid_full", "cpu"))
    other = toy_dit()
    with torch.no_grad():
        other.head.head.bias += torch.distributed.get_rank() == 2
    found["other weights"] = refused(lambda: apply(other, torch.device("cpu"), Plan(blocks=BLOCKS)))
    dit = apply(toy_dit(), torch.device("cpu"), Plan(blocks=BLOCKS, strategy="full"))
    found["muon"] = refused(lambda: muon(dit, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0))
    shadow = EMA(dit, 0.9).shadow
    found["ema is sharded"] = all(isinstance(t, DTensor) and fsdp.local(t).shape == fsdp.local(p).shape for t, p in zip(shadow, dit.parameters()))
    found["half"] = half(dit=toy_dit().float())
    return found


def half(dit):
    """bf16 compute on float32 masters: (type of a gradient, of the velocity, relative distance of the whole gradient from float32's)."""
    mesh = Mesh.launch(1, "cpu")
    reference = toy_dit().float()
    apply(dit, torch.device("cpu"), Plan(blocks=BLOCKS, entries=ENTRIES, strategy="full", bf16=True))
    batch, layout = batch_of(CASE, [0]), film_layout(FRAMES, CASE.copies, mesh, CASE.kind)
    for network in (dit, reference):
        text = network.text([e.float() for e in batch.embeds])
        velocity = sharded_velocity(network, text, batch.film, batch.context, batch.copies, mesh, layout)
        kind = velocity.dtype if network is dit else kind  # noqa: F821
        velocity.float().square().mean().backward()
    ours, theirs = (torch.cat([fsdp.whole(p.grad).flatten() for p in network.parameters()]) for network in (dit, reference))
    return next(dit.parameters()).grad.dtype, kind, ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return train(toy_dit(), Mesh())


@pytest.mark.parametrize("name", WAYS)
def test_a_sharded_step_equals_the_step_of_one_process(found, alone, name):
    norms, weights, ema = alone
    assert norms.min() > CLIP  # clipping is part of the step
    for rank in found:
        torch.testing.assert_close(rank[name]["norms"], norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(rank[name]["weights"], weights, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(rank[name]["ema"], ema, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WAYS)
def test_each_rank_holds_its_share(found, name):
    strategy, host, _, wrap = WAYS[name]
    share = host if strategy != "full" else 4
    for rank in found:
        assert rank[name]["own"] == pytest.approx(rank[name]["all"] / share, rel=0.05)
        assert rank[name]["units"] == (4 if wrap == "transformer" else 2)


def test_only_the_last_micro_step_reduces(found):
    assert all(rank["full"]["reduced"] == [False, True] * STEPS for rank in found)


def test_the_ema_stays_in_shards(found):
    assert all(rank["ema is sharded"] for rank in found)


def test_half_precision_computes_in_bf16_on_float32_masters(found):
    for rank in found:
        gradient, velocity, distance = rank["half"]
        assert gradient == torch.float32 and velocity == torch.bfloat16 and 0 < distance < 0.1


def test_refusals_are_the_same_on_every_rank(found):
    said = {name: {rank[name] for rank in found} for name in ("uneven hosts", "other weights", "muon")}
    assert all(len(words) == 1 for words in said.values())
    assert "WORLD_SIZE(4) % LOCAL_WORLD_SIZE(3) = 1, not 0" in said["uneven hosts"].pop()
    assert "different weights (head.head.bias and 0 more)" in said["other weights"].pop()
    assert "training.optimizer(muon)" in said["muon"].pop()


def test_patterns_match_at_their_own_depth():
    dit = toy_dit()
    assert fsdp.matching(dit, ("blocks.*", "text_embedding")) == [dit.text_embedding, *dit.blocks]
    assert issubclass(ConfigError, LongLiveError) and not fsdp.shards("full", 1) and not fsdp.shards("no_shard", 4)
