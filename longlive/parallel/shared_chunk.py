"""One chunk of a film over the ranks that make it together: frames while they compute, heads while they attend, and the whole of its latents on each.

Every rank holds all weights and walks through the same sampler with the same noise; the forward of the transformer is what they share. Each feeds its own
latent frames, the two exchanges of `Ulysses` surround attention, and the velocities of all frames come back to all (spec inference §7). Alone every
method gives back what it got.

Legend: B batch, F latent frames of the chunk, f = F / P frames of this rank, P ranks.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens
from .gather import gather_frames
from .mesh import Mesh, check_heads
from .shard import Layout
from .ulysses import Attend, Ulysses


class SharedChunk:
    """How chunks of `frames` latent frames are shared on `mesh` by a network of `heads` heads.

    Raises InputError for frames and ConfigError for heads that P ranks cannot share equally.
    """

    def __init__(self, mesh: Mesh, frames: int, heads: int):
        check_heads(heads, mesh.sp_size)
        self.mesh, self.heads = mesh, heads // mesh.sp_size  # heads that this rank attends with, and keeps keys and values of
        self.layout = Layout(film=frames, ranks=mesh.sp_size)

    def own(self, whole_BF: torch.Tensor) -> torch.Tensor:
        """[B, F, ...] -> this rank's frames [B, f, ...]."""
        return self.layout.shard(whole_BF, self.mesh.sp_rank)

    def own_tokens(self, tokens: Tokens) -> Tokens:
        """The chunk's tokens -> those of this rank's frames."""
        return self.layout.shard_tokens(tokens, self.mesh.sp_rank)

    def attend(self, strategy: Attend) -> Attend:
        """`strategy`, which sees all tokens of the chunk and this rank's heads, as the transformer calls it with this rank's tokens and all heads."""
        return strategy if self.mesh.sp_size == 1 else Ulysses(strategy, self.mesh, self.layout)

    def whole(self, own_BfCHW: torch.Tensor) -> torch.Tensor:
        """[B, f, C, H, W] of every rank -> [B, F, C, H, W], the same bits on every rank. All ranks that share the film must call it."""
        return gather_frames(own_BfCHW, self.mesh)
