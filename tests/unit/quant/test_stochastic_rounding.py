"""Stochastic rounding: unbiased, reproducible, and independent from tile to tile."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import ConfigError, InputError
from longlive.ops import fp4, mxfp4
from longlive.ops.nvfp4 import RULES, quantise
from longlive.ops.random_bits import counter_bits

DRAWS = 1000


def draws(x, quantised, seed=0):
    """[DRAWS, R, K] float64: independent roundings of `x`."""
    many = x.expand(DRAWS, *x.shape)
    return quantised(many, counter_bits(seed, many.shape)).dequantise().double()


def assert_unbiased(x, found):
    """No element beyond 5 standard errors, and slope 1 within 4 standard errors of the slope."""
    x = x.double()
    error = found.std(0) / DRAWS**0.5
    rare = 10 / DRAWS * x.abs().max() / 6  # a neighbour that is taken less than once in DRAWS leaves no trace in the spread
    assert ((found.mean(0) - x).abs() <= 5 * error + rare).all()
    assert abs(((found.mean(0) * x).sum() / x.square().sum()).item() - 1) < 4 * ((error * x).norm() / x.square().sum()).item() + 1e-6
    top = x.abs() > 0.9 * x.unflatten(-1, (-1, 16)).abs().amax(-1).repeat_interleave(16, -1)
    assert (found.mean(0)[top] / x[top]).mean().item() == pytest.approx(1, abs=2e-3)  # 0.9885 where the largest of a group saturate


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("tile", [1, 16])
def test_the_mean_of_many_roundings_is_the_value(rule, tile):
    """Fails when scales round to nearest (slope 0.9966) or when four-over-six looks at the noise (0.9965); spec nvfp4 §2.3."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    assert_unbiased(x, draws(x, lambda many, bits: quantise(many, rule, tile=tile, bits=bits)))


def test_a_group_far_below_the_rest_is_unbiased_too():
    """To nearest it would vanish; its scale is rounded up to the smallest instead."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    x[:, 16:] *= 1e-5
    found = draws(x, lambda many, bits: quantise(many, "static_6", bits=bits))[..., 16:]
    small = x[:, 16:].double()
    error = (found.std(0) / DRAWS**0.5 * small).norm() / small.square().sum()
    assert error < 0.2
    assert abs((found.mean(0) * small).sum() / small.square().sum() - 1) < 4 * error


def test_mxfp4_is_unbiased():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    assert_unbiased(x, draws(x, lambda many, bits: mxfp4.quantise(many, "static_6", bits=bits)))
    with pytest.raises(ConfigError, match="biased"):
        mxfp4.quantise(x, "ocp", bits=counter_bits(0, x.shape))


def test_numbers_on_the_grid_do_not_move():
    values = fp4.decode(torch.tensor([*range(8), *range(9, 16)], dtype=torch.uint8))
    for bits in (0, 2**24 - 1):
        assert torch.equal(fp4.decode(fp4.encode_stochastic(values, torch.full(values.shape, bits))), values)


def test_only_the_two_neighbours_are_taken_and_what_is_beyond_saturates():
    y = torch.tensor([0.1, -0.6, 2.9, 5.9, 7.0, -9.0])
    low, high = (fp4.decode(fp4.encode_stochastic(y, torch.full(y.shape, bits))) for bits in (0, 2**24 - 1))
    assert low.tolist() == [0.5, -1, 3, 6, 6, -6] and high.tolist() == [0, -0.5, 2, 4, 6, -6]


def test_bits_must_be_one_a_value():
    with pytest.raises(InputError, match="one random number a value"):
        fp4.encode_stochastic(torch.zeros(4), torch.zeros(3, dtype=torch.int64))


def test_every_tile_has_noise_of_its_own():
    """D19 of spec training §9: the published bits depend on the place inside a tile of 128 x 64, so that equal tiles round equally and errors add up."""
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(8)).repeat(2, 2)
    back = quantise(x, "static_6", bits=counter_bits(3, x.shape)).dequantise() - x
    tiles = back.unflatten(0, (2, 128)).unflatten(2, (2, 64)).transpose(1, 2).flatten(0, 1).flatten(1)
    between = torch.corrcoef(tiles.double()) - torch.eye(4)
    assert between.abs().max() < 0.1  # 1 where tiles share their noise
    along = back.unflatten(1, (2, 64)).sum(1)  # the sum over K of both tiles: variances add, amplitudes do not
    assert along.square().mean() / back.square().mean() == pytest.approx(2, rel=0.08)


def test_bits_are_even_and_belong_to_seed_and_place():
    bits = counter_bits(11, (256, 256))
    assert bits.min() >= 0 and bits.max() < 2**24
    ones = torch.stack([(bits >> i & 1).double().mean() for i in range(24)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 256
    assert torch.equal(counter_bits(11, (9, 7), row=30, column=200), bits[30:39, 200:207])  # a shard
    assert torch.equal(counter_bits(11, (4, 64, 256)).flatten(0, 1), bits)
    assert (counter_bits(12, (256, 256)) == bits).sum() < 3 and (counter_bits(11 + 2**32, (256, 256)) == bits).sum() < 3
