"""Teacher forcing over 4 ranks, as 1 x 4, 2 x 2 and 4 x 1 of (dp, sp): the same velocities, losses and gradients as in one process, in float64."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sp_toys import BATCH, CASES, FRAMES, batch_of, toy_dit

from longlive.parallel.mesh import Mesh
from longlive.train.compiled import RotatedAhead, checkpoint_blocks, compile_blocks
from longlive.train.objective import quarter_losses
from longlive.train.sharded import film_layout, sharded_loss, sharded_velocity
from longlive.train.teacher_forcing import teacher_forced_velocity

SP_SIZES = (1, 2, 4)


def step(dit, case, samples, mesh):
    """(velocity, loss, quarters, gradients averaged over the world) of one step on this rank's samples."""
    batch = batch_of(case, samples)
    layout = film_layout(FRAMES, case.copies, mesh, case.kind)
    wrap = RotatedAhead if case.ahead else lambda attend: attend
    velocity = sharded_velocity(dit, dit.text(batch.embeds), batch.film, batch.context, batch.copies, mesh, layout, wrap)
    loss, quarters = sharded_loss(velocity, batch.flows, mesh, layout, batch.area_BFHW)
    dit.zero_grad()
    loss.backward()
    flat = mesh.sum(torch.cat([p.grad.flatten() for p in dit.parameters()])) / mesh.size
    gradients = {name: part.view_as(p) for (name, p), part in zip(dit.named_parameters(), flat.split([p.numel() for p in dit.parameters()]))}
    return velocity.detach(), loss.item(), quarters, gradients


def every_case():
    plain, recomputed = toy_dit(), toy_dit()
    checkpoint_blocks(recomputed.blocks)
    found = {}
    for sp_size in SP_SIZES:
        mesh = Mesh.launch(sp_size, "cpu")
        if sp_size == 4:
            compile_blocks(recomputed.blocks, backend="aot_eager")
        share = BATCH // mesh.dp_size
        samples = list(range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share))
        for name, case in CASES.items():
            velocity, *rest = step(recomputed if case.ahead else plain, case, samples, mesh)
            found[name, sp_size] = (samples, mesh.sp_rank, velocity, *rest)
    return found | {"group": dist.get_backend()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(every_case, 4, tmp_path_factory.mktemp("ranks"))


def alone(case):
    """The whole batch in one process, by the functions that know of no ranks."""
    dit, batch = toy_dit(), batch_of(case, list(range(BATCH)))
    velocities = teacher_forced_velocity(dit, dit.text(batch.embeds), batch.film, batch.context, batch.copies)
    velocity, target = torch.cat(velocities, 1), torch.cat([flow.target_BFCHW for flow in batch.flows], 1)
    sigma, weight, mask = (torch.cat(parts, 1) for parts in zip(*((f.sigma_BF, f.weight_BF, f.mask_BF) for f in batch.flows)))
    error = (velocity - target).square().mean(2)
    if batch.area_BFHW is not None:
        error = error * batch.area_BFHW.repeat(1, case.copies, 1, 1) / batch.area_BFHW.mean()
    error = error.mean((2, 3))
    loss = (error * weight * mask).sum() / mask.sum()
    loss.backward()
    return velocity.detach(), loss.item(), quarter_losses(error.detach(), sigma, mask), {name: p.grad for name, p in dit.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_any_mix_of_ranks_equals_one_process(found, name):
    case = CASES[name]
    velocity, loss, quarters, gradients = alone(case)
    for sp_size in SP_SIZES:
        layout = film_layout(FRAMES, case.copies, Mesh(sp_size=sp_size), case.kind)
        whole = torch.full_like(velocity, torch.nan)
        for rank in found:
            samples, sp_rank, own, own_loss, own_quarters, own_gradients = rank[name, sp_size]
            noisy = [frame - FRAMES for frame in layout.frames(sp_rank) if frame >= FRAMES]
            whole[torch.tensor(samples)[:, None], torch.tensor(noisy, dtype=torch.int64)] = own
            assert own_loss == pytest.approx(loss, rel=1e-12)
            torch.testing.assert_close(own_quarters, quarters, rtol=1e-10, atol=0, equal_nan=True)
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(own_gradients[parameter], gradient, rtol=1e-9, atol=1e-12, msg=lambda m: f"{parameter}, sp {sp_size}: {m}")
        torch.testing.assert_close(whole, velocity, rtol=1e-10, atol=1e-12)


def test_a_masked_loss_keeps_its_scale(found):
    """D4: divided by its sp group's count alone, a masked gradient would be P times too small."""
    norms = [sum(g.square().sum() for g in found[0]["masked", sp_size][-1].values()).sqrt().item() for sp_size in SP_SIZES]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-10)


def test_every_parameter_gets_a_gradient(found):
    gradients = found[0]["windows, cuts, three copies", 4][-1]
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_a_cpu_talks_over_gloo(found):
    assert found[0]["group"] == "gloo"
