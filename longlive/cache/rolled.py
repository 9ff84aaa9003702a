"""Keys and values of a rollout that has gradients: every chunk in a slot of its own, written once.

Generation overwrites the slot of a chunk that has left the window. Here a backward pass may still have to read it, when a block's activations are
computed again: so no slot is ever taken twice, what is visible is a list of slots, and reading recomputes what was read. Keys and values in slots are
constants; those of the running chunk stay in the graph. Hence no gradient crosses from a chunk into an earlier one.

Legend: B batch, P visible earlier chunks, S slots, L tokens of a chunk, H heads, d head features.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens
from ..ops.attention import attention
from ..ops.heads import Heads, norm_rope_write, writes_fused
from ..ops.rope import apply_rope, rope_tables
from .pages import Pages


class RolledOut:
    """Attention of one chunk: its queries read the slots of the earlier chunks that it sees, then its own keys and values.

    With gradients off the chunk's keys and values go to its slot, so that every step and the commit overwrite it and the last one stays. With
    gradients on nothing is written. Absolute mode stores rotated keys; `relative` stores them unrotated and rotates what is read at 0, 1, ...
    """

    places = ("rows", "past_rows", "slot_B", "there", "rope", "past_rope")

    def __init__(
        self, pages: Pages, own: int, visible_BP: list[list[int]], tokens: Tokens, head_dim: int, *, relative: bool = False, t_scale: float = 1.0
    ):
        """`own`: the chunk's slot in every sample. `visible_BP`: the slots of the earlier chunks that each sample sees, oldest first."""
        device, batch = tokens.position_BF.device, len(visible_BP)
        counts = [len(row) for row in visible_BP]
        self.pages, self.own, self.visible_BP, self.most, self.relative = pages, own, visible_BP, max(counts), relative
        self.prefix = all(row == list(range(own)) for row in visible_BP)
        padded_BP = torch.tensor([row + [own] * (self.most + 1 - len(row)) for row in visible_BP], dtype=torch.int64)
        rows_BP = padded_BP + pages.k[0].shape[1] * torch.arange(batch)[:, None]
        self.rows, self.past_rows = (rows.flatten().to(device, non_blocking=True) for rows in (rows_BP, rows_BP[:, :-1]))
        self.slot_B = torch.full((batch,), own).to(device, non_blocking=True)
        self.there: torch.Tensor | None = None
        if min(counts) < self.most:
            there_BP = torch.tensor([[True] * n + [False] * (self.most - n) + [True] for n in counts])
            self.there = there_BP.repeat_interleave(pages.k[0].shape[2], 1)[:, None, None].to(device, non_blocking=True)
        self.rope, self.past_rope = rope_tables(tokens, head_dim, t_scale=t_scale), None
        if relative:
            frames = torch.arange(tokens.frames, dtype=torch.float64)
            own_place = torch.tensor(counts)[:, None] * tokens.frames + frames
            self.rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=own_place.to(device, non_blocking=True))
            if self.most:
                place = (torch.arange(self.most)[:, None] * tokens.frames + frames).flatten()[None]
                self.past_rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=place.to(device, non_blocking=True))

    @property
    def variant(self) -> tuple:
        """As of `Cached`."""
        return self.own, self.most, self.prefix, self.there is None, self.past_rope is None

    def takes(self, heads: Heads) -> bool:
        """Whether a kernel normalises, rotates and writes at once (`ops.heads.TakesHeads`)."""
        return not torch.is_grad_enabled() and not self.relative and writes_fused(heads, self.pages.k[0])

    def attend(self, heads: Heads, layer: int) -> torch.Tensor | None:
        """From bare projections; only where `takes` says so."""
        q = norm_rope_write(heads, self.rope, self.slot_B, self.pages.k[layer], self.pages.v[layer], rotate_k=True)
        return None if q is None else attention(q, *self._written(layer), self.there)

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        turned, alone = apply_rope(k, *self.rope), not torch.is_grad_enabled()
        if alone:
            self.pages.k[layer][:, self.own].copy_(k if self.relative else turned)
            self.pages.v[layer][:, self.own].copy_(v)
        if q is None:
            return None
        q = apply_rope(q, *self.rope)
        if alone and not self.relative and self.pages.k[layer].dtype == q.dtype:
            return attention(q, *self._written(layer), self.there)
        if self.most:
            past_k, past_v = self.past(layer)
            turned, v = torch.cat((past_k.to(turned.dtype), turned), dim=1), torch.cat((past_v.to(v.dtype), v), dim=1)
        return attention(q, turned, v, self.there)

    @torch.no_grad()
    def past(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, of the visible earlier chunks [B, P L, H, d], oldest first: constants."""
        keys, values = (self._slots(store[layer], self.own, self.past_rows) for store in (self.pages.k, self.pages.v))
        return keys if self.past_rope is None else apply_rope(keys, *self.past_rope), values

    def _written(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the chunk's own, which is in its slot."""
        return tuple(self._slots(store[layer], self.own + 1, self.rows) for store in (self.pages.k, self.pages.v))

    def _slots(self, store_BSLHd: torch.Tensor, count: int, rows: torch.Tensor) -> torch.Tensor:
        """A view of the first `count` slots where each sample sees them all, else a copy of the slots `rows`."""
        if self.prefix:
            return store_BSLHd[:, :count].flatten(1, 2)
        return store_BSLHd.flatten(0, 1).index_select(0, rows).unflatten(0, (len(store_BSLHd), -1)).flatten(1, 2)
