"""Fused quantisers give the bits of their torch references, and products on tensor cores the numbers of theirs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from longlive.core.errors import ConfigError
from longlive.ops import fp4_matmul, nvfp4
from longlive.ops.fp8 import quantise_rows
from longlive.ops.fp8_matmul import fp8_product, quantised_rows
from longlive.ops.kv_formats import FORMATS, dequantise_page, quantise_page
from longlive.ops.kv_reading import read_pages, write_page
from longlive.ops.modulate import modulate
from longlive.ops.norm import layer_norm
from longlive.ops.quant_matmul import repack_fp8, w4a4, w8a8
from longlive.ops.random_bits import counter_bits
from longlive.precision.backends import BACKENDS, choose
from longlive.precision.capability import FP4_FAMILIES, FP8_FAMILIES, probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FP8 = torch.cuda.is_available() and probe("cuda").family in FP8_FAMILIES
needs_fp8 = pytest.mark.skipif(not FP8, reason="needs FP8 tensor cores")


def data(*shape, seed=0, spread=2.0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device="cuda")
    return (x * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator, device="cuda"))).to(dtype)


@needs_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [48, 3072, 14336])
def test_rows(width, dtype):
    x = data(3, 40, width, dtype=dtype)
    x[0, 1] = 0
    assert quantised_rows(x) == quantise_rows(x)
    x[1, 2, 5] = torch.inf
    mine, theirs = quantised_rows(x), quantise_rows(x, on_nonfinite="nan")
    assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales.isnan(), theirs.scales.isnan())


@needs_fp8
@pytest.mark.parametrize("width", [48, 3000, 14336])
def test_rows_whose_quotients_are_ties(width):
    """Where code times scale is a value of the row, and halfway between two codes, the product with an inverse would fall to either side."""
    x = torch.arange(1, 257, device="cuda").float()[:, None] * torch.arange(1, width + 1, device="cuda").remainder(129)[None] / 128
    x[:, 0], x[:, 1] = torch.arange(1, 257, device="cuda") * 7 / 4, -0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert quantised_rows(x.to(dtype)) == quantise_rows(x.to(dtype))


def close_rows(mine, truth):
    """Rows of float32 values that two orders of the same sum give: a code may fall to the other side of a tie, and to no other."""
    theirs = quantise_rows(truth.float())
    torch.testing.assert_close(mine.scales, theirs.scales, rtol=2e-5, atol=0)
    numbers = [torch.where(r.codes >= 128, 128 - r.codes.int(), r.codes.int()) for r in (mine, theirs)]
    apart = (numbers[0] - numbers[1]).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@needs_fp8
@pytest.mark.parametrize("width", [80, 14336])
def test_gelu_rows(width):
    from longlive.ops.triton_rows import gelu_rows_fused

    x = data(2, 200, width, spread=0.5)
    mine = gelu_rows_fused(x)
    assert mine.dtype == x.dtype
    close_rows(mine, F.gelu(x.double(), approximate="tanh"))
    x[0, 3, 5], x[1, 7, 11] = torch.inf, torch.nan
    broken = gelu_rows_fused(x)
    assert broken.scales.isnan().nonzero().tolist() == [[0, 3, 0], [1, 7, 0]] and not broken.codes[0, 3].any() and not broken.codes[1, 7].any()


@needs_fp8
@pytest.mark.parametrize("rule", list(nvfp4.RULES))
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_nvfp4_quantiser(rule, spread):
    x = data(2, 333, 3072, spread=spread)
    x[0, 3] = 0
    right = nvfp4.quantise(x, rule)
    assert fp4_matmul.quantised_activation(x, rule) == right
    half = fp4_matmul.quantised_activation(x[:, 100:200].contiguous(), rule, right.amax)
    assert torch.equal(half.codes, right.codes[:, 100:200])
    for seed in (3, 2**40 + 17):
        bits = counter_bits(seed, x.shape, device="cuda")
        assert fp4_matmul.quantised_activation(x, rule, seed=seed) == nvfp4.quantise(x, rule, bits=bits)
    x[1, 7, 9] = torch.nan
    mine, theirs = fp4_matmul.quantised_activation(x, rule), nvfp4.quantise(x, rule, on_nonfinite="nan")
    assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales) and torch.equal(mine.amax, theirs.amax)


def same_bits(mine, theirs):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[mine.element_size()]
    return mine.dtype == theirs.dtype and torch.equal(mine.view(kind), theirs.view(kind))


@needs_fp8
@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("shape", [(512, 3072), (33, 48), (3, 70, 80)])
def test_packed_weights_as_matrices(rule, shape):
    """Every code under many scales, with the signs of zeros; subnormal scales, rows and a matrix of zeros among them."""
    x = data(*shape, spread=3.0)
    x[..., 1, :] = 0
    x[..., 2, ::2] = -1e-30
    for w in (nvfp4.quantise(x, rule), nvfp4.quantise(x, rule).swizzled(), nvfp4.quantise(x.float() * 2.0**-100, rule), nvfp4.quantise(0 * x, rule)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert same_bits(fp4_matmul.dequantised(w, dtype), w.dequantise(dtype))
            assert same_bits(fp4_matmul.products(w, dtype), w.products().to(dtype))
        if len(shape) == 2:
            rows = repack_fp8(w)
            assert fp4_matmul.as_rows(w, rows.scales) == rows


@needs_fp8
def test_packed_values_that_are_not_finite_stay_so():
    x = data(3, 40, 64)
    x[1, 7, 9] = torch.nan
    t = nvfp4.quantise(x, "mse", on_nonfinite="nan")
    for mine, theirs in ((fp4_matmul.products(t), t.products()), (fp4_matmul.dequantised(t, torch.float32), t.dequantise(torch.float32))):
        assert mine.isnan().sum() == 16 and torch.equal(mine.isnan(), theirs.isnan())


def store_of(page, pages, batch):
    shape = {name: torch.zeros(batch, pages, *t.shape[1:], dtype=t.dtype, device="cuda") for name, t in page.tensors().items()}
    return replace(page, **shape)


@needs_fp8
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [70, 7040])
def test_pages(format, tokens):
    """Written parts bit for bit; reads with and without rotation, with running and kept pages at hand."""
    batch, pages, heads, d = 2, 3, 6, 128
    x = data(batch, tokens, 3 * heads, d, spread=0.5).unflatten(2, (3, heads))[:, :, 1]
    x = x + 3 * torch.randn(heads, d, device="cuda").bfloat16()
    store = store_of(quantise_page(torch.zeros(1, tokens, heads, d), format), pages, batch)
    slots = torch.tensor([2, 1], device="cuda")
    write_page(x, store, slots)
    right = quantise_page(x, format)
    rows = torch.arange(batch, device="cuda")
    for name, part in right.tensors().items():
        assert torch.equal(store.tensors()[name][rows, slots], part), name
    write_page(x + 1, store, torch.tensor([0, 0], device="cuda"))
    write_page(x - 1, store, torch.tensor([1, 2], device="cuda"))
    angle = torch.randn(batch, pages * tokens, d // 2, device="cuda")
    given = [(torch.tensor([-1, 2], device="cuda"), x * 2), (torch.tensor([0, 1], device="cuda"), x)]
    for rope in (None, (angle.cos(), angle.sin()), (angle[:1].cos(), angle[:1].sin())):
        for at_hand in ([], given[:1], given):
            for dtype in (torch.bfloat16, torch.float32):
                out = torch.zeros(batch, pages + 1, tokens, heads, d, dtype=dtype, device="cuda")[:, :pages]
                read_pages(store, pages, rope, out, at_hand)
                slow = _slow_read(store, pages, rope, at_hand)
                assert torch.equal(out, slow.to(dtype))


def _slow_read(store, pages, rope, given):
    out = []
    for slot in range(pages):
        page = dequantise_page(replace(store, **{name: part[:, slot] for name, part in store.tensors().items()}))
        for slot_B, x in given:
            page = torch.where((slot_B == slot)[:, None, None, None], x.float(), page)
        if rope is not None:
            cos, sin = (t.unflatten(1, (pages, -1))[:, slot].unsqueeze(2) for t in rope)
            a, b = page.unflatten(-1, (-1, 2)).unbind(-1)
            page = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        out.append(page)
    return torch.stack(out, dim=1)


@needs_fp8
def test_fp8_product():
    x, w, bias = data(2, 300, 3072, spread=0.5), data(1024, 3072, seed=1, spread=0.5), data(1024, 1, seed=2, spread=0.0)[:, 0]
    a, b = quantise_rows(x), quantise_rows(w)
    mine, right = fp8_product(a, b, bias).float(), w8a8(a, b, bias, dtype=torch.float32, wide=torch.float64)
    assert (mine - right).norm() < 5e-3 * right.norm()


@needs_fp8
@pytest.mark.parametrize("fast, bar", [(True, 0.1), (False, 5e-3)])
def test_fp8_products_of_one_sign(fast, bar):
    """The worst case of fast accumulation (5 % measured on an H200): the cores keep about 14 bits of a running sum and cut the rest off each term."""
    x, w = data(300, 3072, spread=0.5).abs(), data(512, 3072, seed=1, spread=0.5).abs()
    a, b = quantise_rows(x), quantise_rows(w)
    mine, right = fp8_product(a, b, fast=fast).float(), w8a8(a, b, dtype=torch.float32, wide=torch.float64)
    assert (mine - right).norm() < bar * right.norm()


@pytest.mark.parametrize("rule", ["mse", "static_6"])
def test_emulated_fp4_product(rule):
    x, w = data(2, 300, 1024, spread=0.5), data(512, 1024, spread=0.5)
    a, b = nvfp4.quantise(x, rule), nvfp4.quantise(w, rule)
    mine, right = fp4_matmul.emulated(a, b, None, torch.float32), w4a4(a, b, dtype=torch.float32, wide=torch.float64)
    torch.testing.assert_close(mine.double(), right.double(), rtol=1e-4, atol=1e-4 * right.abs().max().item())


def test_native_fp4_is_computed_or_refused():
    capability = probe("cuda")
    if capability.family not in FP4_FAMILIES:
        with pytest.raises(ConfigError, match="no FP4 tensor cores"):
            choose("native", "model_quant_backend", tuple(BACKENDS), "w4a16", capability)
        return
    x, w, bias = data(1, 300, 1024, spread=0.5), data(512, 1024, spread=0.5), data(512, 1)[:, 0]
    a, b = nvfp4.quantise(x, "mse"), nvfp4.quantise(w, "mse")
    mine, twin = (f(a, b, bias, torch.bfloat16).float() for f in (fp4_matmul.native, fp4_matmul.emulated))
    assert (mine - twin).norm() < 5e-3 * twin.norm()


@needs_fp8
@pytest.mark.parametrize("width", [3072, 257, 256])
def test_norms_write_rows(width):
    """What the fused norms hand to FP8 layers is the rows of the norm before it is rounded; the sum is the same bit for bit."""
    from longlive.ops.triton_residual import residual_norm

    x, y = data(2, 880, width, spread=0.3), data(2, 880, width, seed=1, spread=0.3)
    shift, scale, gate = (data(2, 4, width, seed=s, spread=0.0) for s in (2, 3, 4))
    for how in (
        {"y_BND": None, "gate_BGD": None, "scale": scale, "shift": shift, "modulated": True},
        {"y_BND": y, "gate_BGD": None, "scale": scale, "shift": shift, "modulated": True},
        {"y_BND": y, "gate_BGD": gate, "scale": scale[0, 0], "shift": shift[0, 0], "modulated": False},
    ):
        (total, rows), (plain, _) = (residual_norm(x, eps=1e-6, rows=rows, **how) for rows in (True, False))
        assert torch.equal(total, plain) and rows.dtype == x.dtype
        norm = layer_norm(total.double(), 1e-6)
        close_rows(rows, modulate(norm, shift.double(), scale.double()) if how["modulated"] else norm * how["scale"].double() + how["shift"].double())
