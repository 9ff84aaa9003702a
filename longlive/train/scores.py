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
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, TextContext, WanDiT
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
) -> torch.Tensor:
    """Velocity [B, F, C, H, W] of the noisy film, float32 or wider. `clean_BFCHW`: the film as history, read by `teacher_forced` only."""
    if mask == "teacher_forced":
        context = (clean_BFCHW, torch.zeros_like(sigma_BF))
        (velocity,) = teacher_forced_velocity(dit, text, film, context, [(noisy_BFCHW, sigma_BF)], wrap)
        return velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    frames, _, height, width = noisy_BFCHW.shape[1:]
    tokens = sequence_tokens(film, 0, height, width)
    options = {"t_scale": film.t_scale}
    if mask == "bidirectional":
        attend = Full(tokens, dit.dims.head_dim, **options)
    else:
        attend = TeacherForced(tokens, dit.dims.head_dim, film.visible_BcP, committed_BCP=film.committed_BcP, relative=film.relative, **options)
    out = dit(patchify(noisy_BFCHW), tokens, sigma_BF, text, wrap(attend))
    velocity = unpatchify(out, frames, tokens.height, tokens.width)
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32))
