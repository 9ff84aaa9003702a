"""Encoding several samples on the ranks that will share each of them: every rank encodes whole samples, then the latents are gathered.

Nothing is encoded twice and no frame leaves the rank that decoded it; a latent film is a thousandth of its activations in size. Where there are fewer
samples than ranks, `halo` splits a clip instead.

Legend: S samples, P ranks, F latent frames, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .mesh import Mesh


def own_samples(samples: int, mesh: Mesh) -> list[int]:
    """The samples, of those that the sp group is about to train on, that this rank encodes: every P-th."""
    return list(range(mesh.sp_rank, samples, mesh.sp_size))


@torch.no_grad()
def encode_samples(encode: Callable[[int], torch.Tensor], latents_SFCHW: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Fills `latents_SFCHW` on every rank of the sp group; `encode(i)` gives the latents [F, C, H, W] of sample i and is called for own samples only."""
    own = own_samples(len(latents_SFCHW), mesh)
    rounds = -(-len(latents_SFCHW) // mesh.sp_size)
    mine = latents_SFCHW.new_zeros(rounds, *latents_SFCHW.shape[1:])
    for place, sample in enumerate(own):
        mine[place] = encode(sample)
    latents_SFCHW.copy_(mesh.gather(mine).transpose(0, 1).flatten(0, 1)[: len(latents_SFCHW)])
    return latents_SFCHW
