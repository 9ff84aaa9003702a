"""Schedules, solver rows, flow algebra, guidance and known frames."""

import math

import pytest
import torch

from longlive.core.errors import InputError
from longlive.diffusion import flow
from longlive.diffusion.guidance import branches
from longlive.diffusion.known import KnownFrames
from longlive.diffusion.samplers import sample, unipc

FIFTY = [
    999, 995, 991, 987, 982, 978, 973, 968, 963, 957, 952, 946, 940, 934, 927, 920, 913, 906, 898, 890, 882, 873, 863, 854, 843, 833, 821, 809,
    796, 783, 768, 753, 737, 720, 701, 681, 660, 636, 611, 584, 555, 522, 487, 448, 405, 356, 302, 241, 172, 92,
]  # fmt: skip


def unipc_step_by_step(sigmas, noise, velocity):
    """The solver as it is written down (spec inference §3.3), on samples instead of on coefficients."""
    lam = [math.log((1 - s) / s) for s in sigmas[:-1]]
    x, last, clean = noise, None, []
    for i in range(len(sigmas) - 1):
        clean.append(x - sigmas[i] * velocity[i])
        if i:
            h = lam[i] - lam[i - 1]
            growth = math.expm1(-h)
            move = 0.5 * (clean[i] - clean[i - 1])
            if i > 1:
                r = (lam[i - 2] - lam[i - 1]) / h
                g1 = growth / -h - 1
                g2 = g1 / -h - 0.5
                b1, b2 = g1 / growth, 2 * g2 / growth
                rho0 = (b1 - b2) / (1 - r)
                move = rho0 * (clean[i - 2] - clean[i - 1]) / r + (b1 - rho0) * (clean[i] - clean[i - 1])
            x = sigmas[i] / sigmas[i - 1] * last - (1 - sigmas[i]) * growth * (clean[i - 1] + move)
        last = x
        if i == len(sigmas) - 2:
            return clean[i]
        h = lam[i + 1] - lam[i]
        pull = 0.5 * (clean[i - 1] - clean[i]) / ((lam[i - 1] - lam[i]) / h) if i else 0
        x = sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * math.expm1(-h) * (clean[i] + pull)


def test_published_rows_and_timesteps():
    four, two = unipc(4, 5.0), unipc(2, 5.0)
    assert four.timesteps == (999, 937, 833, 624) and two.timesteps == (999, 833)
    assert list(unipc(50, 5.0).timesteps) == FIFTY
    rows = ((-0.062534,), (-0.026651, -0.140094), (-0.027461, 0.004177, -0.351828), (-0.027461, 0.004177, -0.351828, -0.624687))
    for ours, published in zip(four.rows, rows):
        assert ours == pytest.approx(published, abs=1e-6)
    assert two.rows[1] == pytest.approx((-0.166744, -0.833055), abs=1e-6)


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 1.0), (3, 5.0), (7, 8.0), (20, 3.0)])
def test_rows_equal_the_solver_written_down(steps, shift):
    noise, velocity = torch.randn(5, dtype=torch.float64), torch.randn(steps, 5, dtype=torch.float64)
    schedule = unipc(steps, shift)
    ours = noise + torch.tensor(schedule.rows[-1], dtype=torch.float64) @ velocity
    assert torch.allclose(ours, unipc_step_by_step(schedule.sigmas, noise, velocity), atol=1e-9)


def test_a_perfect_model_is_recovered_in_any_number_of_steps():
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    for steps in (1, 2, 5, 33):
        assert torch.allclose(sample(lambda x, sigma: noise - clean, noise, unipc(steps, 5.0)), clean, atol=2e-3)


def test_sampling_is_in_float32_and_tells_the_model_whole_timesteps():
    asked, seen = [], []

    def denoise(x, sigma):
        asked.append((x.dtype, sigma))
        return torch.zeros(2, dtype=torch.bfloat16)

    out = sample(denoise, torch.ones(2, dtype=torch.bfloat16), unipc(4, 5.0), lambda step, x, v: seen.append(step))
    assert asked == [(torch.float32, s) for s in (0.999, 0.937, 0.833, 0.624)]
    assert out.dtype == torch.float32 and seen == [0, 1, 2, 3]


def test_no_steps_is_refused():
    with pytest.raises(InputError, match="sampling_steps"):
        unipc(0, 5.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, 1e6])
def test_shifts_without_a_solution_are_refused(shift):
    with pytest.raises(InputError, match="timestep_shift"):
        unipc(4, shift)
    assert all(math.isfinite(c) for row in unipc(4, 1000.0).rows for c in row)


def test_flow_algebra_inverts():
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    sigma = torch.rand(2, 3) * 0.9 + 0.05
    x = flow.add_noise(clean, noise, sigma)
    assert torch.allclose(flow.x0_from_velocity(x, flow.velocity_target(clean, noise), sigma), clean, atol=1e-5)
    assert torch.allclose(flow.velocity_from_x0(x, clean, sigma), noise - clean, atol=1e-4)


def test_training_weights_have_mean_one_and_peak_in_the_middle():
    table = flow.train_table(5.0)
    assert table.weights.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert table.weights[0] == 0 and table.weights.max().item() == pytest.approx(2.08, abs=0.01)
    assert table.sigmas[-1].item() == pytest.approx(0.00498, abs=1e-5)
    assert table.nearest(torch.tensor([[0.0, 2000.0]])).tolist() == [[999, 0]]


def test_denoising_lists():
    assert flow.denoising_steps(4, 5.0) == [1000, 937, 833, 625, 0]
    assert flow.denoising_steps(5, 1.0) == [1000, 800, 600, 400, 200, 0]
    assert flow.warp_denoising_steps([1000, 500, 0], 5.0).tolist() == pytest.approx([1000.0, 833.3333, 0.0])


def test_guidance_is_the_same_batched_or_in_two_passes():
    prompt, negative = torch.randn(2, 3), torch.randn(2, 3)
    batched = branches([0, 1], 7, 3.0, True)
    apart = branches([0, 1], 7, 3.0, False)
    assert batched.passes == ((0, 1, 7, 7),) and apart.passes == ((0, 1), (7, 7))
    want = negative + 3 * (prompt - negative)
    assert torch.equal(batched.combine([torch.cat((prompt, negative))]), want)
    assert torch.equal(apart.combine([prompt, negative]), want)
    assert branches([0], None, 1.0, True).passes == ((0,),)
    with pytest.raises(InputError, match="negative prompt"):
        branches([0], None, 3.0, True)


def test_known_frames_are_cut_by_chunk():
    known = KnownFrames(torch.arange(3.0).view(1, 3, 1, 1, 1))
    parts = [known.part(start, 2) for start in (0, 2, 4)]
    assert [p.frames for p in parts] == [2, 1, 0]
    x = torch.full((2, 2, 1, 1, 1), 9.0)
    assert parts[1].clamp(x).flatten().tolist() == [2, 9, 2, 9]
    assert parts[1].levels(torch.ones(2, 2)).tolist() == [[0, 1], [0, 1]]
    assert parts[2].clamp(x) is x
    later = KnownFrames(torch.ones(1, 1, 1, 1, 1), start=2)
    assert [later.part(start, 2).frames for start in (0, 2, 4)] == [0, 1, 0]
