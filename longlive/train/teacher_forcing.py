"""The doubled sequence of teacher forcing: [clean film; noisy copy; noisy copy ...] through the network in one forward.

Any number of noisy copies share the clean copy's keys and values, so a second noise level of the same film costs half of a first one.
All copies of a frame stand at the same position and read the same prompt. Where a film is longer in positions than in frames (shot
offsets, gaps that stand for everything a long rollout has forgotten), `frame_positions` says so.

Legend: B batch, F latent frames, c chunks, K noisy copies, C latent channels, H W latent rows and columns, P visible chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cache.attend import TeacherForced
from ..core.geometry import PATCH
from ..core.tokens import Tokens
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, TextContext, WanDiT


@dataclass(frozen=True)
class Film:
    """What stays the same for all copies of a batch of clips.

    prompt_Bc      int64 on the device, row of the text for each chunk
    position_BF    float64 on the device, temporal position of each frame
    visible_BcP    int64 on the CPU, earlier chunks that a chunk sees (-1 = none); None: all earlier ones
    committed_BcP  the same for the clean copy; None: as `visible_BcP`
    t_scale, relative   rotation of positions, as in generation
    """

    prompt_Bc: torch.Tensor
    position_BF: torch.Tensor
    visible_BcP: torch.Tensor | None = None
    committed_BcP: torch.Tensor | None = None
    t_scale: float = 1.0
    relative: bool = False


def sequence_tokens(film: Film, copies: int, height: int, width: int) -> Tokens:
    """Metadata of [clean; noisy x copies] for latents of `height` x `width`; the layout stays on the CPU, where it is read."""
    frames, chunks = film.position_BF.shape[1], film.prompt_Bc.shape[1]
    chunk_F = torch.arange(chunks).repeat_interleave(frames // chunks)
    return Tokens(
        position_BF=film.position_BF.repeat(1, 1 + copies),
        chunk_F=chunk_F.repeat(1 + copies),
        noisy_F=torch.arange(frames * (1 + copies)) >= frames,
        prompt_BG=film.prompt_Bc.repeat(1, 1 + copies),
        height=height // PATCH,
        width=width // PATCH,
    )


def film_attention(film: Film, tokens: Tokens, head_dim: int) -> TeacherForced:
    """The strategy over the whole sequence `tokens` of `film`."""
    return TeacherForced(tokens, head_dim, film.visible_BcP, committed_BCP=film.committed_BcP, t_scale=film.t_scale, relative=film.relative)


def teacher_forced_velocity(
    dit: WanDiT,
    text: TextContext,
    film: Film,
    context: tuple[torch.Tensor, torch.Tensor],
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]],
    wrap: Callable[[TeacherForced], Attend] = lambda attend: attend,
) -> list[torch.Tensor]:
    """Velocity [B, F, C, H, W] of each noisy copy.

    `context` and every copy are (latents_BFCHW, sigma_BF): what stands there and the noise level the network is told. `wrap` decorates
    the attention strategy (compilation here, sequence parallelism elsewhere).
    """
    streams = [context, *copies]
    batch, frames, _, height, width = context[0].shape
    tokens = sequence_tokens(film, len(copies), height, width)
    attend = film_attention(film, tokens, dit.dims.head_dim)
    x_BNc = torch.cat([patchify(latents) for latents, _ in streams], dim=1)
    sigma_BF = torch.cat([sigma for _, sigma in streams], dim=1)
    y_BNc = dit(x_BNc, tokens, sigma_BF, text, wrap(attend))
    parts = y_BNc.chunk(len(streams), dim=1)[1:]
    return [unpatchify(part, frames, tokens.height, tokens.width) for part in parts]


def frame_positions(cuts_Bc: Sequence[Sequence[bool]], chunk_frames: int, offset: float, gap_Bc: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
    """float64 [B, F] on the CPU: frame number + `offset` for every cut so far + all gaps up to and including the frame's chunk."""
    cuts = torch.tensor(cuts_Bc, dtype=torch.float64)
    extra = offset * cuts.cumsum(1)
    if gap_Bc is not None:
        extra = extra + torch.tensor(gap_Bc, dtype=torch.float64).cumsum(1)
    frames = torch.arange(cuts.shape[1] * chunk_frames, dtype=torch.float64)
    return frames + extra.repeat_interleave(chunk_frames, 1)


def draw_gaps(cuts: Sequence[bool], largest: int, chunk_frames: int, pin: bool, generator: torch.Generator) -> list[int]:
    """Gap in latent frames before each chunk of one film, whole chunks, log-uniform up to `largest`.

    One gap stands after the anchor (chunk 0), and with `pin` another after the last cut chunk that has a chunk behind it: seen from
    later chunks, anchor and pin are then as far away as in a long rollout while the newest chunk is near. The chunk right behind a
    gap lacks its true predecessor; it must not be trained.
    """
    after = [0] + [c for c in range(1, len(cuts) - 1) if cuts[c]][-1:] * pin
    gaps = [0] * len(cuts)
    for chunk in after:
        if chunk + 1 < len(cuts):
            u = torch.rand((), generator=generator, dtype=torch.float64).item()
            gaps[chunk + 1] = round((largest / chunk_frames) ** u) * chunk_frames
    return gaps
