"""Attention in FP8 against attention of the same rounded q, k, v in float64, and how far it is from attention that rounds nothing."""

import pytest
import torch
from kernels_here import DEVICE, GPU_ONLY, INTERPRETED, MARKS, apart, random

from longlive.ops.attention import attention, fp8_fits
from longlive.ops.fp8 import to_e4m3
from longlive.ops.triton_available import fp8_tiles_lack

pytestmark = [*MARKS, pytest.mark.skipif(torch.cuda.is_available() and fp8_tiles_lack(DEVICE) is not None, reason="needs Hopper or datacentre Blackwell")]
SMALL = [(1, 3, 16, 1, 64), (2, 130, 144, 2, 64)]
LARGE = [(1, 33, 272, 3, 128), (2, 128, 256, 2, 128), (1, 1000, 4 * 1008, 5, 128)]

if torch.cuda.is_available() or INTERPRETED:
    import triton
    import triton.language as tl

    from longlive.ops.triton_rows import saturated

    @triton.jit
    def saturate(x, out):
        tl.store(out, saturated(tl.load(x)))


@pytest.mark.parametrize("batch, queries, keys, heads, head_dim", SMALL if INTERPRETED else SMALL + LARGE)
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_against_the_rounded_inputs(batch, queries, keys, heads, head_dim, sharp):
    from longlive.ops import triton_attention as kernel

    q, k, v = (random(batch, n, heads, head_dim, seed=n, dtype=torch.float32) for n in (queries, keys, keys + 1))
    q, k, v = (to_e4m3(t).float() for t in (q * sharp, k, v[:, :keys].contiguous()))
    found = kernel.attention(q, kernel.codes(k), kernel.transposed_codes(v))
    truth = attention(*(t.double() for t in (q, k, v)), kernel="math")
    assert found.isfinite().all() and apart(found, truth) < (0.2 if INTERPRETED else 0.03)


@pytest.mark.parametrize("batch, keys, heads, head_dim", [(2, 80, 3, 64), (1, 64, 1, 128)])
def test_codes_and_their_transposition(batch, keys, heads, head_dim):
    from longlive.ops import triton_attention as kernel

    pages = random(batch, keys + 5, heads, head_dim, seed=1) / 8
    v = pages[:, :keys]  # a view of the first slots, as pages are read
    truth = to_e4m3(v).float()
    plain, turned = kernel.codes(v).float(), kernel.transposed_codes(v).float()
    order = [16 * (at // 16) + 8 * h + 2 * c + e for at in range(0, keys, 16) for c in range(4) for h in range(2) for e in range(2)]
    assert torch.equal(turned, plain[:, order].permute(0, 2, 3, 1))
    assert apart(plain, truth) < 0.2 if INTERPRETED else torch.equal(plain, truth)  # the interpreter rounds some values wrongly


def test_codes_of_some_keys_among_those_of_more():
    from longlive.ops import triton_attention as kernel

    q, k, v = (random(2, n, 2, 64, seed=n, dtype=torch.float32) for n in (70, 96, 96))
    held = [torch.full(shape, torch.nan, device=DEVICE).to(torch.float8_e4m3fn) for shape in ((2, 128, 2, 64), (2, 2, 64, 128))]
    for some in (slice(0, 32), slice(32, 96)):
        kernel.codes(k[:, some], held[0][:, some])
        kernel.transposed_codes(v[:, some], held[1][..., some])
    assert torch.equal(held[0][:, :96].float(), kernel.codes(k).float()) and torch.equal(held[1][..., :96].float(), kernel.transposed_codes(v).float())
    found = kernel.attention(q, held[0][:, :96], held[1][..., :96])
    assert torch.equal(found, kernel.attention(q, kernel.codes(k), kernel.transposed_codes(v)))


@pytest.mark.parametrize("wide, kept", [(torch.nan, torch.nan), (torch.inf, 448.0), (-1e9, -448.0), (3.0, 3.0)])
def test_saturating_keeps_what_is_no_number(wide, kept):
    x, out = torch.tensor([wide], device=DEVICE), torch.zeros(1, device=DEVICE)
    saturate[(1,)](x, out)
    torch.testing.assert_close(out.cpu(), torch.tensor([kept]), rtol=0, atol=0, equal_nan=True)


@GPU_ONLY
def test_what_is_no_number_reaches_the_result():
    q, k, v = (random(1, 128, 2, 64, seed=n, dtype=torch.bfloat16) for n in range(3))
    k[0, 5] = torch.nan
    assert fp8_fits(q, k, v) and attention(q, k, v, kernel="fp8").isnan().all()


@GPU_ONLY
@pytest.mark.parametrize("head_dim", [64, 128])
def test_how_far_it_is_from_attention_in_float32(head_dim):
    q, k, v = (random(1, n, 4, head_dim, seed=n, dtype=torch.bfloat16) for n in (512, 4096, 4096))
    v = random(1, 4096, 4, head_dim, seed=3, dtype=torch.bfloat16)
    assert fp8_fits(q, k, v)
    truth = attention(q.float(), k.float(), v.float(), kernel="math")
    assert apart(attention(q, k, v, kernel="fp8"), truth) < 0.08
