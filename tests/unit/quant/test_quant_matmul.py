"""Reference products of quantised matrices."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import InputError
from longlive.ops.fp4 import decode, unpack
from longlive.ops.fp8 import quantise_rows
from longlive.ops.hadamard import hadamard
from longlive.ops.nvfp4 import RULES, quantise
from longlive.ops.quant_matmul import repack_fp8, w4a4, w4a8, w4a16, w8a8

WIDE = torch.float64


def data(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


X, W, BIAS = data(0, 40, 200), data(1, 24, 200), data(2, 24)
X[:, ::100] *= 20  # outlier channels


def near(ours, exact, relative=1e-6):
    return (ours.double() - exact).norm() < relative * exact.norm()


@pytest.mark.parametrize("rule", list(RULES))
def test_w4a4_is_the_product_of_what_was_kept(rule):
    a, w = quantise(X, rule), quantise(W, rule, tile=16)
    exact = a.dequantise(WIDE) @ w.dequantise(WIDE).T + BIAS.double()
    assert near(w4a4(a, w, BIAS, dtype=WIDE, wide=WIDE), exact, 2e-7)  # what dequantising rounds
    assert near(w4a4(a, w, BIAS, dtype=torch.float32), exact)  # the order of addition
    assert w4a4(a, w, BIAS).dtype == torch.bfloat16 and near(w4a4(a, w, BIAS), exact, 3e-3)


def test_activations_may_come_in_batches():
    x = torch.stack((X, 3 * X))
    together, w = w4a4(quantise(x, "mse"), quantise(W, "mse")), quantise(W, "mse")
    assert torch.equal(together[1], w4a4(quantise(3 * X, "mse"), w)) and together.shape == (2, 40, 24)


def test_a_turned_product_is_the_product():
    """The Hadamard transform on both sides cancels but for what is rounded; nothing else may move."""
    x, w = hadamard(X[:, :192].float()), hadamard(W[:, :192].float())
    exact = X[:, :192].double() @ W[:, :192].double().T
    assert near(w4a4(quantise(x, "static_6"), quantise(w, "static_6"), dtype=WIDE, wide=WIDE), exact, 0.2)


def test_autocast_changes_nothing():
    x, w = X.float(), quantise(W, "mse")

    def products():
        return hadamard(x[:, :192]), w4a4(quantise(x), w), w4a16(x, w), w4a8(x, w)

    with torch.autocast("cpu", torch.bfloat16):
        inside = products()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(inside, products()))


def relative(y):
    exact = X.double() @ W.double().T
    return ((y.double() - exact).square().sum() / exact.square().sum()).item()


def test_more_bits_are_nearer():
    """Relative squared error: W8A8 < W4A16 < W4A8 < W4A4 (spec nvfp4 §6.2), each within its bound."""
    w = quantise(W, "mse")
    errors = [relative(y) for y in (w8a8(quantise_rows(X), quantise_rows(W)), w4a16(X, w), w4a8(X, w), w4a4(quantise(X, "mse"), w))]
    assert errors == sorted(errors)
    assert errors[0] < 2e-3 and errors[1] < 1.3e-2 and errors[2] < 1.4e-2 and errors[3] < 2.6e-2


def test_w4a16_and_w4a8_by_hand():
    w = quantise(W, "mse")
    assert torch.equal(w4a16(X, w, BIAS, dtype=torch.float32), X.float() @ w.dequantise(torch.bfloat16).float().T + BIAS.float())
    a, packed = quantise_rows(X), repack_fp8(w)
    exact = a.dequantise(torch.float32).double() @ packed.dequantise(torch.float32).double().T
    assert near(w4a8(X, w, dtype=WIDE, wide=WIDE), exact)


@pytest.mark.parametrize("rule", list(RULES))
def test_repacked_weights_keep_what_four_bits_hold(rule):
    """Codes of one significant bit times a scale of four stay exact, the others are rounded; a row's scale is a power of two times the matrix's."""
    w = quantise(W * torch.exp2(data(3, 24, 1)), rule)
    packed, products = repack_fp8(w), w.products()
    powers = (packed.scales / w.decode_scale).log2()
    largest = packed.e4m3.float().abs().amax(-1)
    assert torch.equal(powers, powers.round()) and largest.min() >= 128 and largest.max() <= 256
    kept, normal = packed.e4m3.float() * torch.exp2(powers), products.abs() >= torch.exp2(powers - 6)
    exact = normal & torch.isin(decode(unpack(w.codes))[:, :200].abs(), torch.tensor([0.5, 1.0, 2.0, 4.0]))
    assert torch.equal(kept[exact], products[exact]) and 0.3 < exact.float().mean() < 0.9
    assert ((kept - products).abs() <= (products.abs() / 16).clamp(min=torch.exp2(powers - 10))).all()
    assert (kept - products).norm() < 0.025 * products.norm()


def test_repacking_small_and_broken_weights():
    """A row of zeros, a matrix of zeros, one whose decode scale is subnormal; infinity is refused."""
    w = W.float()
    w[3] = 0
    assert not repack_fp8(quantise(w)).dequantise()[3].any() and not repack_fp8(quantise(0 * w)).dequantise().any()
    tiny = quantise(w * 2.0**-118)
    assert tiny.decode_scale < torch.finfo(torch.float32).tiny
    exact = tiny.dequantise(torch.float32).double()
    assert near(repack_fp8(tiny).dequantise(torch.float32), exact, 0.03)
    w[0, 0] = torch.inf
    with pytest.raises(InputError, match="infinity or NaN"):
        repack_fp8(quantise(w, on_nonfinite="nan"))


def test_row_wise_fp8_agrees_with_torch():
    """torch's own FP8 product on this machine, to one rounding of its bfloat16 result."""
    x, w = X[:, :192], W[:16, :192]
    a, b = quantise_rows(x), quantise_rows(w)
    theirs = torch._scaled_mm(a.e4m3, b.e4m3.T, scale_a=a.scales, scale_b=b.scales.T, out_dtype=torch.bfloat16)
    ours = w8a8(a, b, dtype=torch.float32)
    assert ((theirs.float() - ours).abs() <= ours.abs() * 2**-7 + ours.abs().max() * 2**-8).all()


def test_shapes_that_do_not_multiply_are_refused():
    with pytest.raises(InputError, match=r"activations \[40, 200\] and weights \[24, 100\]"):
        w4a4(quantise(X), quantise(W[:, :100]))
