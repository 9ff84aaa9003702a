"""Frames -> latents, the one way that training and the shards share, so that both have the same numbers.

A sample is one stream of the causal VAE: each latent depends on all earlier frames of its sample and on none of another. Samples are encoded one by
one and piece by piece: the result does not depend on the batch, and the memory not on the length.

Legend: B batch, T pixel frames, F latent frames, C latent channels, H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.geometry import latent_frames, pixel_frames
from ..models.codec import VideoCodec
from .samples import VideoBatch, to_pixels

PIECE = 8  # latent frames that are encoded at a time


@torch.no_grad()
def encode_frames(codec: VideoCodec, frames_BTHW3: Tensor, piece: int = PIECE) -> Tensor:
    """uint8 [B, T, H, W, 3] with T = 1 + 4k -> normalised latents [B, 1 + k, C, H/16, W/16] float32 on the codec's device. Raises InputError for other T."""
    total = latent_frames(frames_BTHW3.shape[1])
    streams = []
    for frames_THW3 in frames_BTHW3:
        state, parts = None, []
        for at in range(0, total, piece):
            part_THW3 = frames_THW3[pixel_frames(at) : pixel_frames(min(at + piece, total))]
            state, z = codec.stream_encode(state, to_pixels(part_THW3[None], codec.device, codec.dtype))
            parts.append(z)
        streams.append(torch.cat(parts, dim=1))
    return torch.cat(streams)


def encoded(codec: VideoCodec, batch: VideoBatch) -> VideoBatch:
    """The batch with its latents: encoded here, or moved where they came from shards."""
    if batch.latents_BFCHW is not None:
        return batch.to(codec.device)
    return batch.with_latents(encode_frames(codec, batch.frames_BTHW3))

