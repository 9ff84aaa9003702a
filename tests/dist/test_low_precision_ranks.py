"""NVFP4 training over ranks: tokens of a sample on two ranks quantise with one amax, sharded weights with that of the whole."""

import pytest
import torch
from ranks import run_ranks
from sp_toys import BATCH, CASES, FRAMES, batch_of, toy_dit

from longlive.models.spec import TINY
from longlive.ops.fp4_training import Recipe
from longlive.parallel import fsdp
from longlive.parallel.apply import Plan, apply
from longlive.parallel.mesh import Mesh
from longlive.precision.training import NVFP4_TRAINED, Moment, TrainingConverter
from longlive.train.compiled import checkpoint_blocks
from longlive.train.low_precision import largest_of
from longlive.train.sharded import film_layout, sharded_loss, sharded_velocity

CASE = CASES["masked"]
PLAIN = Recipe(stochastic=False, gradient_rule="mse")


def network(reduce, kind=True):
    dit = toy_dit().float()
    if kind:
        TrainingConverter(kind=NVFP4_TRAINED, recipe=PLAIN, moment=Moment(reduce=reduce)).convert(dit, TINY)
    return dit


def gradients(dit, mesh):
    """(velocity of this rank, loss, gradients averaged over the world), whole."""
    share = BATCH // mesh.dp_size
    batch = batch_of(CASE, list(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)))
    batch = type(batch)(**{k: _float(v) for k, v in vars(batch).items()})
    layout = film_layout(FRAMES, CASE.copies, mesh, CASE.kind)
    velocity = sharded_velocity(dit, dit.text(batch.embeds), batch.film, batch.context, batch.copies, mesh, layout)
    loss, _ = sharded_loss(velocity, batch.flows, mesh, layout)
    dit.zero_grad()
    loss.backward()
    found = {name: fsdp.whole(p.grad).clone() if p.grad is not None else None for name, p in dit.named_parameters()}
    if not fsdp.is_sharded(dit):
        found = {name: mesh.sum(g) / mesh.size for name, g in found.items() if g is not None}
    return velocity.detach(), loss.item(), found


def _float(value):
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return value.float()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(_float, value))
    return value


def on_two_ranks():
    found = {}
    for sp_size in (2, 1):
        mesh = Mesh.launch(sp_size, "cpu")
        found[f"sp {sp_size}"] = gradients(network(largest_of(mesh)), mesh)
        if sp_size == 2:
            found["every rank its own amax"] = gradients(network(None), mesh)
    dit = apply(network(None), torch.device("cpu"), Plan(blocks=("blocks.*",), entries=("text_embedding",), strategy="full", recompute=checkpoint_blocks))
    found["fsdp"] = gradients(dit, Mesh.launch(1, "cpu"))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("low"))


@pytest.fixture(scope="module")
def alone():
    return gradients(network(None), Mesh()), gradients(network(None, kind=False), Mesh())


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("way", ["sp 2", "sp 1", "fsdp"])
def test_two_ranks_learn_what_one_learns(found, alone, way):
    """Losses agree to a few codes that rounding tips over, far nearer than with an amax for every rank. Weight gradients are turned and grouped over the
    tokens that a rank has, so that they agree as two quantisations do."""
    (_, loss, expected), (_, exact_loss, exact) = alone

    def error(name):
        return abs(sum(f[name][1] for f in found) / 2 - loss)

    assert error(way) < 0.05 * abs(loss - exact_loss) and error(way) < 0.5 * error("every rank its own amax")
    for name, right in expected.items():
        if name not in found[0][way][2] or right.norm() < 1e-8:
            continue
        mine = found[0][way][2][name]
        quantised = apart(right, exact[name])
        assert apart(mine, right) < max(1.5 * quantised, 2e-3), name
        assert torch.equal(mine, found[1][way][2][name])


def test_sharding_changes_nothing_of_replicas(found):
    """FSDP gathers weights before they are quantised: the amax is the whole's, and so are all codes."""
    for f in found:
        assert torch.equal(f["fsdp"][0], f["sp 1"][0])
    for name, g in found[0]["sp 1"][2].items():
        torch.testing.assert_close(found[0]["fsdp"][2][name], g, rtol=1e-4, atol=1e-6)
