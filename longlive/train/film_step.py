"""Velocities and loss of one film, alone or shared between ranks: the same numbers either way, to rounding.

Alone means one process. With more, `sharded` does the work, also where no sample is shared: its loss is the mean over all that the ranks hold, whatever
their masks.

Legend: B batch, F latent frames, n frames of this rank, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..cache.attend import TeacherForced
from ..models.wan_dit import Attend, TextContext, WanDiT
from ..parallel.mesh import Mesh
from ..parallel.shard import Layout
from ..parallel.ulysses import Ulysses
from .compiled import RotatedAhead
from .objective import FlowTarget, frame_errors, masked_mean, quarter_losses
from .sharded import sharded_loss, sharded_velocity
from .teacher_forcing import Film, teacher_forced_velocity


@dataclass(frozen=True)
class FilmStep:
    """`rotate_ahead`: rotation is a graph of its own before attention, for compiled blocks. `keep_reads`: so many of the recomputed
    blocks do not attend again (`cache.attend.TeacherForced`), each for the memory of one activation."""

    mesh: Mesh
    layout: Layout
    rotate_ahead: bool = False
    keep_reads: int = 0

    def velocities(
        self, dit: WanDiT, text: TextContext, film: Film, context: tuple[torch.Tensor, torch.Tensor], flows: Sequence[FlowTarget]
    ) -> list[torch.Tensor]:
        """[B, n, C, H, W] per noisy copy; every rank that shares the film must call it with equal arguments."""
        pairs = [(flow.noisy_BFCHW, flow.sigma_BF) for flow in flows]
        if self.mesh.size == 1:
            return teacher_forced_velocity(dit, text, film, context, pairs, self._strategy)
        return list(sharded_velocity(dit, text, film, context, pairs, self.mesh, self.layout, self._strategy).chunk(len(pairs), dim=1))

    def _strategy(self, attend: TeacherForced | Ulysses) -> Attend:
        if self.keep_reads:
            strategy = attend.attend if isinstance(attend, Ulysses) else attend
            strategy.keep_reads = self.keep_reads
        return RotatedAhead(attend) if self.rotate_ahead else attend

    def loss(
        self, velocities: Sequence[torch.Tensor], flows: Sequence[FlowTarget], area_BFHW: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over all ranks, whose gradients are to be averaged over all of them, and its unweighted error by quarter of sigma [4]."""
        if self.mesh.size > 1:
            return sharded_loss(torch.cat(list(velocities), dim=1), flows, self.mesh, self.layout, area_BFHW)
        errors = torch.cat([frame_errors(v, flow.target_BFCHW, area_BFHW) for v, flow in zip(velocities, flows)])
        sigma, weight, mask = (torch.cat(parts) for parts in zip(*((flow.sigma_BF, flow.weight_BF, flow.mask_BF) for flow in flows)))
        return masked_mean(errors, weight, mask), quarter_losses(errors.detach(), sigma, mask)
