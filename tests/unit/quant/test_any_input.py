"""Properties of every format on any finite input: drawn bit patterns, so that all sizes of float32 meet in one matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from longlive.ops import mxfp4, nvfp4
from longlive.ops.fp8 import quantise_rows
from longlive.ops.packed import from_state
from longlive.ops.random_bits import counter_bits

MOST = 2.0**126  # above it the next larger number of a format may leave float32
SHAPES = arrays.array_shapes(min_dims=2, max_dims=3, max_side=35)
MATRICES = arrays.arrays(np.float32, SHAPES, elements=st.floats(-MOST, MOST, width=32), fill=st.floats(-4, 4, width=32))
FORMATS = {
    **{f"{rule} {tile}": (lambda x, bits, rule=rule, tile=tile: nvfp4.quantise(x, rule, tile=tile, bits=bits)) for rule in nvfp4.RULES for tile in (1, 16)},
    "mxfp4": lambda x, bits: mxfp4.quantise(x, bits=bits),
    "fp8": lambda x, bits: quantise_rows(x),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stochastic", [False, True])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(values=MATRICES)
def test_any_finite_input(name, stochastic, values):
    """Same shape, finite, signs kept or zero, no further off than a step of the grid at the largest value, and saved as it is."""
    x = torch.from_numpy(values.copy())
    packed = FORMATS[name](x, counter_bits(1, x.shape) if stochastic else None)
    back = packed.dequantise(torch.float64)
    assert back.shape == x.shape and back.isfinite().all()
    assert (back * x.double() >= 0).all()
    assert ((back - x.double()).abs() <= 0.55 * x.double().abs().max() + 1e-35).all()
    assert from_state(packed.state(), packed.describe()) == packed
