"""From the outputs of the q, k, v projections to an attention strategy: normalise, rotate, store.

A strategy is called with normalised, unrotated heads. One that owns the rotation and the memory of its keys may take the bare projections instead and do all
of it in one pass; it says so for each call (`TakesHeads`).

Legend: B batch, N tokens, D = H * d features, H heads, d head features, P pages (slots).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from .inference import fuses
from .norm import rms_norm
from .rope import apply_rope

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Heads:
    """q (None: keys and values only), k and v [B, N, D] before the RMS norms of q and k, whose weights are [D]."""

    q_BND: torch.Tensor | None
    k_BND: torch.Tensor
    v_BND: torch.Tensor
    weight_q: torch.Tensor
    weight_k: torch.Tensor
    eps: float
    head_dim: int

    def normalised(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """q, k, v [B, N, H, d], normalised over all heads and not rotated."""
        q = None if self.q_BND is None else self._split(rms_norm(self.q_BND, self.weight_q, self.eps))
        return q, self._split(rms_norm(self.k_BND, self.weight_k, self.eps)), self._split(self.v_BND)

    def _split(self, x_BND: torch.Tensor) -> torch.Tensor:
        return x_BND.unflatten(-1, (-1, self.head_dim))


@runtime_checkable
class TakesHeads(Protocol):
    """An attention strategy that may take the bare projections."""

    def takes(self, heads: Heads) -> bool: ...

    def attend(self, heads: Heads, layer: int) -> torch.Tensor | None: ...


def attend_heads(attend: Callable[..., torch.Tensor | None], heads: Heads, layer: int) -> torch.Tensor | None:
    """What the strategy `attend` reads for `heads`: [B, N, H, d], or None without queries."""
    if isinstance(attend, TakesHeads) and attend.takes(heads):
        return attend.attend(heads, layer)
    return attend(*heads.normalised(), layer)


def norm_rotate(heads: Heads, tables: Tables) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(rotated q or None, unrotated k, v) [B, N, H, d], normalised; what a store of unrotated keys takes. `tables` as in `norm_rope_write`."""
    v_BNHd = heads.v_BND.unflatten(-1, (-1, heads.head_dim))
    if fuses(heads.k_BND, heads.q_BND, heads.weight_q, heads.weight_k):
        from .triton_heads import norm_heads

        k = norm_heads(heads.k_BND, heads.weight_k, heads.eps, heads.head_dim, None)
        return None if heads.q_BND is None else norm_heads(heads.q_BND, heads.weight_q, heads.eps, heads.head_dim, tables), k, v_BNHd
    q, k, v = heads.normalised()
    return None if q is None else apply_rope(q, *tables), k, v


def writes_fused(heads: Heads, k_pages: torch.Tensor) -> bool:
    """Whether `norm_rope_write` has a kernel for these heads and pages."""
    return fuses(heads.k_BND, heads.q_BND, heads.v_BND, heads.weight_q, heads.weight_k) and k_pages.is_contiguous()


def norm_rope_write(
    heads: Heads, tables: Tables, slot_B: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *, rotate_k: bool
) -> torch.Tensor | None:
    """Normalises q and k, rotates them, and writes k and v to slot `slot_B[b]` of the pages [B, P, N, H, d]; returns q [B, N, H, d] (None without q).

    `rotate_k` False stores keys unrotated. `tables`: cosines and sines of the tokens, [B or 1, N, d / 2]. No gradient passes.
    """
    if writes_fused(heads, k_pages):
        from . import triton_heads

        weights = (heads.weight_q, heads.weight_k)
        return triton_heads.norm_rope_write(
            heads.q_BND, heads.k_BND, heads.v_BND, weights, heads.eps, tables, slot_B, (k_pages, v_pages), rotate_k=rotate_k
        )
    with torch.no_grad():
        q, k, v = heads.normalised()
        rows = torch.arange(len(slot_B), device=slot_B.device)
        k_pages[rows, slot_B] = (apply_rope(k, *tables) if rotate_k else k).to(k_pages.dtype)
        v_pages[rows, slot_B] = v.to(v_pages.dtype)
        return None if q is None else apply_rope(q, *tables)
