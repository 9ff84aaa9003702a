"""Pages of quantised keys and values in and out of a store: one quantising write, one pass of dequantising, adding the mean and rotating.

Torch references, and fused kernels where the device has them (`triton_kv`), which give the same codes and the same numbers.

Legend: B batch, P pages (slots), L tokens of a page, H heads, d head features. A store's page has P after B in every part of a `QuantisedPage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .kv_formats import QuantisedPage, dequantise_page, quantise_page
from .rope import apply_rope
from .triton_available import fused_fp8

Tables = tuple[torch.Tensor, torch.Tensor]
Given = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def write_page(x_BLHd: torch.Tensor, store: QuantisedPage, slot_B: torch.Tensor) -> None:
    """Quantises `x` into each sample's slot. A page with infinity or NaN becomes NaN where it had one, and nothing waits for the device."""
    if fused_fp8(x_BLHd) and _fits(x_BLHd):
        from .triton_kv import write_page_fused

        return write_page_fused(x_BLHd, store, slot_B)
    page = quantise_page(x_BLHd, store.format, store.rule or "mse", on_nonfinite="nan")
    rows = torch.arange(len(slot_B), device=slot_B.device)
    for name, part in page.tensors().items():
        store.tensors()[name][rows, slot_B] = part


@torch.no_grad()
def read_pages(store: QuantisedPage, filled: int, rope: Tables | None, out_BPLHd: torch.Tensor, given: Sequence[Given] = ()) -> None:
    """Values of the first `filled` slots into `out` [B, filled, L, H, d], rotated by `rope` [B or 1, filled * L, d / 2] in float32 and rounded once.

    `given`: (slot of each sample, x [B, L, H, d]): pages that are at hand in full and are read from there, the last one first; slot -1 is none.
    """
    if fused_fp8(out_BPLHd) and _fits(out_BPLHd):
        from .triton_kv import read_pages_fused

        return read_pages_fused(store, filled, rope, out_BPLHd, given)
    for slot in range(filled):
        page = dequantise_page(replace(store, **{name: part[:, slot] for name, part in store.tensors().items()}))
        for slot_B, x_BLHd in given:
            page = torch.where((slot_B == slot)[:, None, None, None], x_BLHd.to(torch.float32), page)
        if rope is not None:
            page = apply_rope(page, *(t.unflatten(1, (filled, -1))[:, slot] for t in rope))
        out_BPLHd[:, slot] = page.to(out_BPLHd.dtype)


def _fits(x: torch.Tensor) -> bool:
    """Whether the fused kernels take heads of this size: powers of two, whole groups."""
    return x.shape[-1] >= 16 and x.shape[-1] & (x.shape[-1] - 1) == 0
