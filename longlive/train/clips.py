"""What a training step trains on, wherever it comes from: latents, cuts, masks and words. The trainer knows this protocol and nothing behind it.

`world_clips` serves the procedural world from a bank in device memory, `video_clips` folders of videos and shards.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns, R = B c rows of text, M text keys, t text features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from ..config.root import Config
from ..models.codec import VideoCodec
from ..models.spec import DiTDims, ModelSpec
from ..models.text import TextEncoder
from ..models.wan_dit import text_rows
from ..parallel.mesh import Mesh
from .trainer import Draw


@dataclass(frozen=True, kw_only=True)
class Clips:
    """One micro-batch of streams of whole chunks, on the device.

    latents_BFCHW  float32, normalised
    mask_BF        float32, 1 for frames of a clip, 0 for padding
    cuts           per sample and chunk: another shot begins here
    area_BFHW      float32, how much of a latent pixel shows a character; None where that is not known
    slot_B         int64, a source's own mark of where each sample came from, or None
    prompts        per sample and chunk, or () where the source finds them by `slot_B`
    """

    latents_BFCHW: torch.Tensor
    mask_BF: torch.Tensor
    cuts: tuple[tuple[bool, ...], ...]
    area_BFHW: torch.Tensor | None = None
    slot_B: torch.Tensor | None = None
    prompts: tuple[tuple[str, ...], ...] = ()


class Words(NamedTuple):
    """Rows of text as `WanDiT.text_context` takes them, sample after sample and chunk by chunk."""

    raw_RMt: torch.Tensor
    bias_RM: torch.Tensor


class FrozenParts(NamedTuple):
    """The networks besides the trained one, None where clips and words come from shards; `umt5`: the text encoder is UMT5, on this device."""

    codec: VideoCodec | None
    text: TextEncoder | None
    umt5: bool


class ClipSource(Protocol):
    """Where clips come from. Making one opens the data and reads no weights; `load` comes before everything else."""

    frames: int  # latent frames of a clip, padding included
    title: str  # what the data are, for reports

    def load(self, dims: DiTDims) -> None:
        """Brings what turns pixels into latents and prompts into words to the device."""

    def frozen_parts(self) -> FrozenParts:
        """What `load` brought."""

    def prepare(self) -> None:
        """What takes long and is done once, before the clock starts."""

    def example(self, number: int) -> Clips:
        """A batch of the run's shape that takes nothing from the data, for warming up."""

    def draw(self, draw: Draw) -> Clips:
        """The clips of this micro-step: equal on the ranks that share a sample."""

    def words(self, clips: Clips, dropped_B: torch.Tensor, draw: Draw) -> Words:
        """The texts of `clips`; samples in `dropped_B` read the empty prompt."""

    def state(self) -> dict:
        """Where the run stands in the data."""

    def restore(self, state: dict) -> None:
        """Goes on from what `state` said, on any number of ranks."""


def open_clips(config: Config, spec: ModelSpec, device: torch.device, mesh: Mesh) -> ClipSource:
    """The source that `config` names: `data.data_path` where it is given, else the procedural world for the small model."""
    if config.data.data_path is None and not spec.folder:
        from .world_clips import WorldClips

        return WorldClips(config, device, mesh)
    from .video_clips import VideoClips

    return VideoClips(config, spec, device, mesh)


class PaddedText:
    """Prompts -> rows of one width that never changes, so that a compiled network meets one shape."""

    def __init__(self, dims: DiTDims, encoder: TextEncoder, dtype: torch.dtype, device: torch.device):
        self.dims, self.encoder, self.dtype, self.device = dims, encoder, dtype, device
        self.width = math.ceil((dims.text_len + 2) / 8) * 8
        self.empty_M = self.rows([""]).bias_RM[0]

    @torch.no_grad()
    def rows(self, prompts: Sequence[str]) -> Words:
        """One row per prompt, in the order given."""
        raw, bias = text_rows(self.encoder.encode(list(prompts)), self.dims, self.dtype, self.width)
        return Words(raw.to(self.device), bias.to(self.device))

    def dropped(self, words: Words, dropped_B: torch.Tensor) -> Words:
        """The rows of sample after sample, those of `dropped_B` as the empty prompt has them."""
        raw_BcMt, bias_BcM = (part.unflatten(0, (len(dropped_B), -1)) for part in words)
        raw = raw_BcMt.masked_fill(dropped_B[:, None, None, None], 0)
        bias = torch.where(dropped_B[:, None, None], self.empty_M, bias_BcM)
        return Words(raw.flatten(0, 1), bias.flatten(0, 1))
