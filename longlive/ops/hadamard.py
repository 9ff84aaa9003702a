"""The random Hadamard transform: spreads an outlier over its neighbours, and cancels in a product whose both sides are turned.

Blocks of 16 values are multiplied by diag(signs) H / 4, with Sylvester's H and one fixed vector of signs. The matrix is orthogonal and its entries
(+-1/4) are exact in every float format (spec nvfp4 §2.3).

Legend: K values of a row.
"""

from __future__ import annotations

import torch

from ..core.errors import InputError

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
SIZE = len(SIGNS)


def hadamard_matrix(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[16, 16]: a block is transformed by `block @ matrix`, and back by `block @ matrix.T`."""
    h = torch.ones(1, 1, device=device)
    while len(h) < SIZE:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (torch.tensor(SIGNS, device=device).unsqueeze(1) * h / SIZE**0.5).to(dtype)


def hadamard(x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """`x` [..., K] with every block of 16 values along K turned; result in the dtype of `x`.

    Sums run in float32 (float64 for float64), as four rounds of sums and differences of values 1, 2, 4 and 8 apart: the same bits on every device.
    Raises InputError when K is no multiple of 16: zeros that fill a block would be turned into values.
    """
    if x.shape[-1] % SIZE:
        raise InputError(f"the Hadamard transform turns blocks of {SIZE} values and a row has {x.shape[-1]}; pad both sides of the product with zeros first")
    blocks = x.unflatten(-1, (-1, SIZE)).to(torch.promote_types(x.dtype, torch.float32))
    signs = hadamard_matrix(x.device, blocks.dtype)[:, 0]  # with the factor 1 / 4
    blocks = blocks if inverse else blocks * signs
    for apart in (1, 2, 4, 8):
        first, second = blocks.unflatten(-1, (-1, 2, apart)).unbind(-2)
        blocks = torch.stack((first + second, first - second), -2).flatten(-3)
    return (blocks * signs if inverse else blocks).flatten(-2).to(x.dtype)
