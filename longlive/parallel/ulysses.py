"""Sequence parallelism as a decorator of attention: tokens are split between ranks everywhere but in attention, where heads are.

`Ulysses(attend, mesh)` satisfies the same protocol as the strategy it wraps. It receives the q, k, v of this rank's tokens, and one all-to-all gives
every rank the whole sequence for its share of the heads; the strategy works on that as it would on one device, with fewer heads; a second
all-to-all returns its answer to the tokens' owners (spec training §5.2). The gradient of an exchange is the opposite exchange.

Legend: P ranks, B batch, N tokens of the whole sequence, n = N / P of this rank, H heads, h = H / P, d head features, R runs (`Layout.runs`),
m = n / R tokens of a run, t tensors that travel together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..core.errors import InputError
from .mesh import Mesh, check_heads
from .shard import Layout

Attend = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor, int], torch.Tensor | None]


class Ulysses:
    """The strategy `attend` over the ranks of `mesh` that share a sample.

    `layout` says in which runs each rank holds the sequence (None: one run). The strategy sees the sequence in its own order,
    whatever the layout. Raises InputError for a layout of another number of ranks, and when called ConfigError for heads that cannot be shared equally.
    Compiled blocks leave it out of their graphs, as they do any strategy (`train.compiled.RotatedAhead`).
    """

    def __init__(self, attend: Attend, mesh: Mesh, layout: Layout | None = None):
        if layout is not None and layout.ranks != mesh.sp_size:
            raise InputError(f"the layout is for {layout.ranks} ranks, the mesh has {mesh.sp_size} that share a sample; make the layout from the mesh")
        self.attend, self.mesh = attend, mesh
        self.exchange = Exchange(mesh.sp_group, mesh.sp_size, 1 if layout is None else layout.runs)

    @property
    def rope(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The strategy's rotation tables for this rank's tokens. Whoever rotates ahead of the exchange takes them and sets None."""
        if self.attend.rope is None or self.mesh.sp_size == 1:
            return self.attend.rope
        return tuple(self._own(table) for table in self.attend.rope)

    @rope.setter
    def rope(self, none: None) -> None:
        self.attend.rope = none

    def _own(self, table_BN: torch.Tensor) -> torch.Tensor:
        return split_runs(table_BN, 1, self.exchange)[:, :, self.mesh.sp_rank].flatten(1, 2)

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        if self.mesh.sp_size == 1:
            return self.attend(q, k, v, layer)
        check_heads(k.shape[2], self.mesh.sp_size)
        given = (k, v) if q is None else (q, k, v)
        *queries, keys, values = TokensToHeads.apply(self.exchange, *given)
        read = self.attend(queries[0] if queries else None, keys, values, layer)
        return None if read is None else HeadsToTokens.apply(self.exchange, read)[0]


class Exchange(NamedTuple):
    """Who exchanges, and in how many runs each rank holds the sequence."""

    group: dist.ProcessGroup | None
    ranks: int
    runs: int


class TokensToHeads(torch.autograd.Function):
    """t tensors [B, n, H, d] of this rank's tokens -> t tensors [B, N, h, d] of this rank's heads, in one all-to-all."""

    @staticmethod
    def forward(ctx, exchange: Exchange, *own_BnHd: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        return tokens_to_heads(exchange, own_BnHd)

    @staticmethod
    def backward(ctx, *grad_BNhd: torch.Tensor):
        return None, *heads_to_tokens(ctx.exchange, grad_BNhd)


class HeadsToTokens(torch.autograd.Function):
    """The inverse of `TokensToHeads`."""

    @staticmethod
    def forward(ctx, exchange: Exchange, *whole_BNhd: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        return heads_to_tokens(exchange, whole_BNhd)

    @staticmethod
    def backward(ctx, *grad_BnHd: torch.Tensor):
        return None, *tokens_to_heads(ctx.exchange, grad_BnHd)


def tokens_to_heads(exchange: Exchange, own_BnHd: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """One copy into the send buffer; after the exchange the sequence is put in order, which is a view for B = 1 and one run."""
    received = _all_to_all(exchange, [t.unflatten(2, (exchange.ranks, -1)).permute(2, 0, 1, 3, 4) for t in own_BnHd])
    return tuple(t.unflatten(2, (exchange.runs, -1)).permute(1, 2, 0, 3, 4, 5).flatten(1, 3) for t in received)


def heads_to_tokens(exchange: Exchange, whole_BNhd: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inverse: a copy into the send buffer (none for one tensor, B = 1 and one run), and one that puts the heads side by side."""
    received = _all_to_all(exchange, [split_runs(t, 1, exchange).permute(2, 0, 1, 3, 4, 5) for t in whole_BNhd])
    return tuple(t.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2) for t in received)


def split_runs(x: torch.Tensor, dim: int, exchange: Exchange) -> torch.Tensor:
    """Dimension N -> (R, P, m)."""
    return x.unflatten(dim, (exchange.runs, exchange.ranks, -1))


def _all_to_all(exchange: Exchange, sent: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """t tensors [P, ..., h, d] as one: entry p goes to rank p; entry p of every result came from rank p."""
    buffer = torch.stack(sent, -3) if len(sent) > 1 else sent[0].unsqueeze(-3).contiguous()
    received = torch.empty_like(buffer)
    dist.all_to_all_single(received, buffer, group=exchange.group)
    return received.unbind(-3)
