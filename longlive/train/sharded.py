"""Teacher forcing on a film whose tokens are shared between the ranks of a mesh: the same numbers as on one rank, to rounding.

Latents, noise, noise levels, targets and masks of the whole film are on every rank of an sp group: drawn from the sample's seed, they do not depend on
the number of ranks, and they are a thousandth of the activations. From here on a rank holds only its own frames: tokens, text rows, velocities, errors.

Legend: B batch, F latent frames of the film, f noisy frames of this rank over all copies, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..core.tokens import Tokens
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, TextContext, WanDiT
from ..parallel.loss import global_mean
from ..parallel.mesh import Mesh
from ..parallel.shard import BALANCED, Layout
from ..parallel.ulysses import Ulysses
from .objective import FlowTarget, quarter_sums
from .teacher_forcing import Film, film_attention, sequence_tokens


def film_layout(frames: int, copies: int, mesh: Mesh, kind: str = BALANCED) -> Layout:
    """Who holds what of [clean film; noisy copy x `copies`] with `frames` latent frames each."""
    return Layout(film=frames, streams=1 + copies, ranks=mesh.sp_size, kind=kind)


def sharded_velocity(
    dit: WanDiT,
    text: TextContext,
    film: Film,
    context: tuple[torch.Tensor, torch.Tensor],
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mesh: Mesh,
    layout: Layout,
    wrap: Callable[[Ulysses], Attend] = lambda attend: attend,
) -> torch.Tensor:
    """Velocity [B, f, C, H, W] of this rank's noisy frames, copy after copy; every rank of the sp group must call it.

    Arguments are those of `teacher_forced_velocity`, of the whole film and equal on the ranks that share it.
    """
    streams = [context, *copies]
    height, width = context[0].shape[-2:]
    tokens = sequence_tokens(film, len(copies), height, width)
    attend = Ulysses(film_attention(film, tokens, dit.dims.head_dim), mesh, layout)
    text, own = _own_text(text, layout.shard_tokens(tokens, mesh.sp_rank), layout)
    latents, sigma_BF = (layout.shard_streams(part, mesh.sp_rank) for part in zip(*streams))
    y_BNc = dit(patchify(latents), own, sigma_BF, text, wrap(attend))
    start, stop = layout.ranges(mesh.sp_rank)[0]
    return unpatchify(y_BNc, own.frames, own.height, own.width)[:, stop - start :]


def _own_text(text: TextContext, own: Tokens, layout: Layout) -> tuple[TextContext, Tokens]:
    """Only the rows of text that the rank's stretch of the film reads, where that saves rows."""
    prompt_BG = own.prompt_BG[:, : own.prompt_BG.shape[1] // layout.streams]
    if layout.kind != BALANCED or prompt_BG.numel() >= text.prompts:
        return text, own
    places = torch.arange(prompt_BG.numel(), device=prompt_BG.device).reshape(prompt_BG.shape)
    return text.select(prompt_BG.flatten()), replace(own, prompt_BG=places.repeat(1, layout.streams))


def sharded_loss(
    velocity_BfCHW: torch.Tensor, flows: Sequence[FlowTarget], mesh: Mesh, layout: Layout, area_BFHW: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss over all frames of all ranks, and its unweighted error by quarter of sigma [4]; both equal on every rank.

    sum(error weight mask) / sum(mask) over the world (spec training §3.3, §3.4); gradients are to be averaged over the world. `flows` are the copies
    of the whole film, `area_BFHW` weighs pixels as in `frame_errors`. Every rank of the world must call it.
    """

    def own(*parts: torch.Tensor) -> torch.Tensor:
        return layout.shard_streams(parts, mesh.sp_rank, skip=1)

    target = own(*(flow.target_BFCHW for flow in flows))
    wide = torch.promote_types(velocity_BfCHW.dtype, torch.float32)
    error = (velocity_BfCHW.to(wide) - target).square().mean(2)
    if area_BFHW is not None:
        area_mean = mesh.sum(area_BFHW.mean()) / mesh.size
        error = error * own(*[area_BFHW / area_mean] * len(flows))
    error = error.mean((2, 3))
    sigma, weight, mask = (own(*parts) for parts in zip(*((flow.sigma_BF, flow.weight_BF, flow.mask_BF) for flow in flows)))
    loss = global_mean((error * weight * mask).sum(), mask.sum(), mesh)
    errors, frames = mesh.sum(torch.stack(quarter_sums(error.detach(), sigma, mask))).unbind()
    return loss, errors / frames
