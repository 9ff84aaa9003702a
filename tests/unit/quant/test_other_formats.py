"""MXFP4 and row-wise FP8."""

from __future__ import annotations

import math

import pytest
import torch

from longlive.core.errors import ConfigError, InputError
from longlive.ops import fp4, mxfp4
from longlive.ops.fp8 import quantise_rows


def data(rows=32, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rule", "largest"), [("static_6", 6), ("static_4", 4)])
def test_mxfp4_takes_the_smallest_power_of_two_that_does_not_saturate(rule, largest):
    x = torch.zeros(1, 32)
    for value, exponent in ((6.0, 0), (6.01, 1), (3.0, -1), (4.0, 0), (4.01, 0), (48.0, 3)):
        x[0, 5] = value * largest / 6
        packed = mxfp4.quantise(x, rule)
        assert packed.scales.item() - 127 == exponent
        assert abs(packed.dequantise()[0, 5].item() - x[0, 5].item()) <= x[0, 5].item() / 4


def test_mxfp4_of_the_standard_saturates():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 7.9, 5.0
    packed = mxfp4.quantise(x, "ocp")
    assert packed.scales.item() == 127 and packed.dequantise()[0, :2].tolist() == [6, 4]


@pytest.mark.parametrize(("rule", "error"), [("static_6", 1.33e-2), ("ocp", 1.32e-2)])
def test_mxfp4_error_on_gaussian_data(rule, error):
    """Spec nvfp4 §1.7."""
    x = data(512, 512)
    assert ((mxfp4.quantise(x, rule).dequantise() - x).square().mean() / x.square().mean()).item() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("rule", mxfp4.RULES)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 2e38])
def test_mxfp4_at_the_ends_of_float32(rule, size):
    x = torch.linspace(-1, 1, 80).reshape(2, 40) * size
    packed = mxfp4.quantise(x, rule)
    back = packed.dequantise()
    assert back.shape == x.shape and back.isfinite().all()
    assert ((back.double() - x.double()).abs() <= max(0.3 * size, 2.0**-127)).all()


def test_mxfp4_zeros_and_what_is_not_finite():
    x = data()
    x[:, :32] = 0
    packed = mxfp4.quantise(x)
    assert not packed.dequantise()[:, :32].any() and not packed.scales[:, 0].any()
    x[2, 40] = math.nan
    with pytest.raises(InputError, match="infinity or NaN"):
        mxfp4.quantise(x)
    back = mxfp4.quantise(x, on_nonfinite="nan").dequantise()
    assert back[2, 32:64].isnan().all() and back.isnan().sum() == 32
    with pytest.raises(ConfigError, match="MXFP4 has no scale rule 'mse'"):
        mxfp4.quantise(x, "mse")


def test_mxfp4_powers_are_exact():
    codes = torch.arange(256, dtype=torch.uint8)
    assert mxfp4.power(codes)[:255].tolist() == [2.0 ** (c - 127) for c in range(255)] and mxfp4.power(codes)[255].isnan()


def test_fp8_keeps_every_row_within_a_sixteenth():
    x = data() * torch.logspace(-20, 20, 32)[:, None]
    packed = quantise_rows(x)
    back = packed.dequantise()
    small = x.abs() < x.abs().amax(-1, keepdim=True) / 448 * 2**-6
    assert ((back - x).abs() <= x.abs() / 16 + 1e-30)[~small].all()
    assert torch.allclose(back.abs().amax(-1), x.abs().amax(-1), rtol=1e-6)
    relative = (back.double() - x.double()).square().sum(-1) / x.double().square().sum(-1)
    assert relative.mean().item() == pytest.approx(7e-4, rel=0.1)  # spec nvfp4 §1.7


def test_fp8_edges():
    x = torch.zeros(5, 16)
    x[1], x[2, 3], x[3] = 1e-44, torch.finfo(torch.float32).max, -2.0
    packed = quantise_rows(x)
    back = packed.dequantise()
    assert packed.scales[0] == 1 and not back[0].any() and back.isfinite().all()
    assert back[3].tolist() == [-2.0] * 16
    x[4, 0] = -math.inf
    with pytest.raises(InputError, match="infinity or NaN"):
        quantise_rows(x)
    back = quantise_rows(x, on_nonfinite="nan").dequantise()
    assert back[4].isnan().all() and back.isnan().sum() == 16


def test_fp4_values_in_e4m3_bytes():
    """What a conversion of codes to FP8 by table must give (spec nvfp4 §4.4)."""
    bytes_ = fp4.decode(torch.arange(8, dtype=torch.uint8)).to(torch.float8_e4m3fn).view(torch.uint8)
    assert [f"{b:02X}" for b in bytes_.tolist()] == ["00", "30", "38", "3C", "40", "44", "48", "4C"]
