"""E2M1, E4M3, packing, scale layouts, the Hadamard transform: every code, every midpoint, every edge."""

from __future__ import annotations

import math

import pytest
import torch

from longlive.core.errors import InputError
from longlive.ops import fp4
from longlive.ops.fp8 import to_e4m3, to_e4m3_up
from longlive.ops.hadamard import SIZE, hadamard, hadamard_matrix
from longlive.ops.scale_layout import swizzle, swizzled_size, unswizzle

FINITE_E4M3 = torch.arange(127, dtype=torch.uint8)  # 0x7F is NaN


def after(x: float, towards: float) -> float:
    return torch.nextafter(torch.tensor(x), torch.tensor(towards)).item()


def test_every_code_decodes_and_encodes_back():
    values = fp4.decode(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1, values[8].item()) == -1
    assert fp4.encode(values).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]  # -0 is a zero and has no sign


@pytest.mark.parametrize(("middle", "even"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)])
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer(middle, even):
    x = torch.tensor([after(middle, 0), middle, after(middle, 9)])
    lower = fp4.MIDPOINTS.index(middle)
    assert fp4.encode(x).tolist() == [lower, even, lower + 1]
    assert fp4.encode(-x).tolist() == [lower | 8, even | 8, (lower + 1) | 8]


def test_saturates_and_has_no_code_for_nan():
    x = torch.tensor([6.0, 7.5, 8.7, 1e30, math.inf, -math.inf, math.nan, 1e-30, -1e-30])
    assert fp4.encode(x).tolist() == [7, 7, 7, 7, 7, 15, 0, 0, 8]


def test_the_even_index_lies_in_the_low_half():
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert fp4.pack(codes).tolist() == [[0x21, 0xF3]]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(fp4.pack(fp4.unpack(every)), every)
    with pytest.raises(InputError, match="pad the row"):
        fp4.pack(codes[:, :3])


def test_e4m3_rounds_to_even_and_saturates():
    values = FINITE_E4M3.view(torch.float8_e4m3fn).float()
    middles = (values[1:].double() + values[:-1].double()) / 2
    found = to_e4m3(middles.float()).view(torch.uint8)
    assert torch.equal(found, FINITE_E4M3[:-1] + (FINITE_E4M3[:-1] & 1))
    assert torch.equal(to_e4m3(values).view(torch.uint8), FINITE_E4M3)
    assert to_e4m3(torch.tensor([449.0, 1e9, math.inf, -1e9])).float().tolist() == [448, 448, 448, -448]
    assert to_e4m3(torch.tensor(math.nan)).float().isnan()


def test_e4m3_up_is_the_smallest_that_is_not_below():
    values = FINITE_E4M3.view(torch.float8_e4m3fn).float()
    assert torch.equal(to_e4m3_up(values).view(torch.uint8), FINITE_E4M3)
    above = torch.nextafter(values[:-1], torch.tensor(math.inf))
    assert torch.equal(to_e4m3_up(above).view(torch.uint8), FINITE_E4M3[1:])
    assert to_e4m3_up(torch.tensor([450.0, 1e-30, 0.0])).float().tolist() == [448, 2**-9, 0]


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (1, 1), (300, 10), (130, 3), (257, 8)])
def test_swizzled_bytes_lie_where_the_hardware_reads_them(rows, columns):
    scales = torch.randint(0, 256, (2, rows, columns), dtype=torch.uint8)
    flat = swizzle(scales)
    assert flat.shape == (2, swizzled_size(rows, columns))
    tiles = -(-columns // 4)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    place = (r // 128 * tiles + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    assert torch.equal(flat[:, place], scales)
    assert flat.sum(dtype=torch.int64) == scales.sum(dtype=torch.int64)  # the rest is zeros
    assert torch.equal(unswizzle(flat, rows, columns), scales)


def test_unswizzle_refuses_another_size():
    with pytest.raises(InputError, match="take 512 bytes, not 511"):
        unswizzle(torch.zeros(511, dtype=torch.uint8), 128, 4)


def test_the_hadamard_transform_is_orthogonal_and_cancels_in_a_product():
    matrix = hadamard_matrix()
    assert torch.equal(matrix @ matrix.T, torch.eye(SIZE))
    assert torch.equal(matrix, hadamard_matrix(dtype=torch.bfloat16).float())
    x, y = torch.randn(5, 64), torch.randn(7, 64)
    difference = hadamard(x) @ hadamard(y).T - x @ y.T
    assert difference.norm() < 1e-6 * (x @ y.T).norm()
    assert torch.allclose(hadamard(hadamard(x), inverse=True), x, atol=1e-6)
    assert torch.allclose(hadamard(x), (x.unflatten(-1, (-1, 16)) @ matrix).flatten(-2), atol=1e-6)
    with pytest.raises(InputError, match="blocks of 16"):
        hadamard(torch.zeros(2, 24))
