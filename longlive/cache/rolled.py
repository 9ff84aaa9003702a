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
from ..ops.rope import apply_rope, rope_tables
from .pages import Pages


class RolledOut:
    """Attention of one chunk: its queries read the slots of the earlier chunks that it sees, then its own keys and values.

    With gradients off the chunk's keys and values go to its slot, so that every step and the commit overwrite it and the last one stays. With
    gradients on nothing is written. Absolute mode stores rotated keys; `relative` stores them unrotated and rotates what is read at 0, 1, ...
    """

    def __init__(
        self, pages: Pages, own: int, visible_BP: list[list[int]], tokens: Tokens, head_dim: int, *, relative: bool = False, t_scale: float = 1.0
    ):
        """`own`: the chunk's slot in every sample. `visible_BP`: the slots of the earlier chunks that each sample sees, oldest first."""
        device, batch = tokens.position_BF.device, len(visible_BP)
        counts = [len(row) for row in visible_BP]
        self.pages, self.own, self.visible_BP, self.most = pages, own, visible_BP, max(counts)
        self.prefix = all(row == list(range(own)) for row in visible_BP)
        padded = torch.tensor([row + [own] * (self.most - len(row)) for row in visible_BP], dtype=torch.int64).reshape(batch, self.most)
        self.rows_BP = None if self.prefix else (padded + pages.k[0].shape[1] * torch.arange(batch)[:, None]).flatten().to(device, non_blocking=True)
        self.there: torch.Tensor | None = None
        if min(counts) < self.most:
            there_BP = torch.tensor([[True] * n + [False] * (self.most - n) + [True] for n in counts])
            self.there = there_BP.repeat_interleave(pages.k[0].shape[2], 1)[:, None, None].to(device, non_blocking=True)
        self.rope, self.past_rope = rope_tables(tokens, head_dim, t_scale=t_scale), None
        if relative:
            frames = torch.arange(tokens.frames, dtype=torch.float64)
            place = (torch.arange(self.most)[:, None] * tokens.frames + frames).flatten()[None].to(device, non_blocking=True)
            self.past_rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=place) if self.most else None
            own_place = torch.tensor(counts)[:, None] * tokens.frames + frames
            self.rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=own_place.to(device, non_blocking=True))
        self.relative = relative

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        turned = apply_rope(k, *self.rope)
        if not torch.is_grad_enabled():
            self.pages.k[layer][:, self.own].copy_(k if self.relative else turned)
            self.pages.v[layer][:, self.own].copy_(v)
        if q is None:
            return None
        if self.most:
            past_k, past_v = self.past(layer)
            turned, v = torch.cat((past_k.to(turned.dtype), turned), dim=1), torch.cat((past_v.to(v.dtype), v), dim=1)
        return attention(apply_rope(q, *self.rope), turned, v, self.there)

    @torch.no_grad()
    def past(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, of the visible earlier chunks [B, P L, H, d], oldest first: constants."""
        keys, values = (self._visible(store[layer]) for store in (self.pages.k, self.pages.v))
        return keys if self.past_rope is None else apply_rope(keys, *self.past_rope), values

    def _visible(self, store_BSLHd: torch.Tensor) -> torch.Tensor:
        if self.prefix:
            return store_BSLHd[:, : self.own].flatten(1, 2)
        return store_BSLHd.flatten(0, 1).index_select(0, self.rows_BP).unflatten(0, (len(store_BSLHd), -1)).flatten(1, 2)
