"""Distillation with the films of a sample shared by 2 and 4 ranks: rollouts, scores and gradients of one rank, in float64."""

import pytest
import torch
from ranks import run_ranks
from sp_toys import CUTS, HEIGHT, WIDTH, toy_dit

from longlive.engine.rollout import RolloutSettings
from longlive.parallel.mesh import Mesh
from longlive.train.compiled import checkpoint_blocks
from longlive.train.dmd import dmd_gradient, dmd_loss, guided, velocity_loss
from longlive.train.scores import score
from longlive.train.simulation import Exits, Script, Stepping, StudentRollout
from longlive.train.teacher_forcing import Film, frame_positions

F, CHUNKS, BATCH = 4, 4, 2
SETTINGS = RolloutSettings(chunk_frames=F, window_frames=3 * F, sink_frames=F, shot_offset=3.0, steps=2)
MASKS = ("causal", "teacher_forced", "bidirectional")


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(mask, player, mesh):
    """(loss, film, gradients) of one step over all ranks of `mesh`; the networks are toys of one seed, which suffices for numbers."""
    dit = toy_dit()
    checkpoint_blocks(list(dit.blocks))
    embeds = [drawn(30 + i, i % 5 + 1, dit.dims.text_dim) for i in range(BATCH * CHUNKS + 1)]
    cuts = CUTS[1 : 1 + BATCH]
    prompt = torch.arange(BATCH * CHUNKS).reshape(BATCH, CHUNKS)
    noise, other = (drawn(seed, BATCH, CHUNKS * F, dit.dims.channels, HEIGHT * 2, WIDTH * 2) for seed in (1, 2))
    with torch.set_grad_enabled(player == "student"):
        rollout = StudentRollout(dit, SETTINGS, mesh=mesh)
        exits, stepper = Exits(steps=(1, 0, 1, 1), first_with_gradients=1), Stepping(dit, dit.text(embeds)) if mask == "causal" else None
        x = rollout.run(noise, Script(cuts_Bc=cuts, prompt_Bc=prompt), dit.text(embeds), exits, stepper=stepper).x_BFCHW
    film = Film(prompt, frame_positions(cuts, F, 3.0))
    sigma = drawn(3, BATCH, CHUNKS).sigmoid().repeat_interleave(F, 1)
    noisy = (1 - sigma[..., None, None, None]) * x.detach() + sigma[..., None, None, None] * other
    mask_BF = torch.ones(BATCH, CHUNKS * F)
    mask_BF[:, 0] = 0

    def said(rows):
        return score(dit, dit.text(embeds), Film(rows, film.position_BF), mask, noisy, sigma, x.detach(), mesh=mesh)

    if player == "critic":
        loss = velocity_loss(said(prompt), other - x.detach(), mask_BF)
    else:
        with torch.no_grad():
            real = guided(*(noisy - sigma[..., None, None, None] * said(rows) for rows in (prompt, torch.full_like(prompt, BATCH * CHUNKS))), 3.0)
        loss = dmd_loss(x, dmd_gradient(x, real, noisy - said(prompt).detach(), mask_BF, F), mask_BF)
    loss.backward()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in dit.parameters()])
    return loss.detach(), x.detach(), mesh.sum(flat) / mesh.size


def everything(sp_size):
    mesh = Mesh.launch(sp_size, "cpu")
    return {(mask, player): step(mask, player, mesh) for mask in MASKS for player in ("student", "critic")}


@pytest.fixture(scope="module")
def alone():
    return {(mask, player): step(mask, player, Mesh()) for mask in MASKS for player in ("student", "critic")}


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_films_learn_as_one(alone, ranks, tmp_path):
    for found in run_ranks(everything, ranks, tmp_path, ranks):
        for case, (loss, x, gradients) in alone.items():
            for ours, theirs in zip(found[case], (loss, x, gradients)):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text: f"{case}: {text}")
            assert gradients.abs().max() > 0


