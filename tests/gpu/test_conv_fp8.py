"""FP8 convolutions: norm to codes, and the product over taps, against their references, at sizes that fill no tile."""

import pytest
import torch
import torch.nn.functional as F
from kernels_here import DEVICE, GPU_ONLY, INTERPRETED, MARKS, apart, random

from longlive.ops import conv_fp8
from longlive.ops.fp8 import to_e4m3
from longlive.ops.frames import norm_silu
from longlive.ops.triton_available import fp8_tiles_lack, fused_roles

pytestmark = [*MARKS, pytest.mark.skipif(torch.cuda.is_available() and fp8_tiles_lack(DEVICE) is not None, reason="needs Hopper or datacentre Blackwell")]
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16


def plain(frames, codes, scales, bias, residual):
    weight = (codes.float() * scales[:, None]).unflatten(0, (3, 3, 3)).permute(3, 4, 0, 1, 2).double()
    y = F.conv3d(frames.float().double().permute(0, 4, 1, 2, 3), weight, bias.double()).permute(0, 2, 3, 4, 1)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("batch, frames, rows, columns, channels", [(1, 1, 1, 1, 64), (2, 3, 3, 5, 64), (1, 2, 4, 3, 128)])
@pytest.mark.parametrize("biased", [True, False])
def test_codes_of_the_norm(batch, frames, rows, columns, channels, biased):
    from longlive.ops import triton_conv

    x = 3 * random(batch, frames, rows, columns, channels, seed=1, dtype=DTYPE)
    gamma, bias = 1 + 0.2 * random(channels, seed=2, dtype=DTYPE), random(channels, seed=3, dtype=DTYPE) if biased else None
    past = random(batch, 2, rows + 2, columns + 2, channels, seed=4).to(torch.float8_e4m3fn)
    found = triton_conv.norm_silu_fp8(x, bias, gamma, past).float()
    assert torch.equal(found[:, :2], past.float())
    truth = norm_silu(x.float(), gamma.float(), None, None if bias is None else bias.float())
    inner = found[:, 2:, 1:-1, 1:-1]
    if INTERPRETED:  # the interpreter rounds what should become the next power of two down by half
        assert apart(inner, truth) < 0.2
    else:
        assert apart(inner, truth) < 1.02 * apart(to_e4m3(truth), truth) and ((inner - truth).abs() <= truth.abs() / 15 + 2**-9).all()
    border = found[:, 2:].clone()
    border[:, :, 1:-1, 1:-1] = 0
    assert (border == 0).all()


SIZES = [(1, 1, 1, 1, 64, 64), (1, 2, 3, 5, 64, 128), (2, 1, 4, 3, 128, 64)]
LARGE = [
    (1, 3, 17, 21, 256, 512),
    (2, 2, 9, 33, 512, 256),
    (1, 2, 30, 40, 1024, 1024),
    (2, 5, 70, 60, 64, 128),
    (1, 4, 90, 110, 192, 192),
    (3, 4, 60, 80, 256, 256),
]


def convolutions():
    """The kernels that can run here, by name."""
    from longlive.ops import triton_conv

    found = {"triton": triton_conv.convolution}
    if fused_roles(torch.empty(0, device=DEVICE)):
        from longlive.ops import hopper_conv

        found["hopper"] = hopper_conv.convolution
    return found


@pytest.mark.parametrize("batch, frames, rows, columns, inputs, outputs", SIZES if INTERPRETED else SIZES + LARGE)
@pytest.mark.parametrize("summed", [True, False])
def test_convolution(batch, frames, rows, columns, inputs, outputs, summed):
    x = F.pad(random(batch, 2 + frames, rows, columns, inputs, seed=1), (0, 0, 1, 1, 1, 1)).to(torch.float8_e4m3fn)
    codes, scales = conv_fp8.quantise_weight(random(outputs, inputs, 3, 3, 3, seed=2) * inputs**-0.5)
    bias = random(outputs, seed=3, dtype=DTYPE)
    residual = random(batch, frames, rows, columns, outputs, seed=4, dtype=DTYPE) if summed else None
    truth = plain(x, codes, scales, bias, residual)
    for name, convolution in convolutions().items():
        found = convolution(x, codes, scales, bias, residual)
        assert found.shape == truth.shape and found.isfinite().all(), name
        assert apart(found, truth) < (1e-5 if INTERPRETED else 5e-3), name
        assert (found - truth).abs().max() < (1e-4 if INTERPRETED else 0.02) * truth.abs().max(), name


@GPU_ONLY
def test_a_large_frame_is_right_everywhere():
    """More than 2^31 values of output addresses are not tested here, but every tile of a real stage is: 2 frames of 176 x 320, 512 channels."""
    x = F.pad(random(1, 4, 176, 320, 512, seed=1), (0, 0, 1, 1, 1, 1)).to(torch.float8_e4m3fn)
    codes, scales = conv_fp8.quantise_weight(random(512, 512, 3, 3, 3, seed=2) * 0.02)
    bias = torch.zeros(512, device=DEVICE, dtype=torch.bfloat16)
    found = conv_fp8.convolution_fp8(x, codes, scales, bias)
    weight = (codes.float() * scales[:, None]).unflatten(0, (3, 3, 3)).permute(3, 4, 0, 1, 2).bfloat16()
    truth = F.conv3d(x.bfloat16().permute(0, 4, 1, 2, 3), weight).permute(0, 2, 3, 4, 1)
    assert apart(found, truth) < 0.02
    wrong = (found.float() - truth.float()).norm(dim=-1) / truth.float().norm(dim=-1)
    assert wrong.max() < 0.1
