"""What a network says about a noised film: one forward, under one of three masks.

    causal          one noisy copy; a chunk sees the noisy chunks up to itself, as published
    teacher_forced  [clean film; noisy film]: a noisy chunk sees the clean chunks before it, as the AR model was trained
    bidirectional   one noisy copy; every frame sees every frame

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from ..cache.attend import Full, TeacherForced
from ..core.tokens import Tokens
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, TextContext, WanDiT
from ..parallel.gather import gather_frames
from ..parallel.mesh import Mesh
from ..parallel.shard import Layout
from ..parallel.ulysses import Ulysses
from .sharded import film_layout, sharded_velocity
from .simulation import wide
from .teacher_forcing import Film, sequence_tokens, teacher_forced_velocity

Mask = Literal["causal", "teacher_forced", "bidirectional"]


def score(
    dit: WanDiT,
    text: TextContext,
    film: Film,
    mask: Mask,
    noisy_BFCHW: torch.Tensor,
    sigma_BF: torch.Tensor,
    clean_BFCHW: torch.Tensor,
    wrap: Callable[[Attend], Attend] = lambda attend: attend,
    mesh: Mesh = Mesh(),
) -> torch.Tensor:
    """Velocity [B, F, C, H, W] of the noisy film, float32 or wider, whole on every rank that shares it. All arguments are of the whole film.

    `clean_BFCHW`: the film as history, read by `teacher_forced` only.
    """
    frames, _, height, width = noisy_BFCHW.shape[1:]
    if mask == "teacher_forced":
        context, copies = (clean_BFCHW, torch.zeros_like(sigma_BF)), [(noisy_BFCHW, sigma_BF)]
        if mesh.sp_size == 1:
            (velocity,) = teacher_forced_velocity(dit, text, film, context, copies, wrap)
        else:
            velocity = sharded_velocity(dit, text, film, context, copies, mesh, film_layout(frames, 1, mesh), wrap)
        return gather_frames(wide(velocity), mesh)
    tokens, layout = sequence_tokens(film, 0, height, width), Layout(film=frames, ranks=mesh.sp_size)
    attend = _alone(mask, film, tokens, dit.dims.head_dim)
    own, noisy, sigma = layout.shard_tokens(tokens, mesh.sp_rank), layout.shard(noisy_BFCHW, mesh.sp_rank), layout.shard(sigma_BF, mesh.sp_rank)
    out = dit(patchify(noisy), own, sigma, text, wrap(attend if mesh.sp_size == 1 else Ulysses(attend, mesh, layout)))
    return gather_frames(wide(unpatchify(out, own.frames, own.height, own.width)), mesh)


def _alone(mask: Mask, film: Film, tokens: Tokens, head_dim: int) -> Full | TeacherForced:
    """Attention over one noisy copy."""
    if mask == "bidirectional":
        return Full(tokens, head_dim, t_scale=film.t_scale)
    return TeacherForced(tokens, head_dim, film.visible_BcP, committed_BCP=film.committed_BcP, t_scale=film.t_scale, relative=film.relative)
