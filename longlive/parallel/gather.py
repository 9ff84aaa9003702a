"""The whole of a film from the frames that each rank of an sp group holds, with the gradient that belongs to the rank's own.

Every rank then computes the same loss of the whole film, and only its own frames lead back into its graph: its gradients are one of P parts that add up.
Since gradients are averaged over all ranks, the part is multiplied by P on its way back.

Legend: P ranks that share a sample, B batch, F latent frames of the film, f = F / P frames of this rank.
"""

from __future__ import annotations

import torch

from .mesh import Mesh


class _Gathered(torch.autograd.Function):
    """[B, f, ...] -> [B, F, ...], in rank order."""

    @staticmethod
    def forward(ctx, own: torch.Tensor, mesh: Mesh) -> torch.Tensor:
        ctx.mesh = mesh
        return torch.cat(list(mesh.gather(own).unbind()), dim=1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.chunk(ctx.mesh.sp_size, dim=1)[ctx.mesh.sp_rank] * ctx.mesh.sp_size, None


def gather_frames(own_BfCHW: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The film on every rank of the sp group; every rank must call it. A loss of it is to be computed by all of them, alike."""
    return own_BfCHW if mesh.sp_size == 1 else _Gathered.apply(own_BfCHW, mesh)
