"""What a step asks of the network: levels, masks, weights."""

import math

import pytest
import torch

from longlive.diffusion.flow import train_table
from longlive.train.objective import augmentation_range, draw_indices, flow_target, frame_errors, know_first_frames, masked_mean, quarter_losses

TABLE = train_table(5.0)


def _clip(batch=2, frames=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, frames, 3, 2, 2, generator=generator) for _ in range(2)]


def test_a_perfect_prediction_has_no_loss_and_leads_back_to_the_clip():
    clean, noise = _clip()
    flow = flow_target(clean, noise, torch.tensor([[0, 999], [500, 10]]), TABLE)
    assert frame_errors(flow.target_BFCHW, flow.target_BFCHW).abs().max() == 0
    back = flow.noisy_BFCHW - flow.sigma_BF[..., None, None, None] * flow.target_BFCHW
    torch.testing.assert_close(back.float(), clean, atol=1e-5, rtol=0)


def test_frames_of_a_chunk_share_their_level_and_it_is_told_in_float64():
    clean, noise = _clip()
    flow = flow_target(clean, noise, torch.tensor([[3, 7], [1, 2]]), TABLE)
    assert flow.sigma_BF.dtype == torch.float64
    assert torch.equal(flow.sigma_BF[:, 0], flow.sigma_BF[:, 1]) and torch.equal(flow.sigma_BF[:, 2], flow.sigma_BF[:, 3])
    assert torch.equal((flow.sigma_BF * 1000).float()[0, ::2], TABLE.timesteps[[3, 7]])


def test_known_frames_are_clean_untold_and_uncounted():
    clean, noise = _clip()
    flow = know_first_frames(flow_target(clean, noise, torch.full((2, 2), 100), TABLE), clean, torch.tensor([1, 0]))
    assert torch.equal(flow.noisy_BFCHW[0, 0], clean[0, 0]) and flow.sigma_BF[0, 0] == 0 and flow.mask_BF[0].tolist() == [0, 1, 1, 1]
    assert flow.mask_BF[1].tolist() == [1, 1, 1, 1] and flow.sigma_BF[1, 0] > 0.9


def test_the_mean_counts_only_what_the_mask_shows():
    error, weight = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 5.0]])
    assert masked_mean(error, weight, torch.tensor([[1.0, 0.0]])).item() == 2.0
    assert masked_mean(error, weight, torch.zeros(1, 2)).item() == 0.0


def test_an_area_weight_moves_weight_but_not_the_scale():
    target = torch.zeros(1, 1, 2, 2, 2)
    area = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]]]])
    assert frame_errors(torch.ones_like(target), target, area).item() == pytest.approx(1.0)
    corner = torch.zeros_like(target)
    corner[..., 0, 0] = 1
    assert frame_errors(corner, target, area).item() == pytest.approx(2 * frame_errors(corner, target).item())


def test_quarters_sort_errors_by_level():
    losses = quarter_losses(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.1, 0.9, 1.0]]), torch.ones(1, 3))
    assert losses[0] == 1 and math.isnan(losses[1]) and losses[3] == 3


def test_history_noise_stays_below_its_timestep():
    low, high = augmentation_range(200, 5.0)
    assert high == 1000 and TABLE.timesteps[low] <= 200 < TABLE.timesteps[low - 1]


def test_draws_are_a_function_of_the_generator():
    first, second = (draw_indices(4, 3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4, 3) and first.max() < 1000
