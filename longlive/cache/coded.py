"""A store for attention in FP8: slots hold the e4m3 codes that it reads, so that a forward makes codes of its own chunk alone.

Half the memory of bfloat16, and the numbers of a dense store under the same attention, which rounds what it reads. (Quantised stores of finished chunks are
another matter: `cache.quantised`.)

Legend: B batch, P pages (slots), L tokens of a page, H heads, d head features.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens
from ..ops.coded_attention import value_rows, write_codes
from .policy import Window


class CodedPages:
    """Per layer rotated keys [B, P, L, H, d] and values [B, H, d, P L], both e4m3, as `ops.coded_attention` orders them; dense reads are in `dtype`."""

    unrotated = False

    def __init__(self, layers: int, batch: int, pages: int, page_tokens: int, heads: int, head_dim: int, *, device: torch.device, dtype: torch.dtype):
        def zeros(*shape: int) -> list[torch.Tensor]:
            return [torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn) for _ in range(layers)]

        self.k, self.v = zeros(batch, pages, page_tokens, heads, head_dim), zeros(batch, heads, head_dim, pages * page_tokens)
        self.dtype, self.rows_B = dtype, torch.arange(batch, device=device)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))

    def begin(self, windows: list[Window], chunk: int, tokens: Tokens, slot_B: torch.Tensor, commit: bool) -> None:
        """What follows is written by `chunk`, into `slot_B`: every write is for good."""

    @torch.no_grad()
    def write(self, layer: int, slot_B: torch.Tensor, k_BLHd: torch.Tensor, v_BLHd: torch.Tensor) -> None:
        """Overwrites each sample's slot `slot_B[b]`."""
        write_codes(k_BLHd, v_BLHd, slot_B, self.k[layer], self.v[layer])

    def codes(self, layer: int, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, filled * L, H, d] and values [B, H, d, filled * L] of the first `filled` slots; views wherever the memory allows."""
        return self.k[layer][:, :filled].flatten(1, 2), self.v[layer][..., : filled * self.k[layer].shape[2]]

    def read(self, layer: int, filled: int, rope: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, filled * L, H, d] of the first `filled` slots in `dtype`, in slot order: where attention has a mask. Keys are rotated for good."""
        keys, values = self.codes(layer, filled)
        return keys.to(self.dtype), value_rows(values).to(self.dtype)

    def copy_out(self, layer: int, slot_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies [B, P * L, H, d] of the slots `slot_BP` in `dtype`, in that order."""
        pages, rows = self.k[layer].shape[1], self.rows_B.unsqueeze(1)
        return tuple(t.unflatten(1, (pages, -1))[rows, slot_BP].flatten(1, 2) for t in self.read(layer, pages))

    def snapshot(self) -> list[torch.Tensor]:
        return [t.clone() for t in (*self.k, *self.v)]

    def restore(self, state: list[torch.Tensor]) -> None:
        for mine, theirs in zip((*self.k, *self.v), state, strict=True):
            mine.copy_(theirs)
