"""Fused kernels of the VAE against their torch references: odd sizes, starts of streams, both precisions; and the whole decoder with and without them."""

import pytest
import torch
import torch.nn.functional as F
from kernels_here import DEVICE, GPU_ONLY, MARKS, apart, close, random

from longlive.core.pixels import to_uint8
from longlive.models import wan_vae
from longlive.models.spec import VAEDims
from longlive.models.wan_vae import WanVAE
from longlive.ops import frame_attention
from longlive.ops import frames as frames_op
from longlive.ops.frames import Beside, duplicate_up, from_patches, norm_silu

pytestmark = MARKS
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, frames, rows, columns, channels", [(1, 2, 3, 5, 12), (2, 3, 2, 3, 64), (1, 1, 1, 7, 96), (2, 1, 2, 2, 1024)])
@pytest.mark.parametrize("past, biased", [(2, True), (2, False), (0, True)])
def test_norm_silu(batch, frames, rows, columns, channels, past, biased, dtype):
    from longlive.ops import triton_frames

    x = 3 * random(batch, frames, rows, columns, channels, seed=1, dtype=dtype)
    before = random(batch, past, rows, columns, channels, seed=2, dtype=dtype) if past else None
    gamma, bias = 1 + 0.2 * random(channels, 1, 1, 1, seed=3, dtype=dtype), random(channels, seed=4, dtype=dtype) if biased else None
    found = triton_frames.norm_silu(x, bias, gamma.flatten(), before)
    truth = norm_silu(x.double(), gamma.double(), None if before is None else before.double(), None if bias is None else bias.double())
    close(found, truth, dtype)
    if past:
        assert torch.equal(found[:, :past], before)


def test_a_position_of_zeros_stays_zero():
    from longlive.ops import triton_frames

    assert (triton_frames.norm_silu(torch.zeros(1, 1, 2, 2, 6, device=DEVICE), None, torch.ones(6, device=DEVICE), None) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_add(dtype):
    from longlive.ops import triton_frames

    y, x = (random(2, 1, 3, 5, 7, seed=i, dtype=dtype) for i in (1, 2))
    bias = random(7, seed=3, dtype=dtype)
    truth = y.double() + x.double() + bias.double()
    found = triton_frames.bias_add(y, x, bias)
    assert found.data_ptr() == y.data_ptr()
    close(found, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, outputs, time", [(8, 8, 2), (16, 8, 1), (12, 12, 1), (6, 3, 2)])
@pytest.mark.parametrize("first", [False, True])
def test_interleave_beside_the_input(inputs, outputs, time, first, dtype):
    from longlive.ops import triton_frames

    batch, frames, rows, columns = 2, 3, 3, 5
    x = random(batch, frames, rows, columns, inputs, seed=1, dtype=dtype)
    made = frames * time - (time - 1 if first else 0)
    y = random(batch * made, rows + 1, columns + 1, 2, 2, outputs, seed=2, dtype=dtype)
    bias = random(outputs, seed=3, dtype=dtype)
    plain = frames_op.Interleave.apply(y.double() + bias.double())
    close(triton_frames.interleave(y, bias, None), plain, dtype)
    truth = plain.unflatten(0, (batch, made)) + duplicate_up(x.double(), outputs, time, first)
    found = triton_frames.interleave(y, bias, (x, made, time, time - 1 if first else 0))
    close(found.unflatten(0, (batch, made)), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 3, 5, 12), (1, 1, 1, 1, 2), (1, 2, 2, 7, 2048)])
def test_paired(shape, dtype):
    from longlive.ops import triton_frames

    y, bias = random(*shape, seed=1, dtype=dtype), random(shape[-1], seed=2, dtype=dtype)
    close(triton_frames.paired(y, bias), frames_op.paired(y.double().cpu(), bias.double().cpu()), dtype)


@GPU_ONLY
@pytest.mark.parametrize("frames, positions, channels", [(3, 70, 512), (2, 901, 1024)])
def test_attention_of_a_wide_head(frames, positions, channels, monkeypatch):
    q, k, v = (2 * random(frames, positions, channels, seed=i, dtype=torch.bfloat16) for i in (1, 2, 3))
    truth = F.scaled_dot_product_attention(*(x.double().unsqueeze(1) for x in (q, k, v))).squeeze(1)
    with torch.no_grad():
        close(frame_attention.frame_attention(q, k, v), truth, torch.bfloat16)
        monkeypatch.setattr(frame_attention, "SCORES", 2 * positions**2)
        close(frame_attention.frame_attention(q, k, v), truth, torch.bfloat16)
    monkeypatch.setattr(frame_attention, "two_products", None)
    assert frame_attention.frame_attention(q.requires_grad_(), k, v).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(dtype):
    from longlive.ops import triton_frames

    x, bias = random(2, 3, 4, 5, 12, seed=1, dtype=dtype), 0.3 * random(12, seed=2, dtype=dtype)
    assert torch.equal(triton_frames.to_bytes(x, bias).cpu(), to_uint8(from_patches(x.float() + bias.float())).cpu())
    wide = random(2, 3, 4, 5, 16, seed=3, dtype=dtype)[..., :12]  # a view of more channels
    assert torch.equal(triton_frames.to_bytes(wide, bias).cpu(), to_uint8(from_patches(wide.float() + bias.float())).cpu())
    halves = (torch.arange(12 * 40, device=DEVICE).float() / 2 / 127.5 - 1).to(dtype).reshape(1, 1, 8, 5, 12)  # exact halves round to even
    zero = torch.zeros(12, device=DEVICE, dtype=dtype)
    assert torch.equal(triton_frames.to_bytes(halves, zero).cpu(), to_uint8(from_patches(halves)).cpu())


@GPU_ONLY
@pytest.mark.parametrize("base", [8, 24])
@pytest.mark.parametrize("sizes", [(4,), (1, 3)])
def test_the_decoder_with_kernels_is_the_decoder(base, sizes, monkeypatch):
    torch.manual_seed(0)
    vae = WanVAE(VAEDims(encoder_base=4, decoder_base=base)).to(DEVICE).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    vae.bfloat16().float()  # values that both precisions hold
    z = random(2, 48, sum(sizes), 3, 5)

    def decoded(dtype):
        state, parts = None, []
        with torch.no_grad():
            for part in z.to(dtype).split(sizes, 2):
                pixels, state = vae.to(dtype).decode(part, state)
                parts.append(pixels)
        return torch.cat(parts, 2)

    fused, low = decoded(torch.float32), decoded(torch.bfloat16)
    monkeypatch.setattr(wan_vae, "adds_bias", lambda *a: False)
    monkeypatch.setattr(frames_op, "fuses", lambda *a: False)
    truth, plain_low = decoded(torch.float32), decoded(torch.bfloat16)
    assert apart(fused, truth) < 1e-3  # float32 convolutions may use tf32
    assert apart(low, truth) < 1.1 * apart(plain_low, truth)


@GPU_ONLY
def test_operations_take_kernels_without_gradients_only(monkeypatch):
    from longlive.ops import triton_frames

    calls = []
    for name in ("norm_silu", "bias_add", "interleave", "paired", "to_bytes"):
        real = getattr(triton_frames, name)
        monkeypatch.setattr(triton_frames, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    vae = WanVAE(VAEDims(encoder_base=4, decoder_base=8)).to(DEVICE, torch.bfloat16)
    z = random(1, 48, 2, 2, 3, dtype=torch.bfloat16)
    vae.decode(z)[0].float().mean().backward()
    assert not calls
    with torch.no_grad():
        vae.decode_bytes(z)
    assert set(calls) == {"norm_silu", "bias_add", "interleave", "paired", "to_bytes"}
    assert Beside(torch.zeros(1, 2, 1, 1, 8), 2, True).doubled(8).shape == (1, 3, 2, 2, 8)
