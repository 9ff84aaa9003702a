"""Who holds which frames of a sequence: pure functions of sizes, and the same cut applied to tensors and to `Tokens`.

A training sequence is several streams of one film, [clean; noisy; noisy ...]. Balanced layout: rank r holds frames [r n, (r + 1) n) of *every* stream,
so that all ranks carry equally many clean and equally many loss-bearing frames, and what a rank holds concerns one stretch of the film (spec
training §5.1). Contiguous layout: rank r holds one run of the whole sequence. With one stream the two are the same: a chunk shared in generation.

Legend: F frames of one stream, S streams, P ranks, n = F / P, T = S * F frames of the sequence, G prompt groups of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..core.errors import InputError
from ..core.tokens import Tokens

BALANCED, CONTIGUOUS = "balanced", "contiguous"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`streams` streams of `film` latent frames over `ranks` ranks. Raises InputError where the ranks' shares would differ in size."""

    film: int
    streams: int = 1
    ranks: int = 1
    kind: str = BALANCED

    def __post_init__(self):
        if self.kind not in (BALANCED, CONTIGUOUS):
            raise InputError(f"layout {self.kind!r} is neither {BALANCED} nor {CONTIGUOUS}")
        shared, words = self.film, f"film frames({self.film})"
        if self.kind == CONTIGUOUS:
            shared, words = self.film * self.streams, f"{words} x streams({self.streams})"
        if shared % self.ranks:
            equation = f"{words} % ranks({self.ranks}) = {shared % self.ranks}, not 0"
            raise InputError(f"{equation}: every rank takes equal parts; use another number of frames or ranks")

    @property
    def runs(self) -> int:
        """Runs of consecutive frames that each rank holds."""
        return self.streams if self.kind == BALANCED else 1

    @property
    def run(self) -> int:
        """Frames of one run."""
        return self.film * self.streams // (self.runs * self.ranks)

    def frames(self, rank: int) -> list[int]:
        """The rank's frames as numbers in the whole sequence, in the order in which it holds them."""
        stride = self.film * self.streams // self.runs
        return [r * stride + rank * self.run + i for r in range(self.runs) for i in range(self.run)]

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """The rank's frames [start, stop) of each stream, counted in the film. Empty ranges where it holds none."""
        if self.kind == BALANCED:
            return [(rank * self.run, (rank + 1) * self.run)] * self.streams
        first = rank * self.run
        return [tuple(min(max(frame - s * self.film, 0), self.film) for frame in (first, first + self.run)) for s in range(self.streams)]

    def shard(self, sequence: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """The rank's share of a tensor whose `dim` runs over the sequence: frames, or any whole number of tokens per frame."""
        dim %= sequence.dim()
        return sequence.unflatten(dim, (self.runs, self.ranks, -1)).select(dim + 1, rank).flatten(dim, dim + 1)

    def shard_streams(self, streams: Sequence[torch.Tensor], rank: int, *, skip: int = 0) -> torch.Tensor:
        """The rank's share [B, frames, ...] of the sequence of streams [B, F, ...]; `skip` the first streams that are not given and left out."""
        ranges = self.ranges(rank)[skip:]
        return torch.cat([stream[:, start:stop] for stream, (start, stop) in zip(streams, ranges, strict=True)], dim=1)

    def unshard(self, parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The whole sequence from the shares of all ranks, in rank order: the inverse of `shard`."""
        dim %= parts[0].dim()
        return torch.stack([part.unflatten(dim, (self.runs, -1)) for part in parts], dim + 1).flatten(dim, dim + 2)

    def shard_tokens(self, tokens: Tokens, rank: int) -> Tokens:
        """The rank's tokens with their metadata. Prompt groups become smaller where a rank's runs are not whole groups."""
        group = math.gcd(tokens.frames // tokens.prompt_BG.shape[1], self.run)
        prompt_BG = tokens.prompt_BG.repeat_interleave(tokens.frames // (group * tokens.prompt_BG.shape[1]), dim=1)
        return replace(
            tokens,
            position_BF=self.shard(tokens.position_BF, rank),
            chunk_F=self.shard(tokens.chunk_F, rank, 0),
            noisy_F=self.shard(tokens.noisy_F, rank, 0),
            prompt_BG=self.shard(prompt_BG, rank),
        )
