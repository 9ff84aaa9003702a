"""The decoder's convolutions in plain torch as the kernels of a GPU compute them: taps of all columns at once, four phases, codes with scales."""

import pytest
import torch
import torch.nn.functional as F

from longlive.models.wan_vae import DoublingConv
from longlive.ops import conv_doubling, conv_narrow
from longlive.ops.frames import Beside


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_over_columns_and_sums_over_frames_and_rows_are_the_convolution():
    x, weight = random(2, 5, 4, 6, 64, seed=1), random(12, 64, 3, 3, 3, seed=2)
    rows = conv_narrow.tap_rows(weight).view(3, conv_narrow.TILE, 64)
    assert not rows[:, 108:].any()
    wide = F.pad(x, (0, 0, 1, 1))
    products = sum(wide[:, :, :, tap : tap + 6] @ rows[tap].T for tap in range(3))
    products = F.pad(products, (0, 0, 0, 0, 1, 1))
    y = sum(products[:, t : t + 3, h : h + 4, :, 12 * (3 * t + h) :][..., :12] for t in range(3) for h in range(3))
    truth = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(y, truth)


def test_four_taps_of_a_phase_on_a_run_of_positions_are_the_doubling_convolution():
    """The neighbours of a position at the edge of a frame lie in the next row: what the taps over that edge give is put to zero."""
    H, W, C = 3, 4, 64
    conv = DoublingConv(C).double().requires_grad_(False)
    x = random(1, 2, H, W, C, seed=1)
    rows = conv_doubling.tap_rows(conv.phases()).view(2, 2, 4, C, C)
    flat = F.pad(x.view(2, H * W, C), (0, 0, W + 1, W + 1))  # zeros above and below
    out = torch.empty(2, H, 2, W, 2, C, dtype=torch.float64)
    columns = torch.arange(H * W) % W
    for j in range(2):
        for k in range(2):
            over = sum(flat[:, W + 1 + (i + j - 1) * W + 2 * k - 1 :][:, : H * W] @ rows[i, k, 2 * j + k].T for i in range(2))
            over[:, columns == k * (W - 1)] = 0
            inner = sum(flat[:, W + 1 + (i + j - 1) * W :][:, : H * W] @ rows[i, 1 - k, 2 * j + k].T for i in range(2))
            out[:, :, j, :, k] = (over + inner).view(2, H, W, C)
    with torch.no_grad():
        truth = conv.kernel(x, (1, 1)) - conv.bias
    torch.testing.assert_close(out.view(1, 2, 2 * H, 2 * W, C), truth)


def test_a_frame_has_the_scale_of_its_largest_value():
    x = random(4, 2, 3, 8, seed=1).float() * torch.tensor([1.0, 1e-5, 0.0, 1e4])[:, None, None, None]
    codes, scales = conv_doubling.quantise_frames(x)
    size = x.abs().amax((1, 2, 3))
    assert scales[2] == 1 and torch.allclose(scales[[0, 1, 3]], size[[0, 1, 3]] / 448)
    back = codes.float() * scales[:, None, None, None]
    assert ((back - x).abs() <= x.abs() / 15 + scales[:, None, None, None] * 2**-9).all()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf
    codes, scales = conv_doubling.quantise_frames(x)
    broken = (codes.float() * scales[:, None, None, None]).isnan()
    assert broken[:2].any((1, 2, 3)).all() and not broken[2:].any()


@torch.no_grad()
@pytest.mark.parametrize("time, first, width", [(2, True, 1), (2, False, 1), (1, False, 2)])
def test_doubling_in_fp8_is_near_doubling(time, first, width):
    frames = 2 * time - first
    conv, x = DoublingConv(8), 5 * random(2, frames, 4, 5, 8, seed=1).float()
    beside = Beside(random(2, 2, 4, 5, 8 * width, seed=2).float(), time, first)
    truth = conv.kernel(x, (1, 1), beside=beside)
    found = conv_doubling.doubled_fp8(x, *conv_doubling.quantise_phases(conv.weight), conv.bias, beside)
    assert found.shape == truth.shape == (2, frames, 8, 10, 8) and (found - truth).norm() / truth.norm() < 0.05


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def test_who_gets_the_kernels(monkeypatch):
    x, weight, small = half(1, 3, 2, 2, 64), half(12, 64, 3, 3, 3), half(64, 64, 3, 3)
    assert not conv_narrow.fits(x, weight, (1, 1, 1), (1, 1)) and not conv_doubling.fits(x, small, (1, 1), None)  # a CPU
    for module in (conv_narrow, conv_doubling):
        monkeypatch.setattr(module, "fused_tiles", lambda x: True)
        monkeypatch.setattr(module, "fuses", lambda x, *others: all(t is None or t.dtype == x.dtype for t in others))

    def narrow(x=x, weight=weight, stride=(1, 1, 1), pad=(1, 1)):
        return conv_narrow.fits(x, weight, stride, pad)

    assert narrow() and narrow(pad=(0, 1)) and narrow(weight=half(4, 64, 3, 3, 3))
    assert not narrow(x.float(), weight.float()) and not narrow(weight=weight.float())
    assert not any(narrow(weight=half(*shape)) for shape in ((16, 64, 3, 3, 3), (10, 64, 3, 3, 3), (12, 24, 3, 3, 3), (12, 64, 3, 1, 1), (64, 64, 3, 3)))
    assert not narrow(stride=(2, 1, 1)) and not narrow(pad=(1, 0))

    def doubling(weight=small, pad=(1, 1), beside=None):
        return conv_doubling.fits(x, weight, pad, beside)

    assert doubling() and all(doubling(beside=Beside(half(1, 3, 2, 2, width), 1, False)) for width in (64, 128))
    assert not any((doubling(small.float()), doubling(half(24, 64, 3, 3)), doubling(half(64, 24, 3, 3)), doubling(pad=(0, 1))))
    assert not doubling(beside=Beside(half(1, 3, 2, 2, 256), 1, False)) and not doubling(beside=Beside(half(1, 3, 2, 2, 64).float(), 1, False))
