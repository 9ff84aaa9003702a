"""Two orders for block scales: linear [R, C], and the swizzled one that FP4 tensor cores read (tiles of 128 x 4 scales, 512 bytes each).

Inside a tile the byte of row r and column c is at (r mod 32) * 16 + (r div 32) * 4 + c; tiles follow one another along a row of tiles (spec nvfp4 §1.6).
Memory and files of ours hold linear scales; the swizzled order is made for a kernel or a published checkpoint.

Legend: R rows, C scales of a row, T tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..core.errors import InputError

TILE_ROWS, TILE_COLUMNS = 128, 4


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def swizzled_size(rows: int, columns: int) -> int:
    """Bytes of the swizzled form of [rows, columns] scales, padding included."""
    return round_up(rows, TILE_ROWS) * round_up(columns, TILE_COLUMNS)


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """[..., R, C] one-byte scales -> [..., T * 512], missing rows and columns filled with zeros."""
    rows, columns = scales.shape[-2:]
    padded = F.pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-2, (-1, 4, 32)).unflatten(-1, (-1, TILE_COLUMNS))  # [..., row tile, 4, 32, column tile, 4]
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5)


def unswizzle(flat: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[..., T * 512] -> [..., rows, columns]. Raises InputError when the size is not that of such scales."""
    if flat.shape[-1] != swizzled_size(rows, columns):
        raise InputError(f"swizzled scales of [{rows}, {columns}] take {swizzled_size(rows, columns)} bytes, not {flat.shape[-1]}; check the shape")
    tiles = flat.unflatten(-1, (round_up(rows, TILE_ROWS) // TILE_ROWS, -1, 32, 4, TILE_COLUMNS))
    padded = tiles.transpose(-3, -2).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return padded[..., :rows, :columns].contiguous()
