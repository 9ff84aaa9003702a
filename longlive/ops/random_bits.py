"""Random bits for stochastic rounding: a function of (seed, place in the whole tensor).

A place is a row and a column of the whole tensor, never of a tile or a shard: neighbouring tiles get different noise, so that rounding errors average
out along a sum, and a shard rounds as it would inside the whole.

Legend: R rows, K columns.
"""

from __future__ import annotations

import torch

from .fp4 import RANDOM_BITS

WORD = 0xFFFFFFFF
COLUMN, ROW, SEED = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D


def _mix(word: torch.Tensor | int) -> torch.Tensor | int:
    """A bijection of 32-bit words in which every bit of the input reaches every bit of the output."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD & WORD
    word = (word ^ (word >> 15)) * 0x735A2D97 & WORD
    return word ^ (word >> 15)


def seed_word(seed: int) -> int:
    """What a seed of 64 bits contributes to every place: 32 bits."""
    return _mix(seed & WORD) ^ _mix((seed >> 32 & WORD) + SEED & WORD)


def counter_bits(seed: int, shape: tuple[int, ...], *, row: int = 0, column: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Integers in [0, 2^24), int64 [..., R, K]; the same (seed, row, column) gives the same bits on every device and in every shard.

    `row` and `column`: where this part begins in the whole. Leading dimensions count as more rows, R apart.
    """
    *_, rows, columns = shape
    lead = torch.arange(torch.Size(shape[:-2]).numel(), device=device) * rows
    place = (lead.unsqueeze(1) + torch.arange(row, row + rows, device=device)).reshape(*shape[:-1], 1)
    start = seed_word(seed)
    by_row = _mix((_mix(place & WORD) * ROW + (place >> 32) * SEED & WORD) ^ start)
    word = _mix(by_row + torch.arange(column, column + columns, device=device) * COLUMN & WORD)
    return _mix(word ^ start) >> (32 - RANDOM_BITS)
