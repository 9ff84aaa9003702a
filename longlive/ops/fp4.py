"""E2M1, the 4-bit number: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Two codes to a byte, the even index in the low half.

A code is sign (bit 3) over magnitude (bits 2-0). There is no infinity and no NaN: what is larger than 6 becomes 6 (spec nvfp4 §1.1, §1.2).
A negative number that rounds to zero keeps its sign (code 8), as in hardware; a zero has none (code 0).
"""

from __future__ import annotations

import torch

from ..core.errors import InputError

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]
# Between neighbours; a value that lies on one goes to the even code.
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
RANDOM_BITS = 24


def encode(y: torch.Tensor) -> torch.Tensor:
    """Codes uint8 of the nearest numbers, ties to the even code, saturating at 6. NaN has no code; it gives 0."""
    magnitude = y.abs()
    code = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
    for lower, middle in enumerate(MIDPOINTS):
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return _signed(code, y)


def encode_stochastic(y: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Codes uint8 of one of the two neighbours, the nearer one more often, so that the mean is `y` wherever |y| <= 6.

    `bits`: integers in [0, 2^24), one for each value (`ops.random_bits`).
    """
    if bits.shape != y.shape:
        raise InputError(f"stochastic rounding needs one random number a value: bits are {list(bits.shape)}, values {list(y.shape)}")
    magnitude = y.abs().to(torch.float32)
    below = torch.zeros(y.shape, dtype=torch.uint8, device=y.device)
    for step in MAGNITUDES[1:-1]:
        below += magnitude >= step
    grid = torch.tensor(MAGNITUDES, device=y.device)
    low, high = grid[below.long()], grid[below.long() + 1]
    share = ((magnitude - low) / (high - low)).clamp(max=1.0)  # a power of two below: exact
    up = bits.to(torch.float32) * 2.0**-RANDOM_BITS < share
    return _signed(below + up.to(torch.uint8), y)


def _signed(code: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return code | ((y < 0).to(torch.uint8) << 3)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of uint8 codes 0..15; code 8 is -0."""
    grid = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32, device=codes.device)
    return grid[codes.long()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] codes -> uint8 [..., K / 2] bytes. Raises InputError for odd K."""
    if codes.shape[-1] % 2:
        raise InputError(f"4-bit codes are packed in pairs and there are {codes.shape[-1]} in a row; pad the row to an even number")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] bytes -> uint8 [..., K] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
