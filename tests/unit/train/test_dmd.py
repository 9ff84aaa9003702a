"""The pure functions of distillation: what is drawn, the student's gradient, the losses."""

import pytest
import torch

from longlive.diffusion.flow import train_table
from longlive.diffusion.samplers import unipc
from longlive.train.dmd import dmd_gradient, dmd_loss, draw_timesteps, guided, off_policy_levels, score_timesteps, velocity_loss
from longlive.train.simulation import Exits

SHAPE = (2, 4, 3, 2, 2)


def films(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(count)]


def test_the_gradient_is_the_difference_over_the_distance_of_each_chunk():
    x, real, fake = films(3)
    mask = torch.ones(SHAPE[:2])
    g = dmd_gradient(x, real, fake, mask, 2, epsilon=0.0)
    for b in range(2):
        for chunk in (slice(0, 2), slice(2, 4)):
            expected = (fake - real)[b, chunk] / (x - real)[b, chunk].abs().mean()
            torch.testing.assert_close(g[b, chunk], expected)


def test_a_given_frame_counts_nowhere_and_a_chunk_that_is_right_explodes_nowhere():
    """D18."""
    x, real, fake = films(3)
    mask = torch.ones(SHAPE[:2])
    mask[:, 0] = 0
    known = dmd_gradient(x, real, fake, mask, 2)
    real[:, 0] += 100  # what the teacher says of a given frame
    moved = dmd_gradient(x, real, fake, mask, 2)
    assert torch.equal(known, moved) and known[:, 0].abs().max() == 0
    expected = (fake - real)[:, 1] / ((x - real)[:, 1].abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(known[:, 1], expected)
    x[:, 2:] = real[:, 2:] = fake[:, 2:]
    assert dmd_gradient(x, real, fake, mask, 2).isfinite().all() and dmd_gradient(x, real, fake, mask, 2)[:, 2:].abs().max() == 0


def test_the_loss_has_that_gradient():
    x, g = films(2)
    mask = torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 0]])
    x.requires_grad_(True)
    g = g * mask[..., None, None, None]
    loss = dmd_loss(x, g, mask)
    loss.backward()
    counted = mask.sum() * 12
    torch.testing.assert_close(x.grad, g / counted)
    torch.testing.assert_close(loss, 0.5 * g.square().sum() / counted)


def test_the_critic_learns_on_its_velocity():
    """D8: a velocity that is right to the last bit of bfloat16 costs nothing, at any level."""
    target = films(1, dtype=torch.float32)[0].bfloat16()
    mask = torch.ones(SHAPE[:2])
    assert velocity_loss(target, target.float(), mask) == 0
    mask[0] = 0
    torch.testing.assert_close(velocity_loss(target + 1, target.float(), mask), (target + 1 - target.float()).float()[1].square().mean())


def test_guidance_of_3_is_4_by_the_usual_count():
    cond, uncond = torch.tensor(2.0), torch.tensor(1.0)
    assert guided(cond, uncond, 3.0) == uncond + 4 * (cond - uncond)


def test_score_timesteps():
    generator = torch.Generator().manual_seed(0)
    whole = draw_timesteps(500, 3, generator)
    assert torch.equal(whole[:, 0], whole[:, 2]) and whole.min() >= 0 and 900 < whole.max() < 1000
    apart = draw_timesteps(500, 3, generator, low=250, high=400, per_chunk=True)
    assert not torch.equal(apart[:, 0], apart[:, 1]) and apart.min() >= 250 and apart.max() < 400
    told = score_timesteps(torch.tensor([0, 500, 999, 1000]), 5.0)
    torch.testing.assert_close(told, torch.tensor([20.0, 5 * 0.5 / 3 * 1000, 980.0, 980.0], dtype=torch.float64))


def test_exits_know_the_timesteps_around_them():
    schedule = unipc(4, 5.0)
    bounds = [Exits(steps=(step,) * 3).bounds(schedule, 5.0) for step in range(4)]
    assert bounds[3] == (249, 0) and [b[1] for b in bounds[:-1]] == [b[0] for b in bounds[1:]]
    table = train_table(5.0)
    assert all(abs(float(table.timesteps[1000 - b[0]]) - t) < 3 for b, t in zip(bounds, schedule.timesteps))
    assert Exits(steps=(0, 1)).bounds(schedule, 5.0) is None


@pytest.mark.parametrize("listed, warp", [(None, False), ([1000, 750, 500, 250, 0], True), ([1000, 946, 854, 681, 0], False)])
def test_off_policy_levels_end_above_0(listed, warp):
    """D23."""
    levels = off_policy_levels(listed, 4, 5.0, warp=warp)
    assert len(levels) == 4 and min(levels) > 0.5 and levels[0] == 1.0
