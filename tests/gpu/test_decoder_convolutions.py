"""The decoder's doubling convolutions and its last one in tiles, against plain torch in float64, at sizes that fill no tile; and who gets them."""

import pytest
import torch
import torch.nn.functional as F
from kernels_here import DEVICE, GPU_ONLY, INTERPRETED, MARKS, apart, random

from longlive.models.spec import VAEDims
from longlive.models.vae_fp8 import decoder_to_fp8
from longlive.models.wan_vae import WanVAE
from longlive.ops import conv_doubling, conv_narrow
from longlive.ops.frames import Beside
from longlive.ops.triton_available import fp8_tiles_lack, fused_roles

pytestmark = [*MARKS, pytest.mark.skipif(torch.cuda.is_available() and fp8_tiles_lack(DEVICE) is not None, reason="needs Hopper or datacentre Blackwell")]
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter multiplies the bits of bfloat16
BOUND = 1e-5 if INTERPRETED else 4e-3


def doubling(x, weight, bias, beside):
    """In float64: each pixel doubled, the 3x3 convolution, bias, the doubled `beside`."""
    frames = x.double().flatten(0, 1).permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = F.conv2d(frames, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
    return y if beside is None else y + Beside(beside.x.double(), beside.time, beside.first).doubled(len(bias))


def shortcut(kind, batch, frames, rows, columns, outputs):
    """The stage's input of one of three kinds, for `frames` frames of the small grid."""
    if kind is None:
        return None
    time, first, width = {"same": (2, False, 1), "first": (2, True, 1), "wide": (1, False, 2)}[kind]
    return Beside(random(batch, (frames + time - 1) // time, rows, columns, width * outputs, seed=4, dtype=DTYPE), time, first)


def kernels():
    """The kernels that can run here, by name."""
    from longlive.ops import triton_doubling

    found = {"triton": triton_doubling.doubled}
    if fused_roles(torch.empty(0, device=DEVICE)):
        from longlive.ops import hopper_doubling

        found["hopper"] = hopper_doubling.doubled
    return found


SIZES = [(1, 1, 1, 1, 64, 64, None), (2, 2, 3, 5, 64, 128, "same"), (1, 3, 9, 4, 128, 64, "first"), (1, 2, 2, 17, 64, 64, "wide")]
LARGE = [(1, 4, 17, 33, 512, 512, "wide"), (2, 3, 11, 20, 1024, 1024, "first"), (1, 2, 8, 70, 256, 256, "same"), (2, 5, 44, 80, 192, 128, "wide")]
LARGER = [(2, 5, 60, 81, 256, 256, "first"), (1, 9, 50, 64, 64, 64, None)]  # more tiles than programs that stay


@pytest.mark.parametrize("batch, frames, rows, columns, inputs, outputs, kind", SIZES if INTERPRETED else SIZES + LARGE + LARGER)
@pytest.mark.parametrize("low", [False, True])
def test_doubling(batch, frames, rows, columns, inputs, outputs, kind, low):
    x, weight = 3 * random(batch, frames, rows, columns, inputs, seed=1, dtype=DTYPE), inputs**-0.5 * random(outputs, inputs, 3, 3, seed=2, dtype=DTYPE)
    bias, beside = random(outputs, seed=3, dtype=DTYPE), shortcut(kind, batch, frames, rows, columns, outputs)
    given = None if beside is None else (beside.x, frames, beside.time, beside.time - 1 if beside.first else 0)
    flat, truth = x.flatten(0, 1), doubling(x, weight, bias, beside)
    if low:
        codes, scales = conv_doubling.quantise_frames(flat)
        taps, of_taps = conv_doubling.quantise_phases(weight)
        exact = (codes.float() * scales[:, None, None, None]).unflatten(0, x.shape[:2])
        operands = (codes, taps, bias, given, (scales, of_taps))
        reference = conv_doubling.doubled_fp8(exact.cpu(), taps.cpu(), of_taps.cpu(), bias.cpu(), beside and Beside(beside.x.cpu(), beside.time, beside.first))
    else:
        operands = (flat, conv_doubling.tap_rows(conv_doubling.phases(weight)), bias, given)
    for name, doubled in kernels().items():
        found = doubled(*operands).unflatten(0, x.shape[:2])
        assert found.shape == truth.shape and found.isfinite().all(), name
        if low:
            assert apart(found, reference) < 2 * BOUND and apart(found, truth) < 0.06, name
        else:
            assert apart(found, truth) < BOUND + 2e-3, name  # bfloat16 sums of taps are rounded
        worst = ((found.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max()
        assert worst < (0.15 if low else 0.02), name  # at every pixel


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 5, 7, 64)])
def test_frames_to_codes(shape):
    from longlive.ops import triton_doubling

    x = 100 * random(*shape, seed=1, dtype=DTYPE) * torch.tensor([1.0, 1e-3, 0.0])[: shape[0], None, None, None].to(DEVICE, DTYPE)
    codes, scales = triton_doubling.quantise_frames(x)
    right, of_frames = conv_doubling.quantise_frames(x)
    assert torch.equal(scales, of_frames)
    if not INTERPRETED:  # which rounds what should become the next power of two down by half
        assert torch.equal(codes.view(torch.uint8), right.view(torch.uint8))


NARROW = [(1, 1, 1, 1, 64, 12), (2, 3, 3, 5, 64, 12), (1, 2, 4, 3, 128, 8)]
WIDE = [(1, 6, 17, 130, 256, 12), (2, 3, 9, 33, 128, 12), (1, 12, 64, 96, 256, 4)]


@pytest.mark.parametrize("batch, frames, rows, columns, inputs, outputs", NARROW if INTERPRETED else NARROW + WIDE)
@pytest.mark.parametrize("pad, ring", [(1, None), (1, 1), (0, 2)])
def test_narrow(batch, frames, rows, columns, inputs, outputs, pad, ring, monkeypatch):
    from longlive.ops import triton_narrow

    rows += 2 - 2 * pad
    x, weight = random(batch, 2 + frames, rows, columns, inputs, seed=1, dtype=DTYPE), inputs**-0.5 * random(outputs, inputs, 3, 3, 3, seed=2, dtype=DTYPE)
    if ring is not None:
        monkeypatch.setattr(triton_narrow, "RING_BYTES", (2 + ring) * 36 * outputs * rows * columns)
    found = triton_narrow.convolution(x, conv_narrow.tap_rows(weight), outputs, pad)
    truth = F.conv3d(x.double().permute(0, 4, 1, 2, 3), weight.double(), padding=(0, pad, 1)).permute(0, 2, 3, 4, 1)
    assert found.shape == truth.shape and found.isfinite().all()
    assert apart(found, truth) < BOUND
    assert (found.double() - truth).abs().max() < 0.02 * truth.abs().max()


@GPU_ONLY
@pytest.mark.parametrize("low", [False, True])
def test_a_decoder_takes_them_without_gradients_only(low, monkeypatch):
    from longlive.ops import triton_narrow

    calls = []
    for module, name in ((conv_doubling, "_fused"), (triton_narrow, "convolution")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    vae, z = WanVAE(VAEDims(encoder_base=4, decoder_base=64, decoder_blocks=1)).to(DEVICE), random(1, 48, 3, 5, 7)
    z = z.to(DTYPE)
    with torch.no_grad():
        truth = vae.to(DTYPE).float().decode(z.float())[0]  # of values that both precisions hold
    vae.to(DTYPE)
    if low:
        decoder_to_fp8(vae)
    else:
        vae.decode(z)[0].float().mean().backward()
        assert not calls
    with torch.no_grad():
        found = vae.decode(z)[0]
        assert calls == ["_fused"] * 3 + ["convolution"]
        monkeypatch.setattr(conv_doubling, "fused_tiles", lambda x: False)
        monkeypatch.setattr(conv_doubling, "fused_fp8_tiles", lambda x: False)
        monkeypatch.setattr(conv_narrow, "fused_tiles", lambda x: False)
        assert apart(found, truth) < 1.1 * apart(vae.decode(z)[0], truth)
    assert len(calls) == 4
