"""A store that keeps finished chunks quantised: fp8, int8 or nvfp4, keys unrotated, means taken off (`ops.kv_formats`).

Only the clean pass (commit) quantises; while a chunk is denoised its own keys and values are read as they are given, and so they are in the
commit itself. A read is one pass: dequantise, add the mean, rotate by the positions of the frames, into a buffer that all layers share. Pages that are
never evicted (anchor, pin) may be kept in full beside their quantised form, since errors in them are read for ever.

All memory is allocated at once and never moves; passes over a chunk differ by the contents of tensors alone, and commits from other passes by which
kernels run, so that either can be recorded. (Spec nvfp4 §4.5.)

Legend: B batch, P pages (slots), F frames and L tokens of a page, H heads, d head features.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..core.tokens import Tokens
from ..ops.kv_formats import QuantisedPage, quantise_page
from ..ops.kv_reading import read_pages, write_page
from .policy import Window

ANCHOR, PIN = 0, 1
KEYS, VALUES = 0, 1
Tables = tuple[torch.Tensor, torch.Tensor]


class QuantisedPages:
    """`format` fp8, int8 or nvfp4 (with the scale `rule`); `keep_anchor`, `keep_pin`: pages kept in full. Reads are in `dtype`."""

    unrotated = True

    def __init__(
        self,
        layers: int,
        batch: int,
        pages: int,
        page_tokens: int,
        heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        format: str,
        rule: str = "mse",
        keep_anchor: bool = False,
        keep_pin: bool = False,
    ):
        def zeros(*shape: int, like: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=like)

        shape = (page_tokens, heads, head_dim)
        self._empty = quantise_page(torch.zeros(1, *shape), format, rule)
        self.parts = {name: zeros(layers, 2, batch, pages, *t.shape[1:], like=t.dtype) for name, t in self._empty.tensors().items()}
        self.buffer = zeros(2, batch, pages, *shape, like=dtype)
        self.kept = {place: zeros(layers, 2, batch, *shape, like=dtype) for place, on in ((ANCHOR, keep_anchor), (PIN, keep_pin)) if on}
        self.kept_slot = torch.full((2, batch), -1, dtype=torch.int64, device=device)  # slot of anchor and pin; -1: none is kept in full
        self.position: torch.Tensor | None = None  # float64 [B, P, F], made when the number of frames is known
        self.rows_B = torch.arange(batch, device=device)
        self._committing, self._sinks = False, torch.zeros(2, batch, dtype=torch.bool, device=device)
        self._own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def bytes(self) -> int:
        """What is kept; the shared buffer is `buffer.nbytes` more."""
        return sum(t.nbytes for t in (*self.parts.values(), *self.kept.values()))

    def begin(self, windows: list[Window], chunk: int, tokens: Tokens, slot_B: torch.Tensor, commit: bool) -> None:
        """What follows is written by `chunk`, into `slot_B`; its frames are those of `tokens`."""
        if self.position is None:
            self.position = torch.zeros(*self.buffer.shape[1:3], tokens.frames, dtype=torch.float64, device=self.buffer.device)
        self.position[self.rows_B, slot_B] = tokens.position_BF.to(torch.float64).expand(len(windows), -1)
        self._committing = commit
        if not self.kept:
            return
        sinks = ([commit and chunk == 0] * len(windows), [commit and w.pinned == chunk for w in windows])
        self._sinks.copy_(torch.tensor(sinks), non_blocking=True)
        for place in self.kept:  # a slot that another chunk takes is no longer kept in full
            slot = self.kept_slot[place]
            self.kept_slot[place] = torch.where(self._sinks[place], slot_B, torch.where(slot == slot_B, -1, slot))

    def positions(self, filled: int) -> torch.Tensor:
        """float64 [B, filled * F]: temporal positions of the frames in the first slots."""
        return self.position[:, :filled].flatten(1)

    @torch.no_grad()
    def write(self, layer: int, slot_B: torch.Tensor, k_BLHd: torch.Tensor, v_BLHd: torch.Tensor) -> None:
        """Takes the chunk's keys (unrotated) and values: for the read of this layer that follows, and for good in a commit."""
        self._own = (slot_B, k_BLHd, v_BLHd)
        if not self._committing:
            return
        for kind, x in ((KEYS, k_BLHd), (VALUES, v_BLHd)):
            write_page(x, self._page(layer, kind), slot_B)
            for place, store in self.kept.items():
                store[layer, kind].copy_(torch.where(self._sinks[place][:, None, None, None], x.to(store.dtype), store[layer, kind]))

    @torch.no_grad()
    def read(self, layer: int, filled: int, rope: Tables | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, filled * L, H, d] of the first slots, keys rotated by `rope` [B or 1, filled * L, d / 2]; good until the next read."""
        given = [[(self.kept_slot[place], store[layer, kind]) for place, store in self.kept.items()] for kind in (KEYS, VALUES)]
        for kind in (KEYS, VALUES) if self._own is not None else ():
            given[kind].append((self._own[0], self._own[1 + kind]))
        out = self.buffer[:, :, :filled]
        for kind, turn in ((KEYS, rope), (VALUES, None)):
            read_pages(self._page(layer, kind), filled, turn, out[kind], given[kind])
        return out[KEYS].flatten(1, 2), out[VALUES].flatten(1, 2)

    def copy_out(self, layer: int, slot_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies [B, P * L, H, d] of the slots `slot_BP`, in that order, keys unrotated."""
        self._own = None
        keys, values = self.read(layer, self.buffer.shape[2])
        rows = self.rows_B.unsqueeze(1)
        return tuple(t.unflatten(1, (self.buffer.shape[2], -1))[rows, slot_BP].flatten(1, 2) for t in (keys, values))

    def _page(self, layer: int, kind: int) -> QuantisedPage:
        """All slots of one layer's keys or values: the parts with P after B."""
        return replace(self._empty, **{name: part[layer, kind] for name, part in self.parts.items()})

    def _state(self) -> list[torch.Tensor]:
        return [*self.parts.values(), *self.kept.values(), self.kept_slot]

    def snapshot(self) -> list[torch.Tensor]:
        """Everything that is kept, copied; positions last, where there are any."""
        positions = [] if self.position is None else [self.position]
        return [t.clone() for t in (*self._state(), *positions)]

    def restore(self, state: list[torch.Tensor]) -> None:
        """Back to what `snapshot` gave, in the same memory."""
        *mine, last = state if len(state) > len(self._state()) else (*state, None)
        for here, there in zip(self._state(), mine, strict=True):
            here.copy_(there)
        if last is not None:
            self.position = torch.zeros_like(last) if self.position is None else self.position
            self.position.copy_(last)
        self._own = None
