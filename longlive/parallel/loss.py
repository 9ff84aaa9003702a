"""A masked mean over everything that all ranks hold, with the right gradient for any mask and any mix of dp and sp.

Every rank holds some of the frames (its samples under dp, its share of a sample under sp) and gradients are averaged over all ranks. A mean of
means would weigh a rank with few valid frames like one with many, and a local sum over the count of its sp group would lose a factor P
(spec training §5.4, D4).
"""

from __future__ import annotations

import torch

from .mesh import Mesh


def global_mean(local_sum: torch.Tensor, local_count: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """sum over ranks of `local_sum` / sum over ranks of `local_count` (at least 1), a scalar equal on every rank.

    Its gradient on each rank is scaled so that the *average* of the gradients over all ranks is the gradient of that quotient. Every rank must call it.
    """
    total, count = mesh.sum(torch.stack((local_sum.detach(), local_count.to(local_sum.dtype)))).unbind()
    count = count.clamp(min=1)
    share = local_sum * (mesh.size / count)
    return share + (total / count - share.detach())
