"""Where keys and values live: fixed slots of one chunk each, written in place, read without a copy.

A store is memory and nothing else; which chunk lies in which slot is the policy's business. Slots keep their addresses for the life of
the store, so that a captured graph and a restored snapshot see the same memory.

Legend: B batch, P pages (slots), L tokens of a page, H heads, d head features.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens
from ..ops.rope import apply_rope
from .policy import Window


class Pages:
    """Dense store: per layer k and v [B, P, L, H, d] in the dtype they are given in. It rotates nothing unless asked to."""

    unrotated = False

    def __init__(self, layers: int, batch: int, pages: int, page_tokens: int, heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype):
        shape = (batch, pages, page_tokens, heads, head_dim)
        # Zeros, not empty: a slot that is masked may not hold a NaN.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.rows_B = torch.arange(batch, device=device)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    def begin(self, windows: list[Window], chunk: int, tokens: Tokens, slot_B: torch.Tensor, commit: bool) -> None:
        """What follows is written by `chunk`, into `slot_B`: a dense store keeps whatever it is given."""

    @torch.no_grad()
    def write(self, layer: int, slot_B: torch.Tensor, k_BLHd: torch.Tensor, v_BLHd: torch.Tensor) -> None:
        """Overwrites each sample's slot `slot_B[b]`."""
        self.k[layer][self.rows_B, slot_B] = k_BLHd.to(self.k[layer].dtype)
        self.v[layer][self.rows_B, slot_B] = v_BLHd.to(self.v[layer].dtype)

    def read(self, layer: int, filled: int, rope: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [B, filled * L, H, d] of the first `filled` slots, in slot order; keys turned by `rope`, where given, in a copy."""
        keys, values = self.k[layer][:, :filled].flatten(1, 2), self.v[layer][:, :filled].flatten(1, 2)
        return keys if rope is None else apply_rope(keys, *rope), values

    def copy_out(self, layer: int, slot_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies [B, P * L, H, d] of the slots `slot_BP`, in that order."""
        rows = self.rows_B.unsqueeze(1)
        return self.k[layer][rows, slot_BP].flatten(1, 2), self.v[layer][rows, slot_BP].flatten(1, 2)

    def snapshot(self) -> list[torch.Tensor]:
        return [t.clone() for t in (*self.k, *self.v)]

    def restore(self, state: list[torch.Tensor]) -> None:
        for mine, theirs in zip((*self.k, *self.v), state, strict=True):
            mine.copy_(theirs)
